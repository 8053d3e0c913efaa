"""A two-node cluster made of network namespaces, for the demo and the tests."""
