"""What users call: accelerate, make_plan, sweep, load."""
