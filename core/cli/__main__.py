"""`python -m stepgraph.cli`."""

from stepgraph.cli.main import main

main()
