"""Triton providers of fused operations for GPUs: one file per operation (kernel, launcher, registration).

No operation is fused yet: graphs run torch's own operators. A provider registers on `stepgraph.ops`, and imports nothing of
the compiler or the runtime.
"""
