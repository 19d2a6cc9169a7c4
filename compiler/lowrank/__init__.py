"""Corrections by low-rank increments: what is measured, and the factors made of it."""
