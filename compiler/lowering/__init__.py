"""From rewritten graphs to callables: cut into regions, compiled once each, kept on disk."""
