"""Everything that touches the kernel: programs, links, namespaces, conntrack."""
