"""Executables that run, or are read, without stepgraph."""
