"""The kernel side: eBPF programs in C, packaged as ``tracer.bpf``."""
