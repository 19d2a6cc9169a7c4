"""The soft plan: mixtures of stored and fresh values, exact at both ends, with the right gradients."""

import pytest
import torch

import stepgraph as sg
from helpers.tiny import inputs, labels, noise, tiny_dit
from stepgraph.compiler.interfaces.pass_context import PassContext
from stepgraph.compiler.marking.graphs import written_storages
from stepgraph.compiler.marking.mark_sites import bound_copy
from stepgraph.compiler.marking.traced_model import marked_graph
from stepgraph.compiler.passes.sites.soften_site import beta_name, soften_site
from stepgraph.compiler.routers.mixed_model import MixedModel
from stepgraph.node_facts import MARKER
from stepgraph.plan.liveness import VALUE, Read

MODULES = (0, 1, 3, 4)


def softened(model, reads=MODULES, batch: int = 1):
    marked = marked_graph(model, inputs(batch))
    gm = bound_copy(marked, model)
    context = PassContext(
        marked.sites, "C" * len(marked.sites), tuple(Read(i, VALUE, 1) for i in reads), (), written_storages(marked.graph)
    )
    return gm, context, marked


@pytest.mark.parametrize("reads", [(), (1,), MODULES])
def test_a_mixture_per_site(dit, reads):
    gm, context, marked = softened(dit, reads, batch=3)
    before = len(gm.graph.nodes)
    assert soften_site(gm, context) == len(reads)
    gm.graph.lint()
    assert len(gm.graph.nodes) == before + 3 * len(reads)
    mixed = [node for node in gm.graph.nodes if node.target is torch.lerp]
    assert [tuple(node.meta["val"].shape) for node in mixed] == [(3, 16, 32)] * len(reads)
    added = [node for node in gm.graph.nodes if node.op == "placeholder" and node.target.startswith("beta_")]
    assert {node.target for node in added} == {beta_name(marked.sites[i]) for i in reads}
    assert all(tuple(node.meta["val"].shape) == (3, 1, 1) for node in added)
    # The markers stay where they were, behind the mixtures.
    markers = [node for node in gm.graph.nodes if MARKER in node.meta]
    assert len(markers) == len(marked.sites)
    assert [m.meta[MARKER] for m in markers if m.args[0] in mixed] == list(reads)


def test_only_module_sites_are_mixed(dit):
    gm, context, _ = softened(dit, (2,))
    with pytest.raises(sg.CompileError, match=r"transformer_blocks\.0 is of kind 'block'; soft plans mix attn, "):
        soften_site(gm, context)


def soft_model(model, batch: int) -> MixedModel:
    return MixedModel(model, marked_graph(model, inputs(batch)))


def given(*timesteps: int, seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    latents = noise(len(timesteps), seed).to(dtype)
    return {"hidden_states": latents, "timestep": torch.tensor(timesteps), **labels(*range(len(timesteps)))}


def module_outputs(model, values) -> list[torch.Tensor]:
    """What the eager model's attention and feed-forward modules return, by forward hooks."""
    found = []
    handles = [
        module.register_forward_hook(lambda _m, _i, output: found.append(output.clone()))
        for block in model.transformer_blocks
        for module in (block.attn1, block.ff)
    ]
    model(**values)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def test_filling_gives_the_eager_model_and_its_pre_gate_values(dit):
    soft, values = soft_model(dit, 2), given(700, 300)
    output, stored = soft.fill(values)
    assert torch.equal(output, dit(**values).sample)
    hooked = module_outputs(dit, values)
    assert len(stored) == len(hooked) == 4
    assert all(map(torch.equal, stored, hooked))


@torch.no_grad()
def test_beta_one_is_the_eager_model(dit):
    soft = soft_model(dit, 2)
    _, stored = soft.fill(given(700, 300))
    values = given(600, 200, seed=1)
    output, mixed = soft.mix(values, stored, torch.ones(2, 4))
    assert torch.equal(output, dit(**values).sample)
    assert all(map(torch.equal, mixed, module_outputs(dit, values)))


@torch.no_grad()
def test_beta_zero_is_reuse_and_each_sample_has_its_own_weights(dit):
    soft = soft_model(dit, 2)
    _, stored = soft.fill(given(700, 300))
    values = given(600, 200, seed=1)
    beta = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.25, 1.0, 0.0]])
    output, mixed = soft.mix(values, stored, beta)

    # The same by hooks that replace what modules return.
    modules = [m for block in dit.transformer_blocks for m in (block.attn1, block.ff)]

    def mixing(weight, old):
        return lambda module, args, fresh: (1 - weight) * old + weight * fresh

    weights = [beta[:, i].reshape(2, 1, 1) for i in range(len(modules))]
    handles = [m.register_forward_hook(mixing(w, old)) for m, w, old in zip(modules, weights, stored, strict=True)]
    expected = dit(**values).sample
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(mixed[0][0], stored[0][0])
    assert torch.equal(mixed[3], stored[3])
    assert not torch.equal(mixed[2][1], stored[2][1])


def test_gradients_are_those_of_finite_differences():
    model = tiny_dit().double()
    marked = marked_graph(model, inputs(2) | {"hidden_states": noise(2).double()})
    soft = MixedModel(model, marked)
    with torch.no_grad():
        _, stored = soft.fill(given(700, 300, dtype=torch.float64))
    values = given(100, 40, seed=1, dtype=torch.float64)

    def loss(beta: torch.Tensor) -> torch.Tensor:
        return soft.mix(values, stored, beta)[0].square().mean()

    beta = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(loss, [beta.requires_grad_()])
