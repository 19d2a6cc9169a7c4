"""C++ providers of fused operations for the CPU: one source file per operation, and their loader.

No operation is fused yet: graphs run torch's own operators. A provider registers on `stepgraph.ops`, and imports nothing of
the compiler or the runtime.
"""
