"""What the kernels' files and `declines.py` both need, without importing Triton: limits, and whether it interprets."""

import os

# Values, gates, or maps of one launch.
MAX_VALUES = 8
# A row is normalised in registers.
MAX_CHANNELS = 16384


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; Triton itself reads this at import."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "yes", "on", "y")
