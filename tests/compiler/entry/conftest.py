"""Fixtures of what users call."""

from helpers.pipes import pipe

__all__ = ["pipe"]
