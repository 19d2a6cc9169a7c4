"""LoRAs of real peft on FLUX, as diffusers loads them, and on PixArt, as peft alone does: the eager model's bits throughout."""

import diffusers
import peft
import torch
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

import stepgraph as sg
from helpers.families import FLUX, flux_inputs, flux_plan
from helpers.loras import count_traces, load
from helpers.pixart_sd3 import PIXART, pixart_inputs, planned
from stepgraph.adapters import is_tuner

RANK = 4


class Followed:
    """Compares an executable's first step with the eager model's, after every change."""

    def __init__(self, model, plan, inputs):
        self.model, self.inputs, self.outputs = model, inputs, []
        self.exe = sg.compile(model, plan, inputs, backend="eager", exact=True)

    def check(self) -> torch.Tensor:
        output = self.exe.session()(**self.inputs, return_dict=False)[0]
        with torch.no_grad():
            assert torch.equal(output, self.model(**self.inputs, return_dict=False)[0])
        self.outputs.append(output)
        return output

    @property
    def distinct(self) -> int:
        return len({tuple(output.flatten().tolist()) for output in self.outputs})


def test_flux(monkeypatch):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**FLUX).eval()
    model.enable_lora_hotswap(target_rank=RANK)
    load(model, "one", 1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flux, traced = Followed(model, flux_plan(model, scheduler, {}, steps=2), flux_inputs()), count_traces(monkeypatch)
    flux.check()
    load(model, "one", 2, RANK, 8.0, hotswap=True)
    flux.check()
    model.set_adapters("one", 0.5)
    flux.check()
    model.disable_lora()
    off = flux.check()
    assert not traced
    model.enable_lora()
    model.fuse_lora()
    flux.check()
    assert len(traced) == 1
    model.unfuse_lora()
    model.unload_lora()
    assert torch.allclose(flux.check(), off, atol=1e-5)
    assert flux.distinct >= 5


def tuners(model):
    return [module for module in model.modules() if is_tuner(type(module))]


def test_pixart(monkeypatch):
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(**PIXART).eval()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, "one")
    prepare_model_for_compiled_hotswap(model, target_rank=RANK)
    pixart, traced = Followed(model, planned(model, pixart_inputs(), {}, steps=2), pixart_inputs()), count_traces(monkeypatch)
    pixart.check()
    # Another LoRA of another rank and strength, in the place of the first.
    other = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    twin = peft.inject_adapter_in_model(other, diffusers.PixArtTransformer2DModel(**PIXART), "two")
    state = peft.get_peft_model_state_dict(twin, adapter_name="two")
    state = {name.replace(".weight", ".one.weight"): tensor for name, tensor in state.items()}
    hotswap_adapter_from_state_dict(model, state, "one", other)
    pixart.check()
    for tuner in tuners(model):
        tuner.set_scale("one", 0.25)
    pixart.check()
    for tuner in tuners(model):
        tuner.enable_adapters(False)
    off = pixart.check()
    assert not traced
    for tuner in tuners(model):
        tuner.enable_adapters(True)
        tuner.merge()
    pixart.check()
    assert len(traced) == 1
    for tuner in tuners(model):
        tuner.unmerge()
        tuner.enable_adapters(False)
    assert torch.allclose(pixart.check(), off, atol=1e-5)
    assert pixart.distinct >= 5
