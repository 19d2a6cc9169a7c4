"""The oracle for FLUX, SD3, PixArt and U-ViT: as `oracle`, with the places where these models compute their sites."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn

from helpers.oracle import Oracle

Forward = Callable[..., object]


class PatchingOracle(Oracle):
    """An oracle that says for every module of a model what runs in place of its forward.

    `unrun` holds the modules whose replaced forward was called and did not run: the counters leave them out.
    """

    def replacements(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Modules with what runs in place of their forwards."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they run."""
        raise NotImplementedError

    @property
    def stack_is_dead(self) -> bool:
        """Whether no block runs in this step."""
        return bool({"R", "F"} & {self.letter("hidden"), self.letter("stack_residual")})

    def __call__(self, *args, **kwargs):
        """The model's forward."""
        self.unrun: set[str] = set()
        result = super().__call__(*args, **kwargs)
        for path in self.unrun:
            del self.executed[-1][path]
        return result

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module, forward in [*self.replacements(), *self.linears()]:
                stack.enter_context(mock.patch.dict(module.__dict__, {"forward": forward}))
            yield

    def linears(self) -> Iterator[tuple[nn.Module, Forward]]:
        """The linear maps that have factors and are no sites themselves."""
        for path in self.maps:
            if path not in self.names:
                # A single block's MLP is projected before the module that is the site.
                inside = path.replace("proj_mlp", "act_mlp")
                (site,) = (
                    name
                    for name in self.names
                    if inside == name
                    or inside.startswith(f"{name}.net")
                    or (inside.startswith(f"{name}.") and name.endswith((".attn", ".attn1", ".attn2")))
                )
                module = self.model.get_submodule(path)
                # Patched already: what runs then decides whether the map is reached at all.
                yield module, self.run_linear(path, site, module.__dict__.get("forward", module.forward))

    def run_unless(self, dead: Callable[[], bool], path: str, instead: Callable[..., object]) -> tuple[nn.Module, Forward]:
        """A module that does not run where `dead` says so; what is returned then goes nowhere."""
        module = self.model.get_submodule(path)
        original = module.forward

        def forward(*args, **kwargs):
            if not dead():
                return original(*args, **kwargs)
            self.unrun.add(path)
            return instead(*args, **kwargs)

        return module, forward


class TwoStreamsOracle(PatchingOracle):
    """An oracle for models whose blocks keep image and text tokens apart."""

    def run_two_streams(self, block: nn.Module, original: Forward) -> Forward:
        """A block, with the end of the stack behind the last."""
        first, last = (block is self.blocks()[end] for end in (0, -1))

        def forward(hidden_states, encoder_hidden_states, **kwargs):
            if first:
                self.tokens_in = hidden_states.clone()
            text, image = encoder_hidden_states, None
            if not self.stack_is_dead:
                text, image = original(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
            # Blocks that do not run hand on something that has a shape.
            return text, self.end_of_stack(image) if last else hidden_states if image is None else image

        return forward

    def run_joint(self, path: str, original: Forward) -> Forward:
        """Image and text outputs of one attention: both stored, or it runs."""

        def forward(**kwargs):
            # The text output of SD3's last attention goes nowhere and is no site.
            both = f"{path}:1" in self.names
            letters = self.letter(path) + self.letter(f"{path}:1" if both else path)
            assert letters in ("CC", "LL") or set(letters) <= {"R", "F"}, f"{path} has the actions {letters}"
            image, text = original(**kwargs) if letters in ("CC", "LL") else (None, None)
            return self.value(path, lambda: image), self.value(f"{path}:1", lambda: text) if both else None

        return forward


class FluxOracle(TwoStreamsOracle):
    """Stands in for a FluxTransformer2DModel."""

    def blocks(self) -> list[nn.Module]:
        """Double blocks, then single ones."""
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def replacements(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Embedders, blocks, and what lies in them."""
        yield self.run_unless(lambda: self.letter("hidden") in "RF", "x_embedder", lambda x: x)
        yield self.run_unless(lambda: self.stack_is_dead, "context_embedder", lambda x: x)
        for block in self.blocks():
            yield block, self.run_two_streams(block, block.forward)
        for number, block in enumerate(self.model.transformer_blocks):
            path = f"transformer_blocks.{number}"
            yield block.attn, self.run_joint(f"{path}.attn", block.attn.forward)
            for child in ("ff", "ff_context"):
                module = getattr(block, child)
                yield module, self.run_module(f"{path}.{child}", module.forward)
        for number in range(len(self.model.single_transformer_blocks)):
            yield from self.run_side_by_side(f"single_transformer_blocks.{number}")

    def run_side_by_side(self, path: str) -> Iterator[tuple[nn.Module, Forward]]:
        """Attention and MLP of a single block, and the projection of both."""

        def stored(child: str) -> tuple[nn.Module, Forward]:
            site, module = f"{path}.{child}", self.model.get_submodule(f"{path}.{child}")
            original = module.forward

            def forward(*args, **kwargs):
                if self.letter(site) not in "CL":
                    self.unrun.add(site)
                if site in self.maps and self.letter(site) in "CL":
                    return self.run_linear(site, site, original)(*args)
                if self.letter(site) == ".":
                    assert self.letter(f"{path}.proj_out") in "RF"
                    # Something to concatenate, of no width: a reused projection does not look at it.
                    return (*args, *kwargs.values())[0][..., :0]
                return self.value(site, lambda: original(*args, **kwargs))

            return module, forward

        if f"{path}.proj_mlp" not in self.maps:
            yield self.run_unless(lambda: self.letter(f"{path}.act_mlp") != "C", f"{path}.proj_mlp", lambda x: x)
        yield from map(stored, ("attn", "act_mlp", "proj_out"))


class SD3Oracle(TwoStreamsOracle):
    """Stands in for an SD3Transformer2DModel."""

    def blocks(self) -> list[nn.Module]:
        """The joint blocks."""
        return list(self.model.transformer_blocks)

    def replacements(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Embedders, blocks, and what lies in them."""
        yield self.run_unless(lambda: self.letter("hidden") in "RF", "pos_embed", lambda x: x)
        yield self.run_unless(lambda: self.stack_is_dead, "context_embedder", lambda x: x)
        for number, block in enumerate(self.blocks()):
            path = f"transformer_blocks.{number}"
            yield block, self.run_two_streams(block, block.forward)
            yield block.attn, self.run_joint(f"{path}.attn", block.attn.forward)
            for child in ("attn2", "ff", "ff_context"):
                module = getattr(block, child)
                if module is not None:
                    yield module, self.run_module(f"{path}.{child}", module.forward)


class PixArtOracle(PatchingOracle):
    """Stands in for a PixArtTransformer2DModel."""

    def replacements(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Embedders, blocks, and what lies in them."""
        yield self.run_unless(lambda: self.letter("hidden") in "RF", "pos_embed", lambda x: x)
        width = self.model.inner_dim
        yield self.run_unless(lambda: self.stack_is_dead, "caption_projection", lambda x: x.new_zeros(len(x), 1, width))
        for number, block in enumerate(self.model.transformer_blocks):
            path = f"transformer_blocks.{number}"
            yield block, self.run_block(path, block.forward)
            for child in ("attn1", "attn2", "ff"):
                module = getattr(block, child)
                yield module, self.run_module(f"{path}.{child}", module.forward)


class UVitOracle(PatchingOracle):
    """Stands in for a UTransformer2DModel."""

    def blocks(self) -> list[nn.Module]:
        """First half, middle, second half."""
        halves = self.model.transformer_in_blocks, [entry["block"] for entry in self.model.transformer_out_blocks]
        return [*halves[0], self.model.transformer_mid_block, *halves[1]]

    def replacements(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Embedder, blocks, skip connections, and what lies in the blocks."""
        yield self.run_unless(lambda: self.letter("hidden") == "R", "pos_embed", lambda x: None)
        for number in range(len(self.model.transformer_out_blocks)):
            path = f"transformer_out_blocks.{number}.skip"
            yield self.run_unless(lambda: self.stack_is_dead, path, lambda x, skip: None)
        paths = {module: path for path, module in self.model.named_modules()}
        for block in self.blocks():
            yield block, self.run_one_stream(block, block.forward)
            for child in (block.attn1, block.ff):
                yield child, self.run_module(paths[child], child.forward)

    def run_one_stream(self, block: nn.Module, original: Forward) -> Forward:
        """A block, with the end of the stack behind the last."""
        first, last = (block is self.blocks()[end] for end in (0, -1))

        def forward(hidden_states, **kwargs):
            if first:
                self.tokens_in = None if hidden_states is None else hidden_states.clone()
            out = None if self.stack_is_dead else original(hidden_states, **kwargs)
            return self.end_of_stack(out) if last else out

        return forward


@torch.no_grad()
def run_flow(predict: Callable[..., tuple[torch.Tensor, ...]], scheduler, steps: int, inputs: dict[str, torch.Tensor]):
    """A plain sampling loop as FLUX's pipeline has it, the timestep in 0..1; every output of the model."""
    scheduler.set_timesteps(steps)
    latents, outputs = inputs["hidden_states"], []
    for t in scheduler.timesteps:
        timestep = t.expand(len(latents)) / 1000
        outputs.append(predict(**{**inputs, "hidden_states": latents, "timestep": timestep}, return_dict=False)[0].clone())
        latents = scheduler.step(outputs[-1], t, latents, return_dict=False)[0]
    return [*outputs, latents]
