"""Images on request from one executable: what a replica of a server does, whatever carries the requests to it.

`examples/serve.py` puts it behind Ray Serve. Plain Python, threads and stepgraph; nothing here knows of HTTP or Ray.
"""

import base64
import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import stepgraph as sg
from stepgraph.compiler.entry.load_artifact import build_scheduler, compile_artifact
from stepgraph.runtime.artifact.read_artifact import read_artifact


class OrderError(ValueError):
    """An order that nobody can fill; the message says why."""


@dataclass(frozen=True)
class Order:
    """A request.

    Attributes:
        key: The client's name for it, the same in every retry: 8 to 64 letters, digits and dashes.
        label: Class of the image.
        seed: Of its noise, below 2^63.
        guidance: Scale of classifier-free guidance, above 1 and at most 20.
    """

    key: str
    label: int
    seed: int
    guidance: float = 2.0

    @classmethod
    def parse(cls, given: Any, classes: int) -> "Order":
        """An order from JSON.

        Raises:
            OrderError: A field is missing, unknown or out of range.
        """
        known = set(cls.__dataclass_fields__)
        if not isinstance(given, Mapping) or set(given) - known or known - {"guidance"} - set(given):
            raise OrderError(f"an order is an object of {', '.join(sorted(known))}; given is {given!r:.200}")
        order = cls(**given)
        key = order.key if isinstance(order.key, str) else ""
        if not (8 <= len(key) <= 64 and key.isascii() and key.replace("-", "").isalnum()):
            raise OrderError(f"key is {order.key!r:.100}; expected 8 to 64 letters, digits and dashes")
        for name, limit in (("label", classes), ("seed", 2**63)):
            value = getattr(order, name)
            if type(value) is not int or not 0 <= value < limit:
                raise OrderError(f"{name} is {value!r:.100}; expected a whole number from 0 to {limit - 1}")
        if type(order.guidance) not in (int, float) or not 1 < order.guidance <= 20:
            raise OrderError(f"guidance is {order.guidance!r:.100}; expected a number above 1, at most 20")
        return order


def reused_key(first: Order) -> OrderError:
    """What whoever uses the key of another order is told."""
    return OrderError(f"key {first.key!r} was used for {first}; every order needs a key of its own")


@dataclass(frozen=True)
class Answer:
    """What is given back.

    Attributes:
        order: The order that it fills.
        png: The image, base64.
        digest: SHA-256 of the samples [1, C, H, W] in float32, hexadecimal.
        pid: Of the process that made it.
        seconds: What that took, without waiting.
    """

    order: Order
    png: str
    digest: str
    pid: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class ImageService:
    """One executable, loaded once, and threads that run orders on it, each in a session of its own.

    Orders wait in the pool's queue; who sends an order again that is being made gets the same answer. The noise is drawn in
    float32 and rounded to the model's dtype.

    Args:
        artifact: An artifact with weights and a scheduler, of a class-conditional model (DiT) whose null class is its last.
        threads: How many orders run at once.
        deadline: Seconds after which an order that is running is given up, between two steps.

    Raises:
        PlanError: The artifact has no weights or no scheduler.
    """

    def __init__(self, artifact: str | Path, threads: int = 1, deadline: float = 60.0) -> None:
        torch.set_num_threads(1)
        read = read_artifact(artifact)
        self.executable, self.scheduler, self.deadline = compile_artifact(read), build_scheduler(read), deadline
        if self.scheduler is None:
            raise sg.PlanError(f"{artifact} has no scheduler; save it with scheduler=...")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="order")
        self._lock, self._making = threading.Lock(), dict[str, tuple[Order, Future[Answer]]]()

    @property
    def classes(self) -> int:
        """How many classes can be asked for."""
        config: Any = self.executable.model.config
        return int(config.num_embeds_ada_norm)

    def submit(self, order: Order) -> "Future[Answer]":
        """The answer to an order, now or later.

        The future raises TimeoutError past the deadline, RuntimeError after `close`; the service goes on after both.

        Raises:
            OrderError: Another order is being made under the same key.
        """
        with self._lock:
            if order.key not in self._making:
                future = self._pool.submit(self._make, order)
                self._making[order.key] = order, future
                future.add_done_callback(lambda _: self._making.pop(order.key, None))
                return future
            first, future = self._making[order.key]
        if first != order:
            raise reused_key(first)
        return future

    def close(self) -> None:
        """Finish what has been submitted, and take nothing more."""
        self._pool.shutdown(wait=True)

    def _make(self, order: Order) -> Answer:
        started = time.monotonic()

        def on_step(done: int, steps: int) -> None:
            if time.monotonic() - started > self.deadline:
                raise TimeoutError(f"order {order.key} was given up after step {done} of {steps} and {self.deadline:g} s")

        model: Any = self.executable.model
        size, generator = model.config.sample_size, torch.Generator().manual_seed(order.seed)
        noise = torch.randn(1, model.config.in_channels, size, size, generator=generator).to(model.dtype)
        label, null = torch.tensor([order.label]), torch.tensor([self.classes])
        given = {"class_labels": label, "negative_class_labels": null}
        image = sg.sample(self.executable, self.scheduler, noise, float(order.guidance), on_step=on_step, **given)
        digest = sha256(image.float().contiguous().numpy().tobytes()).hexdigest()
        return Answer(order, png_of(image[0]), digest, os.getpid(), time.monotonic() - started)


class Ledger:
    """The answers given so far, by key: the first one recorded is the answer, whoever asks, and however often.

    One for all replicas. A replica that dies before it has recorded an answer leaves nothing here, and the client's retry has
    the order made by another one.

    Args:
        limit: Answers that are kept; the oldest go.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self.limit = limit
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._counts = {"recorded": 0, "repeated": 0, "found": 0}

    def find(self, order: Order) -> Answer | None:
        """The answer to an order that came before.

        Raises:
            OrderError: Its key belongs to another order.
        """
        answer = self._answers.get(order.key)
        if answer is not None and answer.order != order:
            raise reused_key(answer.order)
        self._counts["found"] += answer is not None
        return answer

    def record(self, answer: Answer) -> Answer:
        """Record an answer; returns the one that counts, which is another replica's if that was first."""
        first = self._answers.setdefault(answer.order.key, answer)
        if first.order != answer.order:
            raise reused_key(first.order)
        self._counts["recorded" if first is answer else "repeated"] += 1
        while len(self._answers) > self.limit:
            self._answers.popitem(last=False)
        return first

    def counts(self) -> dict[str, int]:
        """Answers recorded, made again in vain, and found when asked for again."""
        return dict(self._counts)


def png_of(image: torch.Tensor) -> str:
    """An image [3, H, W] in -1..1 as a PNG, base64."""
    pixels = ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    with io.BytesIO() as file:
        Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode("ascii")
