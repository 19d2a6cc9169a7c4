"""Learning-to-Cache: the training itself, and its checkpoints."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverSinglestepScheduler

import stepgraph as sg
from helpers.routers import SMALL, train, trajectories
from helpers.tiny import labels, noise, tiny_dit
from stepgraph.compiler.routers.router_settings import RouterSettings, settings_of
from stepgraph.errors import PlanError


def test_only_logits_are_trained(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.pos_embed.proj.weight.requires_grad_(False)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    trained = train(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.pos_embed.proj.weight.requires_grad_(True)
    assert trained.history.shape == (6, 2)
    moved = (trained.logits != 0).all(dim=1)
    assert moved.tolist() == [False, True, False, True]


def test_the_same_seed_trains_the_same_routers(model, router):
    assert torch.equal(train(model).logits, router.logits)
    assert not torch.equal(train(model, settings=replace(SMALL, seed=1)).logits, router.logits)


def test_the_loss_is_the_papers(model):
    """The first history entry, computed again with hooks on the eager model."""
    settings = replace(SMALL, iterations=1, batch=4, pool=4, init=1.0, label_dropout=0.0)
    trained = train(model, settings=settings)
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(settings.seed))
    source = trajectories(model, 4, seed=settings.seed + 2)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    offset = int(torch.randint(2, (1,), generator=generator))
    window = source.window(torch.tensor([0, 2])[(torch.arange(4) + offset) % 2], 1, generator)
    modules = [m for block in model.transformer_blocks for m in (block.attn1, block.ff)]
    stored = {}
    errors, sums = [], []
    for sample in range(4):
        full, routed = ({name: value[sample : sample + 1] for name, value in each.items()} for each in window.inputs)
        beta = 1 / (1 + torch.exp(-weights[int(window.steps[1, sample])]))
        with torch.no_grad():
            handles = [m.register_forward_hook(lambda _m, _i, out, i=i: stored.update({i: out})) for i, m in enumerate(modules)]
            model(**full)
            [handle.remove() for handle in handles]
            teacher = model(**routed).sample
            handles = [
                m.register_forward_hook(lambda _m, _i, out, i=i, beta=beta: (1 - beta[i]) * stored[i] + beta[i] * out)
                for i, m in enumerate(modules)
            ]
            student = model(**routed).sample
            [handle.remove() for handle in handles]
        errors.append(float((student - teacher).double().square().mean()))
        sums.append(float(beta.sum()))
    assert trained.history[0].tolist() == pytest.approx([sum(errors) / 4, sum(sums) / 4], rel=1e-4)


def constant_feed_forward() -> torch.nn.Module:
    """Block 0's feed-forward returns the same at every step: reusing it costs nothing."""
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[0].ff.net[2].weight.zero_()
        model.transformer_blocks[0].ff.net[2].bias.fill_(0.5)
    return model


def test_what_never_changes_is_learnt_as_reusable():
    trained = train(constant_feed_forward(), settings=replace(SMALL, iterations=40, lam=1e-6, batch=16))
    routed = trained.logits[1::2]
    constant = trained.sites[1].name
    assert constant == "transformer_blocks.0.ff"
    # Nothing but lam moves its logits, downwards; every other module costs something to reuse.
    assert (routed[:, 1] < -0.5).all()
    assert (routed[:, [0, 2, 3]] > 0.5).all()
    plan = trained.reused(0.5)
    assert plan[1::2].tolist() == [[False, True, False, False]] * 2
    assert not plan[::2].any()


def test_lambda_decides_what_is_left():
    model = constant_feed_forward()
    nothing = train(model, settings=replace(SMALL, iterations=20, lam=0.0))
    # Without a price only the constant module has no reason to move.
    assert (nothing.logits[1::2, 1].abs() < 1e-3).all()
    assert (nothing.logits[1::2, [0, 2, 3]] > 0).all()
    everything = train(model, settings=replace(SMALL, iterations=20, lam=1e3))
    assert (everything.logits[1::2] < 0).all()
    assert everything.reused(0.5)[1::2].all()


def test_logits_are_clamped_unless_told_otherwise(model):
    wild = replace(SMALL, iterations=3, lr=10.0, lam=1e3)
    assert float(train(model, settings=wild).logits.min()) == -5.0
    assert float(train(model, settings=replace(wild, clamp=None)).logits.min()) < -20


@pytest.mark.parametrize("changes", [{"run": 2}, {"shift": 1}, {"loss": "sum"}, {"states": "q_sample"}], ids=str)
def test_the_other_settings_train_too(model, changes):
    trained = train(model, steps=5, settings=replace(SMALL, **changes))
    routed = ~torch.tensor(trained.full)
    assert (trained.logits[routed] != 0).all()
    assert (trained.logits[~routed] == 0).all()


def test_longer_runs_read_what_the_step_before_mixed(model):
    """With run 2, the second routed step's loss depends on the first one's logits."""
    from stepgraph.compiler.marking.describe import example_inputs, make_header
    from stepgraph.compiler.marking.traced_model import marked_graph
    from stepgraph.compiler.routers.mixed_model import MixedModel
    from stepgraph.compiler.routers.train_router import _Training

    settings = replace(SMALL, run=2, batch=4)
    marked = marked_graph(model, example_inputs(model, 4))
    header = make_header(model, DDIMScheduler(), 3, marked)
    states = trajectories(model, 4, steps=3)
    training = _Training(MixedModel(model, marked), states, header, settings)
    window = states.window(torch.zeros(4, dtype=torch.int64), 2, torch.Generator().manual_seed(0))
    _, stored = training.soft.fill(window.inputs[0])
    first = torch.full((4, 4), 0.5, requires_grad=True)
    _, mixed = training.soft.mix(window.inputs[1], stored, first)
    output, _ = training.soft.mix(window.inputs[2], mixed, torch.full((4, 4), 0.5))
    (gradient,) = torch.autograd.grad(output.square().sum(), [first])
    assert (gradient != 0).all()


def test_user_data_is_noised(model):
    settings = replace(SMALL, states="q_sample", iterations=2)
    given = {"data": noise(5), "conditioning": labels(1, 2, 3, 4, 5)}
    assert train(model, settings=settings, **given).history.shape == (2, 2)


def test_a_resumed_training_equals_an_uninterrupted_one(model, router, tmp_path):
    path = tmp_path / "checkpoint.safetensors"

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, checkpoint=path, every=2, on_step=stop)
    seen = []
    resumed = train(model, checkpoint=path, every=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 6), (6, 6)]
    assert torch.equal(resumed.logits, router.logits)
    assert torch.equal(resumed.history, router.history)
    # It can go on further than it was asked for at first.
    longer = train(model, settings=replace(SMALL, iterations=8), checkpoint=path)
    assert torch.equal(longer.logits, train(model, settings=replace(SMALL, iterations=8)).logits)


def test_a_checkpoint_of_another_training_is_refused(model, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    train(model, checkpoint=path)
    with pytest.raises(PlanError, match=r"begun with lam 0\.0001, asked for is 0\.5; remove the file"):
        train(model, settings=replace(SMALL, lam=0.5), checkpoint=path)
    with pytest.raises(PlanError, match="trained for fingerprint"):
        train(tiny_dit(seed=1), checkpoint=path)
    with pytest.raises(PlanError, match="trained for steps 4, but the plan is for 6"):
        train(model, steps=6, checkpoint=path)
    with pytest.raises(PlanError, match="already at iteration 6, asked for are 3"):
        train(model, settings=replace(SMALL, iterations=3), checkpoint=path)


def test_a_checkpoint_of_other_data_is_refused(model, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    settings = replace(SMALL, states="q_sample", iterations=1)
    train(model, settings=settings, data=noise(2), conditioning=labels(1, 2), checkpoint=path)
    with pytest.raises(PlanError, match="begun on other data"):
        train(model, settings=settings, data=noise(2, seed=1), conditioning=labels(1, 2), checkpoint=path)


def test_bad_data(model):
    noised = replace(SMALL, states="q_sample")
    with pytest.raises(PlanError, match=r"data is \[2, 3\]; expected clean latents \[N, 4, 8, 8\]"):
        train(model, settings=noised, data=torch.zeros(2, 3))
    with pytest.raises(PlanError, match="conditioning lacks class_labels, which DiTTransformer2DModel needs"):
        train(model, settings=noised, data=noise(2))
    with pytest.raises(PlanError, match=r"conditioning class_labels is \[3\]; expected 2 rows, one per sample"):
        train(model, settings=noised, data=noise(2), conditioning=labels(1, 2, 3))
    with pytest.raises(PlanError, match="states is 'trajectory', where the model samples"):
        train(model, data=noise(2), conditioning=labels(1, 2))


def test_a_model_that_gives_nan_is_named():
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].bias.fill_(float("nan"))
    with pytest.raises(PlanError, match="the loss is nan at iteration 1"):
        train(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_uvit_preset_trains_under_its_solver(dit):
    scheduler = DPMSolverSinglestepScheduler(solver_order=2, lower_order_final=True)
    settings = settings_of("u-vit", {"iterations": 2, "batch": 4, "pool": 4, "init": 0.0})
    router = sg.train_router(dit, scheduler, steps=6, settings=settings)
    assert router.full == (True, True, False, True, False, True)
    moved = (router.logits != 0).any(dim=1).tolist()
    assert moved == [not full for full in router.full]


def test_a_router_whose_step_is_not_drawn_stands_still(dit):
    def trained(iterations: int) -> torch.Tensor:
        settings = RouterSettings(iterations=iterations, batch=1, pool=2, init=0.0, lr=0.1, states="trajectory")
        return sg.train_router(dit, DDIMScheduler(), steps=8, settings=settings).logits

    before = torch.zeros(8, trained(1).shape[1])
    for iterations in (1, 2, 3, 4):
        now = trained(iterations)
        # One sample per iteration is one routed step: momentum moves no other.
        assert int((now != before).any(dim=1).sum()) == 1
        before = now
