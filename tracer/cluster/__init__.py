"""What Kubernetes says about addresses: an immutable index of the cluster, and its sources."""
