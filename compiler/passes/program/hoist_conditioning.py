"""Hoisting: what depends on the prompt or the timestep alone is computed before the loop (docs/design.md, decision 3)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import fx

from stepgraph.compiler.interfaces.program_context import ProgramContext, RowGraphs
from stepgraph.compiler.marking.graphs import erase_dead, live_nodes, storages_of, written_storages
from stepgraph.env import get_logger
from stepgraph.inputs import TIMESTEPS, is_of_latents, timestep_key
from stepgraph.node_facts import PROVIDER, TABLE, output_of
from stepgraph.runtime.program.copy_graph import copy_node
from stepgraph.runtime.program.tables import Hoisted, Table
from stepgraph.weight_kinds import own_kinds

RANDOM = frozenset({"bernoulli", "dropout", "multinomial", "normal", "rand", "rand_like", "randint", "randn", "randn_like"})


class Level(IntEnum):
    """What a value depends on."""

    PROMPT = 0
    TIMESTEP = 1
    LATENT = 2


@dataclass(frozen=True)
class Inputs:
    """Names of a model's tensor inputs: the latents come first, the timestep has its name, the rest is the prompt's."""

    names: tuple[str, ...]

    @property
    def timestep(self) -> str:
        """What the timestep is called."""
        return timestep_key(self.names) or TIMESTEPS[0]

    @property
    def prompt(self) -> tuple[str, ...]:
        """All but latents and timestep."""
        return tuple(name for name in self.names if name != self.timestep and not is_of_latents(name, self.names))

    def level(self, name: str) -> Level:
        """Of a graph input; stored values and coefficients are the loop's."""
        if name == self.timestep:
            return Level.TIMESTEP
        return Level.PROMPT if name in self.prompt else Level.LATENT


def hoist_conditioning(program: RowGraphs, ctx: ProgramContext) -> int:
    """Replace what variants need not compute in the loop by inputs; returns the number of tables.

    Before, in every variant (class_labels [B], timestep [B])::

        %embedded = call_module[...emb](%timestep, %class_labels)                 # [B, C]
        %modulation = call_module[...norm1.linear](%embedded)                     # [B, 6 C]
        %scale = getitem(%chunked, 1)

    After, in the variants that read it; `program.hoisted` computes the tables of all steps in one batch::

        %table_modulation = placeholder                                           # [B, 6 C]
        %scale = getitem(%chunked, 1)

    Where all tables exceed `ctx.limit_bytes`, the largest are computed in the loop after all.
    """
    inputs, steps = Inputs(ctx.inputs), ctx.steps
    in_loop: dict[str, int] = {}
    while True:
        cones = _Cones(inputs)
        borders = [cones.add_borders(gm, in_loop) for gm in program.graphs]
        sizes = {node.name: _bytes(node) * (steps if cones.levels[node] == Level.TIMESTEP else 1) for node in cones.tables}
        if ctx.limit_bytes is None or sum(sizes.values()) <= ctx.limit_bytes:
            break
        in_loop |= _largest(sizes, ctx.limit_bytes)
    if in_loop:
        get_logger("hoist").warning(
            "hoist_limit_mb: %d values of %.1f MB stay in the loop, such as %s",
            len(in_loop),
            sum(in_loop.values()) / 1e6,
            max(in_loop, key=in_loop.__getitem__),
        )
    prompt, timestep, order = cones.split()
    tables = tuple(Table(n.name, sizes.get(n.name, _bytes(n)), cones.levels[n] == Level.TIMESTEP) for n in order)
    place = {node: index for index, node in enumerate(order)}
    program.tables = tuple(
        _take(gm, {n: place[table] for n, table in border.items()}) for gm, border in zip(program.graphs, borders, strict=True)
    )
    program.conditioning = {"prompt": prompt, "timestep": timestep}
    # Bound methods: vmap would write the whole module out to have a name for it.
    rowwise = bool(own_kinds(timestep))
    program.hoisted = Hoisted(inputs.prompt, prompt.forward, timestep.forward, tables, in_loop, ctx.timestep, rowwise)
    return len(tables)


def _largest(sizes: Mapping[str, int], limit: float) -> dict[str, int]:
    """The largest of some tables, as many as exceed the limit; what they are computed from may be tables in their place."""
    total, largest = sum(sizes.values()), dict[str, int]()
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if total <= limit:
            break
        largest[name] = sizes[name]
        total -= sizes[name]
    return largest


def _bytes(node: fx.Node) -> int:
    value: torch.Tensor = node.meta["val"]
    return value.numel() * value.element_size()


def _take(gm: fx.GraphModule, border: Mapping[fx.Node, int]) -> tuple[int, ...]:
    """Make the nodes of a border inputs and remove what only they needed; equal tables are one input."""
    graph, indices = gm.graph, sorted(set(border.values()))
    before = next(node for node in graph.nodes if node.op != "placeholder")
    tables: dict[int, fx.Node] = {}
    for index in indices:
        example = next(node for node, table in border.items() if table == index)
        with graph.inserting_before(before):
            tables[index] = graph.placeholder(f"table_{example.name}")
        tables[index].meta |= {"val": example.meta["val"], TABLE: index}
    for node, index in border.items():
        node.replace_all_uses_with(tables[index])
    erase_dead(graph)
    return tuple(indices)


def levels_of(graph: fx.Graph, inputs: Inputs) -> dict[fx.Node, Level]:
    """The level of every node. What touches memory that is written to, is random, or runs on a kernel stays in the loop."""
    written = written_storages(graph)
    levels: dict[fx.Node, Level] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            levels[node] = inputs.level(str(node.target))
        elif node.op == "output" or PROVIDER in node.meta or storages_of(node) & written or _is_random(node):
            levels[node] = Level.LATENT
        else:
            levels[node] = max((levels[n] for n in node.all_input_nodes), default=Level.PROMPT)
    return levels


def _is_random(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name).rstrip("_") in RANDOM


@dataclass
class _Cones:
    """The nodes that the borders of all variants depend on, in one graph in which equal nodes are one."""

    inputs: Inputs
    graph: fx.Graph = field(default_factory=fx.Graph)
    levels: dict[fx.Node, Level] = field(default_factory=dict)
    tables: dict[fx.Node, None] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.inputs.timestep, *self.inputs.prompt):
            node = self.graph.placeholder(name)
            self.levels[node] = self.inputs.level(name)
            self._known["placeholder", name] = node

    def add_borders(self, gm: fx.GraphModule, stays: Collection[str]) -> dict[fx.Node, fx.Node]:
        """The hoisted values that a graph's loop reads, each with its node here."""
        levels = levels_of(gm.graph, self.inputs)
        live = live_nodes([output_of(gm.graph)])
        while True:
            border, levels = _border(gm.graph, live, levels)
            copies = self._copied(gm, border)
            demoted = [node for node in border if copies[node].name in stays]
            if not demoted:
                break
            levels |= dict.fromkeys(demoted, Level.LATENT)
        self.tables |= dict.fromkeys(copies[node] for node in border)
        return {node: copies[node] for node in border}

    def _copied(self, gm: fx.GraphModule, border: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """The nodes of a graph that a border depends on, each with its one copy here."""
        copies: dict[fx.Node, fx.Node] = {}
        cone = live_nodes(border) if border else set()
        for node in gm.graph.nodes:
            if node in cone:
                copies[node] = self._copy(gm, node, copies)
        return copies

    def _copy(self, gm: fx.GraphModule, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        target = node.target
        if node.op in ("get_attr", "call_module"):
            target = self._attribute(gm, str(target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: copies[n])
        key = (node.op, target) if node.op == "placeholder" else (node.op, target, repr(args), repr(kwargs))
        if key not in self._known:
            copy = self.graph.create_node(node.op, target, args, kwargs, name=node.name)
            copy.meta |= node.meta
            self._known[key] = copy
            self.levels[copy] = max((self.levels[n] for n in copy.all_input_nodes), default=Level.PROMPT)
        return self._known[key]

    def _attribute(self, gm: fx.GraphModule, path: str) -> str:
        """The path of a module or tensor here; variants may have several of one name."""
        value = gm
        for part in path.split("."):
            value = getattr(value, part)
        suffix, name = 0, path
        while self.attributes.setdefault(name, value) is not value:
            suffix += 1
            name = f"{path}_{suffix}"
        return name

    def split(self) -> tuple[fx.GraphModule, fx.GraphModule, list[fx.Node]]:
        """The graphs of both levels, and their results in order: tables at prompt level and what the other level reads, tables
        at timestep level.
        """
        calls = [node for node in self.graph.nodes if node.op != "placeholder"]
        of_prompt = [node for node in calls if self.levels[node] == Level.PROMPT]
        stepped = [node for node in calls if self.levels[node] == Level.TIMESTEP and node in self.tables]
        needed = live_nodes(stepped) if stepped else set()
        late = [node for node in calls if node in needed and self.levels[node] == Level.TIMESTEP]
        read = {n for node in late for n in node.all_input_nodes if n in set(of_prompt) and n.op != "get_attr"}
        passed = [node for node in of_prompt if node in self.tables or (node in read and _is_tensor(node))]
        prompt = self._subgraph(passed, (), self.inputs.prompt)
        timestep = self._subgraph(stepped, passed, (self.inputs.timestep, *self.inputs.prompt))
        return prompt, timestep, passed + stepped

    def _subgraph(self, results: Sequence[fx.Node], prompt_values: Sequence[fx.Node], names: Sequence[str]) -> fx.GraphModule:
        """The graph of some results, with the inputs `names` and then the values `prompt_values`."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for name in names:
            copies[self._known["placeholder", name]] = graph.placeholder(name)
        for node in prompt_values:
            copies[node] = graph.placeholder(f"prompt_{node.name}")
        needed = live_nodes(results, cut=set(prompt_values)) if results else set()
        for node in self.graph.nodes:
            if node in needed and node not in copies:
                copies[node] = copy_node(node, graph, copies)
        graph.output(tuple(copies[node] for node in results))
        used = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
        return fx.GraphModule({name: self.attributes[name] for name in used}, graph, class_name="Hoisted")


def _border(
    graph: fx.Graph, live: Collection[fx.Node], levels: Mapping[fx.Node, Level]
) -> tuple[list[fx.Node], dict[fx.Node, Level]]:
    """The hoisted tensors that the loop reads, and the levels with what must follow into the loop.

    A tuple is unpacked in the loop, so what it is made of is read there; so is a view of a weight, which costs nothing there.
    """
    weights = frozenset().union(*(storages_of(node) for node in graph.nodes if node.op == "get_attr"))
    levels, border = dict(levels), dict[fx.Node, None]()
    for node in reversed(graph.nodes):
        if node not in live or levels[node] != Level.LATENT:
            continue
        for value in node.all_input_nodes:
            if levels[value] == Level.LATENT or value.op in ("placeholder", "get_attr"):
                continue
            if _is_tensor(value) and not storages_of(value) & weights:
                border[value] = None
            else:
                levels[value] = Level.LATENT
    return [node for node in graph.nodes if node in border and levels[node] != Level.LATENT], levels


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
