"""A tiny model of each of five classes, with its inputs, and a layer like a LoRA's to put into any of them."""

import diffusers
import torch

from helpers.families import FLUX, UVIT, flux_inputs, uvit_inputs
from helpers.pixart_sd3 import PIXART, SD3, pixart_inputs, sd3_inputs
from helpers.tiny import inputs, tiny_dit


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(**FLUX).eval()


def pixart():
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(**PIXART).eval()


def sd3():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(**SD3).eval()


def uvit():
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel

    torch.manual_seed(0)
    return UTransformer2DModel(**UVIT).eval()


class Grown(torch.nn.Module):
    """As a LoRA: a layer with a product beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.strength, self.scales = base, 0.5, {"style": 0.25}
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)
        self.active = ["style"]

    def forward(self, x):
        for name in self.active:
            x = self.base(x) + self.strength * self.up(self.down(x)) * self.scales[name]
        return x


def grow(model):
    """Put an adapter into the first attention of a model; returns it."""
    for module in model.modules():
        if isinstance(getattr(module, "to_v", None), torch.nn.Linear):
            module.to_v = Grown(module.to_v).eval().requires_grad_(False)
            return module.to_v
    raise AssertionError("no attention")


MODELS = {
    "dit": (tiny_dit, inputs),
    "pixart": (pixart, pixart_inputs),
    "sd3": (sd3, sd3_inputs),
    "flux": (flux, flux_inputs),
    "uvit": (uvit, uvit_inputs),
}
