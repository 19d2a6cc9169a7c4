"""What stands for a tensor while a model's forward is traced."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from stepgraph.compiler.tracing.model_location import model_location
from stepgraph.errors import TraceError


class TracedTensor(torch.Tensor):
    """Stands for a tensor during tracing: `value` is its fake tensor, `node` the graph node that makes it."""

    value: FakeTensor
    node: fx.Node

    @staticmethod
    def __new__(cls: type["TracedTensor"], value: FakeTensor, node: fx.Node) -> "TracedTensor":
        """A wrapper of the value's shape, strides, dtype and device, without storage."""
        traced: TracedTensor = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=value.device,
        )  # fmt: skip
        traced.value, traced.node = value, node
        return traced

    @property  # type: ignore[misc]  # torch declares it as any object's
    def __class__(self) -> type[torch.Tensor]:  # type: ignore[override]  # what it stands for
        """As the tensor that it stands for answers; `type` gives the real class."""
        return torch.Tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a plain function here and calls a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Reached only by code that goes around torch's function protocol."""
        raise TraceError(f"{func} was called on a traced tensor past torch's function protocol, at {model_location()}")


def storage_key(tensor: torch.Tensor) -> int:
    """The same number for all views of one (fake) storage, while one of them lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


__all__ = ["TracedTensor", "storage_key"]
