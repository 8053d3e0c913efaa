"""srcip: where a Kubernetes node replaces the client's IP address, and why."""
