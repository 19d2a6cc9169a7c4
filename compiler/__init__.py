"""The compiler: from a traced model and a plan to static per-timestep graphs; `pipeline.py` reads top to bottom."""
