"""From a model's forward to one graph with markers on its sites."""
