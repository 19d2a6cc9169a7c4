"""Several users of one attached transformer: runs that are interleaved, given up, swapped; in threads; at the ends of a run."""

import copy
import inspect
import pickle
import threading

import pytest
import torch

import stepgraph as sg
from helpers.devices import count_as_accelerator
from helpers.oracle import Oracle
from helpers.pipes import STEPS, images, oracle_images, shared
from helpers.tape import no_host_reads
from helpers.tiny import inputs, tiny_scheduler
from stepgraph.errors import CompileError, PlanError

ACTIONS = {"attn": "CRCR", "ff": "CRRR", "hidden": "CCCR"}


def compiled(pipe, actions=ACTIONS, rows: int = 2, **arguments) -> sg.Executable:
    plan = sg.make_plan("manual", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, actions=actions, **arguments)
    return sg.compile(pipe.transformer, plan, inputs(rows), backend="eager", exact=True)


def loop(model, scheduler, seed: int, computed: bool = False, rows: int = 2, plan=None):
    """A sampling loop that stops before and after every call of the model, and gives its latents.

    With a plan, every output is to be the plan's of a run over this loop's own calls, from whichever step on.
    """
    scheduler.set_timesteps(STEPS)
    given, oracles, valid = inputs(rows, seed), [], True
    latents, classes = given["hidden_states"], given["class_labels"]
    yield None
    for step, t in enumerate(scheduler.timesteps):
        asked = t.clone().expand(rows) if computed else t.expand(rows)
        call = {"timestep": asked, "class_labels": classes}
        with torch.no_grad():
            out = model(latents, **call).sample
        if plan is not None:
            oracles.append(Oracle.of(model, plan.tail(step)))
            valid &= any(torch.equal(out, answer) for answer in [oracle(latents, **call).sample for oracle in oracles])
        yield None
        latents = scheduler.step(out.chunk(2, dim=1)[0], t, latents).prev_sample
        yield latents
    assert valid


def last(steps) -> torch.Tensor:
    return [latents for latents in steps if latents is not None][-1]


def expected(pipe, exe, *args, **kwargs) -> torch.Tensor:
    with Oracle.of(pipe.transformer, exe.plan).in_place_of_model():
        return last(loop(pipe.transformer, copy.deepcopy(pipe.scheduler), *args, **kwargs))


def in_turns(*loops, order: str) -> list[torch.Tensor]:
    """Run loops piece by piece, in the order of their letters, again and again to the end."""
    ends, going = [None] * len(loops), dict(zip("abc", loops))
    while going:
        for letter in order:
            if letter in going:
                try:
                    value = next(going[letter])
                except StopIteration:
                    del going[letter]
                    continue
                ends["abc".index(letter)] = value if value is not None else ends["abc".index(letter)]
    return ends


ORDERS = ["ab", "aab", "abb", "aaaaab", "baaa", "abba"]


@pytest.mark.parametrize("both", [True, False], ids=["both attached", "one attached"])
def test_interleaved_pipelines_come_out_right(pipe, both):
    exe, twin = compiled(pipe), shared(pipe)
    wanted = [expected(pipe, exe, seed) for seed in (1, 2)]
    exe.attach(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    if both:
        exe.attach(twin)
    for order in ORDERS:
        runs = (loop(pipe.transformer, one.scheduler, seed) for one, seed in ((pipe, 1), (twin, 2)))
        for end, right in zip(in_turns(*runs, order=order), wanted, strict=True):
            assert torch.equal(end, right), order
    assert torch.equal(last(loop(pipe.transformer, pipe.scheduler, 1)), wanted[0])
    exe.detach()
    assert not {"step", "set_timesteps", "__getstate__"} & {*vars(pipe.scheduler), *vars(twin.scheduler)}


@pytest.mark.parametrize("both", [True, False], ids=["both attached", "one attached"])
@pytest.mark.parametrize("same", [True, False], ids=["one scheduler", "two schedulers"])
def test_interleaved_runs_that_nothing_tells_apart_are_refused_or_right(pipe, both, same):
    """Timesteps that are computed do not say whose they are."""
    exe, twin = compiled(pipe), shared(pipe, pipe.scheduler if same else None)
    wanted = expected(pipe, exe, 1)
    exe.attach(pipe)
    if both:
        exe.attach(twin)
    refused = 0
    for order in ORDERS:
        runs = {
            letter: loop(pipe.transformer, one.scheduler, seed, computed=True, plan=exe.plan)
            for letter, one, seed in (("a", pipe, 1), ("b", twin, 2))
        }
        while runs:
            for letter in order:
                try:
                    if letter in runs:
                        next(runs[letter])
                except StopIteration:
                    del runs[letter]
                except PlanError:
                    del runs[letter]
                    refused += 1
        assert torch.equal(last(loop(pipe.transformer, pipe.scheduler, 1, computed=True)), wanted)
    assert refused >= len(ORDERS) - 1
    exe.detach()


def test_a_loop_that_goes_on_unseen_is_refused(pipe):
    """Its scheduler is not watched, its timesteps are computed, and another run has begun since its first call."""
    exe, twin = compiled(pipe), shared(pipe)
    exe.attach(pipe)
    for ended in (False, True):
        if ended:
            last(loop(pipe.transformer, pipe.scheduler, 1, computed=True))
        else:
            # The first call is taken for that of the run which begins here.
            pipe.scheduler.set_timesteps(STEPS)
        unseen = loop(pipe.transformer, twin.scheduler, 2, computed=True)
        for _ in range(2):
            next(unseen)
        run = loop(pipe.transformer, pipe.scheduler, 1, computed=True)
        for _ in range(2):
            next(run)
        with pytest.raises(PlanError, match="may belong to this run, or to one that was given up"):
            last(unseen)
        with pytest.raises(PlanError):
            last(run)
    exe.detach()


@pytest.mark.parametrize("both", [True, False], ids=["both attached", "one attached"])
def test_a_run_that_begins_within_another_is_refused_by_both_names(pipe, both):
    """As in a callback of the first; what each is told says which runs they are, and what to do."""
    exe, twin = compiled(pipe), shared(pipe)
    wanted = expected(pipe, exe, 2)
    exe.attach(pipe)
    if both:
        exe.attach(twin)
    first = loop(pipe.transformer, pipe.scheduler, 1, computed=True)
    second = loop(pipe.transformer, twin.scheduler, 2, computed=True)
    # To behind its second step.
    for _ in range(5):
        next(first)
    if both:
        said = (
            r"that of pipeline 1 of 2 attached \(DiTPipeline\) had had its call at step 1 of 4 when that of pipeline 2 of 2 "
            r"attached \(DiTPipeline\) began.*Call one pipeline after the other, or each in a thread of its own"
        )
        assert torch.equal(last(second), wanted)
    else:
        said = r"a second run of the transformer begins, at timestep 750, while one .* has come to step 1.*attach both"
        with pytest.raises(PlanError, match=said):
            last(second)
    with pytest.raises(PlanError, match=said):
        last(first)
    exe.detach()


def test_a_beginning_whose_run_ended_is_nobody_elses(pipe):
    exe, *twins = compiled(pipe), shared(pipe), shared(pipe)
    for one in (pipe, *twins):
        exe.attach(one)
    first, second, third = (
        loop(pipe.transformer, one.scheduler, seed, computed=True) for seed, one in enumerate((pipe, *twins))
    )
    next(first)
    last(second)
    next(third)
    next(first)
    with pytest.raises(PlanError, match="a further call of the transformer at timestep 750, before the scheduler's step"):
        next(third)
    # Its stored values are nobody's any more: what goes on is the rest of a schedule, which computes everything first.
    last(first)
    exe.detach()


@pytest.mark.parametrize("computed", [False, True])
def test_two_pipelines_in_two_threads(pipe, computed):
    exe, twin = compiled(pipe), shared(pipe)
    wanted = [expected(pipe, exe, seed) for seed in (1, 2)]
    exe.attach(pipe).attach(twin)
    barrier, ends = threading.Barrier(2), [None, None]

    def work(place, one):
        for latents in loop(pipe.transformer, one.scheduler, place + 1, computed):
            barrier.wait(60)
            ends[place] = latents if latents is not None else ends[place]

    threads = [threading.Thread(target=work, args=item) for item in enumerate((pipe, twin))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(end, right) for end, right in zip(ends, wanted, strict=True))
    # What the threads left is forgotten with the next run.
    assert torch.equal(last(loop(pipe.transformer, pipe.scheduler, 1, computed)), wanted[0])
    assert len(pipe.transformer.forward.runs._runs) == 1
    exe.detach()


def test_one_pipeline_prepared_in_one_thread_and_run_in_others(pipe):
    exe = compiled(pipe)
    wanted = expected(pipe, exe, 1)
    exe.attach(pipe)
    steps, ends = loop(pipe.transformer, pipe.scheduler, 1), []
    next(steps)
    for _ in range(2 * STEPS):
        thread = threading.Thread(target=lambda: ends.append(next(steps)))
        thread.start()
        thread.join()
    assert torch.equal(ends[-1], wanted)


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("pieces", [2, 3, 4, 6])
def test_a_run_that_was_given_up_leaves_nothing(pipe, computed, pieces):
    exe, twin = compiled(pipe), shared(pipe)
    wanted = [expected(pipe, exe, seed) for seed in (1, 2)]
    exe.attach(pipe).attach(twin)
    given_up = loop(pipe.transformer, pipe.scheduler, 5, computed)
    for _ in range(pieces):
        next(given_up)
    given_up.close()
    assert torch.equal(last(loop(pipe.transformer, twin.scheduler, 2, computed)), wanted[1])
    assert torch.equal(last(loop(pipe.transformer, pipe.scheduler, 1, computed)), wanted[0])


def test_a_scheduler_in_place_of_the_attached_one(pipe):
    exe = compiled(pipe)
    wanted = oracle_images(pipe, exe.plan)
    before = pipe.scheduler
    exe.attach(pipe)
    assert torch.equal(images(pipe), wanted)
    pipe.scheduler = copy.deepcopy(before)
    for _ in range(2):
        assert torch.equal(images(pipe), wanted)
    assert "step" in vars(pipe.scheduler)
    assert "step" not in vars(before)
    pipe.scheduler = type("Bare", (), {"timesteps": before.timesteps})()
    with pytest.raises(CompileError, match="which has no set_timesteps"):
        pipe.transformer(**inputs(2))
    pipe.scheduler = before
    assert torch.equal(images(pipe), wanted)
    exe.detach()
    assert "step" not in vars(before)


def test_a_loop_without_the_schedulers_step_goes_by_the_timesteps(pipe):
    exe = compiled(pipe)
    calls = [inputs(2, seed) for seed in range(STEPS)]
    pipe.scheduler.set_timesteps(STEPS)
    for given, t in zip(calls, pipe.scheduler.timesteps, strict=True):
        given["timestep"] = torch.full((2,), int(t))
    oracle = Oracle.of(pipe.transformer, exe.plan)
    wanted = [oracle(**given).sample for given in calls]
    exe.attach(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    for _ in range(2):
        assert all(torch.equal(pipe.transformer(**given).sample, right) for given, right in zip(calls, wanted, strict=True))
    exe.detach()


def test_evaluations_of_one_timestep_are_told_apart_by_the_step_between_them(pipe):
    pipe.scheduler = tiny_scheduler("heun")
    plan = sg.make_plan("interval", model=pipe.transformer, scheduler=pipe.scheduler, steps=STEPS, every=2)
    assert len(set(plan.header.timesteps)) < plan.steps == 2 * STEPS - 1
    exe = sg.compile(pipe.transformer, plan, inputs(2), backend="eager", exact=True)
    wanted = oracle_images(pipe, plan)
    exe.attach(pipe)
    assert torch.equal(images(pipe), wanted)
    assert torch.equal(images(pipe), wanted)
    exe.detach()


# -- schedulers are left as they are ---------------------------------------------------------------------------------------


def test_copies_of_a_watched_scheduler_are_not_watched(pipe):
    scheduler = pipe.scheduler
    signatures = [inspect.signature(method) for method in (scheduler.step, scheduler.set_timesteps)]
    exe = compiled(pipe).attach(pipe)
    assert [inspect.signature(method) for method in (scheduler.step, scheduler.set_timesteps)] == signatures
    for other in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert vars(other).keys() == vars(scheduler).keys() - {"step", "set_timesteps", "__getstate__"}
        other.set_timesteps(7)
        assert len(scheduler.timesteps) != 7
    exe.detach()


def test_what_was_put_over_a_schedulers_method_is_not_taken_away(pipe):
    exe, own = compiled(pipe), pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)
    before = pipe.scheduler.step
    exe.attach(pipe)
    watched = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: watched(*args, **kwargs)
    with pytest.raises(CompileError, match="step of DDIMScheduler was replaced after the executable was attached"):
        exe.detach()
    pipe.scheduler.step = watched
    exe.detach()
    assert vars(pipe.scheduler)["step"] is before


def test_an_attached_model_is_not_copied_pickled_or_exported(pipe, tmp_path):
    exe, model = compiled(pipe).attach(pipe), pipe.transformer
    given = inputs(2)
    attempts = {
        "copying, pickling": [
            lambda: copy.deepcopy(model), lambda: copy.deepcopy(pipe.components),
            lambda: pickle.dumps(model), lambda: torch.save(model, tmp_path / "model.pt"),
        ],
        "exporting or tracing": [
            lambda: torch.export.export(model, (), given, strict=False),
            lambda: torch.jit.trace(lambda latents: model(**given | {"hidden_states": latents}).sample, given["hidden_states"]),
        ],
    }  # fmt: skip
    for message, actions in attempts.items():
        for attempt in actions:
            with pytest.raises(CompileError, match=f"detach it before {message}"):
                attempt()
    pipe.save_pretrained(tmp_path / "pipe")
    exe.detach()
    copy.deepcopy(model)


def test_pipelines_that_share_a_transformer_are_each_attached_once(pipe):
    exe, twin = compiled(pipe), shared(pipe)
    exe.attach(pipe).attach(twin)
    for other, executable in ((pipe, exe), (twin, exe), (shared(pipe), compiled(pipe, {}))):
        with pytest.raises(CompileError, match="already has an executable attached"):
            executable.attach(other)
    wanted = oracle_images(twin, exe.plan)
    assert torch.equal(images(twin), wanted)
    exe.detach()


# -- an accelerator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("computed", [False, True])
def test_branches_are_compared_on_the_device_and_read_at_the_end(pipe, monkeypatch, computed):
    count_as_accelerator(monkeypatch)
    exe = compiled(pipe, {"ff": "CRCR"}, guidance="separate").attach(pipe)

    def run(stray: bool = False) -> None:
        pipe.scheduler.set_timesteps(STEPS)
        for step, t in enumerate(pipe.scheduler.timesteps):
            for branch in range(2):
                given = inputs(2, seed=step + (stray and step == 2 and branch))
                asked = t.clone().expand(2) if computed else t.expand(2)
                given |= {"timestep": asked, "class_labels": given["class_labels"] + branch}
                if (step, branch) in ((0, 0), (0, 1), (STEPS - 1, 1)):
                    pipe.transformer(**given)
                else:
                    with no_host_reads():
                        pipe.transformer(**given)
            pipe.scheduler.step(given["hidden_states"], t, given["hidden_states"])

    run()
    with pytest.raises(PlanError, match=r"those of a step differed in more than their conditioning.*Found at the end"):
        run(stray=True)
    run()
    exe.detach()
