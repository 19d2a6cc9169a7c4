"""The oracle: an independent interpreter of a plan on the eager model, without graphs.

Forwards of modules are replaced, so that what a plan reuses really does not run. Everything that is computed is stored,
without a thought about who reads it. Nothing here comes from the compiler or the runtime: from stepgraph it only takes
a plan's letters and the names of its sites.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

KINDS = {"attn1": "attn", "ff": "ff"}


class Oracle:
    """Stands in for a DiT and answers its calls by a plan, one step (and branch) after the other.

    `executed` holds one counter per call: how often each leaf module (one without children) ran. `history` holds, per branch,
    every value a site has computed, the inputs of the model and of linear maps among them, oldest first.
    """

    def __init__(self, model: nn.Module, rows: tuple[str, ...], names: list[str], branches: int = 1) -> None:
        self.model, self.rows, self.names = model, rows, names
        self.forward = type(model).forward.__get__(model)
        self.history: list[dict[str, list[torch.Tensor]]] = [{} for _ in range(branches)]
        self.forecasts, self.maps, self.tables = {}, {}, {}
        self.executed: list[Counter[str]] = []
        self.calls = 0
        self.tokens_in: torch.Tensor | None = None
        self.given: torch.Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, plan, maps=None, tables=None) -> "Oracle":
        """An oracle for a plan; `maps` are the (A, B) of linear maps by path, `tables` coefficients per channel."""
        oracle = cls(model, plan.rows, [site.name for site in plan.sites], len(plan.header.branches))
        oracle.forecasts = {(s, plan.sites[i].name): (f.terms, f.coefficients) for (s, i), f in plan.forecasts.items()}
        oracle.maps, oracle.tables = maps or {}, tables or {}
        return oracle

    @property
    def stored(self) -> list[dict[str, torch.Tensor]]:
        """The last computed value of every site, per branch."""
        return [{name: values[-1] for name, values in own.items()} for own in self.history]

    # -- one value ---------------------------------------------------------------------------------------------------

    @property
    def branch(self) -> int:
        """Which of the model's calls within a step comes now."""
        return self.calls % len(self.history)

    def letter(self, site: str) -> str:
        """The action of a site in the current step."""
        return self.rows[self.calls // len(self.history)][self.names.index(site)]

    def value(self, site: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """The value of a site by its action; a dead one has none, and whoever touches it fails."""
        letter = self.letter(site)
        if letter == "C":
            return self.keep(site, compute())
        if letter == "R":
            return self.history[self.branch][site][-1].clone()
        if letter == "F":
            return self.forecast(site, site)
        if letter == "L":
            # What is linear inside is corrected on its own.
            return compute()
        assert letter == ".", f"the oracle does not know the action {letter}"
        return None

    def keep(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Store a value behind those that are there."""
        self.history[self.branch].setdefault(name, []).append(value.clone())
        return value

    def forecast(self, name: str, site: str) -> torch.Tensor:
        """The combination of a name's stored values by the site's forecast; the last one where it has none."""
        step, stored = self.calls // len(self.history), self.history[self.branch]
        if (step, site) not in self.forecasts:
            return stored[name][-1].clone()
        terms, coefficients = self.forecasts[step, site]
        rows = coefficients[self.branch] if coefficients else self.tables[f"{site}/{step}"]
        own, channels, added = 0.0, 0, 0.0
        for term, c in zip(terms, rows, strict=True):
            if term == "1":
                own = own + c
            elif term[0] == "y":
                own = own + c * stored[name][-int(term[1:])]
            else:
                x = stored["the model's input"][-int(term[1:])] if term != "x0" else self.given
                channels, added = x.shape[1], added + c * x
        if not channels:
            return own
        return torch.cat([own[:, :channels] + added, own[:, channels:]], 1)

    # -- the replaced forwards ---------------------------------------------------------------------------------------

    def run_module(self, path: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(*args, **kwargs):
            assert self.letter(path) != ".", f"{path} ran inside a reused site"
            if path in self.maps:
                return self.run_linear(path, path, original)(*args)
            return self.value(path, lambda: original(*args, **kwargs))

        return forward

    def run_linear(self, path: str, site: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A linear map, or a whole module, with factors: y + A B (x - C(x)) where its site is corrected, as in the paper."""

        def forward(x):
            if self.letter(site) == "L":
                a, b = self.maps[path]
                return self.forecast(f"{path} y", site) + (x - self.forecast(f"{path} x", site)) @ b.T @ a.T
            if self.letter(site) != "C":
                # A map outside its site's module is passed by where the site is reused.
                return self.value(site, lambda: original(x)) if path == site else x
            self.keep(f"{path} x", x)
            y = self.keep(f"{path} y", original(x))
            return self.keep(site, y) if path == site else y

        return forward

    def run_block(self, path: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor | None]:
        blocks = self.model.transformer_blocks
        first, last = path.endswith(".0"), path.endswith(f".{len(blocks) - 1}")

        def forward(tokens, *args, **kwargs):
            if first:
                self.tokens_in = None if tokens is None else tokens.clone()
            out = self.value(path, lambda: original(tokens, *args, **kwargs))
            return self.end_of_stack(out) if last else out

        return forward

    def end_of_stack(self, tokens_out: torch.Tensor | None) -> torch.Tensor | None:
        """The sites behind the last block: the stack's residual, then the hidden tokens."""
        residual = self.value("stack_residual", lambda: tokens_out - self.tokens_in)
        if self.letter("stack_residual") in "RF":
            tokens_out = self.tokens_in + residual
        return self.value("hidden", lambda: tokens_out)

    def run_embedding(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor | None]:
        def forward(*args, **kwargs):
            # Nothing before a reused `hidden` is read, not even the tokens that go into the first block.
            return None if self.letter("hidden") in "RF" else original(*args, **kwargs)

        return forward

    def __call__(self, *args, return_dict: bool = True, **kwargs):
        """The model's forward."""
        counter: Counter[str] = Counter()
        with torch.no_grad(), self._counting(counter), self._replaced():
            self.given = (*args, *kwargs.values())[0]
            sample = self.value("output", lambda: self.forward(*args, return_dict=False, **kwargs)[0])
            if self.letter("output") == "C":
                self.keep("the model's input", self.given)
        self.executed.append(counter)
        self.calls += 1
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, block in enumerate(self.model.transformer_blocks):
                path = f"transformer_blocks.{number}"
                patch = {block: self.run_block(path, block.forward)}
                for child in KINDS:
                    module = getattr(block, child)
                    patch[module] = self.run_module(f"{path}.{child}", module.forward)
                for name, module in block.named_modules():
                    site = next((child for child in KINDS if name.startswith(f"{child}.")), None)
                    if isinstance(module, nn.Linear) and f"{path}.{name}" in self.maps:
                        patch[module] = self.run_linear(f"{path}.{name}", f"{path}.{site}", module.forward)
                for module, forward in patch.items():
                    stack.enter_context(mock.patch.dict(module.__dict__, {"forward": forward}))
            embed = self.model.pos_embed
            stack.enter_context(mock.patch.dict(embed.__dict__, {"forward": self.run_embedding(embed.forward)}))
            yield

    @contextmanager
    def _counting(self, counter: Counter[str]) -> Iterator[None]:
        hooks = [
            module.register_forward_pre_hook(lambda _, __, path=path: counter.update([path]))
            for path, module in self.model.named_modules()
            if not list(module.children())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def in_place_of_model(self) -> Iterator["Oracle"]:
        """Within it, calls of the model (by a pipeline, say) are answered by the oracle."""
        with mock.patch.dict(self.model.__dict__, {"forward": self}):
            yield self


@torch.no_grad()
def run_loop(
    predict: Callable[..., tuple[torch.Tensor, ...]],
    scheduler,
    noise: torch.Tensor,
    steps: int,
    guidance_scale: float = 1.0,
    cond: dict[str, torch.Tensor] | None = None,
    uncond: dict[str, torch.Tensor] | None = None,
    separate: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A plain sampling loop around anything that is called like the model; (final latents, every output of the model)."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    # Flow-matching schedulers know neither of the two.
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    channels, outputs = noise.shape[1], []

    def call(batch, t, labels):
        outputs.append(predict(hidden_states=batch, timestep=t.expand(len(batch)), **labels, return_dict=False)[0].clone())
        return outputs[-1]

    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        if guidance_scale <= 1:
            noise_prediction = call(scaled, t, cond)
        else:
            if separate:
                wanted, base = call(scaled, t, cond), call(scaled, t, uncond)
            else:
                labels = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
                wanted, base = call(torch.cat([scaled, scaled]), t, labels).chunk(2)
            noise_prediction = base + guidance_scale * (wanted - base)
        eta = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
        latents = scheduler.step(noise_prediction[:, :channels], t, latents, **eta).prev_sample
    return latents, outputs
