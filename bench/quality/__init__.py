"""How near plans come to full compute, at which cost."""
