"""Decompositions of linear maps, from which factors of any rank are cut.

Each is a sum of rank-one terms L[:, j] R[j, :] in order of falling weight: the first r of them are A B.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepgraph.checks import check_number
from stepgraph.compiler.calibration.stats import CalibrationStats
from stepgraph.compiler.lowrank.covariances import Covariances
from stepgraph.errors import ArgumentError, MismatchError, PlanError
from stepgraph.weight_kinds import is_plain, kind_of

SCALES = ("in", "out", "both")
# Methods that take an option of their own.
TAKES = {"scale": ("ca", "cd"), "shrinkage": ("cov", "whole")}
CHANNEL_OF = {"ca": "magnitude", "cd": "change"}


@dataclass(frozen=True)
class Decomposition:
    """A map, or what approximates it, in terms.

    Attributes:
        left: L [C_out, k] float64.
        right: R [k, C_in] float64.
        weights: What each term takes off the squared error that the method minimises, [k] float64, falling: of "cov"
            E||(W - A B) dx||^2, of "whole" E||dy - A B dx||^2.
    """

    left: Tensor
    right: Tensor
    weights: Tensor

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [C_out, r] and B [r, C_in] float32 of the first r terms, both vectors of a term of one length."""
        left, right = self.left[:, :rank], self.right[:rank]
        lengths, others = left.norm(dim=0), right.norm(dim=1)
        balance = torch.where((lengths > 0) & (others > 0), (others / lengths.clamp_min(1e-300)).sqrt(), 1.0)
        return (left * balance).float().contiguous(), (right / balance[:, None]).float().contiguous()


def weight_of(model: nn.Module, path: str) -> Tensor:
    """The weight W [C_out, C_in] of a linear map.

    Raises:
        PlanError: It is quantised, or another class of its own.
    """
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    if not is_plain(weight):
        raise ArgumentError(
            f"the weight of {path} is a {kind_of(weight)}; factors are made of plain weights, so use REUSE or FORECAST at its "
            f"site, or correct the model before it is quantised"
        )
    return weight


def plain_svd(weight: Tensor) -> Decomposition:
    """The singular value decomposition of W [C_out, C_in]."""
    return scaled_svd(weight, None, None)


def scaled_svd(weight: Tensor, scale_in: Tensor | None, scale_out: Tensor | None) -> Decomposition:
    """W = S_o^-1 (S_o W S_i) S_i^-1 with the singular value decomposition of the bracket (arXiv 2505.05829).

    Args:
        weight: W [C_out, C_in].
        scale_in: Diagonal of S_i, [C_in]; 1 unless given.
        scale_out: Diagonal of S_o, [C_out]; likewise.
    """
    w = weight.detach().double().cpu()
    s_in = torch.ones(w.shape[1], dtype=w.dtype) if scale_in is None else scale_in
    s_out = torch.ones(w.shape[0], dtype=w.dtype) if scale_out is None else scale_out
    u, s, v = torch.linalg.svd(s_out[:, None] * w * s_in, full_matrices=False)
    return Decomposition(u * s / s_out[:, None], v / s_in, s**2)


def channel_scales(stats: CalibrationStats, path: str, method: str, scale: str) -> tuple[Tensor | None, Tensor | None]:
    """S_i [C_in] and S_o [C_out] of a linear map as increment-calibrated caching defines them; None on the side left out.

    v_c is the mean over tokens of |x_c| ("ca") or of |x_c - x_c a step before| ("cd"), for every sample and step brought to
    (v - min + 1e-6) / (max - min + 1e-6) over the channels (over those of q, k and v together on their outputs) and averaged.
    S = sqrt(mean), at least max(S) / 1000, plus 1e-6. The paper's code takes its samples from noised images; here they are
    the steps of sampling runs.

    Raises:
        PlanError: The statistics hold no channel means of this map.
    """
    sides = [stats.channels.get(f"{path}/{side}_{CHANNEL_OF[method]}_scaled") for side in ("input", "output")]
    if any(side is None for side in sides):
        raise ArgumentError(f"the statistics have no channel means of {path}; calibrate with channels=True (--channels)")
    scales = []
    for side, mean in zip(("in", "out"), sides, strict=True):
        assert mean is not None
        if not mean.isfinite().all() or float(mean.min()) < 0:
            raise PlanError(f"the channel means of {path} are negative or not finite; calibrate again")
        root = mean.double().sqrt()
        scales.append(root.clamp_min(float(root.max()) / 1000) + 1e-6 if scale in (side, "both") else None)
    return scales[0], scales[1]


def weighted_svd(weight: Tensor, covariance: Tensor) -> Decomposition:
    """The terms that minimise E||(W - A B) dx||^2 at every rank, for E[dx dx^T] = covariance [C_in, C_in] float64.

    With U the left singular vectors of W covariance^(1/2), the best A B of rank r is U_r U_r^T W: neither the root nor an
    inverse is needed, only the eigenvectors of W covariance W^T, or, where the map has more outputs than inputs, those of the
    same product with W's triangular factor.

    Raises:
        PlanError: The covariance is of another size.
    """
    w = weight.detach().double().cpu()
    if len(covariance) != w.shape[1]:
        raise MismatchError(
            f"the covariance is {list(covariance.shape)}; expected [{w.shape[1]}, {w.shape[1]}], as the map reads"
        )
    basis, inner = (None, w) if w.shape[0] <= w.shape[1] else torch.linalg.qr(w)
    squares, u = torch.linalg.eigh(inner @ covariance @ inner.T)
    u, squares = u.flip(1), squares.flip(0).clamp_min(0)
    right = u.T @ inner
    return Decomposition(u if basis is None else basis @ u, right, squares)


def reduced_rank_regression(cross: Tensor, covariance: Tensor) -> Decomposition:
    """The terms that minimise E||dy - A B dx||^2 at every rank.

    M = E[dy dx^T] covariance^-1 is the best map of full rank; with U the eigenvectors of M covariance M^T the best of rank r
    is U_r U_r^T M.

    Args:
        cross: E[dy dx^T], [C_out, C_in] float64.
        covariance: E[dx dx^T], [C_in, C_in] float64, positive definite.

    Raises:
        PlanError: The covariance is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(covariance)
    if int(info):
        raise PlanError("the covariance is degenerate: some direction never changes; measure more samples, or pass shrinkage")
    # E[dy dx^T] L^-T, whose singular values are those of M covariance^(1/2).
    root = torch.linalg.solve_triangular(lower, cross.T, upper=False).T
    u, s, v = torch.linalg.svd(root, full_matrices=False)
    # v L^-1, solved from the right.
    right = torch.linalg.solve_triangular(lower, s[:, None] * v, upper=False, left=False)
    return Decomposition(u, right, s**2)


def shrunk(source: Covariances, path: str, shrinkage: float | None) -> Tensor:
    """The covariance of what a map reads, drawn towards a multiple of the identity: (1 - s) C + s trace(C)/n I.

    Args:
        source: What was measured.
        path: The map's module path.
        shrinkage: s in 0..1; None for Ledoit and Wolf's estimate from the fourth moments, which falls as 1 / rows. Measured
            on the shipped model it is within a few tenths of a per cent of the best fixed s from 2 samples on.
    """
    covariance, numbers = source.matrix(path), source.numbers[source.name_of(path)]
    mean = float(covariance.diagonal().mean())
    if shrinkage is None:
        spread = float(covariance.square().sum()) - mean**2 * len(covariance)
        noise = max(numbers["fourth"] - float(covariance.square().sum()), 0.0) / numbers["rows"]
        shrinkage = min(noise / spread, 1.0) if spread > 0 else 1.0
    covariance *= 1 - shrinkage
    covariance.diagonal().add_(shrinkage * mean)
    return covariance


def check_choice(method: str, scale: str | None, shrinkage: float | None) -> None:
    """Refuse a scale or shrinkage that there is not, or that a method does not take."""
    if scale is not None and scale not in SCALES:
        raise ArgumentError(f"scale is {scale!r}; expected {', '.join(SCALES)}")
    if shrinkage is not None:
        check_number("shrinkage", shrinkage, 0, 1, tail=", or None to estimate it")
    for name, value in (("scale", scale), ("shrinkage", shrinkage)):
        if value is not None and method not in TAKES[name]:
            takers = " and ".join(TAKES[name])
            raise ArgumentError(
                f"{name} is {value!r}, which the method {method!r} does not take; it is for {takers}: leave it out"
            )
