"""Weights that are no plain tensors: plans give what the quantised eager model gives, or name the class."""

import copy
import dataclasses

import diffusers
import gguf
import pytest
import torch
from torch import nn

import stepgraph as sg
from helpers.quantised import MAKERS, FourBit, QuantState, four_bit_dit, gguf_dit, torchao_dit, torchao_quantise
from helpers.tiny import inputs, tiny_dit
from stepgraph.compiler.tracing.trace import trace
from stepgraph.errors import ArgumentError, CompileError, MismatchError, TraceError
from stepgraph.fingerprint import fingerprint
from stepgraph.weight_kinds import inner_tensors, is_plain, kind_of, own_kinds, weight_bytes

STEPS = 4


def eager(model: nn.Module, **call: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**call).sample


def compiled(model: nn.Module, policy: str = "full", **options) -> sg.Executable:
    arguments = {"every": 2} if policy == "interval" else {}
    plan = sg.make_plan(policy, model=model, scheduler=diffusers.DDIMScheduler(), steps=STEPS, **arguments)
    return sg.compile(model, plan, inputs(2), **options)


@pytest.mark.parametrize("name", MAKERS)
def test_computing_everything_is_the_quantised_model_bit_for_bit(name: str):
    model = MAKERS[name]()
    kinds = {path: kind_of(weight) for path, weight in own_kinds(model).items()}
    assert kinds
    exe = compiled(model, backend="eager", exact=True)
    assert torch.equal(exe.session()(**inputs(2)).sample, eager(model, **inputs(2)))
    assert {path: kind_of(weight) for path, weight in own_kinds(model).items()} == kinds
    # Another batch is another trace; nothing of the weights was changed by the first.
    assert torch.equal(exe.session()(**inputs(3)).sample, eager(model, **inputs(3)))


def test_a_reused_attention_is_the_one_of_the_step_before():
    model = gguf_dit(gguf.GGMLQuantizationType.Q8_0)
    session = compiled(model, "interval", backend="eager", exact=True).session()
    session(**inputs(2))
    reused = session(**inputs(2, seed=1)).sample

    # The oracle: eager, with the blocks' attentions and feed-forwards answering what they answered for the first latents.
    stored: dict[str, torch.Tensor] = {}
    sites = {
        f"{i}.{child}": getattr(block, child) for i, block in enumerate(model.transformer_blocks) for child in ("attn1", "ff")
    }
    handles = [
        site.register_forward_hook(lambda module, args, value, name=name: stored.setdefault(name, value))
        for name, site in sites.items()
    ]
    eager(model, **inputs(2))
    expected = eager(model, **inputs(2, seed=1))
    for handle in handles:
        handle.remove()
    assert torch.equal(reused, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao int8", "GGUF Q8_0", "four bits"])
def test_regions_run_quantised_maps_between_them(name: str):
    model = MAKERS[name]()
    exe = compiled(model, "interval", backend="inductor")
    first = exe.session()(**inputs(2)).sample
    torch.testing.assert_close(first, eager(model, **inputs(2)), rtol=1e-4, atol=1e-5)
    with pytest.raises(CompileError, match="has quantised weights, which run as they are between compiled regions"):
        compiled(model, backend="inductor", regions=False)


def test_a_fingerprint_tells_kinds_and_inner_values():
    model = torchao_dit("Int8WeightOnlyConfig")
    before = fingerprint(model)
    assert before == fingerprint(copy.deepcopy(model))
    assert before.split("/")[0] == fingerprint(tiny_dit()).split("/")[0]
    dynamic = fingerprint(torchao_dit("Int8DynamicActivationInt8WeightConfig"))
    # The same numbers, used otherwise.
    assert dynamic != before
    weight = model.transformer_blocks[1].ff.net[2].weight
    weight.qdata[0, 0] += 1
    assert fingerprint(model) != before
    weight.qdata[0, 0] -= 1
    assert fingerprint(model) == before
    weight.scale.data.mul_(1.5)
    assert fingerprint(model) != before


def test_a_fingerprint_tells_bytes_from_what_they_mean():
    data, scales = torch.arange(32, dtype=torch.uint8)[:, None], torch.ones(8, 1)

    def print_of(**changes) -> str:
        module = nn.Module()
        module.weight = FourBit(
            data.clone(), QuantState(changes.get("absmax", scales), changes.get("shape", torch.Size((8, 8))))
        )
        return fingerprint(module)

    assert print_of() == print_of()
    assert len({print_of(), print_of(absmax=scales * 2), print_of(shape=torch.Size((4, 16)))}) == 3


def test_inner_tensors_of_every_kind():
    wrapper = torchao_dit("Int8WeightOnlyConfig").proj_out_1.weight
    assert inner_tensors(wrapper)["qdata"].dtype == torch.int8
    assert weight_bytes(wrapper) == sum(part.nbytes for part in inner_tensors(wrapper).values()) < wrapper.numel() * 4
    four = four_bit_dit().transformer_blocks[0].attn1.to_q.weight
    assert set(inner_tensors(four)) == {"", "quant_state.absmax"}
    assert all(is_plain(part) for part in inner_tensors(four).values())
    plain = nn.Parameter(torch.ones(2))
    assert inner_tensors(plain)[""] is plain


class Sealed(torch.Tensor):
    """A wrapper that says nothing of what it wraps."""

    @staticmethod
    def __new__(cls) -> "Sealed":
        return torch.Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Sealed has no {func}")


class Other(nn.Module):
    """Holds one weight and has children, so that it is inlined; what its forward does is given."""

    def __init__(self, weight: torch.Tensor, use) -> None:
        super().__init__()
        self.linear, self.use = nn.Linear(4, 4), use
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self, self.linear(x))


def test_an_unknown_class_is_refused_by_name():
    model = Other(Sealed(), lambda module, x: x).eval()
    with pytest.raises(MismatchError, match=r"a weight is a .*Sealed, which does not say what it is made of"):
        fingerprint(model)


@pytest.mark.slow
def test_a_weight_that_is_taken_apart_elsewhere_is_refused_by_name_and_place():
    four = FourBit(torch.zeros(4, 4, dtype=torch.uint8), QuantState(torch.ones(4, 1), torch.Size((4, 4))))
    for use in (lambda module, x: x + module.weight, lambda module, x: x * module.weight.data[:, 1:].sum()):
        with pytest.raises(TraceError, match=r"test_quantised.py:\d+ .*computes with 'weight' itself, a .*FourBit"):
            trace(Other(four, use).eval(), {"x": torch.ones(2, 4)})
    # What it is may be asked.
    ask = lambda module, x: x * (2 if module.weight.dtype == torch.uint8 and module.weight.size(0) == 4 else 3)  # noqa: E731
    model = Other(four, ask).eval()
    recorded = trace(model, {"x": torch.ones(2, 4)})
    assert torch.equal(recorded.bind(model)(torch.ones(2, 4))[0], model(torch.ones(2, 4)))


class Counting(nn.Linear):
    """Changes itself in every call."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda linear: setattr(linear, "__class__", Counting), "changes itself in every call"),
        (lambda linear: setattr(linear, "forward", lambda x: x.mul_(2)), "writes to what it is called with, or returns it"),
        (
            lambda linear: setattr(linear, "forward", lambda x: x @ torch.ones(3)),
            "cannot be called on cpu .* move the model to",
        ),
    ],
)
def test_what_a_node_cannot_do_is_refused_by_the_class(prepare, said: str):
    model = four_bit_dit()
    linear = model.transformer_blocks[0].attn1.to_q
    prepare(linear)
    with pytest.raises(TraceError, match=rf"attn1\.to_q, whose weight is a .*FourBit, {said}"):
        trace(model, inputs(2))
    assert getattr(linear, "calls", 0) == 0


def test_files_of_plain_tensors_do_not_take_quantised_weights(tmp_path):
    model = torchao_dit("Int8WeightOnlyConfig")
    exe = compiled(model, backend="eager", exact=True)
    with pytest.raises(CompileError, match=r"is a torchao\..*Int8Tensor, which a file of plain tensors does not hold"):
        exe.save(tmp_path / "with", with_weights=True)
    with pytest.raises(CompileError, match=r"Int8Tensor, which the format 'pt2' cannot hold"):
        exe.export(tmp_path / "export")
    exe.save(tmp_path / "without")
    again = sg.load(tmp_path / "without", torchao_dit("Int8WeightOnlyConfig"))
    assert torch.equal(again.session()(**inputs(2)).sample, eager(model, **inputs(2)))
    # The plan measured nothing, and follows the weights of the model it is loaded with.
    plain = tiny_dit()
    assert torch.equal(sg.load(tmp_path / "without", plain).session()(**inputs(2)).sample, eager(plain, **inputs(2)))


def test_factors_are_made_of_plain_weights():
    model = torchao_dit("Int8WeightOnlyConfig")
    with pytest.raises(ArgumentError, match=r"Int8Tensor; factors are made of plain weights"):
        sg.factorize(model, rank=2, method="svd")


def test_memory_counts_what_is_kept():
    model, plain = torchao_dit("Int8WeightOnlyConfig"), tiny_dit()
    figures = [dataclasses.asdict(compiled(one, backend="eager", exact=True).memory()) for one in (model, plain)]
    weights = [next(value for key, value in figure.items() if "weight" in key) for figure in figures]
    assert weights[0] == sum(map(weight_bytes, model.parameters())) < weights[1]


def test_weights_that_are_quantised_after_compiling_are_refused_by_their_class():
    model = tiny_dit()
    exe = compiled(model)
    exe.session()(**inputs(2))
    torchao_quantise(model, "Int8WeightOnlyConfig")
    with pytest.raises(CompileError, match=r"has the class torchao\..*; the executable was compiled for Tensor"):
        exe.session()(**inputs(2))
