"""The registry of fused operations and of the providers that do the same faster.

A provider (Triton on GPUs, C++ on CPUs) registers on an operation and says for which arguments it is there; the compiler asks
once per graph node, for real shapes. The operations themselves stand in `stepgraph.ops`, which offers these names too: whoever
imports from there finds the registry filled.
"""

import inspect
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stepgraph.checked import check_type
from stepgraph.env import get_logger, read_env
from stepgraph.errors import OpError
from stepgraph.op_arguments import by_rows, device_of, kind_of_call

REFERENCE = "reference"
# Who is asked on a device, in this order, where STEPGRAPH_PROVIDERS does not say.
PRIORITY: Mapping[str, tuple[str, ...]] = {"cuda": ("triton", REFERENCE), "cpu": ("cpu", REFERENCE)}

# How many kinds of arguments an operation remembers its choice for.
MOST_CHOICES = 4096

# Who registers providers when imported. A package may have `describe()`: what `doctor` shows of it, and advice.
PACKAGES = ("stepgraph.triton_kernels", "stepgraph.csrc")

# Operators of providers -> operators that do the same and write to memory they are given.
INTO: dict[Any, Any] = {}
# Operators whose first call with arguments of a kind may try its configurations.
TUNED: set[Any] = set()
LIBRARY = torch.library.Library("stepgraph", "DEF")


@dataclass(frozen=True)
class Provider:
    """One implementation of an operation.

    Attributes:
        name: "reference", "triton", "cpu".
        run: Called like the reference. Of providers other than the reference a torch operator, which torch.compile and
            torch.export carry along as it is.
        declines: Called like the reference, with real or fake tensors: why the provider does not take these arguments,
            because they do not belong together or its kernels cannot do it; empty where it takes them. It looks at shapes,
            strides, dtypes and devices only.
    """

    name: str
    run: Callable[..., Any]
    declines: Callable[..., str]


@dataclass(frozen=True, eq=False)
class Op:
    """An operation and its providers.

    Attributes:
        name: Of the operation, and of its torch operators (`torch.ops.stepgraph.<name>_<provider>`).
        reference: The torch function that defines it.
        fake: Called like the reference: empty tensors of the results' shapes.
        misfit: Called like the reference: why the arguments do not belong together, for any provider; empty where they do.
        providers: By name; the reference is one of them.
    """

    name: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    misfit: Callable[..., str]
    providers: dict[str, Provider] = field(default_factory=dict)
    _choices: dict[Hashable, Provider] = field(default_factory=dict, repr=False)

    def register(
        self, name: str, run: Callable[..., Any], declines: Callable[..., str], into: bool = False, tuned: bool = False
    ) -> None:
        """Add a provider; `run` becomes the torch operator `stepgraph::<op>_<provider>`.

        Args:
            name: The provider's.
            run: Called like the reference.
            declines: What of arguments that belong together the kernels cannot do, see `Provider`.
            into: Whether `run` also takes the memory for its result, `out`: then `INTO` has the operator that writes there.
            tuned: Whether `run` times its kernels where it may (`stepgraph.tuning`): then `TUNED` has the operator.

        Raises:
            OpError: There is one of that name.
        """
        if name in self.providers:
            raise OpError(f"{self.name} already has a provider {name!r}")
        operator = f"{self.name}_{name}"
        LIBRARY.define(operator + torch.library.infer_schema(self.reference, mutates_args=()))
        LIBRARY.impl(operator, by_rows(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"stepgraph::{operator}", self.fake, lib=LIBRARY)
        registered = getattr(torch.ops.stepgraph, operator).default

        def declined(*args: Any, **kwargs: Any) -> str:
            return self.misfit(*args, **kwargs) or declines(*args, **kwargs)

        self.providers[name] = Provider(name, registered, by_rows(declined))
        self._choices.clear()
        if tuned:
            TUNED.add(registered)
        if into:
            INTO[registered] = _writing(operator, run)

    def choose(self, *args: Any, **kwargs: Any) -> Provider:
        """The first provider in order of priority that takes these arguments; asked once for arguments of a kind.

        Raises:
            OpError: None does; the message gives each one's reason.
        """
        kind = kind_of_call(args, kwargs)
        try:
            provider = self._choices.get(kind)
        except TypeError:
            # No argument of an operation, or sizes that are symbols.
            return self._ask(args, kwargs)
        if provider is None:
            provider = self._ask(args, kwargs)
            if len(self._choices) >= MOST_CHOICES:
                self._choices.clear()
            if kind is not None:
                self._choices[kind] = provider
        return provider

    def _ask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Provider:
        """See `choose`."""
        self._check_types(args, kwargs)
        load_providers()
        wanted = read_env().providers or PRIORITY.get(device_of(args, kwargs), (REFERENCE,))
        log, reasons = get_logger("ops"), list[str]()
        for name in wanted:
            provider = self.providers.get(name)
            reason = provider.declines(*args, **kwargs) if provider else f"{self.name} has no such provider"
            if provider and not reason:
                if log.isEnabledFor(logging.DEBUG):
                    log.debug("%s: %s%s", self.name, name, "".join(f"; {r}" for r in reasons))
                return provider
            reasons.append(f"{name} declines ({reason})")
        raise OpError(
            f"no provider takes {self.name} on these arguments: {'; '.join(reasons)}. Providers asked: {', '.join(wanted)}; "
            f"known: {', '.join(self.providers)}. Set STEPGRAPH_PROVIDERS to a list that ends in {REFERENCE!r}, or unset it"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it with whichever provider takes these arguments.

        Raises:
            OpError: None does, or the arguments do not belong together.
        """
        provider = self.choose(*args, **kwargs)
        try:
            return provider.run(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            # The reference takes more than `misfit` allows, so that it is asked only afterwards.
            reason = self.misfit(*args, **kwargs)
            if not reason or isinstance(error, torch.OutOfMemoryError):
                raise
            raise OpError(f"{self.name} does not take these arguments: {reason}") from error

    def _check_types(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse what is no tensor, number or list of tensors where the reference is annotated with one."""
        signature = inspect.signature(self.reference)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            check_type(f"{self.name}: {name}", value, signature.parameters[name].annotation)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
                    raise OpError(f"{self.name}: {name} has the layout {tensor.layout}; expected a dense tensor")

    @property
    def __name__(self) -> str:
        """The operation's name: what torch.fx writes into a graph's source."""
        return self.name

    def __repr__(self) -> str:
        """The operation's name with its providers."""
        return f"<op {self.name}: {', '.join(self.providers)}>"


OPS: dict[str, Op] = {}


def operation(fake: Callable[..., Any], misfit: Callable[..., str]) -> Callable[[Callable[..., Any]], Op]:
    """Make an operation of its reference."""

    def add(reference: Callable[..., Any]) -> Op:
        op = Op(reference.__name__, reference, fake, misfit)
        op.providers[REFERENCE] = Provider(REFERENCE, reference, lambda *_, **__: "")
        OPS[op.name] = op
        return op

    return add


def forget_choices() -> None:
    """Ask providers anew: for whoever changes what they go by, beside the environment."""
    for op in OPS.values():
        op._choices.clear()


def forced() -> bool:
    """Whether STEPGRAPH_PROVIDERS leaves no reference to fall back to: then being slower is no reason to decline."""
    wanted = read_env().providers
    return bool(wanted) and REFERENCE not in wanted


@lru_cache(maxsize=1)
def load_providers() -> tuple[ModuleType, ...]:
    """Import the packages that register providers: when an operation is first asked for one, for they import this module."""
    return tuple(import_module(package) for package in PACKAGES)


def _writing(operator: str, run: Callable[..., Any]) -> Any:
    """The operator `stepgraph::<operator>_out`, which writes its result to the memory `out`."""
    arguments, _ = (
        str(getattr(torch.ops.stepgraph, operator).default._schema).removeprefix(f"stepgraph::{operator}").split(" -> ")
    )
    separator = ", " if "*" in arguments else ", *, "
    LIBRARY.define(f"{operator}_out{arguments.removesuffix(')')}{separator}Tensor(a!) out) -> ()")

    def called(*args: Any, out: Tensor, **kwargs: Any) -> None:
        by_rows(run)(*args, **kwargs, out=out)

    LIBRARY.impl(f"{operator}_out", called, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stepgraph::{operator}_out", lambda *_, **__: None, lib=LIBRARY)
    return getattr(torch.ops.stepgraph, f"{operator}_out").default
