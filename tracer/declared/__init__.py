"""What proxies declare of their clients in a connection's first bytes. Pure: no I/O."""
