"""What an executable promises outside a run: immutability, refusals, and costs."""

import copy
import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import stepgraph as sg
from helpers.tiny import inputs, tiny_scheduler
from stepgraph.config import CompileConfig
from stepgraph.errors import CompileError
from stepgraph.plan import CachePlan
from stepgraph.runtime.executable import Executable

CONFIG = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "sample_size": 8,
    "num_embeds_ada_norm": 10,
}  # fmt: skip


@pytest.fixture
def model() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(**CONFIG).eval()


def compiled(model: DiTTransformer2DModel, **options: object) -> Executable:
    plan = sg.make_plan("interval", model=model, scheduler=DDIMScheduler(), steps=4, every=2)
    return sg.compile(model, plan, sg.example_inputs(model, 2), backend="eager", **options)


def test_an_executable_cannot_be_changed(model: DiTTransformer2DModel):
    executable = compiled(model)
    with pytest.raises(dataclasses.FrozenInstanceError):
        executable.plan = None


def test_sessions_do_not_disturb_each_other(model: DiTTransformer2DModel):
    executable = compiled(model, exact=True)
    inputs = [{**sg.example_inputs(model, 2), "hidden_states": torch.randn(2, 4, 8, 8)} for _ in range(2)]
    alone = []
    for given in inputs:
        session = executable.session()
        alone.append([session(**given).sample for _ in range(4)])
    first, second = executable.session(), executable.session()
    for step in range(4):
        assert torch.equal(first(**inputs[0]).sample, alone[0][step])
        assert torch.equal(second(**inputs[1]).sample, alone[1][step])


def test_a_finished_session_says_so(model: DiTTransformer2DModel):
    executable, inputs = compiled(model), sg.example_inputs(model, 2)
    session = executable.session()
    for _ in range(4):
        session(**inputs)
    with pytest.raises(CompileError, match="all 4 steps of the plan have run"):
        session(**inputs)


def test_weights_are_used_by_reference(model: DiTTransformer2DModel):
    executable, inputs = compiled(model, exact=True), sg.example_inputs(model, 2)
    inputs["hidden_states"] = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        model.proj_out_2.weight.mul_(2)
        expected = model(**inputs).sample
    assert torch.equal(executable.session()(**inputs).sample, expected)


def test_replaced_modules_are_refused_and_named(model: DiTTransformer2DModel):
    executable = compiled(model)
    model.transformer_blocks[0].ff = torch.nn.Sequential(model.transformer_blocks[0].ff, torch.nn.Linear(32, 32))
    with pytest.raises(CompileError, match=r"other parts than when it was compiled.*transformer_blocks\.0\.ff"):
        executable.session()(**sg.example_inputs(model, 2))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.pos_embed.register_forward_hook(lambda *_: None), r"pos_embed \(forward hook 0\)"),
        (lambda m: setattr(m.pos_embed, "forward", lambda *a: None), r"pos_embed\.forward"),
        (lambda m: m.transformer_blocks[0].attn1.set_processor(AttnProcessor()), r"attn1\.processor"),
    ],
)
def test_other_parts_are_refused_and_named(model: DiTTransformer2DModel, change, named: str):
    executable = compiled(model)
    change(model)
    with pytest.raises(CompileError, match=named):
        executable.session()(**sg.example_inputs(model, 2))


def test_autocast_is_refused(model: DiTTransformer2DModel):
    executable, inputs = compiled(model), sg.example_inputs(model, 2)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CompileError, match="autocast is on"):
        executable.session()(**inputs)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.nn.functional.layer_norm else result


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_around_a_run_are_refused(model: DiTTransformer2DModel):
    executable, inputs = compiled(model), sg.example_inputs(model, 2)
    session = executable.session()
    for mode in (Doubled, Watched):
        with mode(), pytest.raises(CompileError, match=mode.__name__):
            executable.session()(**inputs)
    with torch.device("cpu"), FlopCounterMode(display=False) as counter:
        session(**inputs)
    assert counter.get_total_flops() > 0
    # Also where it begins within a run.
    with Doubled(), pytest.raises(CompileError, match="Doubled"):
        session(**inputs)


def test_inference_mode_and_new_batch_sizes(model: DiTTransformer2DModel):
    executable = compiled(model, exact=True)
    for batch in (2, 3):
        given = {**sg.example_inputs(model, batch), "hidden_states": torch.randn(batch, 4, 8, 8)}
        with torch.no_grad():
            wanted = model(**given).sample
        with torch.inference_mode():
            session = executable.session()
            assert torch.equal(session(**given).sample, wanted)
            session(**given)


def test_sizes_come_from_the_model_and_not_from_the_plan_file(model: DiTTransformer2DModel):
    executable = compiled(model)
    plan = executable.plan
    lying = CachePlan(plan.header, tuple(dataclasses.replace(site, bytes=10**9) for site in plan.sites), plan.rows)
    again = sg.compile(model, lying, sg.example_inputs(model, 2), backend="eager")
    assert again.memory() == executable.memory()


def test_a_row_that_stores_the_residual_behind_a_reused_block_pays_for_its_tokens(model: DiTTransformer2DModel):
    actions = {"transformer_blocks.0": "CRCC", "stack_residual": "CCRC"}
    plan = sg.make_plan("manual", model=model, scheduler=DDIMScheduler(), steps=4, actions=actions)
    executable = sg.compile(model, plan, sg.example_inputs(model), backend="eager")
    assert plan.summary().macs == executable.macs().computed


def test_a_model_with_an_executable_attached_is_not_copied(model: DiTTransformer2DModel):
    class Pipe:
        transformer, scheduler = model, DDIMScheduler()

    executable = compiled(model).attach(Pipe())
    with pytest.raises(CompileError, match="detach it before copying"):
        copy.deepcopy(model)
    executable.detach()
    copy.deepcopy(model)


def test_an_executable_shows_itself_in_one_line(model: DiTTransformer2DModel):
    assert repr(compiled(model)) == "<Executable: DiTTransformer2DModel, interval plan of 4 steps, 2 variants, eager>"


def test_a_tuple_is_returned_where_it_is_asked_for(model: DiTTransformer2DModel):
    executable, inputs = compiled(model, exact=True), sg.example_inputs(model, 2)
    (plain,) = executable.session()(**inputs, return_dict=False)
    assert torch.equal(plain, executable.session()(**inputs).sample)


@pytest.mark.parametrize(("step", "inside"), [(0, True), (3, True), (4, False), (-1, False)])
def test_print_readable_takes_the_steps_of_the_plan(model: DiTTransformer2DModel, step: int, inside: bool):
    executable = compiled(model)
    if inside:
        assert "def forward(self, hidden_states" in executable.print_readable(step)
    else:
        with pytest.raises(sg.PlanError, match="the plan has steps 0 to 3"):
            executable.print_readable(step)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"backend": "tvm"}, "backend is 'tvm'; expected one of eager, inductor"), ({"exact": True}, "pass backend='eager'")],
)
def test_options_that_make_no_sense_are_refused(model: DiTTransformer2DModel, options: dict[str, object], said: str):
    plan = sg.make_plan("full", model=model, scheduler=DDIMScheduler(), steps=2)
    with pytest.raises(ValueError, match=said):
        sg.compile(model, plan, sg.example_inputs(model), **options)


def test_inputs_on_another_device_are_refused(model: DiTTransformer2DModel):
    plan = sg.make_plan("full", model=model, scheduler=DDIMScheduler(), steps=2)
    inputs = {name: value.to("meta") for name, value in sg.example_inputs(model).items()}
    with pytest.raises(CompileError, match="the model is on cpu, but the input hidden_states is on meta"):
        sg.compile(model, plan, inputs, backend="eager")


def test_a_plan_from_stats_has_the_guidance_it_is_made_for(model: DiTTransformer2DModel):
    stats = sg.calibrate(model, DDIMScheduler(), steps=2, samples=1)
    plan = sg.make_plan("interval", stats, every=2, guidance="separate")
    assert plan.header.branches == ("cond", "uncond")
    assert (plan.header.seed, plan.header.samples) == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hoist": "no"}, "hoist is 'no'; expected True or False"),
        ({"offload": 1}, "offload is 1; expected True or False"),
        ({"hoist_limit_mb": "big"}, "hoist_limit_mb is 'big'; expected a number, or None"),
        ({"cuda_graphs": "auto"}, "cuda_graphs is 'auto'; expected True or False, or None"),
        ({"cuda_graphs": 1}, "cuda_graphs is 1; expected True or False, or None"),
    ],
)
def test_options_of_another_kind_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CompileConfig(**options)


def test_new_shapes_are_compiled_aloud(dit, caplog):
    plan = sg.make_plan("full", model=dit, scheduler=tiny_scheduler("ddim"), steps=2)
    exe = sg.compile(dit, plan, inputs(1), backend="eager")
    with caplog.at_level("WARNING", logger="stepgraph"):
        exe.session()(**inputs(1))
        assert not caplog.records
        exe.session()(**inputs(3))
    assert [record for record in caplog.records if "compiled for inputs of other shapes" in record.message]
