"""Fixtures of several rooms of the runtime."""

from helpers.captures import tape
from helpers.pipes import pipe

__all__ = ["pipe", "tape"]
