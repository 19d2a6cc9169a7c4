"""A client of `examples/serve.py` that retries, and a load test made of many of them.

    python examples/serve_client.py --requests 64 --workers 8 --kill-after 16

With --kill-after, the process that gave the 16th answer is killed, so that what it is at work on is lost and has to be asked
for again. On this machine only. Needs nothing but Python.
"""

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import threading
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

# Nothing is wrong with the request: another try may be answered.
PASSING = (429, 500, 502, 503, 504)


class RefusedError(RuntimeError):
    """The server will not answer this request, however often it is asked."""


class UnansweredError(RuntimeError):
    """No try was answered."""


@dataclass
class Client:
    """Asks again, with the same key, until it is answered.

    Attributes:
        url: Of the server.
        timeout: Seconds per try.
        patience: Seconds for all tries of one request.
        retries: How many tries of all requests failed, by reason.
    """

    url: str
    timeout: float = 30.0
    patience: float = 120.0
    retries: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def generate(self, label: int, seed: int, guidance: float = 2.0, key: str | None = None) -> dict[str, Any]:
        """One image, by the server's answer.

        Raises:
            RefusedError: The request is not valid.
            UnansweredError: The patience is over.
        """
        order = {"key": key or str(uuid.uuid4()), "label": label, "seed": seed, "guidance": guidance}
        end, pause = time.monotonic() + self.patience, 0.1
        while True:
            try:
                return self._post(order)
            except urllib.error.HTTPError as error:
                reason = f"{error.code}"
                if error.code not in PASSING:
                    raise RefusedError(f"{error.code}: {error.read()[:500].decode(errors='replace')}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = type(error).__name__
            with self._lock:
                self.retries[reason] = self.retries.get(reason, 0) + 1
            if time.monotonic() + pause > end:
                raise UnansweredError(f"no answer to {order} within {self.patience:g} s; the last try: {reason}")
            # Clients that failed together do not come back together.
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 2.0)

    def get(self, path: str) -> dict[str, Any]:
        """A GET request, once."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=self.timeout) as answer:
            return dict(json.load(answer))

    def _post(self, order: dict[str, Any]) -> dict[str, Any]:
        data, headers = json.dumps(order).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/generate", data, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return dict(json.load(answer))


def load(client: Client, requests: int, workers: int, classes: int, kill_after: int | None = None) -> dict[str, Any]:
    """Send requests from threads; once all are answered, ask for each again, which must change nothing.

    Args:
        client: Of a server on this machine.
        requests: How many.
        workers: Requests at once.
        classes: Labels are 0 to classes - 1 in turn; seeds count up.
        kill_after: After so many answers, kill the process that gave the last one.

    Returns:
        What happened, and `answers` by seed.
    """
    before, lock, seconds, killed = client.get("/ledger"), threading.Lock(), list[float](), list[int]()
    run = uuid.uuid4().hex[:12]

    def ask(seed: int) -> dict[str, Any]:
        started = time.monotonic()
        answer = client.generate(seed % classes, seed, key=f"{run}-{seed}")
        with lock:
            seconds.append(time.monotonic() - started)
            if kill_after is not None and not killed and len(seconds) >= kill_after:
                killed.append(answer["pid"])
                os.kill(answer["pid"], signal.SIGKILL)
        return answer

    started = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(ask, range(requests)))
        whole, failed = time.monotonic() - started, dict(client.retries)
        again = list(pool.map(lambda seed: client.generate(seed % classes, seed, key=f"{run}-{seed}"), range(requests)))
    after = client.get("/ledger")
    return {
        "requests": requests, "workers": workers, "answered": len(answers), "same_when_asked_again": answers == again,
        "recorded": after["recorded"] - before["recorded"], "made_in_vain": after["repeated"] - before["repeated"],
        "killed": killed, "failed_tries": failed, "processes": sorted({answer["pid"] for answer in answers}),
        "seconds": whole, "requests_per_second": requests / whole, "median_s": statistics.median(seconds),
        "slowest_s": max(seconds), "answers": dict(enumerate(answers)),
    }  # fmt: skip


def main() -> None:
    """Run the load test and print what happened as JSON; fails unless every request was answered exactly once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds after which a request counts as lost")
    parser.add_argument("--kill-after", type=int, help="answers after which the process that gave the last one is killed")
    given = parser.parse_args()
    client = Client(f"http://127.0.0.1:{given.port}", patience=given.patience)
    report = load(client, given.requests, given.workers, given.classes, given.kill_after)
    digests = {seed: answer["digest"] for seed, answer in report.pop("answers").items()}
    print(json.dumps({**report, "digests": digests}))
    if not (report["answered"] == report["recorded"] == given.requests and report["same_when_asked_again"]):
        raise SystemExit("not every request was answered exactly once")


if __name__ == "__main__":
    main()
