"""An immutable index of the cluster's objects by address, and the sources that fill it."""
