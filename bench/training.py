"""What all trainings share: one optimiser, averaged weights, checkpoints that are whole, and the loss curve."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from stepgraph.errors import MismatchError
from stepgraph.files.whole_file import whole_file

CHECKPOINT_SECONDS = 60.0
# A step that took longer was stopped in between, and counts as long as this.
LONGEST_STEP = 30.0


def rng_state(device: torch.device) -> list[torch.Tensor]:
    """The random state of the CPU and, where it is used, of the CUDA device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def restore_rng(state: list[torch.Tensor]) -> None:
    """Continue the random numbers where `rng_state` was taken."""
    torch.set_rng_state(state[0].cpu())
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1].cpu())


class Training:
    """Modules under training, with all that a killed run needs to go on to the same bits.

    Attributes:
        step: Steps done.
        total: Steps in all; None until the time that was set says how many.
        losses: Of each step done.
        seconds: That the steps took.
        average: Running means of the parameters, float32, in their order.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        checkpoint: Path,
        settings: Mapping[str, Any],
        *,
        rate: float,
        keep: float,
        device: torch.device,
        total: int | None = None,
        budget_s: float = math.inf,
        steady: float = 0.6,
    ) -> None:
        """Go on from the checkpoint, where there is one.

        Args:
            modules: Whose parameters are trained.
            checkpoint: Where it is kept; its folder exists.
            settings: What must be the same when it is taken up again, as JSON would have it.
            rate: Peak learning rate.
            keep: What the averages keep of themselves at every step, less at the beginning.
            device: Where the modules are.
            total: Steps in all.
            budget_s: In place of `total`: how long all steps together may take. Once the `steady` share of it is over, as many
                steps are left as make up the other share.
            steady: That share.

        Raises:
            MismatchError: The checkpoint was left by other settings.
        """
        self.model, self.checkpoint, self.settings, self.device = nn.ModuleList(modules), checkpoint, dict(settings), device
        self.parameters, self.keep, self.rate = list(self.model.parameters()), keep, rate
        self.average = [parameter.detach().float().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.total, self.seconds, self.losses = 0, total, 0.0, list[float]()
        self.budget_s, self.steady, self._stopped = budget_s, steady, False
        if checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings:
            before, now = state["settings"], self.settings
            differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            raise MismatchError(
                f"{self.checkpoint} was left by a run with other settings ({', '.join(differing)}); "
                "finish that run, or remove the file"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.losses, self.seconds = state["average"], state["losses"], state["seconds"]
        self.step, self.total = state["step"], state["total"] if self.total is None else self.total
        restore_rng(state["rng"])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        numbers = {"step": self.step, "total": self.total, "seconds": self.seconds, "losses": self.losses}
        with whole_file(self.checkpoint) as partial:
            torch.save({**state, **numbers, "settings": self.settings, "rng": rng_state(self.device)}, partial)

    def run(self, name: str, loss_of: Callable[[], torch.Tensor], factor_of: Callable[[], float], limit_s: float) -> bool:
        """Train for `limit_s` seconds at most, or until SIGTERM; returns whether all steps are done, else leaves a checkpoint.

        Args:
            name: Stands beside the bar.
            loss_of: Draws a batch; its loss, a scalar.
            factor_of: On the peak learning rate, at this step.
            limit_s: Of this call.
        """
        self.model.train()
        started = saved = time.monotonic()
        with Progress() as progress, self._until_told():
            bar = progress.add_task(name, total=self.total, completed=self.step)
            while not self.finished and not self._stopped and time.monotonic() - started < limit_s:
                begun = time.monotonic()
                self.advance(loss_of(), factor_of())
                self.seconds += min(time.monotonic() - begun, LONGEST_STEP)
                if self.total is None and self.seconds >= self.steady * self.budget_s:
                    self.total = max(self.step + 1, math.ceil(self.step / self.steady))
                recent = sum(self.losses[-100:]) / len(self.losses[-100:])
                progress.update(bar, total=self.total, completed=self.step, description=f"{name} loss {recent:.4f}")
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    print(f"step {self.step} of {self.total or '?'} loss {recent:.4f}, {self.seconds:.0f} s", flush=True)
                    saved = time.monotonic()
        if not self.finished:
            self.save()
        return self.finished

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.total is not None and self.step >= self.total

    def advance(self, loss: torch.Tensor, factor: float) -> None:
        """One step down the gradient of a loss, at a factor on the peak rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        keep = min(self.keep, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [parameter.float() for parameter in self.parameters], 1 - keep)
        self.losses.append(loss.item())
        self.step += 1

    @torch.no_grad()
    def use_average(self) -> None:
        """Write the averages into the modules."""
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.copy_(mean)

    @contextmanager
    def _until_told(self) -> Iterator[None]:
        """SIGTERM ends the run after the step that it falls into."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            self._stopped = True

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def plot_losses(name: str, losses: list[float], path: Path, of: str) -> None:
    """The training loss and its running mean over 100 steps, as a picture; `of` says what the error is of."""
    import matplotlib.pyplot as plt

    series = torch.tensor(losses)
    smooth = series.unfold(0, min(100, len(losses)), 1).mean(1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.semilogy(series, lw=0.4, alpha=0.4, label="per batch")
    axes.semilogy(range(len(losses) - len(smooth), len(losses)), smooth, lw=1.5, label="mean of 100")
    axes.set(xlabel="training step", ylabel=of, title=f"{name}: final {smooth[-1]:.4f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
