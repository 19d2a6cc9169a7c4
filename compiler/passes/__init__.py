"""Graph rewrites, one file each; `stepgraph.compiler.specialize.PASSES` is their order."""
