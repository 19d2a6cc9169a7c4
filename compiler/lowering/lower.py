"""Turn specialised graphs into the callables that run them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from stepgraph.compiler.lowering.outline import Piece, Region, attribute, cut, lift
from stepgraph.config import CompileConfig
from stepgraph.env import get_logger
from stepgraph.errors import CompileError
from stepgraph.node_facts import output_of
from stepgraph.runtime.memory.arena import Place, Span, assign_offsets
from stepgraph.runtime.program.region_calls import Call, Flat, Run, Whole


@dataclass
class Lowered:
    """What runs a program's variants, and how many regions were compiled for them."""

    runs: list[Run]
    regions: int = 0


def lower(graphs: Sequence[fx.GraphModule], config: CompileConfig, is_block: Callable[[str], bool], results: int) -> Lowered:
    """The variants as what runs them.

    "eager" is a graph's own generated Python. "inductor" cuts the graphs into pieces and compiles each distinct region once,
    for static shapes; without `config.regions`, each whole graph.

    Args:
        graphs: One per variant; their placeholders' meta says shapes, dtypes and devices.
        config: The options.
        is_block: Whether a module path is that of a transformer block.
        results: How many of the graphs' outputs are the model's.
    """
    if config.backend == "eager":
        return Lowered([Whole(gm.forward, results) for gm in graphs])
    if not config.regions:
        return Lowered([Whole(compile_whole(gm), results) for gm in graphs], len(graphs))
    builder = _Builder(config, results)
    variants = [(gm, [builder.add(gm, piece) for piece in cut(gm, is_block)]) for gm in graphs]
    builder.compile()
    return Lowered([builder.flat(gm, pieces) for gm, pieces in variants], len(builder.regions))


@dataclass
class _Builder:
    """The distinct regions of a program."""

    config: CompileConfig
    results: int
    regions: dict[str, Region] = field(default_factory=dict)
    kernels: dict[str, Region] = field(default_factory=dict)
    _runs: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def add(self, gm: fx.GraphModule, piece: Piece) -> Piece:
        """Note a piece's region, and what the region has to return for it."""
        region = lift(gm, piece, self.config.prepack)
        found = self._known(piece).setdefault(piece.key, region)
        found.returned |= {piece.nodes.index(node) for node in piece.results}
        return piece

    def _known(self, piece: Piece) -> dict[str, Region]:
        return self.kernels if piece.kernel else self.regions

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
        (outputs,) = output_of(gm.graph).args
        direct = {node: attribute(gm, str(node.target)) for node in outputs if node.op == "get_attr"}
        weights = {id(tensor): tensor for piece in pieces for tensor in piece.weights}
        weights |= {id(tensor): tensor for tensor in direct.values()}
        returned, stored = outputs[: self.results], outputs[self.results :]
        written = [self._written(piece) for piece in pieces]
        made = list(dict.fromkeys(node for node in returned if any(node in nodes for nodes in written)))
        kept = list(dict.fromkeys(node for node in stored if node not in made and any(node in nodes for nodes in written)))
        crossing = [node for nodes in written for node in nodes if node not in made and node not in kept]

        registers: dict[Any, int] = {key: number for number, key in enumerate([*arguments, *weights, *crossing, *made, *kept])}
        registers |= {node: registers[id(tensor)] for node, tensor in direct.items()}
        work, work_bytes = _places(crossing, pieces, written)
        return Flat(
            calls=tuple(
                Call(
                    self._runs[piece.key],
                    (*(registers[n] for n in piece.inputs), *(registers[id(tensor)] for tensor in piece.weights)),
                    tuple(registers[node] for node in nodes),
                )
                for piece, nodes in zip(pieces, written, strict=True)
            ),
            shapes=tuple(node.meta["val"].shape for node in arguments),
            weights=tuple(weights.values()),
            work=work,
            work_bytes=work_bytes,
            made=tuple((node.meta["val"].shape, node.meta["val"].dtype, node.meta["val"].device) for node in made),
            results=tuple(registers[node] for node in returned),
            stores=tuple(registers[node] for node in stored),
            direct=tuple(node in kept and node not in stored[:number] for number, node in enumerate(stored)),
        )

    def _written(self, piece: Piece) -> list[fx.Node]:
        """The nodes of a piece whose values its region writes, whether anyone reads them here or not."""
        return [piece.nodes[number] for number in sorted(self._known(piece)[piece.key].returned)]


def _places(
    crossing: Sequence[fx.Node], pieces: Sequence[Piece], written: Sequence[Sequence[fx.Node]]
) -> tuple[tuple[Place, ...], int]:
    """Places of the values that regions hand each other, and the bytes they take."""
    first = {node: number for number, nodes in enumerate(written) for node in nodes}
    last = dict(first)
    for number, piece in enumerate(pieces):
        last |= dict.fromkeys((node for node in piece.inputs if node in first), number)
    values = [node.meta["val"] for node in crossing]
    spans = [Span(value.nbytes, first[node], last[node]) for node, value in zip(crossing, values, strict=True)]
    offsets, total = assign_offsets(spans)
    places = (Place(offset, tuple(v.shape), v.dtype, v.dtype) for offset, v in zip(offsets, values, strict=True))
    return tuple(places), total


def compile_region(region: Region, config: CompileConfig) -> Callable[..., Any]:
    """Compile a region with inductor for arguments like its examples; what comes back compiles nothing more."""
    # Inductor takes most of the time that a process takes to start, and only those who compile with it need it.
    from stepgraph.compiler.lowering.region_cache import compile_kept

    targets = [region.nodes[number].meta["val"] for number in sorted(region.returned)]
    gm = region.finish()
    for node in gm.graph.nodes:
        node.meta = {}
    examples = [
        torch.zeros(value.shape, dtype=value.dtype, device=value.device) if _is_fake(value) else value.detach()
        for value in (*region.examples, *targets)
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
