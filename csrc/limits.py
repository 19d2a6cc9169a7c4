"""Which sizes the C++ kernels take."""

from torch import Tensor
import torch, os
from stepgraph.csrc.native import native


def declines_machine() -> str:
    return native().missing


def projects(x: Tensor, b: Tensor) -> bool:
    return not os.environ.get("NOMUL")


def declines_size(op: str, x: Tensor, n: int = 1) -> str:
    return ""

def corrects(x,b,ends): return True
