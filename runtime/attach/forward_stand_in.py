"""What stands in for a transformer's forward while a pipeline calls it."""

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from stepgraph.runtime.attach.call import Call
from stepgraph.runtime.program.facts import StandIn
from stepgraph.wrapped_models import forward_signature, unwrapped


class ForwardStandIn(StandIn):
    """Stands in for the forward of a transformer, which may be what torch.compile made of one.

    Attributes:
        replaced: The forward that the transformer had of its own; None where it had its class's.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.replaced, self._transformer = transformer.__dict__.get("forward"), weakref.ref(transformer)
        # Pipelines ask which arguments there are.
        self.__signature__ = forward_signature(unwrapped(transformer))
        parameters = self.__signature__.parameters.values()
        self._latents = next(iter(self.__signature__.parameters))
        self._extra = [parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]

    def call_of(self, *args: Any, **kwargs: Any) -> Call:
        """A call of the forward, its arguments by name.

        Raises:
            TypeError: They are not those of the model's forward, as the model itself says of them.
        """
        try:
            inputs = dict(self.__signature__.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise TypeError(f"{type(unwrapped(self._transformer())).__name__}.forward() {error}") from None
        for extra in self._extra:
            inputs |= inputs.pop(extra, {})
        return Call.of(inputs, self._latents)

    def own_forward(self) -> Callable[..., Any]:
        """The forward that it stands in for."""
        transformer = self._transformer()
        assert transformer is not None
        forward: Callable[..., Any] = self.replaced or MethodType(type(transformer).forward, transformer)
        return forward
