"""Benchmarks of the fused operations; `python -m stepgraph.bench.ops` runs them."""
