"""What may change under a compiled model, and what happens then: every change is made, and the next image looked at.

    python -m stepgraph.bench.deploy.changes

A small DiT in a real DiTPipeline, with a LoRA (peft) loaded, an executable attached. After each change the pipeline runs once
more. An image counts as followed if a fresh executable of the same plan, compiled after the change, makes the same bits. The
table goes to docs/changes.md; an image that is neither that nor refused ends the run with an error.
"""

import argparse
import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    recurse_remove_peft_layers,
    set_weights_and_activate_adapters,
)
from rich.progress import track
from torch import nn

from stepgraph.bench.record import CHECKOUT
from stepgraph.compiler.calibration.calibrate import calibrate
from stepgraph.compiler.entry.make_plan import make_plan
from stepgraph.compiler.marking.describe import example_inputs
from stepgraph.compiler.pipeline import compile_plan
from stepgraph.config import CompileConfig
from stepgraph.errors import StepgraphError
from stepgraph.files.whole_file import whole_file
from stepgraph.plan import CachePlan

STEPS = 4
FOLLOWED, WARNED, WRONG = "followed", "followed, with a warning", "WRONG"
PAGE = """# What may change after compiling

Every change below was made to a small DiT in a real `DiTPipeline` with an executable attached (`exact=True`), and the pipeline
run once more: `python -m stepgraph.bench.deploy.changes` writes this page. "Followed" means that the next image is, to the bit,
that of a fresh executable of the same plan which was compiled after the change. What is refused is refused before the first
step, by one of stepgraph's errors that names what changed. Plans differ in what they rest on: nothing that was measured (full,
interval, manual), a choice by measurement (smoothcache here), or numbers that were fitted and enter the computation
(whole-step).

"""


@dataclass(frozen=True)
class Change:
    """Something that people do to a pipeline.

    Attributes:
        what: In words.
        make: Does it.
        call: Arguments of the pipeline's call from then on.
        before: What is done before the plan is made and compiled.
    """

    what: str
    make: Callable[[Any], Any]
    call: dict[str, Any] | None = None
    before: Callable[[Any], Any] = field(default=lambda pipe: None)


class Noted(logging.Handler):
    """Whether a warning was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warned = False

    def emit(self, record: logging.LogRecord) -> None:
        """Note it; that something was compiled for other shapes is none."""
        self.warned |= "compiled for" not in record.getMessage()


def main() -> None:
    """Make every change under every kind of plan, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs/changes.md")
    out = parser.parse_args().out
    outcomes = {}
    for change in track(CHANGES, "changes"):
        outcomes[change.what] = {kind: outcome_of(change, kind) for kind in PLANS}
        if WRONG in outcomes[change.what].values():
            raise SystemExit(f"silently wrong: {change.what}: {outcomes[change.what]}")
    with whole_file(out) as partial:
        partial.write_text(PAGE + table(outcomes), encoding="utf-8")


def table(outcomes: dict[str, dict[str, str]]) -> str:
    """The outcomes as a Markdown table."""
    lines = [" | ".join(["| change", *PLANS, ""]).rstrip(), "|---" * (1 + len(PLANS)) + "|"]
    lines += [f"| {what} | " + " | ".join(row[kind] for kind in PLANS) + " |" for what, row in outcomes.items()]
    return "\n".join(lines) + "\n"


def outcome_of(change: Change, kind: str) -> str:
    """What a change does to an image."""
    pipe = new_pipe()
    change.before(pipe)
    plan = PLANS[kind](pipe)
    executable = compiled(pipe, plan)
    executable.attach(pipe)
    image(pipe, {})
    noted = Noted()
    with listening(noted):
        try:
            change.make(pipe)
            got = image(pipe, change.call or {})
        except StepgraphError as error:
            return f"refused: {str(error).partition(';')[0].partition(' (')[0]}"
        finally:
            executable.detach()
    fresh = compiled(pipe, plan)
    fresh.attach(pipe)
    right = image(pipe, change.call or {})
    fresh.detach()
    if not torch.equal(got, right):
        return WRONG
    return WARNED if noted.warned else FOLLOWED


@contextmanager
def listening(handler: logging.Handler) -> Iterator[None]:
    """Let a handler have what stepgraph logs."""
    logger = logging.getLogger("stepgraph")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def new_pipe() -> Any:
    """A pipeline with a LoRA in its attentions, the same one at every call."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), model, "first")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    pipe = diffusers.DiTPipeline(model.eval(), vae.eval(), diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compiled(pipe: Any, plan: CachePlan) -> Any:
    """The plan for the pipeline's transformer as it is."""
    return compile_plan(pipe.transformer, plan, example_inputs(pipe.transformer, 2), CompileConfig("eager", exact=True))


def image(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """An image [1, 3, H, W] of the same noise at every call."""
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": STEPS, "output_type": "pt", **arguments}
    made: torch.Tensor = pipe([7], generator=generator, **call).images
    return made


def _interval(pipe: Any) -> CachePlan:
    return make_plan("interval", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, every=2)


def _smoothcache(pipe: Any) -> CachePlan:
    stats = calibrate(pipe.transformer, pipe.scheduler, steps=STEPS, samples=1)
    return make_plan("smoothcache", stats, alpha=1.0)


def _whole_step(pipe: Any) -> CachePlan:
    return make_plan("whole-step", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, samples=1)


PLANS: dict[str, Callable[[Any], CachePlan]] = {
    "nothing measured": _interval, "choice measured": _smoothcache, "numbers fitted": _whole_step,
}  # fmt: skip


def _lora(pipe: Any) -> list[Any]:
    return [module for module in pipe.transformer.modules() if hasattr(module, "set_scale")]


def _each(action: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Do something to every layer of the LoRA."""

    def make(pipe: Any) -> None:
        for layer in _lora(pipe):
            action(layer)

    return make


def _weights(action: Callable[[torch.Tensor], Any]) -> Callable[[Any], None]:
    """Do something to a weight of every block."""

    def make(pipe: Any) -> None:
        for block in pipe.transformer.transformer_blocks:
            action(block.ff.net[2].weight)

    return make


@torch.inference_mode()
def _write_in_inference_mode(weight: torch.Tensor) -> None:
    weight.mul_(0.9)


def _through_data(weight: torch.Tensor) -> None:
    weight.data += 0.05 * torch.randn_like(weight)


def _optimizer_step(pipe: Any) -> None:
    parameters = list(pipe.transformer.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=1e-3).step()


def _add_adapter(pipe: Any, name: str = "second", rank: int = 2) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, target_modules=["to_q", "to_v"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.transformer, name)


def _set_adapters(*names: str) -> Callable[[Any], None]:
    """As diffusers' `set_adapters` does it, at strength .5."""
    return lambda pipe: set_weights_and_activate_adapters(pipe.transformer, list(names), [0.5] * len(names))


def _delete(pipe: Any, name: str) -> None:
    delete_adapter_layers(pipe.transformer, name)


def _unload(pipe: Any) -> None:
    recurse_remove_peft_layers(pipe.transformer)


def _prepare_hotswap(pipe: Any) -> None:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    prepare_model_for_compiled_hotswap(pipe.transformer, target_rank=4)


def _hotswap(pipe: Any) -> None:
    """What `load_lora_weights(..., hotswap=True)` does, with a LoRA of rank 3 and another strength."""
    from peft import LoraConfig
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    layers = [name for name, module in pipe.transformer.named_modules() if hasattr(module, "set_scale")]
    sides = {"lora_A": (3, 32), "lora_B": (32, 3)}
    state = {f"{layer}.{side}.first.weight": torch.randn(shape) for layer in layers for side, shape in sides.items()}
    hotswap_adapter_from_state_dict(pipe.transformer, state, "first", LoraConfig(r=3, lora_alpha=2))


def _hook(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].ff.register_forward_hook(lambda module, arguments, output: 2 * output)


def _swap_component(pipe: Any) -> None:
    pipe.transformer = copy.deepcopy(pipe.transformer)


def _replace(what: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Put something else in a block's place."""

    def change(pipe: Any) -> None:
        setattr(pipe.transformer.transformer_blocks[0], what, make(getattr(pipe.transformer.transformer_blocks[0], what)))

    return change


def _scheduler(pipe: Any) -> None:
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def _configuration(pipe: Any) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")


CHANGES = (
    Change("nothing", lambda pipe: None),
    Change("a LoRA's strength (`set_scale`)", _each(lambda layer: layer.set_scale("first", 0.25))),
    Change("a LoRA switched off (`enable_adapters(False)`)", _each(lambda layer: layer.enable_adapters(False))),
    Change("a LoRA fused (`merge`)", _each(lambda layer: layer.merge())),
    Change("a LoRA fused, then switched off", _each(lambda layer: (layer.merge(), layer.enable_adapters(False)))),
    Change("a second LoRA loaded", _add_adapter),
    Change("another LoRA of two set, at another strength (`set_adapters`)", _set_adapters("second"), before=_add_adapter),
    Change("two LoRAs set at once (`set_adapters`)", _set_adapters("first", "second"), before=_add_adapter),
    Change("one LoRA of two deleted (`delete_adapters`)", lambda pipe: _delete(pipe, "second"), before=_add_adapter),
    Change("the LoRA unloaded (`unload_lora`)", _unload),
    Change("a first LoRA loaded after compiling", lambda pipe: _add_adapter(pipe, "first"), before=_unload),
    Change("a LoRA prepared for hot-swapping, swapped for another", _hotswap, before=_prepare_hotswap),
    Change(
        "a LoRA prepared for hot-swapping, switched off",
        _each(lambda layer: layer.enable_adapters(False)),
        before=_prepare_hotswap,
    ),
    Change("a LoRA's weights replaced", _each(lambda layer: nn.init.normal_(layer.lora_B["first"].weight, std=0.1))),
    Change("weights written through `.data`", _weights(_through_data)),
    Change("weights written in `torch.inference_mode`", _weights(_write_in_inference_mode)),
    Change("an optimizer's step", _optimizer_step),
    Change(
        "`load_state_dict` of other values",
        lambda pipe: pipe.transformer.load_state_dict({k: 1.01 * v for k, v in pipe.transformer.state_dict().items()}),
    ),
    Change(
        "`load_state_dict(assign=True)` of equal values",
        lambda pipe: pipe.transformer.load_state_dict(
            {name: value.clone() for name, value in pipe.transformer.state_dict().items()}, assign=True
        ),
    ),
    Change("moved away and back", lambda pipe: pipe.transformer.to(torch.float64).to(torch.float32)),
    Change("the model in another dtype", lambda pipe: pipe.transformer.to(torch.bfloat16)),
    Change("another activation", _replace("ff", lambda ff: nn.Sequential(ff, nn.ReLU()))),
    Change("an epsilon of a norm", lambda pipe: setattr(pipe.transformer.transformer_blocks[0].norm3, "eps", 0.1)),
    Change("a forward hook on a layer", _hook),
    Change("another number of steps", lambda pipe: None, {"num_inference_steps": 5}),
    Change("another scheduler", _scheduler),
    Change("another configuration of the scheduler", _configuration),
    Change("no guidance", lambda pipe: None, {"guidance_scale": 1.0}),
    Change("another guidance scale", lambda pipe: None, {"guidance_scale": 2.0}),
)


if __name__ == "__main__":
    main()
