"""One static graph per distinct row of a plan: the passes' order, the one runner of all of them, its checks."""
