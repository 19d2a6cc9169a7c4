"""Runs of a compiled plan, and the memory of what happens in them."""
