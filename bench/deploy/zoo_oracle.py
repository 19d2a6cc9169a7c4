"""A plan interpreted on an eager model of any class: forwards of modules are replaced, and nothing is traced or compiled."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stepgraph.plan import COMPUTE, REUSE, CachePlan


class ZooOracle:
    """Stands in for a model and answers its calls by a plan of reuses, one step after the other.

    Args:
        model: Evaluated as it is.
        plan: With one branch, whose letters are computed, reused and dead.
        ends: Path of the first block and number of the tensor among its inputs that are the tokens, and the same of the last
            block and its outputs, where the plan has sites of the whole stack.
    """

    def __init__(self, model: nn.Module, plan: CachePlan, ends: tuple[str, int | None, str, int | None]) -> None:
        self._model, self._plan, self._ends = model, plan, ends
        self._names = [site.name for site in plan.sites]
        self._stored: dict[str, torch.Tensor] = {}
        self._returned: dict[str, Any] = {}
        self._calls: Counter[str] = Counter()
        self._step = 0
        self._tokens_in: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> list[torch.Tensor]:
        """The tensors that the model returns at the next step."""
        self._calls.clear()
        with self._replaced():
            results = _tensors(self._model(**inputs))
        if "output" in self._names:
            results = [self._value("output", results[0])]
        self._step += 1
        return results

    def _letter(self, site: str) -> str:
        return self._plan.rows[self._step][self._names.index(site)]

    def _value(self, site: str, value: torch.Tensor) -> torch.Tensor:
        """What a site is worth at this step, given what it is when computed."""
        if self._letter(site) == REUSE:
            return self._stored[site].clone()
        if self._letter(site) == COMPUTE:
            self._stored[site] = value.clone()
        return value

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Within it, the forwards of the plan's modules and of the blocks at the stack's ends are replaced."""
        first, _, last, _ = self._ends
        wrappers = [(first, self._first_block), (last, self._last_block)]
        paths = dict.fromkeys(site.path for site in self._plan.sites if site.path)
        with ExitStack() as stack:
            for path, wrap in [*((path, self._module) for path in paths), *wrappers]:
                module = self._model.get_submodule(path)
                stack.enter_context(mock.patch.dict(module.__dict__, {"forward": wrap(path, module.forward)}))
            yield

    def _module(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """A module that does not run where all that it returns is reused."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = f"{path}#{self._calls[path]}" if self._calls[path] else path
            self._calls[path] += 1
            outputs = [name for name in self._names if name == call or name.startswith(f"{call}:")]
            letters = {self._letter(name) for name in outputs}
            if letters == {REUSE}:
                leaves, spec = pytree.tree_flatten(self._returned[call])
                return pytree.tree_unflatten([leaf.clone() if _is_tensor(leaf) else leaf for leaf in leaves], spec)
            returned = original(*args, **kwargs)
            if COMPUTE in letters:
                self._returned[call] = pytree.tree_map_only(torch.Tensor, torch.clone, returned)
            return returned

        return forward

    def _first_block(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """The first block, whose tokens are kept."""
        number = self._ends[1]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if number is not None and self._tokens_in is None:
                self._tokens_in = _tensors((args, kwargs))[number].clone()
            return original(*args, **kwargs)

        return forward

    def _last_block(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """The last block, with the sites of the whole stack behind it."""
        number = self._ends[3]

        def forward(*args: Any, **kwargs: Any) -> Any:
            returned = original(*args, **kwargs)
            first_call, before = not self._calls["the last block"], self._tokens_in
            self._calls["the last block"] += 1
            self._tokens_in = None if first_call else before
            if number is None or not first_call:
                return returned
            leaves, spec = pytree.tree_flatten(returned)
            place = [i for i, leaf in enumerate(leaves) if _is_tensor(leaf)][number]
            if before is not None and "stack_residual" in self._names:
                residual = self._value("stack_residual", leaves[place] - before)
                leaves[place] = before + residual if self._letter("stack_residual") == REUSE else leaves[place]
            leaves[place] = self._value("hidden", leaves[place])
            return pytree.tree_unflatten(leaves, spec)

        return forward


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
