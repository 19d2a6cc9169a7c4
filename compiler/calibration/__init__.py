"""Watching a model during real sampling runs."""
