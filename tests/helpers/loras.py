"""LoRAs for tiny models, as diffusers loads them, and executables of models that have them."""

import copy

import diffusers
import torch
from peft import LoraConfig, get_peft_model_state_dict

import stepgraph as sg
from helpers.pixart_sd3 import SD3, planned, sd3_inputs
from stepgraph.compiler.marking import traced_model

TARGETS = ("to_q", "to_v")


def tiny_sd3() -> diffusers.SD3Transformer2DModel:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(**SD3).eval()


def lora(model, seed: int, rank: int = 2, alpha: float = 3.0, targets=TARGETS):
    """The state dict of a LoRA for a model, and what `load_lora_adapter` needs beside it."""
    torch.manual_seed(seed)
    twin = copy.deepcopy(model)
    if hasattr(twin, "peft_config"):
        twin.unload_lora()
    twin.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False), "made")
    state = get_peft_model_state_dict(twin, adapter_name="made")
    state = {f"transformer.{name}": tensor for name, tensor in state.items()}
    return state, {name.replace(".lora_A.weight", ".alpha"): alpha for name in state if name.endswith("lora_A.weight")}


def load(model, name: str, seed: int, rank: int = 2, alpha: float = 3.0, targets=TARGETS, hotswap: bool = False) -> None:
    state, alphas = lora(model, seed, rank, alpha, targets)
    model.load_lora_adapter(dict(state), network_alphas=alphas, adapter_name=name, hotswap=hotswap)


def full(model, **options) -> sg.Executable:
    plan = planned(model, sd3_inputs(), {}, steps=2)
    return sg.compile(model, plan, sd3_inputs(), backend="eager", exact=True, **options)


@torch.no_grad()
def eager(model) -> torch.Tensor:
    return model(**sd3_inputs(), return_dict=False)[0]


def step(exe) -> torch.Tensor:
    return exe.session()(**sd3_inputs(), return_dict=False)[0]


def count_traces(monkeypatch) -> list[str]:
    """Grows with every trace from now on."""
    traced, trace = [], traced_model.trace

    def counted(model, inputs):
        traced.append(type(model).__name__)
        return trace(model, inputs)

    monkeypatch.setattr(traced_model, "trace", counted)
    return traced
