"""glyph-dit as a flow-matching model: the same network, its inputs and outputs converted."""

import math
from typing import Any

import diffusers
import torch


class DiTTransformer2DModel(diffusers.DiTTransformer2DModel):  # type: ignore[misc]
    """Predicts noise minus clean latents at x = (1 - s) clean + s noise, where the network it inherits predicts v.

    Under the cosine schedule the network knows z = cos(p) clean + sin(p) noise at the angle p, and v = cos(p) noise - sin(p)
    clean. With tan(p) = s / (1 - s), z is x (cos(p) + sin(p)), and noise - clean = (sin(p) - cos(p)) z + (sin(p) + cos(p)) v.
    It keeps the class's name, by which its family is found.
    """

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = True
    ) -> Any:
        """As the network's; `timestep` is 1000 s, [B]."""
        share = timestep / 1000
        angle = torch.atan2(share, 1 - share)
        # diffusers' cosine schedule, alphas_cumprod[t] = cos^2 of an angle that begins at .008 / 1.008 of a quarter turn.
        step = ((angle * 2 / math.pi * 1.008 - 0.008) * 1000 - 1).clamp(min=0)
        cos, sin = (part.view(-1, 1, 1, 1) for part in (torch.cos(angle), torch.sin(angle)))
        noisy = hidden_states * (cos + sin)
        v = super().forward(noisy, timestep=step, class_labels=class_labels, return_dict=False)[0]
        output = (sin - cos) * noisy + (sin + cos) * v
        if not return_dict:
            return (output,)
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=output)


def flow_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model with this class's forward; weights are shared."""
    flow = DiTTransformer2DModel.from_config(model.config)
    flow.load_state_dict(model.state_dict(), assign=True)
    flow.eval()
    module: torch.nn.Module = flow
    return module
