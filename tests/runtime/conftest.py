"""Fixtures of several rooms of the runtime."""

from helpers.captures import accelerator, tape
from helpers.pipes import pipe

__all__ = ["accelerator", "pipe", "tape"]
