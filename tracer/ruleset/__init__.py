"""A read-only snapshot of a node's NAT and drop rules, their owners, and which one matches."""
