"""How fast plans run, against eager and against peers."""
