"""Artifacts, exports and long runs."""
