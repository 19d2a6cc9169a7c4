"""Learning-to-Cache: routers trained by gradient through the traced graph."""
