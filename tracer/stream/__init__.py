"""The agent's live stream: judged connections over a Unix socket, as lines of JSON."""
