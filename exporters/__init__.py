"""What the tracer knows, written for people and programs."""
