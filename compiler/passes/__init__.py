"""Graph rewrites, one file each; `stepgraph.compiler.specializing.passes` has their order."""
