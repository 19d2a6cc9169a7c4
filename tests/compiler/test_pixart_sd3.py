"""PixArt and SD3: their sites, what these cost, and compiled plans against the oracle, bit for bit."""

from collections import Counter

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepgraph as sg
from helpers.distance import SAME_RUN, error
from helpers.families import compare, random_rows
from helpers.oracle import run_loop
from helpers.oracle_families import PixArtOracle, SD3Oracle
from helpers.pixart_sd3 import IMAGE, PIXART, SD3, STEPS, TEXT, WIDTH, pixart_inputs, planned, scheduler_of, sd3_inputs
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.compiler.models import family_of
from stepgraph.errors import CompileError, PlanError
from stepgraph.node_facts import PROVIDER, op_of
from stepgraph.plan import MODULE_KINDS, CachePlan


@pytest.fixture(scope="module")
def pixart() -> diffusers.PixArtTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(**PIXART).eval()


@pytest.fixture(scope="module")
def sd3() -> diffusers.SD3Transformer2DModel:
    """Three blocks, the first of them with SD3.5's second attention."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(**SD3).eval()


def run(predict, scheduler, steps: int, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every output of the model in a plain sampling loop, and the final latents."""
    conditioning = {name: value for name, value in inputs.items() if name not in ("hidden_states", "timestep")}
    final, outputs = run_loop(predict, scheduler, inputs["hidden_states"], steps, cond=conditioning)
    return [*outputs, final]


def checked(model, oracle: type, inputs, plan: CachePlan, unread: int | None = 0):
    """A plan as program and as oracle; the oracle that ran."""
    answers = oracle.of(model, plan)
    compare(model, plan, answers, scheduler_of(model), inputs, run, unread)
    return answers


# -- PixArt --------------------------------------------------------------------------------------------------------------


def test_pixart_sites_lie_where_its_blocks_compute_them(pixart):
    blocks = [
        (f"transformer_blocks.{i}{name}", kind)
        for i in range(2)
        for name, kind in ((".attn1", "attn"), (".attn2", "cross_attn"), (".ff", "ff"), ("", "block"))
    ]
    whole = [(kind, kind) for kind in ("stack_residual", "hidden", "output")]
    assert [(site.name, site.kind) for site in marked_graph(pixart, pixart_inputs()).sites] == blocks + whole


@pytest.mark.parametrize("batch", [1, 3])
def test_pixart_sites_cost_what_their_formulas_say(pixart, batch):
    n, m, c = IMAGE, TEXT, WIDTH
    expected = {
        "transformer_blocks.0.attn1": 4 * n * c * c + 2 * n * n * c,
        # Queries and output for every image token, keys and values for every text token.
        "transformer_blocks.0.attn2": 2 * n * c * c + 2 * m * c * c + 2 * n * m * c,
        "transformer_blocks.0.ff": 8 * n * c * c,
    }
    marked = marked_graph(pixart, pixart_inputs(batch))
    sites = {site.name: site for site in marked.sites}
    assert {name: sites[name].macs for name in expected} == expected
    patches, head = n * 4 * 4 * c, n * c * 4 * 8
    # The time embedding and its modulation, and the two layers of the text's projection.
    shared, text = 256 * c + c * c + 6 * c * c, m * (12 * c + c * c)
    assert marked.macs == 2 * sum(expected.values()) + patches + head + shared + text
    assert {sites[name].bytes for name in expected} == {4 * n * c}


@pytest.mark.parametrize("kind", ["attn", "cross_attn", "ff", "block", "stack_residual", "hidden", "output"])
def test_pixart_reuses_every_kind_by_itself(pixart, kind):
    plan = planned(pixart, pixart_inputs(), {kind: "CRCR"})
    # Where every cross-attention is reused, nobody reads the projected text.
    unread = 2 * TEXT * (12 * WIDTH + WIDTH * WIDTH) if kind == "cross_attn" else 0
    oracle = checked(pixart, PixArtOracle, pixart_inputs(2), plan, unread)
    assert sum(oracle.executed[1].values()) < sum(oracle.executed[0].values())
    assert (kind == "output") == (not oracle.executed[1])


@pytest.mark.parametrize("exact", [True, False])
def test_pixart_corrects_the_cross_attention(pixart, exact):
    """Queries are corrected for the tokens' drift, and keys and values for the text's, which has none."""
    names = [f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    paths = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in names]
    maps = {path: (torch.randn(WIDTH, 4) / 8, torch.randn(4, WIDTH) / 8) for path in paths}
    plan = planned(pixart, pixart_inputs(), {"cross_attn": "CLLC", "ff": "CRCR"})
    header = plan.header
    factors = sg.Factors(header.model, header.fingerprint, header.dtype, "svd", {}, maps)
    exe = sg.compile(pixart, plan, pixart_inputs(2), backend="eager", exact=exact, factors=factors)
    got = run(exe.session(), scheduler_of(pixart), STEPS, pixart_inputs(2))
    wanted = run(PixArtOracle.of(pixart, plan, maps), scheduler_of(pixart), STEPS, pixart_inputs(2))
    reused = run(PixArtOracle.of(pixart, planned(pixart, pixart_inputs(), {"cross_attn": "CRRC", "ff": "CRCR"})),
                 scheduler_of(pixart), STEPS, pixart_inputs(2))  # fmt: skip
    assert error(got[-1], wanted[-1]) < 2e-6 < error(reused[-1], wanted[-1])
    corrected = Counter(exe.default.variants[exe.default.rows[1]].providers)
    # A block's queries; its keys and values, which read the same text; its output.
    assert sum(count for name, count in corrected.items() if name.startswith("lowrank_delta")) == 2 * 3
    n, m, c, rank = IMAGE, TEXT, WIDTH, 4
    saved = 2 * (2 * n * c * c + 2 * m * c * c - (2 * n + 2 * m) * 2 * c * rank)
    skipped = {site.name: site.macs for site in exe.plan.sites}
    fresh = exe.macs().per_step[3] + 2 * sum(skipped[f"transformer_blocks.{i}.ff"] for i in range(2))
    assert exe.macs().per_step[2] == fresh - 2 * saved


# The sizes' embeddings have a third of the width each.
SIZED = PIXART | {"use_additional_conditions": True, "attention_head_dim": 24, "cross_attention_dim": 48}


@pytest.fixture(scope="module")
def sized_pixart() -> diffusers.PixArtTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(**SIZED).eval()


def sized_inputs(height: float = 1024.0, width: float = 768.0, batch: int = 2) -> dict:
    sizes = {"resolution": torch.tensor([[height, width]] * batch), "aspect_ratio": torch.full((batch, 1), height / width)}
    return {**pixart_inputs(batch), "added_cond_kwargs": sizes}


def test_a_pixart_conditioned_on_sizes_equals_the_oracle_to_the_bit(sized_pixart):
    """Tensors inside a dict are inputs; plain and with reuse, on the samplers' own timesteps."""
    for actions in ({}, {"attn": "CRCR", "ff": "CCRR"}):
        plan = planned(sized_pixart, sized_inputs(), actions)
        assert plan.header.shapes["added_cond_kwargs__resolution"] == (2,)
        assert plan.header.shapes["added_cond_kwargs__aspect_ratio"] == (1,)
        checked(sized_pixart, PixArtOracle, sized_inputs(), plan)


@pytest.mark.parametrize("exact", [True, False])
def test_the_sizes_are_hoisted_and_compared_at_every_call(sized_pixart, exact):
    plan = planned(sized_pixart, sized_inputs(), {})
    exe = sg.compile(sized_pixart, plan, sized_inputs(), backend="eager", exact=exact)
    modules = [str(n.target) for n in exe.default.variants[0].graph.graph.nodes if n.op == "call_module"]
    assert not [name for name in modules if "embedder" in name]
    assert {"added_cond_kwargs__resolution", "added_cond_kwargs__aspect_ratio"} <= set(exe.default.hoisted.inputs)
    session, times = exe.session(), [int(t) for t in plan.header.timesteps]
    other = sized_inputs(512.0, 2048.0)["added_cond_kwargs"]
    calls = [sized_inputs() for _ in times]
    calls[1]["added_cond_kwargs"] = other
    calls[2]["added_cond_kwargs"] = {**other, "resolution": other["resolution"].clone().fill_(256.0)}
    calls[3]["added_cond_kwargs"] = calls[2]["added_cond_kwargs"]
    results = []
    for number, (t, call) in enumerate(zip(times, calls, strict=True)):
        if number == 3:
            call["added_cond_kwargs"]["aspect_ratio"].fill_(3.0)
        call["timestep"] = torch.full((2,), t)
        with torch.no_grad():
            found, expected = session(**call).sample, sized_pixart(**call).sample
            apart = sized_pixart(**{**call, "added_cond_kwargs": sized_inputs()["added_cond_kwargs"]}).sample
        assert torch.equal(found, expected) if exact else error(found, expected) < SAME_RUN, number
        results.append(error(apart, expected))
    assert results[0] == 0
    assert min(results[1:]) > 1e-4


def test_an_artifact_keeps_the_sizes_inside_a_dict(sized_pixart, tmp_path):
    exe = sg.compile(sized_pixart, planned(sized_pixart, sized_inputs(), {"ff": "CRCR"}), sized_inputs(), backend="eager")
    exe.save(tmp_path / "pixart.zip")
    loaded = sg.load(tmp_path / "pixart.zip", sized_pixart, verify=True)
    call = sized_inputs(640.0, 896.0) | {"timestep": torch.full((2,), int(exe.plan.header.timesteps[0]))}
    assert loaded.program(call) is loaded.default
    assert torch.equal(loaded.session()(**call).sample, exe.session()(**call).sample)


def test_other_sizes_inside_a_dict_are_another_signature_or_refused(sized_pixart):
    plan = planned(sized_pixart, sized_inputs(), {})
    exe = sg.compile(sized_pixart, plan, sized_inputs(), backend="eager")
    assert exe.program(sized_inputs(640.0, 640.0)) is exe.default
    assert exe.program(sized_inputs(batch=1)) is not exe.default
    wide = sized_inputs()
    wide["added_cond_kwargs"]["resolution"] = torch.zeros(2, 3)
    with pytest.raises(PlanError, match=r"added_cond_kwargs__resolution of shape \[batch, 2\]; given is \[batch, 3\]"):
        exe.program(wide)
    with pytest.raises(PlanError, match=r"the plan is for the tensor inputs .*added_cond_kwargs__resolution"):
        exe.program(pixart_inputs(2))
    with pytest.raises(CompileError, match="two inputs are named added_cond_kwargs__resolution"):
        exe.program({**sized_inputs(), "added_cond_kwargs__resolution": torch.zeros(2, 2)})


def test_example_inputs_of_a_pixart_for_large_images(sized_pixart):
    sizes = sg.example_inputs(sized_pixart, 3)["added_cond_kwargs"]
    assert sizes["resolution"].tolist() == [[64.0, 64.0]] * 3
    assert sizes["aspect_ratio"].tolist() == [[1.0]] * 3
    published = family_of(sized_pixart).example_inputs
    large = {**PIXART, "sample_size": 128, "use_additional_conditions": None}
    assert published(large, 1, torch.float32, torch.device("cpu"))["added_cond_kwargs"]["resolution"].tolist() == [[1024, 1024]]
    assert "added_cond_kwargs" not in published({**large, "sample_size": 64}, 1, torch.float32, torch.device("cpu"))


# -- SD3 -----------------------------------------------------------------------------------------------------------------


def test_sd3_sites_lie_where_its_blocks_compute_them(sd3):
    joint = (("attn", "attn"), ("attn:1", "context_attn"))
    rest = (("ff", "ff"), ("ff_context", "context_ff"))
    # The second attention of the first block; no text behind the last.
    children = ((*joint, ("attn2", "attn"), *rest), (*joint, *rest), (("attn", "attn"), ("ff", "ff")))
    blocks = [(f"transformer_blocks.{i}.{name}", kind) for i, own in enumerate(children) for name, kind in own]
    whole = [(kind, kind) for kind in ("stack_residual", "hidden", "output")]
    assert [(site.name, site.kind) for site in marked_graph(sd3, sd3_inputs()).sites] == blocks + whole


@pytest.mark.parametrize("batch", [1, 3])
def test_sd3_sites_cost_what_their_formulas_say(sd3, batch):
    n, m, c = IMAGE, TEXT, WIDTH
    joint = 3 * (n + m) * c * c + 2 * (n + m) * (n + m) * c
    expected = {
        "transformer_blocks.0.attn": joint + n * c * c,
        "transformer_blocks.0.attn:1": m * c * c,
        "transformer_blocks.0.attn2": 4 * n * c * c + 2 * n * n * c,
        "transformer_blocks.0.ff": 8 * n * c * c,
        "transformer_blocks.0.ff_context": 8 * m * c * c,
        # Nothing else reads what comes before the last attention on the side of the text: the feed-forward of the block
        # before, its attention's text output, and the last norm's modulation.
        "transformer_blocks.2.attn": joint + n * c * c + 8 * m * c * c + m * c * c + 2 * c * c,
    }
    marked = marked_graph(sd3, sd3_inputs(batch))
    sites = {site.name: site for site in marked.sites}
    assert {name: sites[name].macs for name in expected} == expected
    sizes = {"transformer_blocks.1.attn": n * c, "transformer_blocks.1.attn:1": m * c, "hidden": n * c}
    assert {name: sites[name].bytes for name in sizes} == {name: 4 * size for name, size in sizes.items()}
    assert sites["hidden"].macs - sites["stack_residual"].macs == n * 4 * 4 * c


@pytest.mark.parametrize("kind", ["attn", "context_attn", "ff", "context_ff", "stack_residual", "hidden", "output"])
def test_sd3_reuses_every_kind_by_itself(sd3, kind):
    # The two outputs of a joint attention are reused together.
    actions = {"attn": {"attn": "CRCR", "context_attn": "CRCR"}, "context_attn": {
        f"transformer_blocks.1.attn{output}": "CRCR" for output in ("", ":1")}}.get(kind, {kind: "CRCR"})  # fmt: skip
    plan = planned(sd3, sd3_inputs(), actions)
    assert any("R" in row for row in plan.rows)
    # Where every joint attention is reused, nobody reads the text.
    oracle = checked(sd3, SD3Oracle, sd3_inputs(2), plan, None if kind == "attn" else 0)
    assert sum(oracle.executed[1].values()) < sum(oracle.executed[0].values())
    assert (kind == "output") == (not oracle.executed[1])


def test_the_last_attention_of_sd3_is_reused_by_itself(sd3):
    plan = planned(sd3, sd3_inputs(), {"transformer_blocks.2.attn": "CRRC"})
    assert [row[plan.index("transformer_blocks.2.attn")] for row in plan.rows] == list("CRRC")
    checked(sd3, SD3Oracle, sd3_inputs(2), plan)


# -- both ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pixart", "sd3"])
def family(request):
    """The model, its oracle, what makes its inputs, and its configuration."""
    described = {"pixart": (PixArtOracle, pixart_inputs, PIXART), "sd3": (SD3Oracle, sd3_inputs, SD3)}
    return request.getfixturevalue(request.param), *described[request.param]


def test_computing_everything_is_the_eager_model(family):
    model, _, inputs, _ = family
    exe = sg.compile(model, planned(model, inputs(), {}), inputs(2), backend="eager", exact=True)
    eager, got = (run(predict, scheduler_of(model), STEPS, inputs(2)) for predict in (model, exe.session()))
    assert len(got) == STEPS + 1
    assert all(map(torch.equal, eager, got))


@settings(max_examples=6)
@given(data=st.data())
def test_random_plans_run(family, data):
    model, oracle, inputs, _ = family
    full = planned(model, inputs(), {}, steps=5)
    plan = CachePlan(full.header, full.sites, data.draw(random_rows(full.sites, 5)))
    checked(model, oracle, inputs(data.draw(st.sampled_from([1, 3]))), plan, unread=None)


def test_neither_is_sampled_by_name(family):
    model, _, _, config = family
    with pytest.raises(CompileError, match="conditioned on text embeddings"):
        family_of(model).conditioning(config, 1, torch.device("cpu"))


# -- fused ---------------------------------------------------------------------------------------------------------------

# Model -> norms and updates in each run where everything is computed, and updates in each run where all modules are reused.
FUSED = {
    # The two cross-attentions, which have no gates, are one stored sum.
    "pixart": (PixArtOracle, 2 * 2 + 1, [1] * 4, [2 * 2 + 1]),
    # The first block has three norms and updates for the image, those of its attentions one behind the other; the other two
    # blocks have two. The text of the last has a norm only.
    "sd3": (SD3Oracle, 3 + 2 + 2 + (2 + 2 + 1) + 1, [2] + [1] * 9, [7]),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("batch", [1, 3])
def test_modulations_and_gates_are_fused_and_give_the_same(name, batch, request):
    model, (oracle, norms, fresh, reused) = request.getfixturevalue(name), FUSED[name]
    given = (pixart_inputs if name == "pixart" else sd3_inputs)(batch)
    kinds = {site.kind for site in marked_graph(model, given).sites} & set(MODULE_KINDS)
    plan = planned(model, given, dict.fromkeys(kinds, "CRC"), steps=3)
    exe = sg.compile(model, plan, given, backend="eager")
    wanted, got = (run(who, scheduler_of(model), 3, given) for who in (oracle.of(model, plan), exe.session()))
    assert error(got[-1], wanted[-1]) < 2e-6
    found = []
    for variant in exe.default.rows:
        nodes = [n for n in exe.default.variants[variant].graph.graph.nodes if PROVIDER in n.meta]
        ops = Counter(op_of(n) for n in nodes)
        found.append((ops["modulated_norm"], [len(n.args[1]) for n in nodes if op_of(n) == "gated_residual"]))
    assert found == [(norms, fresh), (1, reused), (norms, fresh)]
