"""The example server: its replicas' work, its client, and both under Ray Serve while a replica is killed."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import stepgraph as sg
from helpers.paths import ROOT
from helpers.tiny import inputs, tiny_dit, tiny_scheduler

EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))

from image_service import Answer, ImageService, Ledger, Order, OrderError  # noqa: E402
from serve_client import Client, RefusedError, UnansweredError, load  # noqa: E402

CLASSES = 10


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_dit(in_channels=3, out_channels=6, num_embeds_ada_norm=CLASSES, num_layers=1)


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory) -> Path:
    ddim, path = tiny_scheduler("ddim"), tmp_path_factory.mktemp("serve") / "tiny.zip"
    plan = sg.make_plan("interval", model=model, scheduler=ddim, steps=4, every=2)
    given = {**inputs(2), "hidden_states": torch.zeros(2, 3, 8, 8)}
    sg.compile(model, plan, given, "eager").save(path, with_weights=True, scheduler=ddim)
    return path


@pytest.fixture(scope="module")
def service(artifact) -> Iterator[ImageService]:
    made = ImageService(artifact, threads=4)
    yield made
    made.close()


def order(number: int, **changes: Any) -> Order:
    return Order(**{"key": f"order-{number:04d}", "label": number % CLASSES, "seed": number, "guidance": 2.0, **changes})


def expected(model: torch.nn.Module, label: int, seed: int) -> torch.Tensor:
    """The samples [1, 3, 8, 8] of an order, by an executable of this process that never was an artifact."""
    plan = sg.make_plan("interval", model=model, scheduler=tiny_scheduler("ddim"), steps=4, every=2)
    given = {**inputs(2), "hidden_states": torch.zeros(2, 3, 8, 8)}
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    classes = {"class_labels": torch.tensor([label]), "negative_class_labels": torch.tensor([CLASSES])}
    return sg.sample(sg.compile(model, plan, given, "eager"), tiny_scheduler("ddim"), noise, 2.0, **classes)


# -- a replica's work ------------------------------------------------------------------------------------------------------


def test_answers_are_the_images_that_sampling_gives(service, model):
    answers = [future.result(timeout=60) for future in [service.submit(order(number)) for number in range(6)]]
    image = expected(model, 3, 3)
    assert answers[3].digest == sha256(image.numpy().tobytes()).hexdigest()
    assert len({answer.digest for answer in answers}) == 6
    assert [answer.order for answer in answers] == [order(number) for number in range(6)]
    shown = Image.open(io.BytesIO(base64.b64decode(answers[3].png)))
    assert shown.size == (8, 8)
    pixel = ((image[0, :, 2, 5] / 2 + 0.5).clamp(0, 1) * 255).round().int()
    assert shown.getpixel((5, 2)) == tuple(pixel.tolist())


def test_one_key_is_made_once_at_a_time(service):
    futures = [service.submit(order(7)) for _ in range(5)]
    assert len({id(future) for future in futures}) == 1
    first = futures[0].result(timeout=60)
    # What is finished is the ledger's to remember; made again, it is the same image.
    assert service.submit(order(7)).result(timeout=60).digest == first.digest


def test_a_key_in_flight_is_not_for_another_order(artifact):
    service, held = ImageService(artifact, threads=1), threading.Event()
    try:
        service._pool.submit(held.wait)
        first = service.submit(order(7))
        for other in (order(7, seed=8), order(7, guidance=3.0), order(7, label=1)):
            with pytest.raises(
                OrderError, match=r"key 'order-0007' was used for Order\(.*; every order needs a key of its own"
            ):
                service.submit(other)
        assert service.submit(order(7)) is first
        held.set()
        assert first.result(timeout=60).order == order(7)
    finally:
        held.set()
        service.close()


def test_an_artifact_in_bfloat16_is_sampled_in_its_dtype(tmp_path: Path):
    half, ddim = (
        tiny_dit(in_channels=3, out_channels=6, num_embeds_ada_norm=CLASSES, num_layers=1).bfloat16(),
        tiny_scheduler("ddim"),
    )
    plan = sg.make_plan("interval", model=half, scheduler=ddim, steps=4, every=2)
    exe = sg.compile(half, plan, {**inputs(2), "hidden_states": torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)}, "eager")
    exe.save(tmp_path / "half.zip", with_weights=True, scheduler=ddim)
    service = ImageService(tmp_path / "half.zip")
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)).bfloat16()
    classes = {"class_labels": torch.tensor([3]), "negative_class_labels": torch.tensor([CLASSES])}
    wanted = sg.sample(exe, ddim, noise, 2.0, **classes)
    assert service.submit(order(3, seed=5)).result(timeout=60).digest == sha256(wanted.float().numpy().tobytes()).hexdigest()
    service.close()


def test_an_order_past_its_deadline_is_given_up_and_the_next_one_made(service):
    service.deadline, before = 0.0, service.deadline
    try:
        with pytest.raises(TimeoutError, match=r"order-0001 was given up after step 1 of 4"):
            service.submit(order(1)).result(timeout=60)
    finally:
        service.deadline = before
    assert service.submit(order(1)).result(timeout=60).order == order(1)


def test_an_artifact_without_scheduler_is_refused(model, tmp_path: Path):
    plan = sg.make_plan("interval", model=model, scheduler=tiny_scheduler("ddim"), steps=4, every=2)
    given = {**inputs(2), "hidden_states": torch.zeros(2, 3, 8, 8)}
    sg.compile(model, plan, given, "eager").save(tmp_path / "bare", with_weights=True)
    with pytest.raises(sg.PlanError, match="has no scheduler; save it with scheduler="):
        ImageService(tmp_path / "bare")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "an order is an object of guidance, key, label, seed"),
        ({"key": "order-0001", "label": 1}, "an order is an object of"),
        ({"key": "order-0001", "label": 1, "seed": 1, "steps": 9}, "an order is an object of"),
        ({"key": "short", "label": 1, "seed": 1}, "key is 'short'; expected 8 to 64"),
        ({"key": "order/../0001", "label": 1, "seed": 1}, "expected 8 to 64 letters, digits and dashes"),
        ({"key": "order-0001", "label": CLASSES, "seed": 1}, "label is 10; expected a whole number from 0 to 9"),
        ({"key": "order-0001", "label": True, "seed": 1}, "label is True"),
        ({"key": "order-0001", "label": 1, "seed": -1}, "seed is -1"),
        ({"key": "order-0001", "label": 1, "seed": 1, "guidance": float("nan")}, "guidance is nan"),
        ({"key": "order-0001", "label": 1, "seed": 1, "guidance": 1}, "guidance is 1; expected a number above 1"),
    ],
)
def test_bad_orders_are_refused_by_name(given: Any, reason: str):
    with pytest.raises(OrderError, match=reason):
        Order.parse(given, CLASSES)


def test_the_first_answer_recorded_is_the_answer():
    ledger, first = Ledger(limit=2), Answer(order(1), "png", "digest", 1, 0.5)
    assert ledger.find(order(1)) is None
    assert ledger.record(first) is first
    assert ledger.record(Answer(order(1), "png", "digest", 2, 0.7)) is first
    assert ledger.find(order(1)) is first
    assert ledger.counts() == {"recorded": 1, "repeated": 1, "found": 1}
    for other in (order(1, seed=2), order(1, guidance=3.0)):
        with pytest.raises(OrderError, match="every order needs a key of its own"):
            ledger.find(other)
        with pytest.raises(OrderError, match="every order needs a key of its own"):
            ledger.record(Answer(other, "png", "digest", 1, 0.5))
    for number in (2, 3):
        ledger.record(Answer(order(number), "png", "digest", 1, 0.5))
    assert [ledger.find(order(number)) is None for number in (1, 2, 3)] == [True, False, False]


# -- the client ------------------------------------------------------------------------------------------------------------


@contextmanager
def server(behave: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]) -> Iterator[str]:
    """A real server on this machine that answers POST requests by `behave`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            behave(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def test_the_client_asks_again_with_the_same_key_until_it_is_answered():
    seen: list[dict[str, Any]] = []

    def behave(handler: BaseHTTPRequestHandler, given: dict[str, Any]) -> None:
        seen.append(given)
        ways: list[Callable[[], None]] = [
            lambda: handler.connection.shutdown(socket.SHUT_RDWR),
            lambda: reply(handler, 503, b"{}"),
            lambda: reply(handler, 200, b'{"digest": "half', length=500),
            lambda: reply(handler, 200, b'{"digest": "whole"}'),
        ]
        ways[len(seen) - 1]()
        handler.close_connection = True

    with server(behave) as url:
        client = Client(url, patience=30)
        assert client.generate(3, 4) == {"digest": "whole"}
    assert len(seen) == 4
    assert all(given == seen[0] for given in seen)
    assert seen[0] == {"key": seen[0]["key"], "label": 3, "seed": 4, "guidance": 2.0}
    assert sum(client.retries.values()) == 3
    assert client.retries["503"] == 1


def test_the_client_does_not_repeat_what_is_refused_and_gives_up_at_last():
    counts = {"refused": 0}

    def refuse(handler: BaseHTTPRequestHandler, given: dict[str, Any]) -> None:
        counts["refused"] += 1
        reply(handler, 422, b'{"error": "label is 99"}')

    with server(refuse) as url:
        with pytest.raises(RefusedError, match=r"422: .*label is 99"):
            Client(url).generate(99, 1)
        assert counts["refused"] == 1
    with pytest.raises(UnansweredError, match=r"no answer to .* within 0\.5 s; the last try: URLError"):
        Client(url, patience=0.5).generate(1, 1)


# -- under Ray Serve -------------------------------------------------------------------------------------------------------


@contextmanager
def ray_server(artifact: Path, home: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`examples/serve.py` with two replicas."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, EXAMPLES / "serve.py", artifact, "--port", str(port), "--threads", "2"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 180
        while b"serving " not in (home / "log").read_bytes():
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < end, (home / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `serve` (Ray)")
def test_every_request_is_answered_exactly_once_though_a_replica_is_killed(artifact, model, tmp_path: Path):
    with ray_server(artifact, tmp_path) as (url, process):
        client = Client(url, patience=90)
        report = load(client, requests=80, workers=8, classes=CLASSES, kill_after=10)
        client.generate(1, 1, key="used-twice")
        with pytest.raises(RefusedError, match=r"422: .*every order needs a key of its own"):
            client.generate(1, 2, key="used-twice")
    assert process.returncode == 0
    assert (report["answered"], report["recorded"]) == (80, 80)
    assert report["same_when_asked_again"]
    assert len(report["killed"]) == 1
    # Both replicas worked.
    assert len(report["processes"]) >= 2
    assert [report["answers"][seed]["order"]["seed"] for seed in range(80)] == list(range(80))
    for seed in (0, 41, 79):
        image = expected(model, seed % CLASSES, seed)
        assert report["answers"][seed]["digest"] == sha256(image.numpy().tobytes()).hexdigest()
