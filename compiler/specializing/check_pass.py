"""STEPGRAPH_CHECK=1: what a pass returns is compared with what it was given, on random inputs of the real shapes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from stepgraph.compiler.interfaces.pass_context import PassContext, coefficients_name, slot_name
from stepgraph.compiler.interfaces.program_context import RowGraphs
from stepgraph.errors import CompileError
from stepgraph.inputs import timestep_key
from stepgraph.metrics import relative_error
from stepgraph.node_facts import MARKER, TABLE
from stepgraph.ops import lowrank_input
from stepgraph.plan.liveness import INPUT, MAPS, VALUE
from stepgraph.runtime.program.tables import Tables
from stepgraph.tolerances import PASS_CHECK, tolerance

Constants = Sequence[Sequence[Sequence[torch.Tensor]]]


class ModelCheck:
    """Of passes over the marked graph: the model's results stay."""

    def __init__(self, gm: fx.GraphModule, example: Mapping[str, Any]) -> None:
        self._gm, self._inputs = gm, [value for value in _random(example).values() if isinstance(value, torch.Tensor)]
        self._wanted = self._results()

    def __call__(self, name: str) -> None:
        """Compare, after the pass of a name."""
        _compare(name, self._results(), self._wanted, strict=True)

    def _results(self) -> list[torch.Tensor]:
        self._gm.recompile()
        with torch.no_grad():
            return list(self._gm(*self._inputs))


class RowCheck:
    """Of passes over a row: fed values of the unrewritten graph, the rewritten one gives the same results and shapes.

    Forecasts take their last stored value here, which is the value itself.
    """

    def __init__(self, gm: fx.GraphModule, context: PassContext, example: Mapping[str, Any]) -> None:
        self._gm, self._context, self._example = gm, context, _random(example)
        self._reference = _run_marked(gm, context, self._example)

    def __call__(self, name: str) -> None:
        """Compare, after the pass of a name."""
        gm, context, reference = self._gm, self._context, self._reference
        gm.recompile()
        present = {node.target: node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"}
        inputs = {key: value for key, value in self._example.items() if isinstance(value, torch.Tensor)}
        for read in context.reads:
            for index, tensor in enumerate(_stored(context, read.site, read.part, self._example, reference)):
                inputs[slot_name(context.sites[read.site], read.part, read.age, index)] = tensor.clone()
        for key, value in present.items():
            if str(key).startswith("coefficients_"):
                inputs[key] = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
                inputs[key][0] = 1
        with torch.no_grad():
            outputs = gm(**{key: value for key, value in inputs.items() if key in present})
        wanted = list(reference.results)
        for site, part in context.stores:
            wanted += _stored(context, site, part, self._example, reference)
        _compare(name, outputs, wanted)


class ProgramCheck:
    """Of passes over the whole program: every step of a run gives the same results, from the slots that it reads to those that
    it writes.
    """

    def __init__(
        self,
        program: RowGraphs,
        example: Mapping[str, Any],
        results: int,
        constants: Constants,
        timesteps: Sequence[float],
    ) -> None:
        self._program, self._results, self._constants, self._timesteps = program, results, constants, timesteps
        self._example = {name: value for name, value in _random(example).items() if isinstance(value, torch.Tensor)}
        self._oldest = max((read.age for context in program.contexts for read in context.reads), default=1)
        self._wanted = list(self._run())

    def __call__(self, name: str) -> None:
        """Compare, after the pass of a name."""
        for step, (outputs, wanted) in enumerate(zip(self._run(), self._wanted, strict=True)):
            _compare(f"{name} (step {step})", outputs, wanted, strict=True)

    def _run(self) -> Iterator[list[torch.Tensor]]:
        """The results of every step; the latents stay what they are, the timestep is each step's own."""
        program, held = self._program, dict[tuple[int, str], list[list[torch.Tensor]]]()
        hoisted = program.hoisted
        tables = Tables(hoisted, self._timesteps, batched=False) if hoisted is not None else None
        for gm in program.graphs:
            gm.recompile()
        for step, variant in enumerate(program.rows):
            gm, context = program.graphs[variant], program.contexts[variant]
            inputs = dict(self._example)
            timestep = timestep_key(inputs)
            if timestep is not None:
                inputs[timestep] = torch.full_like(inputs[timestep], self._timesteps[step])
            for read in context.reads:
                for index, tensor in enumerate(held[read.site, read.part][read.age - 1]):
                    inputs[slot_name(context.sites[read.site], read.part, read.age, index)] = tensor.clone()
            inputs |= {coefficients_name(index): value for index, value in enumerate(self._constants[step][0])}
            values = tables.at(step, inputs) if tables is not None and program.tables[variant] else ()
            for node in gm.graph.find_nodes(op="placeholder"):
                if TABLE in node.meta:
                    inputs[str(node.target)] = values[node.meta[TABLE]]
            names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
            with torch.no_grad():
                outputs = list(gm(*(inputs[name] for name in names)))
            rest = iter(outputs[self._results :])
            for site, part in context.stores:
                count = sum(len(group.maps) + 1 for group in context.groups[site]) if part == MAPS else 1
                values_of_site = held.setdefault((site, part), [])
                values_of_site.insert(0, [next(rest).clone() for _ in range(count)])
                del values_of_site[self._oldest :]
            yield [value.clone() for value in outputs[: self._results]]


def _compare(name: str, outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], strict: bool = False) -> None:
    """Refuse results of other shapes, dtypes or values, and where `strict`, another number of them."""
    if strict and len(outputs) != len(wanted):
        raise CompileError(f"pass {name} returns {len(outputs)} values; expected {len(wanted)} (STEPGRAPH_CHECK)")
    for index, (value, expected) in enumerate(zip(outputs, wanted, strict=False)):
        error = relative_error(value, expected) if value.shape == expected.shape else math.inf
        most = tolerance(PASS_CHECK, value.dtype)
        if value.shape != expected.shape or value.dtype != expected.dtype or not error <= most:
            raise CompileError(
                f"pass {name} changed output {index}: {tuple(value.shape)} {value.dtype}, relative error "
                f"{error:.2e}; expected {tuple(expected.shape)} {expected.dtype} (STEPGRAPH_CHECK)"
            )


def _random(example: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with random numbers in place of what may be zeros: normalised, zeros would be nothing but rounding errors."""
    generator = torch.Generator().manual_seed(0)

    def drawn(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value.device, value.dtype)

    return {name: drawn(value) for name, value in example.items()}


@dataclass(frozen=True)
class _Reference:
    """What the unrewritten graph gives on real inputs: its results, the value of every site, and of every node by name."""

    results: tuple[torch.Tensor, ...]
    values: dict[int, torch.Tensor]
    nodes: dict[str, torch.Tensor]


class _ValueRecorder(fx.Interpreter):
    """Runs a marked graph and keeps the value of every site, and of the nodes `names`."""

    def __init__(self, gm: fx.GraphModule, names: frozenset[str]) -> None:
        super().__init__(gm)
        self.values: dict[int, torch.Tensor] = {}
        self.names, self.nodes = names, dict[str, torch.Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if n.name in self.names:
            self.nodes[n.name] = result.clone()
        if MARKER in n.meta:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            value = arguments[0] - arguments[1] if len(arguments) == 2 else arguments[0]
            self.values[n.meta[MARKER]] = value.clone()
        return result


def _run_marked(gm: fx.GraphModule, context: PassContext, example: Mapping[str, Any]) -> _Reference:
    groups = [group for site in context.groups.values() for group in site]
    recorder = _ValueRecorder(gm, frozenset(name for group in groups for name in (group.input, *group.maps)))
    with torch.no_grad():
        results = recorder.run(*(value for value in example.values() if isinstance(value, torch.Tensor)))
    return _Reference(tuple(results), recorder.values, recorder.nodes)


def _stored(
    context: PassContext, site: int, part: str, example: Mapping[str, Any], reference: _Reference
) -> list[torch.Tensor]:
    """The tensors of a stored value, as the unrewritten graph gives them."""
    if part == VALUE:
        return [reference.values[site]]
    if part == INPUT:
        return [next(value for value in example.values() if isinstance(value, torch.Tensor))]
    tensors = []
    for group in context.groups[site]:
        tensors += [reference.nodes[name] for name in group.maps]
        tensors.append(lowrank_input.reference(reference.nodes[group.input], group.b))
    return tensors
