"""The fused operations: each is first a short torch function, and providers do the same faster.

The reference is an operation's meaning, its schema and its fallback. A provider (Triton on GPUs, C++ on CPUs) registers on it
and says for which arguments it is there; the compiler asks once per graph node, for real shapes. Which arguments belong
together is the operation's to say, once for all providers: `op_shapes`.

B batch, N tokens, C channels, R rank. Products with factors and linear combinations accumulate in at least float32;
`modulated_norm` and `gated_residual` round after every operation, as the eager model does. Tokens are the second dimension of
what has three; a modulation (scale, shift, gate) is [B, C], or what broadcasts against [B, N, C].
"""

import inspect
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import stepgraph.op_shapes as op_shapes
from stepgraph.checked import check_type, checked
from stepgraph.env import get_logger, read_env
from stepgraph.errors import CompileError as CompileError
from stepgraph.errors import OpError

REFERENCE = "reference"
# Who is asked on a device, in this order, where STEPGRAPH_PROVIDERS does not say.
PRIORITY: Mapping[str, tuple[str, ...]] = {"cuda": ("triton", REFERENCE), "cpu": ("cpu", REFERENCE)}

# The environment that choices depend on: what is set there is read at every call.
SETTINGS = ("STEPGRAPH_PROVIDERS", "TRITON_INTERPRET")
# Mapped over lists of tensors, they take no Python.
_facts, _strides = attrgetter("shape", "dtype", "device"), Tensor.stride
# How many kinds of arguments an operation remembers its choice for.
MOST_CHOICES = 4096

# Who registers providers when imported. A package may have `describe()`: what `doctor` shows of it, and advice.
PACKAGES = ("stepgraph.triton_kernels", "stepgraph.csrc")


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
        LIBRARY.impl(operator, _by_rows(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"stepgraph::{operator}", self.fake, lib=LIBRARY)
        registered = getattr(torch.ops.stepgraph, operator).default

        def declined(*args: Any, **kwargs: Any) -> str:
            return self.misfit(*args, **kwargs) or declines(*args, **kwargs)

        self.providers[name] = Provider(name, registered, _by_rows(declined))
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
        kind = _kind_of_call(args, kwargs)
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
        wanted = read_env().providers or PRIORITY.get(_device(args, kwargs), (REFERENCE,))
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


def _kind_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
    """All that a choice depends on; None for arguments of which that cannot be told, such as sparse tensors."""
    environment = os.environ
    try:
        return (*[environment.get(name) for name in SETTINGS], *map(_kind, args), *kwargs, *map(_kind, kwargs.values()))
    except (RuntimeError, AttributeError, TypeError):
        return None


def _kind(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return (type(value), *map(type, value), *map(_facts, value), *map(_strides, value))
    return type(value), value


def forget_choices() -> None:
    """Ask providers anew: for whoever changes what they go by, beside the environment."""
    for op in OPS.values():
        op._choices.clear()


def forced() -> bool:
    """Whether STEPGRAPH_PROVIDERS leaves no reference to fall back to: then being slower is no reason to decline."""
    wanted = read_env().providers
    return bool(wanted) and REFERENCE not in wanted


def _writing(operator: str, run: Callable[..., Any]) -> Any:
    """The operator `stepgraph::<operator>_out`, which writes its result to the memory `out`."""
    arguments, _ = (
        str(getattr(torch.ops.stepgraph, operator).default._schema).removeprefix(f"stepgraph::{operator}").split(" -> ")
    )
    separator = ", " if "*" in arguments else ", *, "
    LIBRARY.define(f"{operator}_out{arguments.removesuffix(')')}{separator}Tensor(a!) out) -> ()")

    def called(*args: Any, out: Tensor, **kwargs: Any) -> None:
        _by_rows(run)(*args, **kwargs, out=out)

    LIBRARY.impl(f"{operator}_out", called, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stepgraph::{operator}_out", lambda *_, **__: None, lib=LIBRARY)
    return getattr(torch.ops.stepgraph, f"{operator}_out").default


# Operators of providers -> operators that do the same and write to memory they are given.
INTO: dict[Any, Any] = {}
# Operators whose first call with arguments of a kind may try its configurations.
TUNED: set[Any] = set()
LIBRARY = torch.library.Library("stepgraph", "DEF")
OPS: dict[str, Op] = {}


@lru_cache(maxsize=1)
def load_providers() -> tuple[ModuleType, ...]:
    """Import the packages that register providers: when an operation is first asked for one, for they import this module."""
    return tuple(import_module(package) for package in PACKAGES)


def _device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Kind of the device of the first tensor."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, Tensor):
            return first.device.type
    return "cpu"


def _op(fake: Callable[..., Any], misfit: Callable[..., str]) -> Callable[[Callable[..., Any]], Op]:
    """Make an operation of its reference."""

    def add(reference: Callable[..., Any]) -> Op:
        op = Op(reference.__name__, reference, fake, misfit)
        op.providers[REFERENCE] = Provider(REFERENCE, reference, lambda *_, **__: "")
        OPS[op.name] = op
        return op

    return add


@checked
def rows(modulation: Tensor, x: Tensor) -> Tensor:
    """A modulation [B, C] as it broadcasts over the tokens of `x` [B, N, C]; others as they are."""
    return modulation.unsqueeze(1) if op_shapes.per_batch(modulation, x) else modulation


def _side_by_side(value: Tensor) -> bool:
    return not value.ndim or value.stride(-1) == 1 or value.shape[-1] == 1


def _all_contiguous(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_contiguous():
                return False
        elif isinstance(value, (list, tuple)) and not all(map(Tensor.is_contiguous, value)):
            return False
    return True


def _by_rows(run: Callable[..., Any]) -> Callable[..., Any]:
    """A provider (or its `declines`) that gets every tensor with its channels side by side.

    The strides at run time can be others than those the provider was chosen for: operations in between may be free to choose.
    """

    def by_rows(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if _side_by_side(value) else value.contiguous()
        return [by_rows(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    def called(*args: Any, **kwargs: Any) -> Any:
        # Nearly always there is nothing to do, and calls of operations are short.
        if _all_contiguous(args) and (not kwargs or _all_contiguous(kwargs.values())):
            return run(*args, **kwargs)
        return run(*map(by_rows, args), **{name: by_rows(value) for name, value in kwargs.items()})

    return called


def _wide(x: Tensor) -> Tensor:
    """In the dtype that is accumulated in."""
    return x if x.dtype == torch.float64 else x.float()


def _fake_input(x: Tensor, b: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], b.shape[0]), dtype=op_shapes.accumulated(x))


@_op(_fake_input, op_shapes.lowrank_input)
def lowrank_input(x: Tensor, b: Tensor) -> Tensor:
    """The input of linear maps in rank space, p = B x: what is cached in place of x (docs/design.md, decision 6).

    Args:
        x: [..., C_in].
        b: [R, C_in], the B of all maps that read x, one below the other.

    Returns:
        [..., R] float32 whatever x's dtype (float64 for float64): rounded to x's dtype it would no longer cancel.
    """
    return F.linear(_wide(x), _wide(b))


def _fake_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(stored, memory_format=torch.contiguous_format) for stored in y]


@_op(_fake_delta, op_shapes.lowrank_delta)
def lowrank_delta(
    x: Tensor, y: list[Tensor], p: Tensor, a: list[Tensor], b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    eps: float = 1e-6, gate: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """y_i + A_i (B_i x - p_i): the stored outputs of linear maps of one input, corrected for what the input changed by.

    Increment-calibrated caching (arXiv 2505.05829) in rank space: p_i = B_i C(x) is stored instead of C(x), so that nothing
    is subtracted that is not of rank r, and an unchanged x gives y to the last bit.

    Args:
        x: [..., C_in].
        y: The stored outputs, [..., C_out_i] each.
        p: [..., R] float32, what `lowrank_input` gave for the stored input.
        a: [C_out_i, r_i] each; the r_i add up to R.
        b: [R, C_in], the B_i one below the other: one matrix product for all maps.
        scale: With `shift`: x is first normalised and modulated as by `modulated_norm`.
        shift: See `scale`.
        eps: Of that normalisation.
        gate: With `residual`, and one map only: residual + gate * result, as by `gated_residual`.
        residual: [..., C_out].

    Returns:
        One tensor per map, in the shape and dtype of its y.

    Raises:
        OpError: Only one of scale and shift, or of gate and residual, is given.
    """
    if (scale is None) != (shift is None) or (gate is None) != (residual is None):
        raise OpError("scale goes with shift and gate with residual; only one of a pair is given")
    if scale is not None and shift is not None:
        x = modulated_norm.reference(x, scale, shift, eps)
    t = lowrank_input.reference(x, b) - p
    parts = t.split([map_a.shape[1] for map_a in a], dim=-1)
    corrected = [stored + F.linear(part.to(stored.dtype), map_a) for stored, part, map_a in zip(y, parts, a, strict=True)]
    if gate is not None and residual is not None:
        corrected = [gated_residual.reference(residual, [gate], corrected)]
    return corrected


def _fake_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_op(_fake_norm, op_shapes.modulated_norm)
def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without affine parameters, then the adaLN modulation: norm(x) * (1 + scale) + shift.

    Args:
        x: [B, N, C].
        scale: [B, C], or broadcasting against x.
        shift: Likewise.
        eps: Of the normalisation.
    """
    return F.layer_norm(x, (x.shape[-1],), None, None, eps) * (1 + rows(scale, x)) + rows(shift, x)


def _fake_residual(x: Tensor, gates: list[Tensor], values: list[Tensor]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_op(_fake_residual, op_shapes.gated_residual)
def gated_residual(x: Tensor, gates: list[Tensor], values: list[Tensor]) -> Tensor:
    """Gated residual updates, x + sum_i gate_i * value_i, in this order: a run of sites in one pass.

    Args:
        x: [B, N, C].
        gates: [B, C] each, or broadcasting against x.
        values: [B, N, C] each.
    """
    for gate, value in zip(gates, values, strict=True):
        # In this order the result lies in memory as the value does, whatever x is a view of.
        x = rows(gate, x) * value + x
    return x


def _fake_combination(values: list[Tensor], coefficients: Tensor) -> Tensor:
    return torch.empty_like(values[0], memory_format=torch.contiguous_format)


@_op(_fake_combination, op_shapes.linear_combination)
def linear_combination(values: list[Tensor], coefficients: Tensor) -> Tensor:
    """sum_i c_i * value_i, and a constant where there is one coefficient more than values: a forecast from stored values.

    Args:
        values: k tensors [..., C] of one shape and dtype.
        coefficients: [k] or [k + 1], or one row per channel behind it: [k, C] or [k + 1, C]; float32 (float64 for float64).

    Returns:
        In the shape and dtype of the values.

    Raises:
        OpError: The coefficients are neither as many as the values nor one more.
    """
    count = len(coefficients) if coefficients.ndim else 0
    if count - len(values) not in (0, 1) or not count:
        raise OpError(f"{count} coefficients for {len(values)} values; expected as many, or one more")
    total = coefficients[0] * _wide(values[0])
    for coefficient, value in zip(coefficients[1:], values[1:], strict=False):
        total = total + coefficient * _wide(value)
    if len(coefficients) > len(values):
        total = total + coefficients[-1]
    return total.to(values[0].dtype)
