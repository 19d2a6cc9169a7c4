"""CUDA graphs, of single calls and of whatever can be recorded."""
