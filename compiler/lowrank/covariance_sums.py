"""Running sums over increments: whole covariances, and sketches of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class FullSum:
    """Sum of dx dx^T [C, C], and of dy dx^T [C_out, C] where outputs are given, float32 on the device of the increments."""

    def __init__(self, channels: int, outputs: Mapping[str, int], device: torch.device) -> None:
        self.rows, self.trace, self.fourth = 0, 0.0, 0.0
        self.xx = torch.zeros(channels, channels, device=device)
        self.yx = {path: torch.zeros(count, channels, device=device) for path, count in outputs.items()}
        self.yy = dict.fromkeys(outputs, 0.0)

    def add(self, xs: Sequence[Tensor], ys: Mapping[str, Tensor]) -> None:
        """Increments [rows, C] float32, and of the outputs [rows, C_out]."""
        for x in xs:
            self.rows += len(x)
            squares = x.double().square().sum(-1)
            self.trace += float(squares.sum())
            self.fourth += float(squares.square().sum())
            self.xx.addmm_(x.T, x)
        for path, y in ys.items():
            self.yx[path].addmm_(y.T, xs[0])
            self.yy[path] += float(y.double().square().sum())

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Means over the rows, on the CPU; the sums are used up."""
        sums = {f"xx/{key}": self.xx}
        sums |= {f"yx/{path}": table for path, table in self.yx.items()}
        return {name: table.div_(self.rows).cpu() for name, table in sums.items()}

    def numbers(self) -> dict[str, float]:
        """What else is known of dx: rows, E||dx||^2 and E||dx||^4."""
        return {"rows": self.rows, "trace": self.trace / self.rows, "fourth": self.fourth / self.rows}


class SketchSum:
    """Frequent directions (Liberty 2013): S [l, C] with 0 <= sum of dx dx^T - S^T S <= removed * identity.

    Whenever rows are added, the l largest directions of what is there are kept, each shortened by the next one's square.
    `removed` is the sum of these squares: a bound on the error that is known, whatever the increments were.
    """

    def __init__(self, channels: int, size: int, device: torch.device) -> None:
        self.rows, self.fourth, self.trace, self.removed, self.size = 0, 0.0, 0.0, 0.0, min(size, channels)
        self.sketch = torch.zeros(0, channels, device=device)

    def add(self, xs: Sequence[Tensor], ys: Mapping[str, Tensor]) -> None:
        """Increments [rows, C] float32."""
        for x in xs:
            squares = x.double().square().sum(-1)
            self.rows += len(x)
            self.trace += float(squares.sum())
            self.fourth += float(squares.square().sum())
            for part in x.split(max(self.size, 64)):
                self._shrink(torch.cat([self.sketch, part]).double())

    def _shrink(self, rows: Tensor) -> None:
        """Keep the l largest directions of [n, C] float64."""
        if len(rows) <= self.size:
            self.sketch = rows.float()
            return
        # Eigenvectors of the smaller of the two Gram matrices give the right singular vectors.
        if len(rows) <= rows.shape[1]:
            squares, left = torch.linalg.eigh(rows @ rows.T)
            directions = left.T @ rows / squares.clamp_min(1e-300).sqrt()[:, None]
        else:
            squares, right = torch.linalg.eigh(rows.T @ rows)
            directions = right.T
        squares, directions = squares.flip(0).clamp_min(0), directions.flip(0)
        last = squares[self.size] if len(squares) > self.size else squares.new_zeros(())
        lengths = (squares[: self.size] - last).clamp_min(0).sqrt()
        self.removed += float(last)
        self.sketch = torch.where(lengths[:, None] > 0, lengths[:, None] * directions[: self.size], 0).float()

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Mean over the rows, on the CPU."""
        missing = self.size - len(self.sketch)
        padded = torch.nn.functional.pad(self.sketch, (0, 0, 0, missing))
        return {f"sketch/{key}": (padded / max(self.rows, 1) ** 0.5).cpu()}

    def numbers(self) -> dict[str, float]:
        """What else is known of dx; `removed` bounds the spectral norm of what the sketch lacks."""
        sums = {"trace": self.trace, "fourth": self.fourth, "removed": self.removed}
        return {"rows": self.rows} | {name: value / self.rows for name, value in sums.items()}
