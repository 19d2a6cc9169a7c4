"""Compiled and parallel wrappers are looked beneath; hooks that move, cast or skip are refused by name."""

import accelerate
import diffusers
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import AlignDevicesHook, CpuOffload, ModelHook, SequentialHook, add_hook_to_module
from torch import nn

import stepgraph as sg
from helpers.pipes import images, pipe  # noqa: F401
from helpers.tiny import inputs, tiny_dit
from stepgraph.errors import CompileError
from stepgraph.wrapped_models import forward_signature, refuse_offload, unwrapped

STEPS = 4


def plan_of(model: nn.Module) -> sg.CachePlan:
    return sg.make_plan("interval", model=model, scheduler=diffusers.DDIMScheduler(), steps=STEPS, every=2)


def exact(model: nn.Module) -> sg.Executable:
    return sg.compile(model, plan_of(model), inputs(2), backend="eager", exact=True)


def refusing(graph: torch.fx.GraphModule, example: list[torch.Tensor]):
    """A backend of torch.compile that must not be reached."""
    raise AssertionError("compiled code was asked for")


def expected_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(2)).sample


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend=refusing),
        lambda model: nn.DataParallel(model),
        lambda model: nn.DataParallel(torch.compile(model, backend=refusing)),
    ],
    ids=["torch.compile", "DataParallel", "both"],
)
def test_the_model_beneath_a_wrapper_is_planned_and_compiled(wrap):
    model = tiny_dit()
    wrapped = wrap(model).eval()
    exe = exact(wrapped)
    assert exe.model is model is unwrapped(wrapped)
    assert exe.plan.header.model == "DiTTransformer2DModel"
    assert torch.equal(exe.session()(**inputs(2)).sample, expected_of(model))


def test_a_distributed_wrapper_is_looked_beneath(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny_dit())
        exe = exact(wrapped.eval())
        assert exe.model is wrapped.module
        assert torch.equal(exe.session()(**inputs(2)).sample, expected_of(wrapped.module))
    finally:
        dist.destroy_process_group()


def test_what_a_module_has_compiled_is_not_its_forward():
    model = tiny_dit()
    expected = expected_of(model)
    # Diffusers leaves it to the class which blocks these are; DiT's names none.
    model._repeated_blocks = [type(model.transformer_blocks[0]).__name__]
    model.compile_repeated_blocks(backend=refusing)
    assert model.transformer_blocks[0]._compiled_call_impl is not None
    for part in (model, model.transformer_blocks[0], model.transformer_blocks[1].attn1.to_q, model.pos_embed.proj):
        part.compile(backend=refusing)
    exe = exact(model)
    assert torch.equal(exe.session()(**inputs(2)).sample, expected)
    # Weights are the model's own, whatever was put in its place.
    with torch.no_grad():
        model.transformer_blocks[1].attn1.to_q.weight.mul_(2)
    changed = exe.session()(**inputs(2)).sample
    assert not torch.equal(changed, expected)


@pytest.mark.parametrize("way", ["in place", "wrapper"])
def test_a_compiled_transformer_is_attached_and_given_back(pipe, way: str):  # noqa: F811
    plain = images(pipe)
    if way == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    before = pipe.transformer._compiled_call_impl, vars(pipe.transformer).get("forward")
    plan = sg.make_plan("full", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS)
    exe = sg.compile(pipe.transformer, plan, inputs(2), backend="eager", exact=True).attach(pipe)
    torch.testing.assert_close(images(pipe), plain, rtol=0, atol=0)
    exe.detach()
    assert before == (pipe.transformer._compiled_call_impl, vars(pipe.transformer).get("forward"))


class Louder(diffusers.DiTTransformer2DModel):
    """A subclass whose forward is its own."""

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.sample = result.sample * 2
        return result


def test_a_subclass_is_traced_as_it_is():
    plain = tiny_dit()
    model = Louder.from_config(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    exe = exact(model)
    assert exe.plan.header.model == "Louder"
    assert torch.equal(exe.session()(**inputs(2)).sample, expected_of(plain) * 2)
    with pytest.raises(sg.PlanError, match="the plan is for Louder; this model is DiTTransformer2DModel"):
        sg.compile(plain, exe.plan, inputs(2), backend="eager")
    assert next(iter(forward_signature(model).parameters)) == "hidden_states"


class FSDPModule:
    """Stands in for what torch's fully_shard mixes into a module's class."""


class FSDPLinear(FSDPModule, nn.Linear):
    """A sharded module."""


def test_sharded_models_are_refused_by_name():
    with pytest.raises(CompileError, match="FSDPLinear is sharded over processes"):
        unwrapped(FSDPLinear(2, 2))


def add(hook: ModelHook):
    return lambda model: add_hook_to_module(model.transformer_blocks[1], hook)


class Adds(ModelHook):
    """A hook of a user's own."""

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output + 1


HOOKS = {
    "sequential offload": (add(AlignDevicesHook("cpu", offload=True)), r"blocks\.1 has .* AlignDevicesHook: sequential CPU"),
    "model offload": (lambda model: add_hook_to_module(model, CpuOffload("cpu")), r"DiT.* hook CpuOffload: model CPU offload"),
    "in a sequence": (add(SequentialHook(AlignDevicesHook("cpu"), CpuOffload("cpu"))), "hook CpuOffload"),
    "own": (add(Adds()), "hook Adds: it changes what the module does"),
    "layerwise casting": (
        lambda model: model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32),
        "diffusers hook layerwise_casting: layerwise casting",
    ),
    "first-block cache": (
        lambda model: diffusers.hooks.apply_first_block_cache(model, diffusers.hooks.FirstBlockCacheConfig(threshold=0.1)),
        "has the diffusers hook",
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_change_what_runs_are_refused_by_name(name: str):
    hook, said = HOOKS[name]
    model = tiny_dit()
    exe = exact(model) if name in ("model offload", "layerwise casting") else None
    if exe is not None:
        exe.session()(**inputs(2))
    hook(model)
    with pytest.raises(CompileError, match=said):
        refuse_offload(model)
    with pytest.raises(CompileError, match=said):
        sg.make_plan("full", model=model, scheduler=diffusers.DDIMScheduler(), steps=STEPS)
    if exe is not None:
        with pytest.raises(CompileError, match=said):
            exe.session()(**inputs(2))


def test_group_offload_is_refused_when_attaching(pipe):  # noqa: F811
    plan = sg.make_plan("full", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS)
    exe = sg.compile(pipe.transformer, plan, inputs(2), backend="eager", exact=True)
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer.transformer_blocks[0])
    registry.register_hook(diffusers.hooks.ModelHook(), "group_offloading")
    with pytest.raises(CompileError, match="diffusers hook group_offloading: group offload"):
        exe.attach(pipe)
    registry.remove_hook("group_offloading")
    exe.attach(pipe).detach()


def test_a_hook_that_keeps_inputs_on_the_device_is_let_be():
    model = tiny_dit()
    expected = expected_of(model)
    for part in (model, model.transformer_blocks[0], model.transformer_blocks[0].attn1.to_q):
        add_hook_to_module(part, AlignDevicesHook("cpu", io_same_device=True))
    exe = exact(model)
    assert torch.equal(exe.session()(**inputs(2)).sample, expected)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
