"""How long tests wait for what should be there at once."""

# Of a busy machine; nothing waits so long where all is well.
PATIENCE_S = 60
