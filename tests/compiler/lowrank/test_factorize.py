"""Factors: their formulas written again in numpy, their optimality, and the ranks that a budget gives."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import stepgraph as sg
from helpers.corrections import measured_errors
from helpers.tiny import tiny_dit, tiny_scheduler
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.lowrank.allocate_ranks import RankedMap, allocate_ranks
from stepgraph.compiler.lowrank.covariances import Covariances, measure_covariances
from stepgraph.compiler.lowrank.decompose import reduced_rank_regression, scaled_svd, shrunk, weighted_svd
from stepgraph.compiler.lowrank.factorize import decompositions, factorize
from stepgraph.compiler.lowrank.map_errors import error_on, mean_error, worse_ranks
from stepgraph.compiler.lowrank.rank_report import RankReport, rank_report
from stepgraph.errors import PlanError

SETTINGS = {"steps": 5, "samples": 3, "seed": 3, "guidance_scale": 2.0}
SHAPES = [(12, 7), (7, 12), (9, 9)]


@pytest.fixture(scope="module")
def stats(dit) -> CalibrationStats:
    return sg.calibrate(dit, tiny_scheduler("ddim"), **SETTINGS)


@pytest.fixture(scope="module")
def covariances(dit) -> Covariances:
    return measure_covariances(dit, tiny_scheduler("ddim"), **SETTINGS, whole=True)


@pytest.fixture(scope="module")
def held_out(dit) -> Covariances:
    return measure_covariances(dit, tiny_scheduler("ddim"), **SETTINGS | {"seed": 4}, whole=True)


def weights(model) -> dict[str, np.ndarray]:
    inside = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and (".attn1." in n or ".ff." in n)}
    return {name: module.weight.detach().double().numpy() for name, module in inside.items()}


def product(factors, path: str) -> np.ndarray:
    a, b = factors.maps[path]
    return a.double().numpy() @ b.double().numpy()


def weighted_square(matrix, covariance) -> float:
    return float(np.einsum("ij,jk,ik->", matrix, covariance, matrix))


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def random_case(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W and a covariance with directions of very different size, correlated with one another."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    w, mix = torch.randn(shape, **draw), torch.randn(shape[1], shape[1], **draw)
    mix = mix * torch.logspace(0, -1.5, shape[1], dtype=torch.float64)
    return w, mix @ mix.T


@pytest.mark.parametrize("method", ["svd", "ca", "cd", "cov"])
def test_full_rank_gives_the_weights(dit, stats, covariances, method):
    source = {"svd": None, "ca": stats, "cd": stats, "cov": covariances}[method]
    made = factorize(dit, source, method=method, rank=32)
    found = weights(dit)
    assert set(made.maps) == set(found)
    for path, w in found.items():
        a, b = made.maps[path]
        assert (a.shape, b.shape) == ((w.shape[0], 32), (32, w.shape[1]))
        assert np.allclose(product(made, path), w, atol=3e-6), path
        # Both vectors of a term have one length.
        assert torch.allclose(a.norm(dim=0), b.norm(dim=1), rtol=1e-4)


def test_svd_is_the_truncated_one(dit):
    made = factorize(dit, method="svd", rank=5)
    for path, w in weights(dit).items():
        assert np.allclose(product(made, path), truncated(w, 5), atol=1e-6), path
    assert made.errors == {}
    assert (made.method, made.arguments["rank"], made.model) == ("svd", 5, "DiTTransformer2DModel")


@pytest.mark.parametrize("scale", ["in", "out", "both"])
@pytest.mark.parametrize("method", ["ca", "cd"])
def test_channel_weighted_factors_follow_the_papers_formula(dit, stats, method, scale):
    made = factorize(dit, stats, method=method, scale=scale, rank=6)
    what = {"ca": "magnitude", "cd": "change"}[method]
    for path, w in weights(dit).items():
        sides = []
        for side, name in (("in", "input"), ("out", "output")):
            mean = stats.channels[f"{path}/{name}_{what}_scaled"].numpy()
            s = np.sqrt(mean)
            s = np.maximum(s, s.max() / 1000) + 1e-6
            sides.append(s if scale in (side, "both") else np.ones_like(s))
        s_in, s_out = sides
        wanted = np.diag(1 / s_out) @ truncated(np.diag(s_out) @ w @ np.diag(s_in), 6) @ np.diag(1 / s_in)
        assert np.allclose(product(made, path), wanted, atol=2e-6), path
    assert made.arguments["scale"] == scale
    other = factorize(dit, stats, method={"ca": "cd", "cd": "ca"}[method], scale=scale, rank=6)
    assert made.digest != other.digest


@pytest.mark.parametrize("shape", SHAPES)
def test_covariance_weighted_terms_are_those_of_the_whitened_map(shape):
    w, covariance = random_case(shape)
    values, vectors = np.linalg.eigh(covariance.numpy())
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    inverse = vectors @ np.diag(1 / np.sqrt(values)) @ vectors.T
    terms = weighted_svd(w, covariance)
    singular = np.linalg.svd(w.numpy() @ root, compute_uv=False)
    assert np.allclose(terms.weights[: len(singular)].sqrt().numpy(), singular, rtol=1e-6)
    for rank in range(1, min(shape) + 1):
        a, b = (t.double().numpy() for t in terms.cut(rank))
        assert np.allclose(a @ b, truncated(w.numpy() @ root, rank) @ inverse, atol=1e-5), rank
        lost = weighted_square(w.numpy() - a @ b, covariance.numpy()) / weighted_square(w.numpy(), covariance.numpy())
        total = weighted_square(w.numpy(), covariance.numpy())
        assert 1 - float(terms.weights[:rank].sum()) / total == pytest.approx(lost, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_factors_have_a_smaller_weighted_error(shape):
    w, covariance = (t.numpy() for t in random_case(shape, seed=1))
    rank = 3
    a, b = (t.double().numpy() for t in weighted_svd(torch.from_numpy(w), torch.from_numpy(covariance)).cut(rank))
    best = weighted_square(w - a @ b, covariance)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            other = (a + size * rng.standard_normal(a.shape)) @ (b + size * rng.standard_normal(b.shape))
            assert weighted_square(w - other, covariance) >= best * (1 - 1e-6)
    # Alternating least squares from several starts finds the same error and none below it.
    found = []
    for _ in range(4):
        right = rng.standard_normal((rank, shape[1]))
        for _ in range(400):
            left = w @ covariance @ right.T @ np.linalg.inv(right @ covariance @ right.T)
            right = np.linalg.inv(left.T @ left) @ left.T @ w
        found.append(weighted_square(w - left @ right, covariance))
    assert min(found) == pytest.approx(best, rel=1e-5)
    assert all(error >= best * (1 - 1e-6) for error in found)


def test_covariance_weighted_factors_beat_all_others_on_what_they_were_made_from(dit, stats, covariances):
    made = factorize(dit, covariances, method="cov", rank=6, shrinkage=0.0)
    best = measured_errors(dit, made, covariances)
    assert made.errors == pytest.approx(best)
    others = {"svd": (None, None), "ca": (stats, "in"), "cd": (stats, "both")}
    for method, (source, scale) in others.items():
        for path, terms in decompositions(dit, source, list(made.maps), method, scale):
            assert best[path] <= error_on(dit, path, *terms.cut(6), method, covariances) + 1e-6, (method, path)


def test_more_rank_never_hurts_on_what_the_factors_were_made_from(dit, covariances):
    for path, terms in decompositions(dit, covariances, list(weights(dit)), "cov", shrinkage=0.0):
        errors = [error_on(dit, path, *terms.cut(rank), "cov", covariances) for rank in range(1, 33)]
        assert all(more <= less + 1e-6 for less, more in itertools.pairwise(errors)), path
        assert errors[-1] < 1e-5 < errors[0]


def test_shrinkage_of_ledoit_and_wolf(dit, covariances):
    path = "transformer_blocks.0.ff.net.2"
    found, numbers = covariances.matrix(path).numpy(), covariances.numbers[covariances.name_of(path)]
    size, mean = len(found), np.trace(found) / len(found)
    spread = np.sum((found - mean * np.eye(size)) ** 2)
    noise = (numbers["fourth"] - np.sum(found**2)) / numbers["rows"]
    share = min(noise / spread, 1)
    assert 0 < share < 1
    wanted = (1 - share) * found + share * mean * np.eye(size)
    assert np.allclose(shrunk(covariances, path, None).numpy(), wanted, atol=1e-9)
    assert np.array_equal(shrunk(covariances, path, 0.0).numpy(), found)
    assert np.allclose(shrunk(covariances, path, 1.0).numpy(), mean * np.eye(size))
    # With nothing but the identity the weighted factors are those of plain SVD.
    plain, same = factorize(dit, method="svd", rank=4), factorize(dit, covariances, rank=4, shrinkage=1.0)
    assert all(np.allclose(product(plain, p), product(same, p), atol=1e-5) for p in plain.maps)


@pytest.mark.parametrize("shape", SHAPES)
def test_reduced_rank_regression(shape):
    outputs, inputs = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, inputs)) @ rng.standard_normal((inputs, inputs))
    y = np.tanh(x @ rng.standard_normal((inputs, outputs))) + 0.1 * rng.standard_normal((200, outputs))
    cross, covariance, square = y.T @ x / 200, x.T @ x / 200, float((y**2).sum() / 200)
    terms = reduced_rank_regression(torch.from_numpy(cross), torch.from_numpy(covariance))
    full = cross @ np.linalg.inv(covariance)
    values, vectors = np.linalg.eigh(full @ covariance @ full.T)
    for rank in (1, 2, min(shape)):
        a, b = (t.double().numpy() for t in terms.cut(rank))
        u = vectors[:, ::-1][:, :rank]
        assert np.allclose(a @ b, u @ u.T @ full, atol=1e-5), rank
        residual = float(((y - x @ (a @ b).T) ** 2).sum() / 200)
        assert square - float(terms.weights[:rank].sum()) == pytest.approx(residual, rel=1e-4)
        for _ in range(30):
            other = (a + 0.01 * rng.standard_normal(a.shape)) @ (b + 0.01 * rng.standard_normal(b.shape))
            assert float(((y - x @ other.T) ** 2).sum() / 200) >= residual * (1 - 1e-6)
    assert values[-1] > 0
    with pytest.raises(PlanError, match="degenerate: some direction never changes"):
        reduced_rank_regression(torch.from_numpy(cross), torch.zeros(inputs, inputs, dtype=torch.float64))


def test_whole_modules_get_one_map_each(dit, covariances, held_out):
    made = factorize(dit, covariances, method="whole", rank=8)
    assert set(made.maps) == {f"transformer_blocks.{block}.{name}" for block in range(2) for name in ("attn1", "ff")}
    assert all((a.shape, b.shape) == ((32, 8), (8, 32)) for a, b in made.maps.values())
    errors = measured_errors(dit, made, covariances)
    assert made.errors == pytest.approx(errors)
    assert all(0 < error < 1 for error in errors.values())
    made.refuse_other(dit)
    assert mean_error(measured_errors(dit, made, held_out)) < 1
    linears_only = replace(covariances, inputs={p: n for p, n in covariances.inputs.items() if p not in made.maps})
    with pytest.raises(PlanError, match=r"no covariance of 'transformer_blocks\.0\.attn1' was measured; .*with whole=True"):
        factorize(dit, linears_only, method="whole", rank=8)


def toy_maps(seed: int, equal: bool) -> dict[str, RankedMap]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number in range(3):
        weights = torch.rand(6, generator=generator).double().sort(descending=True).values ** 3
        outputs, rows = (12, 4) if equal else (6 + 6 * number, 4 + number)
        found[f"m{number}"] = RankedMap(weights, outputs, 12, rows)
    return found


def gain_of(maps: dict[str, RankedMap], ranks: dict[str, int]) -> float:
    return sum(own.gain(0, ranks[path]) for path, own in maps.items())


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_the_allocation_is_the_best_one_there_is(seed, equal, budget):
    maps = toy_maps(seed, equal)
    whole = sum(own.macs for own in maps.values())
    found = allocate_ranks(maps, budget, chunk=1)
    assert sum(own.cost(found[path]) for path, own in maps.items()) <= budget * whole
    best = 0.0
    for ranks in itertools.product(*(range(1, own.most + 1) for own in maps.values())):
        tried = dict(zip(maps, ranks, strict=True))
        if sum(own.cost(tried[path]) for path, own in maps.items()) <= budget * whole:
            best = max(best, gain_of(maps, tried))
    # Where all chunks cost the same it is the best; else the last chunk that does not fit may cost that much.
    slack = 1e-12 if equal else max(own.gain(1, 2) for own in maps.values())
    assert best - slack <= gain_of(maps, found) <= best + 1e-12


def test_a_budget_is_kept_and_spent_where_it_helps(dit, covariances):
    made = factorize(dit, covariances, budget=0.5, chunk=4)
    found = weights(dit)
    macs = sum(made.ranks[path] * sum(w.shape) for path, w in found.items())
    assert made.arguments["macs_share"] == pytest.approx(macs / sum(w.size for w in found.values()))
    assert 0.4 < made.arguments["macs_share"] <= 0.5
    # Never a rank at which the correction costs more than the map, and whole chunks below that.
    limits = {path: w.size // sum(w.shape) for path, w in found.items()}
    assert all(rank == limits[path] or (rank % 4 == 0 and rank < limits[path]) for path, rank in made.ranks.items())
    assert len(set(made.ranks.values())) > 1
    rank = 8
    uniform = factorize(dit, covariances, rank=rank)
    allocated = factorize(dit, covariances, budget=uniform.arguments["macs_share"], chunk=1)

    def lost(factors) -> float:
        """E||(W - A B) dx||^2 over all maps."""
        pairs = ((w - product(factors, path), covariances.matrix(path).numpy()) for path, w in found.items())
        return sum(weighted_square(rest, covariance) for rest, covariance in pairs)

    assert lost(allocated) < lost(uniform)
    with pytest.raises(PlanError, match=r"a budget of 0\.01 does not give every map rank 8, which takes"):
        factorize(dit, covariances, budget=0.01)


def test_ranks_that_make_it_worse_are_found():
    assert worse_ranks([(8, 0.5), (16, 0.3), (32, 0.2)]) == []
    assert worse_ranks([(32, 0.4), (8, 0.5), (16, 0.6)]) == [(8, 16)]
    assert worse_ranks([(8, 0.1), (16, 0.3), (32, 0.2)]) == [(8, 16), (8, 32)]
    report = RankReport("ca", {4: {"a": 0.5, "b": 0.5}, 8: {"a": 0.6, "b": 0.4}})
    assert report.worse == {"a": [(4, 8)]}
    assert report.mean[4] == pytest.approx(0.5)


def test_a_scale_on_the_outputs_can_make_a_larger_rank_worse():
    """Terms of a map scaled on its outputs are not orthogonal, so that one more of them can add to the weighted error."""
    found: list[tuple[int, int]] = []
    for seed in range(50):
        w, covariance = random_case((4, 4), seed)
        scale = torch.logspace(0, -2, 4, dtype=torch.float64)
        for outside, terms in ((True, scaled_svd(w, None, scale)), (False, scaled_svd(w, scale, None))):
            left = [w - terms.left[:, :r] @ terms.right[:r] for r in range(1, 5)]
            errors = [(r + 1, weighted_square(m.numpy(), covariance.numpy())) for r, m in enumerate(left)]
            worse = worse_ranks([(rank, max(error, 1e-12)) for rank, error in errors])
            assert outside or not worse
            found += worse
    assert found


def test_the_rank_report_is_the_error_on_other_runs(dit, stats, covariances, held_out):
    report = rank_report(dit, covariances, held_out, [4, 16])
    for rank in (4, 16):
        made = factorize(dit, covariances, rank=rank)
        assert report.errors[rank] == pytest.approx(measured_errors(dit, made, held_out), rel=1e-6)
    assert report.mean[16] < report.mean[4]
    for method in ("ca", "cd"):
        own = rank_report(dit, stats, held_out, [4, 16], method=method)
        assert own.mean[4] > report.mean[4]
    path = "transformer_blocks.1.ff.net.2"
    w, sigma = weights(dit)[path], held_out.matrix(path).numpy()
    lost = weighted_square(w - product(factorize(dit, covariances, rank=4), path), sigma) / weighted_square(w, sigma)
    assert report.errors[4][path] == pytest.approx(math.sqrt(lost), rel=1e-6)
    with pytest.raises(PlanError, match="both sets of covariances are of seed 3; hold out runs of another one"):
        rank_report(dit, covariances, covariances, [4])


def test_a_sketch_of_twice_the_rank_is_enough_and_less_is_refused(dit, covariances, held_out):
    sketched = measure_covariances(dit, tiny_scheduler("ddim"), **SETTINGS, sketch=16)
    made = factorize(dit, sketched, rank=8)
    whole = factorize(dit, covariances, rank=8)
    assert made.arguments["sketch_error"] == pytest.approx(max(sketched.sketch_errors.values()))
    errors, exact, plain = (
        mean_error(measured_errors(dit, own, held_out)) for own in (made, whole, factorize(dit, method="svd", rank=8))
    )
    assert exact <= errors < exact + 0.25 * (plain - exact)
    with pytest.raises(PlanError, match=r"rank 9 of \S+ needs a sketch of 18 directions; these covariances keep 16"):
        factorize(dit, sketched, rank=9)
    assert max(factorize(dit, sketched, budget=0.9).ranks.values()) <= 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 33}, r"rank 33 is more than transformer_blocks\.0\.attn1\.to_q \[32, 32\] can have; at most 32"),
        ({"rank": 0}, "rank is 0; expected a whole number of at least 1"),
        ({"rank": True}, "rank is True"),
        ({}, "rank is None and budget None; give one of the two"),
        ({"rank": 4, "budget": 0.5}, "rank is 4 and budget 0.5"),
        ({"budget": 1.5}, "budget is 1.5; expected a share"),
        ({"budget": 0.5, "chunk": 0}, "chunk is 0"),
        ({"rank": 4, "method": "cur"}, "unknown method 'cur'; known: svd, ca, cd, cov, whole"),
        ({"rank": 4, "scale": "left"}, "scale is 'left'; expected in, out, both"),
        ({"rank": 4, "shrinkage": 1.5}, r"shrinkage is 1.5; expected a number in 0\.\.1"),
        ({"rank": 4, "scale": "both"}, "scale is 'both', which the method 'cov' does not take; it is for ca and cd"),
        ({"rank": 4, "method": "whole", "scale": "in"}, "scale is 'in', which the method 'whole' does not take"),
        (
            {"rank": 4, "method": "svd", "shrinkage": 0.1},
            "shrinkage is 0.1, which the method 'svd' does not take; .* cov and w",
        ),
        ({"rank": 4, "method": "cd", "shrinkage": 0.0}, "shrinkage is 0.0, which the method 'cd' does not take"),
        ({"rank": 4, "kinds": ["proj_out"]}, r"kinds is \['proj_out'\]; this model's module sites are of the kinds attn, ff"),
        ({"rank": 4, "method": "svd"}, "the method 'svd' is made from no source; got Covariances"),
        ({"rank": 4, "method": "ca"}, r"the method 'ca' is made from stepgraph\.calibrate.*; got Covariances"),
    ],
)
def test_refuses_what_cannot_be_factorised(dit, covariances, arguments, message):
    with pytest.raises(PlanError, match=message):
        factorize(dit, covariances, **arguments)


def test_refuses_sources_of_other_models_and_models_without_weights(dit, covariances, stats):
    with pytest.raises(PlanError, match="the covariances are of other weights of DiTTransformer2DModel"):
        factorize(tiny_dit(seed=5), covariances, rank=4)
    with pytest.raises(PlanError, match="the statistics are of a float32 model; this one is bfloat16"):
        factorize(tiny_dit().to(torch.bfloat16), stats, method="cd", rank=4)
    with pytest.raises(PlanError, match="the covariances are of another DiTTransformer2DModel"):
        factorize(tiny_dit(num_layers=3), covariances, rank=4)
    with pytest.raises(PlanError, match="the model has no weights"):
        factorize(tiny_dit().to("meta"), method="svd", rank=4)
    with pytest.raises(
        PlanError, match=r"no channel means of transformer_blocks\.0\.attn1\.to_q; calibrate with channels=True"
    ):
        factorize(dit, replace(stats, channels={}), method="ca", rank=4)


def test_factors_of_a_half_precision_model_are_float32(covariances):
    model = tiny_dit().to(torch.bfloat16)
    measured = measure_covariances(model, tiny_scheduler("ddim"), **SETTINGS)
    made = factorize(model, measured, rank=8)
    assert made.dtype == "bfloat16"
    assert all(a.dtype == b.dtype == torch.float32 for a, b in made.maps.values())
    for name, tensor in measured.tensors.items():
        same = covariances.tensors[name]
        assert float((tensor - same).norm() / same.norm()) < 0.1, name
