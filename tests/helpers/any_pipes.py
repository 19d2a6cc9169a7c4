"""Real diffusers pipelines of classes without an adapter, around tiny transformers; prompts are embeddings, results latents."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import nn

from helpers.text_pipes import tiny_vae
from stepgraph.bench.deploy.zoo import ends_of
from stepgraph.bench.deploy.zoo_draws import build_tiny as tiny
from stepgraph.bench.deploy.zoo_oracle import ZooOracle
from stepgraph.compiler.marking.mark_sites import MarkedGraph
from stepgraph.plan import CachePlan

SHIFTED = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
           "max_image_seq_len": 4096}  # fmt: skip
Call = Callable[[int], Mapping[str, Any]]


def text(seed: int, tokens: int = 8, width: int = 12) -> torch.Tensor:
    """Embeddings [1, N, D] of a prompt."""
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def mask(kept: int, tokens: int = 8) -> torch.Tensor:
    """[1, N] that leaves out what is not kept."""
    return (torch.arange(tokens) < kept).long()[None]


def flow(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def seeded(seed: int, side: int = 16, steps: int = 4, **more: Any) -> dict[str, Any]:
    """What all calls have."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "num_inference_steps": steps,
        "height": side,
        "width": side,
        "generator": generator,
        "output_type": "latent",
        **more,
    }


def both(seed: int, **sizes: int) -> dict[str, torch.Tensor]:
    """A prompt, and what it is guided away from."""
    return {"prompt_embeds": text(seed, **sizes), "negative_prompt_embeds": text(99, **sizes)}


def masked(seed: int, **sizes: int) -> dict[str, torch.Tensor]:
    """The same with masks."""
    return {**both(seed, **sizes), "prompt_attention_mask": mask(6 + seed % 2), "negative_prompt_attention_mask": mask(4)}


def wan() -> tuple[Any, Call]:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = diffusers.WanPipeline(None, None, vae, scheduler, transformer=tiny("WanTransformer3DModel"))
    return pipe, lambda seed: seeded(seed, num_frames=5, guidance_scale=5.0, **both(seed, width=16))


def wan_of_words() -> Any:
    """The same pipeline with a tokenizer of a few words and a tiny text encoder, as a folder holds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "fox"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(7)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()
    pipe, _ = any_pipe("wan")
    pipe.register_modules(tokenizer=fast, text_encoder=encoder)
    return pipe


def qwen_image() -> tuple[Any, Call]:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = flow(**SHIFTED, shift_terminal=0.02, time_shift_type="exponential")
    pipe = diffusers.QwenImagePipeline(scheduler, vae, None, None, tiny("QwenImageTransformer2DModel"))

    def call(seed: int) -> dict[str, Any]:
        # The two halves of guidance have texts of different lengths.
        wanted, base = text(seed, 6), text(99, 4)
        masks = {"prompt_embeds_mask": mask(6, 6), "negative_prompt_embeds_mask": mask(4, 4)}
        return seeded(seed, prompt_embeds=wanted, negative_prompt_embeds=base, true_cfg_scale=4.0, **masks)

    return pipe, call


def chroma() -> tuple[Any, Call]:
    pipe = diffusers.ChromaPipeline(flow(), tiny_vae(1), None, None, tiny("ChromaTransformer2DModel"))
    # Attention takes them as they are.
    return pipe, lambda seed: seeded(
        seed, 8, guidance_scale=3.5, **{name: value.float() for name, value in masked(seed).items()}
    )


def aura_flow() -> tuple[Any, Call]:
    pipe = diffusers.AuraFlowPipeline(None, None, tiny_vae(4), tiny("AuraFlowTransformer2DModel"), flow(shift=1.73))
    return pipe, lambda seed: seeded(seed, 8, guidance_scale=3.5, **masked(seed))


def flux_2() -> tuple[Any, Call]:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1, norm_num_groups=2, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True)
    pipe = diffusers.Flux2Pipeline(scheduler, vae, None, None, tiny("Flux2Transformer2DModel"))
    return pipe, lambda seed: seeded(seed, guidance_scale=3.5, prompt_embeds=text(seed))


def ltx() -> tuple[Any, Call]:
    four, off = (8,) * 4, (False,) * 4
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=four, decoder_block_out_channels=four, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5, upsample_residual=off,
        upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(flow(**SHIFTED, shift_terminal=0.1), vae, None, None, tiny("LTXVideoTransformer3DModel"))
    return pipe, lambda seed: seeded(seed, 32, num_frames=9, guidance_scale=3.0, **masked(seed))


def hunyuan_video() -> tuple[Any, Call]:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, norm_num_groups=4,
    )  # fmt: skip
    transformer = tiny("HunyuanVideoTransformer3DModel")
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, vae, flow(shift=7.0), None, None)

    def call(seed: int) -> dict[str, Any]:
        pooled = text(seed + 50, 1, 8)[:, 0]
        given = {"prompt_embeds": text(seed, width=16), "prompt_attention_mask": mask(5 + seed % 3)}
        return seeded(seed, 32, num_frames=5, pooled_prompt_embeds=pooled, **given)

    return pipe, call


def sana() -> tuple[Any, Call]:
    two = {"layers_per_block": (1, 1), "block_out_channels": (8, 8), "qkv_multiscales": ((), (5,)),
           "block_types": ("ResBlock", "EfficientViTBlock")}  # fmt: skip
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in two.items()}
    vae = diffusers.AutoencoderDC(
        3, 4, 2, **sides, downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = diffusers.SanaPipeline(None, None, vae, tiny("SanaTransformer2DModel"), scheduler)
    free = {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 4.0}
    return pipe, lambda seed: seeded(seed, 32, **free, **masked(seed))


def cogvideox() -> tuple[Any, Call]:
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, layers_per_block=1,
        block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=2,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(None, None, vae, tiny("CogVideoXTransformer3DModel"), diffusers.CogVideoXDDIMScheduler())
    return pipe, lambda seed: seeded(seed, 64, num_frames=5, guidance_scale=6.0, **both(seed, tokens=6))


def z_image() -> tuple[Any, Call]:
    transformer = tiny("ZImageTransformer2DModel")
    pipe = diffusers.ZImagePipeline(flow(use_dynamic_shifting=True, shift=3.0), tiny_vae(4), None, None, transformer)

    def call(seed: int) -> dict[str, Any]:
        given = {"prompt_embeds": [text(seed, 6)[0]], "negative_prompt_embeds": [text(99, 4)[0]]}
        return seeded(seed, 32, guidance_scale=4.0, **given)

    return pipe, call


PIPES = {
    make.__name__: make for make in (wan, qwen_image, chroma, aura_flow, flux_2, ltx, hunyuan_video, sana, cogvideox, z_image)
}


def any_pipe(name: str) -> tuple[Any, Call]:
    """A pipeline without a progress bar, and what it is called with by seed."""
    torch.manual_seed(0)
    pipe, call = PIPES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


@contextmanager
def oracles(model: nn.Module, plan: CachePlan, marked: MarkedGraph) -> Iterator[None]:
    """Within it, the model's calls are answered by the plan's interpreter, one for each call of a step."""
    signature, stands = (
        inspect.signature(model.forward),
        [ZooOracle(model, plan, ends_of(marked)) for _ in plan.header.branches],
    )
    turn = itertools.cycle(stands)

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = signature.bind(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        own = {name: value for name, value in inputs.items() if name != "return_dict"}
        del model.__dict__["forward"]
        try:
            tensors = next(turn)(**own)
        finally:
            model.__dict__["forward"] = forward
        # Z-Image's first result is the list of its samples.
        return (tensors,) if isinstance(next(iter(own.values())), list) else tuple(tensors)

    with mock.patch.dict(model.__dict__, {"forward": forward}):
        yield


def latents(pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """What the pipeline's call makes."""
    made = pipe(**call)
    made = made.images if hasattr(made, "images") else made.frames
    return made if isinstance(made, torch.Tensor) else torch.as_tensor(made[0])
