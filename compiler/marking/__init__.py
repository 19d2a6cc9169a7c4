"""From a trace of a model to a graph with markers on its sites, and what is asked of such graphs."""
