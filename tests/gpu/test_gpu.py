"""On a CUDA device: exact plans, low precision, and pipelines. Deselected by default; run with `-m gpu`."""

import diffusers
import pytest
import torch

import stepgraph as sg
from helpers.distance import error
from helpers.oracle import Oracle, run_loop
from helpers.pipes import tiny_pipe
from helpers.tiny import NULL_CLASS, inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.runtime.sampling.linear_steps import linear_steps
from stepgraph.runtime.sampling.update import FusedUpdate
from stepgraph.scheduler import prepare_scheduler
from stepgraph.tolerances import OP, tolerance

pytestmark = pytest.mark.gpu
ACTIONS = {"attn": "CRCRCR", "ff": "CRRRCC", "hidden": "CCCCCR"}


def to_cuda(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


@pytest.fixture
def cuda_dit():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return tiny_dit().cuda()


def compiled(model, scheduler, batch: int = 2, actions=ACTIONS, dtype=torch.float32, **options) -> sg.Executable:
    plan = sg.make_plan("manual", model=model, scheduler=scheduler, steps=6, actions=actions)
    given = to_cuda(inputs(batch))
    given["hidden_states"] = given["hidden_states"].to(dtype)
    return sg.compile(model, plan, given, **options)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_exact_plans_equal_the_oracle(cuda_dit, name, guidance_scale):
    scheduler = tiny_scheduler(name)
    exe = compiled(cuda_dit, scheduler, backend="eager", exact=True)
    cond, uncond = to_cuda(labels(1, 2)), to_cuda(labels(NULL_CLASS, NULL_CLASS))
    arguments = (scheduler, noise(2).cuda(), 6, guidance_scale, cond, uncond)
    oracle, session = Oracle.of(cuda_dit, exe.plan), exe.session()

    def on_device(predict):
        # The plain loop keeps the scheduler's timesteps where they are.
        return lambda **given: predict(**to_cuda({k: v for k, v in given.items() if k != "return_dict"}), return_dict=False)

    wanted, got = (run_loop(on_device(predict), *arguments)[0] for predict in (oracle, session))
    assert torch.equal(got, wanted)
    if guidance_scale <= 1:
        # Compiled for two rows, run with two.
        assert session.peak_slot_bytes == exe.memory().peak_slot_bytes
    eager = run_loop(on_device(cuda_dit), *arguments)[0]
    assert not torch.equal(eager, wanted)


def test_computing_everything_is_the_eager_model(cuda_dit):
    exe = compiled(cuda_dit, tiny_scheduler("ddim"), 1, {}, backend="eager", exact=True)
    given = to_cuda(labels(3))
    eager = sg.sample(cuda_dit, tiny_scheduler("ddim"), noise().cuda(), steps=6, **given)
    assert torch.equal(sg.sample(exe, tiny_scheduler("ddim"), noise().cuda(), **given), eager)


@pytest.mark.parametrize("offload", [False, True])
def test_the_device_allocates_what_was_promised(offload):
    """Values are large beside a block's activations: the peak is the arena, the tables and a step's own work."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = tiny_dit(num_attention_heads=8, attention_head_dim=64, num_layers=12, sample_size=64).cuda()
    # The output is reused at steps 1 to 6, the values of step 0 are read again at step 7.
    actions = {"output": "CRRRRRRCC", "ff": "CRRRRRRRC", "attn": "CRRRRRRRC"}
    plan = sg.make_plan("manual", model=model, scheduler=tiny_scheduler("ddim"), steps=9, actions=actions)
    given = to_cuda({**inputs(2), "hidden_states": torch.randn(2, 4, 64, 64)})
    exe, peaks = sg.compile(model, plan, given, backend="inductor", offload=offload), []
    memory, session = exe.memory(), exe.session()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for step in range(9):
        torch.cuda.reset_peak_memory_stats()
        session(**{**given, "timestep": torch.full((2,), plan.header.timesteps[step]).cuda().long()})
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    tokens = 2 * 1024 * 512 * 4
    held = memory.arena_bytes + memory.table_bytes
    # Within a block: queries, keys, values, attention's output, and twice the feed-forward's four times wider tokens.
    assert held <= max(peaks) <= held + 16 * tokens
    assert (memory.host_bytes >= 24 * tokens) == offload


@pytest.mark.parametrize("guidance", ["batched", "separate"])
@pytest.mark.parametrize("cuda_graphs", [False, None])
def test_offloaded_values_come_back_as_they_were(cuda_dit, guidance, cuda_graphs):
    """Copies run beside the steps, of both branches in one arena; ten runs, as a race need not show in one."""
    actions, scheduler = {"output": "CRRRRRRCC", "ff": "CRRRRRRRC", "attn": "CRRRRRRRC"}, tiny_scheduler("ddim")
    plan = sg.make_plan("manual", model=cuda_dit, scheduler=scheduler, steps=9, actions=actions, guidance=guidance)
    given = to_cuda(inputs(2 if guidance == "separate" else 4))
    near, far = (
        sg.compile(cuda_dit, plan, given, backend="eager", offload=offload, cuda_graphs=cuda_graphs)
        for offload in (False, True)
    )
    classes = to_cuda({**labels(1, 2), "negative_class_labels": torch.tensor([NULL_CLASS] * 2)})
    for seed in range(10):
        wanted, got = (sg.sample(exe, scheduler, noise(2, seed).cuda(), 2.0, capture=False, **classes) for exe in (near, far))
        assert torch.equal(got, wanted)
    pipeline = [session(**given).sample for session in (near.session(), far.session())]
    assert torch.equal(*pipeline)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_bf16_is_finite_and_close(cuda_dit, backend):
    scheduler, given = tiny_scheduler("ddim"), to_cuda(labels(3))
    wanted = sg.sample(compiled(cuda_dit, scheduler, 1, backend="eager", exact=True), scheduler, noise().cuda(), **given)
    half = cuda_dit.bfloat16()
    exe = compiled(half, scheduler, 1, dtype=torch.bfloat16, backend=backend)
    got = sg.sample(exe, scheduler, noise().cuda().bfloat16(), **given).float()
    assert torch.isfinite(got).all()
    assert (got - wanted).norm() <= 5e-2 * wanted.norm()


def test_attached_to_a_pipeline(cuda_dit):
    pipe = tiny_pipe(cuda_dit)

    def images(batch: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(0)
        return pipe(list(range(batch)), num_inference_steps=6, generator=generator, output_type="pt").images

    exe = compiled(cuda_dit, pipe.scheduler, backend="eager", exact=True)
    for batch in (1, 3):
        with Oracle.of(cuda_dit, exe.plan).in_place_of_model():
            wanted = images(batch)
        exe.attach(pipe)
        assert torch.equal(images(batch), wanted)
        exe.detach()


def test_inputs_on_another_device_are_refused(cuda_dit):
    plan = sg.make_plan("full", model=cuda_dit, scheduler=tiny_scheduler("ddim"), steps=2)
    with pytest.raises(sg.CompileError, match="the model is on cuda:0, but the input hidden_states is on cpu"):
        sg.compile(cuda_dit, plan, inputs(), backend="eager")


def test_the_fused_update_never_waits_for_the_device(cuda_dit):
    """Coefficients lie on the device from the start, so that nothing in the loop synchronises; the result is the CPU's."""
    own = prepare_scheduler(diffusers.DPMSolverMultistepScheduler(), 6, "cuda")
    found = linear_steps(own, {})
    outputs = [tuple(noise(2, seed).cuda() for seed in (2 * step + 1, 2 * step + 2)) for step in range(6)]

    def run(update, latents, device):
        for given, t in zip(outputs, own.timesteps, strict=True):
            latents = update(update.scaled(latents, t), [value.to(device) for value in given], t)
        return latents

    wanted = run(FusedUpdate(found, noise(2), 4.0), noise(2), "cpu")
    # Kernels are tuned when first called, which waits.
    run(FusedUpdate(found, noise(2).cuda(), 4.0), noise(2).cuda(), "cuda")
    update, start = FusedUpdate(found, noise(2).cuda(), 4.0), noise(2).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(update, start, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert error(got.cpu(), wanted) <= tolerance(OP, torch.float32)
