"""An example server: images of an artifact over HTTP, by several replicas under Ray Serve, on this machine alone.

    pip install 'stepgraph[serve]'
    stepgraph plan make --policy interval --model glyph-dit --steps 20 -a every=2 -o plan.json
    stepgraph compile glyph-dit --plan plan.json --backend eager --save glyph.zip --with-weights
    python examples/serve.py glyph.zip --replicas 2
    python examples/serve_client.py --requests 64

POST /generate takes {"key", "label", "seed", "guidance"}, GET /health says who answers, GET /ledger counts answers. What is
guaranteed is in docs/serving.md.
"""

import argparse
import asyncio
import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from image_service import Answer, ImageService, Ledger, Order
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

NAME = "images"


@serve.deployment(health_check_period_s=2, health_check_timeout_s=30, graceful_shutdown_timeout_s=30)
class Replica:
    """A process with an executable of its own."""

    def __init__(self, artifact: str, threads: int, deadline: float, ledger: Any) -> None:
        self.service, self.ledger = ImageService(artifact, threads, deadline), ledger

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer one HTTP request."""
        if (request.method, request.url.path) == ("GET", "/health"):
            return JSONResponse({"pid": os.getpid(), "executable": repr(self.service.executable)})
        if (request.method, request.url.path) == ("GET", "/ledger"):
            return JSONResponse(await self.ledger.counts.remote())
        if (request.method, request.url.path) != ("POST", "/generate"):
            return refusal(404, f"nothing at {request.method} {request.url.path}; POST /generate, GET /health or /ledger")
        try:
            order = Order.parse(await request.json(), self.service.classes)
            answer = await self.answer(order)
        except ValueError as error:
            # What comes from the ledger is wrapped in Ray's account of where it was raised.
            return refusal(422, str(getattr(error, "cause", error)))
        except TimeoutError as error:
            return refusal(504, str(error))
        return JSONResponse(answer.as_dict())

    async def answer(self, order: Order) -> Answer:
        """What the ledger has, or a new image, which is the answer once the ledger has it."""
        found: Answer | None = await self.ledger.find.remote(order)
        if found is not None:
            return found
        # A client that hangs up does not stop its order: its retry finds the answer.
        making: Future[Answer] = self.service.submit(order)
        made = await asyncio.shield(asyncio.wrap_future(making))
        answer: Answer = await self.ledger.record.remote(made)
        return answer

    def __del__(self) -> None:
        """Called by Ray after the last request has been answered."""
        if hasattr(self, "service"):
            self.service.close()


def refusal(status: int, reason: str) -> JSONResponse:
    """An error as JSON."""
    return JSONResponse({"error": reason}, status_code=status)


def start(artifact: Path, replicas: int, threads: int, deadline: float, waiting: int, port: int) -> None:
    """Start Ray on this machine and the application on it; returns when it answers."""
    # One CPU each for replicas, none for the ledger and Ray Serve's own processes, which do little.
    ray.init(num_cpus=replicas, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    ledger = ray.remote(num_cpus=0, max_concurrency=1)(Ledger).remote()
    options = {"num_replicas": replicas, "max_ongoing_requests": 2 * threads, "max_queued_requests": waiting}
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    replica = Replica.options(**options, ray_actor_options={"num_cpus": 1, "runtime_env": environment})
    serve.run(replica.bind(str(artifact.resolve()), threads, deadline, ledger), name=NAME, route_prefix="/")


def main() -> None:
    """Serve until SIGINT or SIGTERM; then answer what has been accepted, and stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="orders that a replica runs at once")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds after which an order is given up")
    parser.add_argument("--waiting", type=int, default=64, help="requests that may wait for a replica; more are answered 503")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    start(given.artifact, given.replicas, given.threads, given.deadline, given.waiting, given.port)
    # Ray has set handlers of its own, which do not wait.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(f"serving {given.artifact} at http://127.0.0.1:{given.port}", flush=True)
    while not stop.wait(0.5):
        pass
    # The application goes first, and with it each replica when it has answered; the sockets are closed after that.
    serve.delete(NAME)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
