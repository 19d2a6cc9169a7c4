"""Corrections by linear combinations of stored values, by formula or fitted."""
