"""What runs a compiled plan; it needs nothing of the compiler."""
