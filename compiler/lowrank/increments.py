"""What is measured for factors: the values that linear maps read, and running sums over their increments.

The increment of a value at a step is its difference from the last step that a plan of a given period computes. Values that
several maps read (those of q, k and v) are one target.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from stepgraph.checks import shown
from stepgraph.compiler.calibration.calibrate import conditioning_of
from stepgraph.compiler.marking.maps_of_sites import maps_of_sites
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.marking.traced_model import TracedModel
from stepgraph.compiler.marking.watched_graph import Watched, watched_graph
from stepgraph.errors import ArgumentError
from stepgraph.plan import MODULE_KINDS


@dataclass(frozen=True, eq=False)
class Target:
    """A value, or several of one map that is called more than once, whose increments have one covariance.

    Attributes:
        readers: Module paths of the linear maps that read it, and in whole mode of the sites whose input it is.
        values: [(value, call)]: the nodes of the value and of what reads it.
        channels: C.
        rows: Tokens of one evaluation, over the whole batch.
        outputs: Whole mode: site path -> node of its output.
        output_channels: Whole mode: C_out of each.
        sites: Index of the site that each value is read in.
    """

    readers: tuple[str, ...]
    values: tuple[tuple[fx.Node, fx.Node], ...]
    channels: int
    rows: int
    outputs: Mapping[str, fx.Node] = field(default_factory=dict)
    output_channels: Mapping[str, int] = field(default_factory=dict)
    sites: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Name of the target: its first reader."""
        return self.readers[0]


def find_maps(model: nn.Module, marked: MarkedGraph, kinds: Sequence[str] | None = None) -> dict[str, list[fx.Node]]:
    """The linear maps inside module sites of some kinds (all unless given): module path -> its calls.

    A joint attention's maps are those of its first output, of kind `attn`.

    Raises:
        PlanError: A kind is not known, or none of its sites holds a linear map.
    """
    wanted = check_kinds(marked, kinds)
    maps = _maps(model, marked, wanted)
    seen = {kind for kind, _ in maps.values()}
    empty = [kind for kind in wanted if kind not in seen and kinds is not None]
    if empty or not maps:
        known = ", ".join(sorted({kind for kind, _ in _maps(model, marked, MODULE_KINDS).values()}))
        raise ArgumentError(f"sites of kind {', '.join(empty or wanted)} hold no linear map; those of {known or 'no kind'} do")
    return {path: calls for path, (_, calls) in maps.items()}


def _maps(model: nn.Module, marked: MarkedGraph, kinds: Sequence[str]) -> dict[str, tuple[str, list[fx.Node]]]:
    """Module path of every linear map inside sites of some kinds -> that kind, and the map's calls."""
    calls_by_path: dict[str, tuple[str, list[fx.Node]]] = {}
    for node, index in maps_of_sites(marked, model).items():
        kind = marked.sites[index].kind
        if kind in kinds:
            calls_by_path.setdefault(str(node.target), (kind, []))[1].append(node)
    return calls_by_path


def find_single_map_sites(marked: MarkedGraph, kinds: Sequence[str] | None = None) -> list[str]:
    """Paths of the module sites that one map could stand for: one call, one output with as many tokens as the input.

    Raises:
        PlanError: A kind that was asked for has a site with several calls or outputs, or of other tokens.
    """
    wanted = check_kinds(marked, kinds)
    members = [site for site in marked.sites if site.kind in MODULE_KINDS]
    several = {site.path for site in members if site.call or site.output}
    paths = []
    for site in members:
        if site.kind not in wanted or site.call or site.output:
            continue
        call = marked.trace.calls[site.path, 0]
        if site.path not in several and call.inputs:
            x, y = call.inputs[0].meta["val"], call.outputs[0].meta["val"]
            if x.is_floating_point() and x.shape[:-1] == y.shape[:-1]:
                paths.append(site.path)
                continue
        if kinds is not None:
            raise ArgumentError(
                f"{site.path} has several calls or outputs, or other tokens in than out; one map cannot stand for it: leave "
                f"out {site.kind}"
            )
    if not paths:
        raise ArgumentError("no site of these kinds has one input and one output of the same tokens")
    return paths


def find_targets(
    model: nn.Module,
    marked: MarkedGraph,
    kinds: Sequence[str] | None = None,
    whole: bool = False,
    corrected: Collection[int] | None = None,
) -> list[Target]:
    """What has to be measured, in the order of the graph.

    Given the indices of the sites that a plan corrects, these sites' maps alone; what the maps of two sites read is then
    measured apart, for each at its own steps.

    Raises:
        PlanError: Kinds without a linear map; in whole mode, sites that one map cannot stand for.
    """
    if not whole:
        find_maps(model, marked, kinds)
    nodes = {node.name: node for node in marked.graph.nodes}
    owners = maps_of_sites(marked, model)
    indices = {site.name: i for i, site in enumerate(marked.sites)}
    by_values: dict[tuple[tuple[fx.Node, int], ...], list[tuple[str, tuple[fx.Node, ...]]]] = {}

    def add(path: str, values: Sequence[fx.Node], calls: Sequence[fx.Node], sites: Sequence[int]) -> None:
        if corrected is None or set(sites) <= set(corrected):
            # Without a plan there is one increment of a value, whoever reads it.
            readers = sites if corrected is not None else [0] * len(sites)
            by_values.setdefault(tuple(zip(values, readers, strict=True)), []).append((path, tuple(calls)))

    for path, (_, calls) in _maps(model, marked, check_kinds(marked, kinds)).items():
        add(path, [call.all_input_nodes[0] for call in calls], calls, [owners[call] for call in calls])
    outputs: dict[str, fx.Node] = {}
    if whole:
        for path in find_single_map_sites(marked, kinds):
            call = marked.trace.calls[path, 0]
            add(path, [nodes[call.inputs[0].name]], [nodes[call.before.name].next], [indices[path]])
            outputs[path] = nodes[call.outputs[0].name]
    targets = []
    for values, readers in by_values.items():
        paths = tuple(dict.fromkeys(path for path, _ in readers))
        written = {path: outputs[path] for path in paths if path in outputs}
        widths = {path: node.meta["val"].shape[-1] for path, node in written.items()}
        shapes = [value.meta["val"].shape for value, _ in values]
        rows = sum(shape[:-1].numel() for shape in shapes)
        read = tuple((value, call) for (value, _), call in zip(values, readers[0][1], strict=True))
        targets.append(Target(paths, read, shapes[0][-1], rows, written, widths, tuple(site for _, site in values)))
    return targets


def check_kinds(marked: MarkedGraph, kinds: Sequence[str] | None) -> list[str]:
    """The module kinds that are meant.

    Raises:
        PlanError: One of them is none of this model's.
    """
    present = [kind for kind in MODULE_KINDS if any(site.kind == kind for site in marked.sites)]
    wanted = [kinds] if isinstance(kinds, str) else list(present if kinds is None else kinds)
    unknown = [kind for kind in wanted if kind not in present]
    if unknown or not wanted:
        raise ArgumentError(f"kinds is {shown(kinds)}; this model's module sites are of the kinds {', '.join(present)}")
    return wanted


class Watcher(nn.Module):
    """Runs the traced model and hands the increments of some targets to their sums.

    Called like the model; `observed` is the model, for whoever needs its signature.
    """

    def __init__(self, model: nn.Module, marked: MarkedGraph, sums: Mapping[Target, Any], periods: Sequence[int]) -> None:
        super().__init__()
        self.observed = model
        self.names, self.results = tuple(marked.trace.inputs), marked.trace.output_spec.num_leaves
        self.sums, self.periods = dict(sums), tuple(periods)
        self.graph = watched_graph(marked, model, values=_watched(list(self.sums)))

    def begin(self) -> None:
        """A new sampling run."""
        self.step = 0
        self.stored: dict[int, tuple[Tensor, ...]] = {}

    def forward(self, return_dict: bool = False, **inputs: Tensor) -> tuple[Tensor, ...]:
        """One evaluation; the sums grow by this step's increments."""
        results, values = self.evaluate(inputs)
        for period in self.periods:
            if self.step % period == 0:
                self.stored[period] = values
            else:
                self._add(values, self.stored[period])
        self.step += 1
        return results

    def evaluate(self, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The model's results at its own timesteps, and all values that are watched."""
        outputs = self.graph(*(inputs[name] for name in self.names))
        return tuple(outputs[: self.results]), tuple(outputs[self.results :])

    def _add(self, values: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
        pairs = zip(values, stored, strict=True)
        increments = ((now.to(torch.float32) - then.to(torch.float32)).flatten(0, -2) for now, then in pairs)
        for target, sums in self.sums.items():
            xs = [next(increments) for _ in target.values]
            sums.add(xs, {path: next(increments) for path in target.outputs})


def _watched(targets: Sequence[Target]) -> list[Watched]:
    """Of every target its values as their readers find them, and in whole mode its outputs."""
    watched: list[Watched] = []
    for target in targets:
        watched += [*target.values, *((output, None) for output in target.outputs.values())]
    return watched


def sampled_rows(
    traced: TracedModel, conditioning: Mapping[str, Tensor] | None, samples: int, guided: bool, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The conditioning of every sampling run, one row each."""
    unbatched = traced.family.unbatched
    all_rows = conditioning_of(traced, conditioning, samples, guided, device)
    for n in range(samples):
        yield {
            name: value if name.removeprefix("negative_") in unbatched else value[n : n + 1] for name, value in all_rows.items()
        }
