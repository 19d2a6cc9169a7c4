"""Executables on disk, as data."""
