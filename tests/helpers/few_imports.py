"""Imported first in a process of its own, spares what diffusers imports where it is there, and tiny models do not need."""

import sys

sys.modules.update(dict.fromkeys(("accelerate", "peft", "torchao", "transformers")))
