"""A tiny model of each of five classes, with its inputs."""

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


MODELS = {
    "dit": (tiny_dit, inputs),
    "pixart": (pixart, pixart_inputs),
    "sd3": (sd3, sd3_inputs),
    "flux": (flux, flux_inputs),
    "uvit": (uvit, uvit_inputs),
}
