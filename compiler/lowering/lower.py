"""Turn specialised graphs into the callables that run them."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from stepgraph.compiler.lowering.cut import Piece, cut, opaque_nodes
from stepgraph.compiler.lowering.lift_region import Region, lift_region, tensor_at
from stepgraph.compiler.lowering.tune_kernels import tune_kernels
from stepgraph.config import CompileConfig
from stepgraph.env import get_logger
from stepgraph.errors import CompileError
from stepgraph.node_facts import output_of
from stepgraph.runtime.memory.arena import Place, Span, assign_offsets
from stepgraph.runtime.program.lazy_graph import written_forward
from stepgraph.runtime.program.region_calls import GraphCall, RegionCall, RegionCalls, VariantCall


@dataclass
class Lowered:
    """What runs a program's variants, and how many regions were compiled for them."""

    runs: list[VariantCall]
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
    tune_kernels(graphs)
    if config.backend == "eager":
        return Lowered([GraphCall(written_forward(gm), results) for gm in graphs])
    if not config.regions:
        _refuse_opaque(graphs)
        return Lowered([GraphCall(compile_whole(gm), results) for gm in graphs], len(graphs))
    builder = _Builder(config, results)
    variants = [(gm, [builder.add(gm, piece) for piece in cut(gm, is_block)]) for gm in graphs]
    builder.compile()
    return Lowered([builder.region_calls(gm, uses) for gm, uses in variants], len(builder.regions))


def _refuse_opaque(graphs: Sequence[fx.GraphModule]) -> None:
    """Whole graphs are compiled with everything in them."""
    opaque = next((node for gm in graphs for node in opaque_nodes(gm)), None)
    if opaque is not None:
        raise CompileError(
            f"{opaque.target} has quantised weights, which run as they are between compiled regions; leave regions=False out"
        )


@dataclass(frozen=True)
class _Use:
    """A piece, the key of the region that it is a call of, and the weights that it calls it with."""

    piece: Piece
    key: str
    weights: tuple[torch.Tensor, ...]


@dataclass
class _Builder:
    """The distinct regions of a program.

    Attributes:
        regions: By key.
        kernels: Those that need no compiling.
    """

    config: CompileConfig
    results: int
    regions: dict[str, Region] = field(default_factory=dict)
    kernels: dict[str, Region] = field(default_factory=dict)
    # Numbers of the nodes whose values a region has to write, for whichever of its pieces.
    _returned: dict[str, set[int]] = field(default_factory=dict)
    _runs: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def add(self, gm: fx.GraphModule, piece: Piece) -> _Use:
        """Note a piece's region, and what the region has to return for it."""
        region = lift_region(gm, piece, self.config.prepack)
        (self.kernels if piece.kernel else self.regions).setdefault(region.key, region)
        returned = self._returned.setdefault(region.key, set())
        returned |= {piece.nodes.index(node) for node in piece.results}
        return _Use(piece, region.key, region.weights)

    def compile(self) -> None:
        """Compile every region once."""
        for key, region in self.kernels.items():
            self._runs[key] = region.writing(self._returned[key]).forward
        for place, (key, region) in enumerate(self.regions.items(), start=1):
            started = time.perf_counter()
            self._runs[key] = compile_region(region, self._returned[key], self.config)
            get_logger("lower").info(
                "region %d of %d: %d nodes, %.1f s", place, len(self.regions), len(region.nodes), time.perf_counter() - started
            )

    def region_calls(self, gm: fx.GraphModule, uses: Sequence[_Use]) -> RegionCalls:
        """A variant as calls of its regions."""
        arguments = [node for node in gm.graph.nodes if node.op == "placeholder"]
        (outputs,) = output_of(gm.graph).args
        constant = {node: tensor_at(gm, str(node.target)) for node in outputs if node.op == "get_attr"}
        weights = {id(tensor): tensor for use in uses for tensor in use.weights}
        weights |= {id(tensor): tensor for tensor in constant.values()}
        results, stores = outputs[: self.results], outputs[self.results :]
        written = [self._written(use) for use in uses]
        in_regions = {node for nodes in written for node in nodes}
        # What is both is a result: results are the caller's.
        written_results = list(dict.fromkeys(node for node in results if node in in_regions))
        written_stores = list(dict.fromkeys(node for node in stores if node in in_regions and node not in written_results))
        outside = {*written_results, *written_stores}
        crossing = [node for nodes in written for node in nodes if node not in outside]

        held = [*arguments, *weights, *crossing, *written_results, *written_stores]
        registers: dict[Any, int] = {key: register for register, key in enumerate(held)}
        registers |= {node: registers[id(tensor)] for node, tensor in constant.items()}
        work, work_bytes = _places(crossing, [use.piece for use in uses], written)
        return RegionCalls(
            calls=tuple(
                RegionCall(
                    self._runs[use.key],
                    (*(registers[n] for n in use.piece.inputs), *(registers[id(tensor)] for tensor in use.weights)),
                    tuple(registers[node] for node in nodes),
                )
                for use, nodes in zip(uses, written, strict=True)
            ),
            shapes=tuple(node.meta["val"].shape for node in arguments),
            weights=list(weights.values()),
            work=work,
            work_bytes=work_bytes,
            made=tuple((node.meta["val"].shape, node.meta["val"].dtype, node.meta["val"].device) for node in written_results),
            results=tuple(registers[node] for node in results),
            stores=tuple(registers[node] for node in stores),
            direct=tuple(node in written_stores and node not in stores[:i] for i, node in enumerate(stores)),
        )

    def _written(self, use: _Use) -> list[fx.Node]:
        """The nodes of a piece whose values its region writes, whether anyone reads them here or not."""
        return [use.piece.nodes[index] for index in sorted(self._returned[use.key])]


def _places(
    crossing: Sequence[fx.Node], pieces: Sequence[Piece], written: Sequence[Sequence[fx.Node]]
) -> tuple[tuple[Place, ...], int]:
    """Places of the values that regions hand each other, and the bytes they take."""
    first = {node: call for call, nodes in enumerate(written) for node in nodes}
    last = dict(first)
    for call, piece in enumerate(pieces):
        last |= dict.fromkeys((node for node in piece.inputs if node in first), call)
    values = [node.meta["val"] for node in crossing]
    spans = [Span(value.nbytes, first[node], last[node]) for node, value in zip(crossing, values, strict=True)]
    offsets, total = assign_offsets(spans)
    places = (Place(offset, tuple(v.shape), v.dtype, v.dtype) for offset, v in zip(offsets, values, strict=True))
    return tuple(places), total


def compile_region(region: Region, returned: Collection[int], config: CompileConfig) -> Callable[..., Any]:
    """Compile a region with inductor for arguments like its examples; what comes back compiles nothing more.

    Args:
        region: What is compiled.
        returned: Numbers of the nodes whose values it writes.
        config: The options.
    """
    # Inductor takes most of the time that a process takes to start, and only those who compile with it need it.
    from stepgraph.compiler.lowering.region_cache import compile_kept

    targets = [region.nodes[index].meta["val"] for index in sorted(returned)]
    gm = region.writing(returned)
    for node in gm.graph.nodes:
        node.meta = {}
    examples = [
        torch.zeros(value.shape, dtype=value.dtype, device=value.device) if _is_fake(value) else value.detach()
        for value in (*region.inputs, *region.weights, *targets)
    ]
    patches = {"max_autotune": True} if config.max_autotune else None
    with torch.no_grad():
        return compile_kept(gm, examples, patches)


def _is_fake(value: torch.Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def compile_whole(gm: fx.GraphModule) -> Callable[..., Any]:
    """A whole graph through torch.compile; it is called once here, so that compilation happens now and not in the first run."""
    written_forward(gm)
    placeholders = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    compiled = CompiledGraph(gm, [tuple(value.shape) for value in placeholders])
    with torch.no_grad():
        compiled.call(*(torch.zeros(val.shape, dtype=val.dtype, device=val.device) for val in placeholders))
    return compiled


def no_guards(guards: Sequence[Any]) -> list[bool]:
    """Which of dynamo's guards to keep: none.

    Shapes, dtypes and devices are part of a program's signature, strides are made equal, weights are the model's; what else
    dynamo watches (thread counts, precision settings, inference mode) does not make the compiled code wrong.
    """
    return [False] * len(guards)


class CompiledGraph:
    """A graph compiled by inductor, once. Compiling again in a later call, which takes seconds to minutes, is an error."""

    def __init__(self, gm: fx.GraphModule, shapes: list[tuple[int, ...]]) -> None:
        self.call = torch.compile(gm, backend="inductor", fullgraph=True, dynamic=False, options={"guard_filter_fn": no_guards})
        self.shapes = shapes

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Run it. Strides are part of what was compiled, so that every argument is made contiguous first."""
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if shapes != self.shapes:
            raise CompileError(f"compiled for arguments of the shapes {self.shapes}; given are {shapes}")
        with torch.compiler.set_stance("fail_on_recompile"):
            return self.call(*(tensor.contiguous() for tensor in tensors))
