"""Tables are of the timesteps that real pipelines give, in every dtype: one pass over all steps serves a run."""

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.pipes import images, tiny_pipe
from helpers.pixart_sd3 import PIXART
from helpers.text_pipes import TEXT, flux_pipe, latents, sd3_pipe, tiny_vae
from helpers.tiny import tiny_dit, tiny_scheduler
from stepgraph.runtime.program.tables import Tables
from stepgraph.tolerances import FIRST_STEP, tolerance

STEPS = 4


def pixart_pipe():
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(**PIXART).eval()
    made = diffusers.PixArtAlphaPipeline(None, None, tiny_vae(4), transformer, tiny_scheduler("dpm++"))
    made.set_progress_bar_config(disable=True)
    return made


def pixart_latents(pipe) -> torch.Tensor:
    generator, dtype = torch.Generator().manual_seed(0), pipe.transformer.dtype
    prompt = torch.randn(1, TEXT, 12, generator=generator).to(dtype)
    mask = torch.ones(1, TEXT, dtype=torch.int64)
    return pipe(
        prompt_embeds=prompt, prompt_attention_mask=mask, negative_prompt=None, negative_prompt_embeds=torch.zeros_like(prompt),
        negative_prompt_attention_mask=mask, num_inference_steps=STEPS, height=64, width=64, use_resolution_binning=False,
        generator=generator, output_type="latent",
    ).images  # fmt: skip


# The pipeline, how guidance calls its transformer, and a run.
PIPES = {
    "flux": (flux_pipe, "none", lambda pipe: latents(pipe, num_inference_steps=STEPS)),
    "sd3": (sd3_pipe, "none", lambda pipe: latents(pipe, num_inference_steps=STEPS)),
    "pixart": (pixart_pipe, "batched", pixart_latents),
    "dit": (lambda: tiny_pipe(tiny_dit()), "batched", images),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", PIPES)
def test_tables_serve_a_whole_run_of_a_real_pipeline(name, dtype, monkeypatch):
    make, guidance, call = PIPES[name]
    pipe = make()
    for module in (pipe.transformer, pipe.vae):
        torch.nn.Module.to(module, dtype=dtype)
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({**dict(zip(("hidden_states",), args)), **kwargs}), with_kwargs=True
    )
    expected = call(pipe)
    hook.remove()
    example = {name: value.clone() for name, value in calls[0].items() if isinstance(value, torch.Tensor)}
    plan = sg.make_plan(
        "full", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, guidance=guidance, example_inputs=example
    )
    exe = sg.compile(pipe.transformer, plan, example, backend="eager").attach(pipe)
    assert any(table.per_step for table in exe.default.hoisted.tables)
    passes, compute_all = [], Tables._compute_all

    def computed(self, *given):
        compute_all(self, *given)
        passes.append(self._expected)

    monkeypatch.setattr(Tables, "_compute_all", computed)
    got = call(pipe)
    # One pass, over just what the pipeline gave at each step, to the bit.
    (timesteps,) = passes
    given = [each["timestep"].flatten()[0] for each in calls]
    assert timesteps.tolist() == [value.item() for value in given]
    assert timesteps.dtype == given[0].dtype
    most = STEPS * tolerance(FIRST_STEP, dtype)
    assert (got - expected).float().norm() <= most * expected.float().norm()
