"""From tuples to a verdict on the source; pure."""
