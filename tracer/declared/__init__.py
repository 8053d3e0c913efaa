"""What proxies declare about their clients in a connection's first bytes. Pure: no I/O."""
