"""A plan run the usual way: the eager model, its modules' forwards replaced, and an `if` at every call.

This is what plans are compared with, and what their results are checked by: a reused module really does not run, and after
every run the modules that ran are counted and compared with the plan's letters. Nothing here comes from the compiler or the
runtime; from a plan it takes letters and the names of sites.
"""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stepgraph.errors import PlanError
from stepgraph.plan import CachePlan

# Sites that are what one call of one module returns.
MODULE_KINDS = ("attn", "cross_attn", "ff", "block")
KINDS = (*MODULE_KINDS, "hidden", "output")
COMPUTED, REUSED, DEAD = "C", "R", "."


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy whose modules can be changed, and whose parameters and buffers are the model's own."""
    tensors = [*model.parameters(), *model.buffers()]
    twin: nn.Module = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return twin


class HookRuntime:
    """A model with replaced forwards that answers its calls by a plan, one step after the other.

    Attributes:
        ran: Per step of the present run, how often each module behind a site ran.
    """

    def __init__(self, model: nn.Module, plan: CachePlan) -> None:
        """Replace forwards in a copy of the model, which shares its weights.

        Raises:
            PlanError: The plan has actions, sites or branches that this runtime does not know.
        """
        _refuse_unknown(plan)
        self.plan, self.model = plan, sharing_weights(model)
        self.letters = [dict(zip((site.name for site in plan.sites), row, strict=True)) for row in plan.rows]
        blocks = self.model.get_submodule("transformer_blocks")
        self._last = f"transformer_blocks.{len(list(blocks.children())) - 1}"
        for site in plan.sites:
            if site.kind in MODULE_KINDS:
                module = self.model.get_submodule(site.path)
                replaced = self._block if site.kind == "block" else self._module
                vars(module)["forward"] = replaced(site.path, module.forward)
        self.start()

    def start(self) -> "HookRuntime":
        """Begin a run: nothing is stored."""
        self.stored: dict[str, Any] = {}
        self.ran: list[Counter[str]] = []
        return self

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward at the next step of the plan.

        Raises:
            PlanError: All steps of the plan have run.
        """
        if len(self.ran) == self.plan.steps:
            raise PlanError(f"all {self.plan.steps} steps of the plan have run; call start() for a new run")
        self.now = self.letters[len(self.ran)]
        self.ran.append(Counter())
        if self.now["output"] == REUSED:
            return self.stored["output"]
        output = self.model(**inputs)
        self.stored["output"] = output
        return output

    def refuse_other_counts(self) -> None:
        """Compare the modules that ran in each step so far with the plan's letters.

        Raises:
            PlanError: A module ran that the plan reuses, or did not although the plan computes it.
        """
        for step, ran in enumerate(self.ran):
            expected = self.expected(step)
            if ran != expected:
                path = next(iter(sorted((ran - expected) | (expected - ran))))
                raise PlanError(f"step {step}: {path} ran {ran[path]} times; the plan says {expected[path]}")

    def expected(self, step: int) -> "Counter[str]":
        """The modules behind sites that a step computes."""
        letters = zip(self.plan.sites, self.plan.rows[step], strict=True)
        return Counter(site.path for site, letter in letters if site.kind in MODULE_KINDS and letter == COMPUTED)

    def _module(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.now[path] == REUSED:
                return self.stored[path]
            self.ran[-1][path] += 1
            value = self.stored[path] = original(*args, **kwargs)
            return value

        return forward

    def _block(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        run = self._module(path, original)

        def forward(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # Blocks before a reused value are passed by; the last one hands it on.
            out = tokens if self.now[path] == DEAD else run(tokens, *args, **kwargs)
            if path != self._last:
                return out
            if self.now["hidden"] == REUSED:
                return self.stored["hidden"]
            self.stored["hidden"] = out
            return out

        return forward


def _refuse_unknown(plan: CachePlan) -> None:
    if len(plan.header.branches) != 1:
        raise PlanError(f"the plan has {len(plan.header.branches)} branches; the hook runtime runs plans of one")
    for step, row in enumerate(plan.rows):
        for site, letter in zip(plan.sites, row, strict=True):
            known = (COMPUTED, REUSED, DEAD) if site.kind in KINDS else (COMPUTED, DEAD)
            if letter not in known or (site.kind in MODULE_KINDS and (site.call or site.output)):
                raise PlanError(
                    f"step {step}: the hook runtime cannot run {letter} at {site.name}; it takes {COMPUTED} and {REUSED} "
                    f"at sites of the kinds {', '.join(KINDS)}"
                )
