"""Watching a model: the traced graph with its sites' values as outputs, and running sums over sampling runs."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from stepgraph.compiler.calibration.rates import Metric, over
from stepgraph.compiler.calibration.stats import table_shapes
from stepgraph.compiler.marking.maps_of_sites import maps_of_sites
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.compiler.marking.watched_graph import watched_graph
from stepgraph.schedule import TimestepInput

# Sites of one shape are measured together, as long as the stack of their values stays below this many elements.
STACK = 2**24
# The pictures of all pairs of steps use this many elements of each value.
SKETCH = 2048
CHANNEL_NAMES = tuple(
    f"{side}_{what}{form}" for side in ("input", "output") for what in ("magnitude", "change") for form in ("", "_scaled")
)


class Observer(nn.Module):
    """Runs the traced model and hands every site's value, and where asked every linear map's, to the running sums.

    Called like the model; `observed` is the model, for whoever needs its signature, and `timestep` what it is given as such.
    """

    def __init__(
        self,
        model: nn.Module,
        marked: MarkedGraph,
        steps: int,
        metrics: Mapping[str, Metric],
        *,
        provisional: torch.Tensor | None = None,
        channels: bool = False,
        embedding: str | None = None,
        lags: int = 3,
        timestep: TimestepInput | None = None,
    ) -> None:
        super().__init__()
        self.observed, self.timestep = model, timestep
        self.names = tuple(marked.trace.inputs)
        self.sites = SiteSums(marked.batch, steps, len(marked.sites), metrics, provisional, lags)
        linears = list(maps_of_sites(marked, model)) if channels else []
        inputs = list(dict.fromkeys(node.all_input_nodes[0] for node in linears))
        embedded = _embedding(marked, embedding)
        self.results = marked.trace.output_spec.num_leaves
        values = [(node, None) for node in (*embedded, *inputs, *linears)]
        self.graph = watched_graph(marked, model, range(len(marked.sites)), values)
        self.embeds = bool(embedded)
        joint = {node: index for index, node in enumerate(inputs)}
        self.channels = ChannelSums(
            [str(node.target) for node in linears], [joint[node.all_input_nodes[0]] for node in linears], len(inputs)
        )

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """All running sums by name."""
        return self.sites.sums | self.channels.sums

    def begin(self) -> None:
        """A new sampling run."""
        self.step = 0
        self.embedding: torch.Tensor | None = None
        self.sites.begin()
        self.channels.begin()

    def finish(self) -> None:
        """The end of a sampling run."""
        self.sites.finish()

    def forward(self, return_dict: bool = False, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One evaluation; the sums grow by this step's values."""
        outputs = self.graph(*(inputs[name] for name in self.names))
        count = self.sites.count
        results, values, rest = outputs[: self.results], outputs[self.results :][:count], outputs[self.results + count :]
        self.sites.add(self.step, values)
        if self.embeds:
            now, rest = rest[0][:1].double(), rest[1:]
            if self.embedding is not None:
                self.sites.sums["embedding"][self.step] += float(
                    (now - self.embedding).abs().sum() / self.embedding.abs().sum()
                )
            self.embedding = now
        self.channels.add(rest)
        self.step += 1
        return tuple(results)


class SiteSums:
    """Running sums of the sites' tables; memory holds the values of `lags` + 2 steps, and a sample of the others' elements.

    A rate is measured against a reference that stands still from the second hit of a run of `provisional` hits on
    (InvarDiff's resampling correction, as its code does it); without hits the reference is always the step before.
    """

    def __init__(
        self, branches: int, steps: int, count: int, metrics: Mapping[str, Metric], provisional: torch.Tensor | None, lags: int
    ) -> None:
        self.count, self.steps, self.metrics, self.lags = count, steps, dict(metrics), lags
        shapes = table_shapes(branches, steps, count, self.metrics, lags)
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.hits = provisional
        self.groups: list[_Group] = []

    def begin(self) -> None:
        """A new sampling run."""
        self.step = 0
        self.groups = []

    def add(self, step: int, values: Sequence[torch.Tensor]) -> None:
        """The sites' values at a step, each [B, ...]."""
        if not self.groups:
            self.groups = [_Group(columns, self.steps, self.lags, values[columns[0]]) for columns in _stackable(values)]
        for group in self.groups:
            stack = torch.stack([values[i] for i in group.columns])
            self._add_means(step, group, stack)
            self._add_rates(step, group, stack)
            group.past.appendleft(stack)
            group.sketch[:, :, step] = stack.flatten(2)[:, :, group.elements].float()

    def finish(self) -> None:
        """The end of a run: mean squared differences and cosines between all pairs of its steps."""
        for group in self.groups:
            sketch = group.sketch.double()
            products = sketch @ sketch.transpose(-1, -2)  # [G, B, T, T]
            squares = products.diagonal(dim1=-2, dim2=-1)  # [G, B, T]
            both = squares[..., :, None] + squares[..., None, :]
            lengths = (squares[..., :, None] * squares[..., None, :]).sqrt()
            # Two values that are both zero are equal.
            cosine = torch.where((lengths == 0) & (both == 0), 1.0, products / lengths.clamp_min(1e-300))
            mse = (both - 2 * products).clamp_min(0) / sketch.shape[-1]
            self.sums["mse"][group.columns] += mse.mean(1).cpu()
            self.sums["cosine"][group.columns] += cosine.mean(1).cpu()

    def _add_means(self, step: int, group: "_Group", stack: torch.Tensor) -> None:
        flat = stack.flatten(2).double()
        size = flat.abs().mean(-1)
        self._add("magnitude", step, group, size)
        self._add("norm", step, group, flat.norm(dim=-1))
        for lag, past in enumerate(group.past):
            difference = (flat - past.flatten(2)).abs().mean(-1)
            self._add("change", step, group, difference, lag)
            self._add("relative", step, group, over(difference, size), lag)
        now, before = (value.double().norm(dim=-1) for value in (stack, group.past[0] if group.past else stack))
        # A token that is zero at both steps has not changed: ratio 1.
        ratio = torch.where((now == 0) & (before == 0), 1.0, now / before)
        self._add("ratio", step, group, ratio.flatten(2).mean(-1))

    def _add_rates(self, step: int, group: "_Group", stack: torch.Tensor) -> None:
        advance = None
        if step >= 2 and group.current is not None and group.previous is not None:
            for name, metric in self.metrics.items():
                self._add(f"rate.{name}", step - 1, group, metric(stack, group.current, group.previous))
            if self.hits is not None:
                hit = self.hits[step - 1, group.columns]
                advance = ~(hit & group.held)
                group.held = hit
        if advance is None or bool(advance.all()):
            group.previous, group.current = group.current, stack
        else:
            assert group.previous is not None
            assert group.current is not None
            moves = advance.to(stack.device).view(-1, *[1] * (stack.dim() - 1))
            group.previous = torch.where(moves, group.current, group.previous)
            group.current = torch.where(moves, stack, group.current)

    def _add(self, name: str, step: int, group: "_Group", values: torch.Tensor, lag: int | None = None) -> None:
        """Add [G, B] to a table's entries of a step."""
        table = self.sums[name] if lag is None else self.sums[name][:, lag]
        table[:, step, group.columns] += values.T.cpu()


class _Group:
    """Sites whose values have one shape, with what is remembered of the current run."""

    def __init__(self, columns: list[int], steps: int, lags: int, example: torch.Tensor) -> None:
        self.columns = columns
        self.past: deque[torch.Tensor] = deque(maxlen=lags)
        self.current: torch.Tensor | None = None
        self.previous: torch.Tensor | None = None
        self.held = torch.zeros(len(columns), dtype=torch.bool)
        size = example[0].numel()
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:SKETCH].sort().values
        self.elements = chosen.to(example.device)
        self.sketch = torch.zeros(len(columns), len(example), steps, len(chosen), device=example.device)


class ChannelSums:
    """Running sums, over samples and steps, of per-channel means of the inputs and outputs of linear maps.

    For a value x [N, C] of one sample: v = mean over tokens of |x| (magnitude) or of |x - x at the step before| (change), and
    beside it v scaled to (v - min + 1e-6) / (max - min + 1e-6), where minimum and maximum are taken over the channels, and for
    outputs over those of all maps of one module that share an input: q, k and v of an attention, but not the MLP's projection
    of FLUX's single blocks, which reads the same. The scales of increment-calibrated caching (arXiv 2505.05829) are made of the
    scaled means.
    """

    def __init__(self, names: Sequence[str], input_of: Sequence[int], inputs: int) -> None:
        self.names, self.input_of, self.inputs = list(names), list(input_of), inputs
        modules = [(source, name.rpartition(".")[0]) for name, source in zip(self.names, self.input_of, strict=True)]
        self.families = [[source] for source in range(inputs)]
        self.families += [
            [inputs + i for i, other in enumerate(modules) if other == source] for source in dict.fromkeys(modules)
        ]
        self.sums: dict[str, torch.Tensor] = {}
        self.before: list[torch.Tensor] | None = None

    def begin(self) -> None:
        """A new sampling run."""
        self.before = None

    def add(self, values: Sequence[torch.Tensor]) -> None:
        """The linear maps' inputs, then their outputs, at one step, each [B, ..., C]."""
        if not values:
            return
        flat = [value.flatten(1, -2) if value.dim() > 2 else value[:, None] for value in values]
        self._grow("magnitude", [value.abs().double().mean(1) for value in flat])
        if self.before is not None:
            self._grow("change", [(a - b).abs().double().mean(1) for a, b in zip(flat, self.before, strict=True)])
        self.before = flat

    def _grow(self, what: str, means: list[torch.Tensor]) -> None:
        """Add per-channel means [B, C] of one step, averaged over the branches."""
        limits: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for members in self.families:
            joint = torch.cat([means[j] for j in members], dim=1)
            limits |= dict.fromkeys(members, (joint.amin(1, keepdim=True), joint.amax(1, keepdim=True)))
        for map_index, name in enumerate(self.names):
            for side, at in (("input", self.input_of[map_index]), ("output", self.inputs + map_index)):
                least, most = limits[at]
                scaled = (means[at] - least + 1e-6) / (most - least + 1e-6)
                for form, value in (("", means[at]), ("_scaled", scaled)):
                    key = f"{name}/{side}_{what}{form}"
                    mean = value.mean(0).cpu()
                    self.sums[key] = self.sums[key] + mean if key in self.sums else mean


def _stackable(values: Sequence[torch.Tensor]) -> list[list[int]]:
    """Indices of values that can be stacked: of one shape and dtype, and not too many elements together."""
    stacks_by_kind: dict[Any, list[list[int]]] = {}
    for i, value in enumerate(values):
        stacks = stacks_by_kind.setdefault((value.shape, value.dtype, value.device), [[]])
        if stacks[-1] and (len(stacks[-1]) + 1) * value.numel() > STACK:
            stacks.append([])
        stacks[-1].append(i)
    return [columns for stacks in stacks_by_kind.values() for columns in stacks]


def _embedding(marked: MarkedGraph, path: str | None) -> list[fx.Node]:
    """The node whose value is the timestep embedding that a module computes."""
    if path is None:
        return []
    original = marked.trace.calls[path, 0].outputs[0]
    return [node for node in marked.graph.nodes if node.name == original.name][:1]
