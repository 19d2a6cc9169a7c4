"""Executables in a server: threads, cancelled runs, processes, and memory over many runs."""

import gc
import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import torch
from torch import nn

import stepgraph as sg
from helpers.children import environment
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler
from stepgraph.compiler.entry.load_artifact import build_scheduler
from stepgraph.packed_weights import PackedWeights
from stepgraph.plan import CachePlan
from stepgraph.runtime.artifact.read_artifact import read_artifact
from stepgraph.runtime.program.program import Program

THREADS = 8
STEPS = 6


class Cancelled(BaseException):
    """Like KeyboardInterrupt and asyncio's CancelledError: no Exception."""


@pytest.fixture(scope="module", params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def made(request, dit):
    """For batches of one: reused, forecast and corrected rows, or with inductor, where each costs seconds, reused ones."""
    ddim = tiny_scheduler("ddim")
    if request.param == "inductor":
        plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=STEPS, every=2, kinds=["attn"])
        return sg.compile(dit, plan, inputs(1), "inductor")
    actions = {"ff": "CCRRCC", "attn": "CCRCRC", "hidden": "CCCCCR"}
    plan = sg.make_plan("manual", model=dit, scheduler=ddim, steps=STEPS, actions=actions)
    plan = sg.lowrank(sg.forecast(plan, "taylor", order=1, kinds=["attn"]), kinds=["ff"])
    return sg.compile(dit, plan, inputs(1), "eager", factors=sg.factorize(dit, method="svd", rank=4))


def image(executable: sg.Executable, number: int, **options: Any) -> torch.Tensor:
    """A run whose noise and class follow from its number."""
    return sg.sample(executable, tiny_scheduler("ddim"), noise(1, seed=number), **labels(number), **options)


def together(work: Callable[[int], Any], count: int) -> list[Any]:
    """The results of `count` threads that start at once and change places as often as Python lets them."""
    barrier, interval = threading.Barrier(count), sys.getswitchinterval()

    def run(number: int) -> Any:
        barrier.wait(timeout=60)
        return work(number)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(run, range(count)))
    finally:
        sys.setswitchinterval(interval)


# -- threads ---------------------------------------------------------------------------------------------------------------


def test_threads_compute_what_one_after_the_other_does(made):
    serial = [image(made, number) for number in range(THREADS)]
    assert not torch.equal(serial[0], serial[1])
    for _ in range(3):
        for expected, found in zip(serial, together(lambda number: image(made, number), THREADS), strict=True):
            assert torch.equal(found, expected)


def test_sessions_take_turns_step_by_step(made, dit):
    """Every session is in the middle of its run while the others compute."""
    times = [float(t) for t in made.plan.header.timesteps]

    def start(number: int) -> tuple[Any, dict[str, torch.Tensor]]:
        return made.session(), {"hidden_states": noise(1, seed=number), **labels(number)}

    def step(run: tuple[Any, dict[str, torch.Tensor]], s: int) -> torch.Tensor:
        session, given = run
        return session(**given, timestep=torch.full((1,), int(times[s])), return_dict=False)[0]

    alone = []
    for number in range(3):
        run = start(number)
        alone.append([step(run, s) for s in range(STEPS)])
    runs = [start(number) for number in range(3)]
    for s in range(STEPS):
        for number, run in enumerate(runs):
            assert torch.equal(step(run, s), alone[number][s])
    # One copy of the weights for all: what graphs and regions read is the model's own memory.
    assert {p.data_ptr() for p in made.model.parameters()} == {p.data_ptr() for p in dit.parameters()}


def test_a_new_batch_size_is_compiled_once_while_others_run(dit):
    ddim = tiny_scheduler("ddim")
    plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=STEPS, every=2)
    made = sg.compile(dit, plan, inputs(1), "eager")
    serial, built = [image(made, number) for number in range(4)], []

    def build(model: nn.Module, given: Mapping[str, Any], plan: CachePlan) -> Program:
        built.append(given)
        return made.build(model, given, plan)

    executable = replace(made, build=build)

    def work(number: int) -> torch.Tensor:
        if number < 4:
            return torch.cat([image(executable, number) for _ in range(4)])
        return sg.sample(executable, ddim, noise(3), **labels(1, 2, 3))

    found = together(work, THREADS)
    for number in range(4):
        assert torch.equal(found[number], serial[number].repeat(4, 1, 1, 1))
    fresh = sg.sample(sg.compile(dit, plan, inputs(3), "eager"), ddim, noise(3), **labels(1, 2, 3))
    for batch in found[4:]:
        assert torch.equal(batch, fresh)
    assert len(built) == 1


def test_runs_do_not_wait_while_another_batch_size_is_compiled(made):
    begun, go_on = threading.Event(), threading.Event()

    def build(model: nn.Module, given: Mapping[str, Any], plan: CachePlan) -> Program:
        begun.set()
        assert go_on.wait(timeout=60)
        raise InterruptedError("the compilation is given up")

    executable, expected = replace(made, build=build), image(made, 1)
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(executable.program, inputs(3))
        try:
            assert begun.wait(timeout=60)
            with ThreadPoolExecutor(1) as other:
                assert torch.equal(other.submit(image, executable, 1).result(timeout=60), expected)
        finally:
            go_on.set()
        with pytest.raises(InterruptedError, match="given up"):
            compiling.result()
    assert torch.equal(image(executable, 1), expected)


def test_packed_weights_are_shared_by_threads():
    """As many weights as are kept and more, some of which die while others are packed."""
    packed = []

    def pack(weight: torch.Tensor) -> torch.Tensor:
        packed.append(1)
        return weight.clone()

    one = 8 * 8 * 4
    kept, shared = PackedWeights(pack, limit=3 * one), [torch.randn(8, 8) for _ in range(5)]

    def work(number: int) -> bool:
        mine = (torch.full((8, 8), float(i)) if i % 3 == 0 else shared[(i + number) % 5] for i in range(400))
        return all(torch.equal(kept.get(weight), weight) for weight in mine)

    assert all(together(work, THREADS))
    gc.collect()
    assert kept.bytes == len(kept) * one <= kept.limit
    wanted = PackedWeights(pack)
    packed.clear()
    assert len({id(form) for form in together(lambda _: wanted.get(shared[0]), THREADS)}) == 1
    assert len(packed) == 1


# -- cancelled runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Cancelled])
def test_a_run_that_is_cancelled_between_steps_disturbs_no_other(made, error: type[BaseException]):
    expected = image(made, 1)

    def stop(done: int, of: int) -> None:
        if done == 3:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        image(made, 2, on_step=stop)
    assert torch.equal(image(made, 1), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Cancelled])
def test_an_exception_inside_a_step_leaves_executable_and_session_usable(error: type[BaseException]):
    """Raised by a hook of a module amid the graph: values of this step are stored already, others are not."""
    model, ddim, countdown = tiny_dit(), tiny_scheduler("ddim"), []

    def hook(*_: Any) -> None:
        if countdown and countdown.pop() == 0:
            raise error("inside")

    model.transformer_blocks[1].ff.net[2].register_forward_hook(hook)
    plan = sg.make_plan("interval", model=model, scheduler=ddim, steps=STEPS, every=2, kinds=["attn"])
    executable = sg.compile(model, plan, inputs(1), "eager")
    expected, session = image(executable, 1), executable.session()

    def steps() -> list[torch.Tensor]:
        return [session(**inputs(1, timestep=int(t)), return_dict=False)[0] for t in plan.header.timesteps]

    outputs = steps()
    session.reset()
    # The hook is called once a step; it raises in the fourth, which reads stored values.
    countdown.extend([0, 1, 1, 1])
    with pytest.raises(error, match="inside"):
        steps()
    assert (countdown, session.step, session.arena_bytes, session.slot_bytes) == ([], 0, 0, 0)
    assert all(torch.equal(found, one) for found, one in zip(steps(), outputs, strict=True))
    assert torch.equal(image(executable, 1), expected)


def test_threads_whose_neighbours_are_cancelled_finish(made):
    serial = [image(made, number) for number in range(THREADS)]

    def work(number: int) -> torch.Tensor | None:
        def stop(done: int, of: int) -> None:
            if number % 2 and done == 1 + number % STEPS:
                raise Cancelled

        try:
            return image(made, number, on_step=stop)
        except Cancelled:
            return None

    for number, found in enumerate(together(work, THREADS)):
        assert (found is None) if number % 2 else torch.equal(found, serial[number])


# -- processes -------------------------------------------------------------------------------------------------------------


def answer(queue: Any, make: Callable[[], torch.Tensor]) -> None:
    """A forked child."""
    queue.put(make().numpy().tobytes())


def answer_from(queue: Any, path: Path, number: int) -> None:
    """A spawned child, which knows nothing but the artifact."""
    torch.set_num_threads(1)
    executable, scheduler = sg.load(path), build_scheduler(read_artifact(path))
    queue.put(sg.sample(executable, scheduler, noise(1, seed=number), **labels(number)).numpy().tobytes())


def in_processes(context: Any, target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[bytes]:
    """What every process puts into a queue of its own; none may take longer than a minute."""
    queues = [context.Queue() for _ in arguments]
    processes = [context.Process(target=target, args=(q, *given)) for q, given in zip(queues, arguments, strict=True)]
    for process in processes:
        process.start()
    try:
        return [queue.get(timeout=60) for queue in queues]
    except Empty:
        pytest.fail(f"no answer within a minute; exit codes {[process.exitcode for process in processes]}")
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_a_forked_child_goes_on_where_the_parent_stood(made):
    expected = [image(made, number).numpy().tobytes() for number in range(2)]
    calls = [(lambda number=number: image(made, number),) for number in range(2)]
    assert in_processes(multiprocessing.get_context("fork"), answer, calls) == expected
    assert image(made, 0).numpy().tobytes() == expected[0]


@pytest.mark.slow
def test_a_spawned_process_loads_the_artifact_and_makes_the_same_bits(made, tmp_path: Path):
    if made.config.backend != "eager":
        pytest.skip("what compiled regions give in other processes is tested with artifacts")
    made.save(tmp_path / "dit.zip", with_weights=True, scheduler=tiny_scheduler("ddim"))
    expected = image(made, 3).numpy().tobytes()
    arguments = [(tmp_path / "dit.zip", 3)]
    assert in_processes(multiprocessing.get_context("spawn"), answer_from, arguments) == [expected]


# -- memory ----------------------------------------------------------------------------------------------------------------

# In a fresh process: what other tests leave behind would move the base line.
LEAK = """
import json, sys, torch
torch.set_num_threads(1)
from helpers.tiny import inputs, labels, noise, tiny_dit, tiny_scheduler
import stepgraph as sg
from stepgraph.bench.deploy.leak import growth, watch

dit, ddim, kept = tiny_dit(), tiny_scheduler("ddim"), []
plan = sg.make_plan("interval", model=dit, scheduler=ddim, steps=2, every=2)
executable = sg.compile(dit, plan, inputs({batch}), "eager")

def generate(number):
    def stop(done, of):
        if number % 8 == 0 and done == 1:
            raise InterruptedError
    try:
        return sg.sample(executable, ddim, noise({batch}, number), on_step=stop, **labels(*range({batch})))
    except InterruptedError:
        return None

clean = watch(generate, 200, 20)
leaking = watch(lambda number: kept.append(generate(number)), 80, 10)
print(json.dumps([[growth(readings), [reading.tensors for reading in readings]] for readings in (clean, leaking)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_after_200_generations_is_what_it_was():
    batch, latent = 16, 16 * 4 * 8 * 8 * 4
    script = LEAK.format(batch=batch)
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (slope, tensors), (leaking_slope, leaking_tensors) = json.loads(done.stdout)
    assert len(set(tensors)) == 1, tensors
    assert slope < latent / 4
    # One latent kept per generation that is not cancelled is seen by both.
    assert leaking_tensors[-1] - leaking_tensors[1] == sum(number % 8 != 0 for number in range(11, 81))
    assert leaking_slope > latent / 2
