"""Who takes part in the runtime benchmark: each can begin a sampling run and answer the model's calls in it."""

import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from stepgraph.bench.speed.books import BOOK, L2C, PUBLISHED, gates, plan_named
from stepgraph.bench.speed.hook_runtime import HookRuntime, sharing_weights
from stepgraph.bench.speed.peer_cache_dit import CacheDit, FirstBlockAndResidual
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.errors import CompileError
from stepgraph.plan import CachePlan
from stepgraph.plan.liveness import traffic
from stepgraph.plan.report import row_macs
from stepgraph.runtime.executable import Executable

# Whole optimisations, as fields of CompileConfig, and passes; each is left out of the slow book's executable in turn.
OPTIONS = ("hoist", "regions", "prepack", "merge", "cuda_graphs")
PASSES = ("fuse_modulated_norm", "fuse_gated_residual")


@dataclass
class Setting:
    """What all contenders of a run have in common.

    Attributes:
        model: The eager model.
        scheduler: A diffusers scheduler, not yet set to its steps.
        steps: Inference steps of a whole run.
        batch: Rows of the model's input.
        backend: Of the executables.
        plans: Folder of the published plans.
    """

    model: nn.Module
    scheduler: Any
    steps: int
    batch: int
    backend: str
    plans: Path = PUBLISHED
    made: dict[str, CachePlan] = field(default_factory=dict)

    def plan(self, name: str) -> CachePlan:
        """A plan by name (`books.NAMES`), made once."""
        if name not in self.made:
            self.made[name] = plan_named(name, self.model, self.scheduler, self.steps, self.plans)
        return self.made[name]


@dataclass
class Contender:
    """One row of the table.

    Attributes:
        name: The row's name.
        start: Begins a run; what it returns is called like the model's forward, once per step.
        kinds: Per step, what is run in it: steps of one kind cost the same.
        macs: Per step, multiply-accumulates of one row of the input.
        total: Those of a step that computes everything.
        reference: The contender whose results this one's must equal within rounding; none where it is one itself.
        check: Called with the number of steps after a run: raises where other modules ran than should have.
        build_s: Seconds it took to build, compilation included where it is not left to the first call.
        facts: What else the record says of it.
        executable: The executable, of those that are one.
    """

    name: str
    start: Callable[[], Callable[..., Any]]
    kinds: Sequence[Hashable]
    macs: Sequence[int]
    total: int
    reference: str | None = None
    check: Callable[[int], None] = lambda _: None
    build_s: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    executable: Executable | None = None

    def ideal(self, steps: int) -> float:
        """How much faster than full compute its first steps were if time were proportional to MACs."""
        return self.total * steps / sum(self.macs[:steps])


def kinds_of(plan: CachePlan) -> list[Hashable]:
    """Per step, its actions and what it reads and stores."""
    moved = traffic(plan)
    return [(row, tuple((s.site, s.part) for s in step.stores), step.reads) for row, step in zip(plan.rows, moved, strict=True)]


def macs_of(plan: CachePlan) -> list[int]:
    """Per step, multiply-accumulates of one row of the input."""
    return [row_macs(plan, row, step.stores) for row, step in zip(plan.rows, traffic(plan), strict=True)]


def eager(setting: Setting) -> Contender:
    """The diffusers model as it is."""
    total = setting.plan("full").header.macs
    return Contender("eager", lambda: setting.model, ["all"] * setting.steps, [total] * setting.steps, total)


def whole_compile(setting: Setting) -> Contender:
    """torch.compile of the whole model: one graph, static shapes, weights frozen as inductor's documentation advises."""
    from torch import _inductor

    compiled = torch.compile(sharing_weights(setting.model), fullgraph=True, dynamic=False)
    inputs = example_inputs(setting.model, setting.batch)
    started = time.perf_counter()
    # The first call compiles; freezing folds the weights into the code only where no gradients are asked for.
    with torch.no_grad(), _inductor.config.patch(freezing=True):
        compiled(**inputs, return_dict=False)
    base = eager(setting)
    return Contender(
        "torch.compile", lambda: compiled, base.kinds, base.macs, base.total, "eager",
        build_s=time.perf_counter() - started,
    )  # fmt: skip


def hooked(name: str, setting: Setting) -> Contender:
    """A plan on the hook runtime."""
    plan = setting.plan(name)
    runtime = HookRuntime(setting.model, plan)

    def check(steps: int) -> None:
        if len(runtime.ran) != steps:
            raise CompileError(f"the hook runtime has run {len(runtime.ran)} steps, not {steps}")
        runtime.refuse_other_counts()

    return Contender(f"hooks: {name}", runtime.start, kinds_of(plan), macs_of(plan), plan.header.macs, check=check)


def ours(name: str, setting: Setting, without: str | None = None) -> Contender:
    """A plan's executable, with one optimisation left out where asked."""
    plan = setting.plan(name)
    options: dict[str, Any] = {without: False} if without in OPTIONS else {}
    config = CompileConfig(setting.backend, **options)
    started = time.perf_counter()
    with pass_disabled(without if without in PASSES else None):
        executable = compile_plan(setting.model, plan, example_inputs(setting.model, setting.batch), config)
    seconds = time.perf_counter() - started
    facts = {
        "variants": len(executable.default.variants),
        "regions": executable.default.regions,
        "stages_s": dict(executable.default.seconds),
        "fused_operations": executable.providers(),
        "memory": asdict(executable.memory()),
    }
    title = f"stepgraph: {name}" + (f", without {without}" if without else "")
    return Contender(
        title, executable.session, kinds_of(plan), macs_of(plan), plan.header.macs,
        "eager" if name == "full" else f"hooks: {name}", build_s=seconds, facts=facts,
        executable=executable,
    )  # fmt: skip


@contextmanager
def pass_disabled(name: str | None) -> Iterator[None]:
    """STEPGRAPH_DISABLE_PASS, with one more pass in it."""
    if name is None:
        yield
        return
    disabled = os.environ.get("STEPGRAPH_DISABLE_PASS", "")
    with mock.patch.dict(os.environ, {"STEPGRAPH_DISABLE_PASS": ",".join(filter(None, (disabled, name)))}):
        yield


def cache_dit(setting: Setting, regional: bool) -> Contender:
    """The slow book's step gate as a cache-dit step mask."""
    mask, full = [letter == "C" for letter in gates(setting.steps, setting.plans)], setting.plan("full")
    started = time.perf_counter()
    runner = CacheDit(setting.model, mask, regional)
    return Contender(
        f"cache-dit: mask, {'regional compile' if regional else 'eager'}", runner.start, mask, mask_macs(full, mask),
        full.header.macs, "first block and residual", runner.refuse_other_steps, time.perf_counter() - started,
        {"cannot": "reuse of single modules or blocks by step; at masked steps its first block always runs"},
    )  # fmt: skip


def first_block_and_residual(setting: Setting) -> Contender:
    """What cache-dit computes, on the eager model."""
    mask, full = [letter == "C" for letter in gates(setting.steps, setting.plans)], setting.plan("full")
    runner = FirstBlockAndResidual(setting.model, mask)
    blocks = sum(site.kind == "block" for site in full.sites)

    def check(steps: int) -> None:
        expected = sum(blocks if computed else 1 for computed in mask[:steps])
        if runner.ran != expected:
            raise CompileError(f"{runner.ran} blocks ran in {steps} steps; the mask says {expected}")

    name = "first block and residual"
    return Contender(name, runner.start, mask, mask_macs(full, mask), full.header.macs, check=check)


def mask_macs(full: CachePlan, mask: Sequence[bool]) -> list[int]:
    """Per step, multiply-accumulates where a masked step runs the first block only."""
    # A block's MACs are those of the whole model up to its end.
    blocks = [site.macs for site in full.sites if site.kind == "block"]
    return [full.header.macs - (0 if computed else blocks[-1] - blocks[0]) for computed in mask]


def ablations() -> dict[str, Callable[[Setting], Contender]]:
    """The slow book without each optimisation that can be switched off in this build."""
    there = {option.name for option in fields(CompileConfig)}
    # Only there is anything captured.
    nowhere = set() if torch.cuda.is_available() else {"cuda_graphs"}
    names = [name for name in OPTIONS if name in there - nowhere] + list(PASSES)
    return {f"stepgraph: slow, without {name}": partial(ours, "slow", without=name) for name in names}


CONTENDERS: dict[str, Callable[[Setting], Contender]] = {
    "eager": eager,
    "torch.compile": whole_compile,
    **{f"stepgraph: {name}": partial(ours, name) for name in ("full", "slow", "mask", "l2c", "fora2", "fora3")},
    **{f"hooks: {name}": partial(hooked, name) for name in ("slow", "mask", "l2c", "fora2", "fora3")},
    "first block and residual": first_block_and_residual,
    "cache-dit: mask, eager": partial(cache_dit, regional=False),
    "cache-dit: mask, regional compile": partial(cache_dit, regional=True),
    **ablations(),
}


def missing(name: str, plans: Path) -> str:
    """What a row lacks on this machine; empty where nothing."""
    if name.startswith("cache-dit") and find_spec("cache_dit") is None:
        return "cache-dit is not installed (pip install 'stepgraph[peers]')"
    plan = name.partition(": ")[2].partition(",")[0]
    file = {"slow": BOOK, "mask": BOOK, "l2c": L2C}.get(plan) or (BOOK if name.startswith("first block") else "")
    return f"{plans / file} is not there (--plans)" if file and not (plans / file).is_file() else ""


def chosen(names: Sequence[str], backend: str) -> list[str]:
    """The contenders asked for, in the table's order, with the references they are checked against.

    Args:
        names: Names, or beginnings of names that are a whole group: "stepgraph", "hooks", "cache-dit"; all where empty.
        backend: With "eager" nothing is compiled, torch.compile's own rows included, unless they are asked for.

    Raises:
        CompileError: A name that is none.
    """
    wanted = {name for name in CONTENDERS if backend != "eager" or "compile" not in name} if not names else set()
    for name in names:
        matching = {key for key in CONTENDERS if key == name or key.startswith(f"{name}: ")}
        if not matching:
            raise CompileError(f"unknown row {name!r}; known: {'; '.join(CONTENDERS)}")
        wanted |= matching
    for name in list(wanted):
        if name.startswith("stepgraph: "):
            plan = name.removeprefix("stepgraph: ").split(",")[0]
            wanted.add("eager" if plan == "full" else f"hooks: {plan}")
        elif name.startswith("cache-dit: "):
            wanted.add("first block and residual")
        elif name == "torch.compile":
            wanted.add("eager")
    return [name for name in CONTENDERS if name in wanted]
