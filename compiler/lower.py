"""Turn specialised graphs into the callables that run them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from stepgraph.compiler.outline import Piece, Region, attribute, cut, lift
from stepgraph.compiler.region_cache import compile_kept
from stepgraph.config import CompileConfig, CompileError
from stepgraph.env import get_logger
from stepgraph.runtime.flat import Call, Flat


@dataclass
class Lowered:
    """The callables of a program's variants, and how many regions were compiled for them."""

    calls: list[Callable[..., Any]]
    regions: int = 0


def lower(graphs: Sequence[fx.GraphModule], config: CompileConfig, is_block: Callable[[str], bool]) -> Lowered:
    """The variants as callables (*inputs, *slots, ...) -> flat tuple of tensors.

    "eager" is a graph's own generated Python. "inductor" cuts the graphs into pieces and compiles each distinct region once,
    for static shapes; without `config.regions`, each whole graph.

    Args:
        graphs: One per variant; their placeholders' meta says shapes, dtypes and devices.
        config: The options.
        is_block: Whether a module path is that of a transformer block.
    """
    if config.backend == "eager":
        return Lowered([gm.forward for gm in graphs])
    if not config.regions:
        return Lowered([compile_whole(gm) for gm in graphs], len(graphs))
    builder = _Builder(config)
    variants = [(gm, [builder.add(gm, piece) for piece in cut(gm, is_block)]) for gm in graphs]
    builder.compile()
    return Lowered([builder.flat(gm, pieces) for gm, pieces in variants], len(builder.regions))


@dataclass
class _Builder:
    """The distinct regions of a program."""

    config: CompileConfig
    regions: dict[str, Region] = field(default_factory=dict)
    kernels: dict[str, Region] = field(default_factory=dict)
    _runs: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def add(self, gm: fx.GraphModule, piece: Piece) -> Piece:
        """Note a piece's region, and what the region has to return for it."""
        region = lift(gm, piece, self.config.prepack)
        known = self.kernels if piece.kernel else self.regions
        found = known.setdefault(piece.key, region)
        found.returned |= {piece.nodes.index(node) for node in piece.results}
        return piece

    def compile(self) -> None:
        """Compile every region once."""
        for key, region in self.kernels.items():
            self._runs[key] = region.finish().forward
        for number, (key, region) in enumerate(self.regions.items(), start=1):
            started = time.perf_counter()
            self._runs[key] = compile_region(region, self.config)
            get_logger("lower").info(
                "region %d of %d: %d nodes, %.1f s", number, len(self.regions), len(region.nodes), time.perf_counter() - started
            )

    def flat(self, gm: fx.GraphModule, pieces: Sequence[Piece]) -> Flat:
        """A variant as calls of its regions."""
        arguments = [node for node in gm.graph.nodes if node.op == "placeholder"]
        registers: dict[Any, int] = {node: number for number, node in enumerate(arguments)}
        weights = {id(tensor): tensor for piece in pieces for tensor in piece.weights}
        output = next(iter(reversed(gm.graph.nodes)))
        direct = {node: attribute(gm, str(node.target)) for node in output.all_input_nodes if node.op == "get_attr"}
        weights |= {id(tensor): tensor for tensor in direct.values()}
        for key in weights:
            registers[key] = len(registers)
        for piece in pieces:
            for node in piece.results:
                registers[node] = len(registers)
        results = tuple(registers[id(direct[node]) if node in direct else node] for node in output.args[0])
        last: dict[int, int] = {}
        reads = []
        for number, piece in enumerate(pieces):
            own = (*(registers[n] for n in piece.inputs), *(registers[id(tensor)] for tensor in piece.weights))
            reads.append(own)
            last |= dict.fromkeys(own, number)
        calls = tuple(self._call(piece, registers, reads[i], last, i, results) for i, piece in enumerate(pieces))
        shapes = tuple(node.meta["val"].shape for node in arguments)
        return Flat(calls, shapes, tuple(weights.values()), len(registers), results)

    def _call(
        self,
        piece: Piece,
        registers: dict[Any, int],
        reads: tuple[int, ...],
        last: dict[int, int],
        at: int,
        kept: tuple[int, ...],
    ) -> Call:
        region = (self.kernels if piece.kernel else self.regions)[piece.key]
        own = {piece.nodes.index(node): registers[node] for node in piece.results}
        writes = tuple(own.get(number) for number in sorted(region.returned))
        frees = tuple(register for register in dict.fromkeys(reads) if last[register] == at and register not in kept)
        return Call(self._runs[piece.key], reads, writes, frees)


def compile_region(region: Region, config: CompileConfig) -> Callable[..., Any]:
    """Compile a region with inductor for arguments like its examples; what comes back compiles nothing more."""
    gm = region.finish()
    for node in gm.graph.nodes:
        node.meta = {}
    examples = [
        torch.zeros(value.shape, dtype=value.dtype, device=value.device) if _is_fake(value) else value.detach()
        for value in region.examples
    ]
    patches = {"max_autotune": True} if config.max_autotune else None
    with torch.no_grad():
        return compile_kept(gm, examples, patches)


def _is_fake(value: torch.Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def compile_whole(gm: fx.GraphModule) -> Callable[..., Any]:
    """A whole graph through torch.compile; it is called once here, so that compilation happens now and not in the first run."""
    placeholders = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    compiled = Compiled(gm, [tuple(value.shape) for value in placeholders])
    with torch.no_grad():
        compiled.call(*(torch.zeros(val.shape, dtype=val.dtype, device=val.device) for val in placeholders))
    return compiled


def no_guards(guards: Sequence[Any]) -> list[bool]:
    """Which of dynamo's guards to keep: none.

    Shapes, dtypes and devices are part of a program's signature, strides are made equal, weights are the model's; what else
    dynamo watches (thread counts, precision settings, inference mode) does not make the compiled code wrong.
    """
    return [False] * len(guards)


class Compiled:
    """A graph compiled by inductor, once. Compiling again in a later call, which takes seconds to minutes, is an error."""

    def __init__(self, gm: fx.GraphModule, shapes: list[tuple[int, ...]]) -> None:
        self.call = torch.compile(gm, backend="inductor", fullgraph=True, dynamic=False, options={"guard_filter_fn": no_guards})
        self.shapes = shapes

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Run it. Strides are part of what was compiled, so that every argument is made contiguous first."""
        given = [tuple(tensor.shape) for tensor in tensors]
        if given != self.shapes:
            raise CompileError(f"compiled for arguments of the shapes {self.shapes}; given are {given}")
        with torch.compiler.set_stance("fail_on_recompile"):
            return self.call(*(tensor.contiguous() for tensor in tensors))
