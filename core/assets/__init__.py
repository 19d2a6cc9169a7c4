"""The trained models that ship with stepgraph."""
