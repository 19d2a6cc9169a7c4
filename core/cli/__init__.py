"""The command line; with the package's own face, the one room that sees everything."""
