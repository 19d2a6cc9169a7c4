"""Graph rewrites, one file each, by what they rewrite; `stepgraph.compiler.specializing.passes` has their order."""
