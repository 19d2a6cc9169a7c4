"""The one runner of all passes: it leaves out, times, lints, dumps and checks; a pass only rewrites."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import fx

from stepgraph.compiler.specializing.passes import MODEL_PASSES, NEEDED, PROGRAM_PASSES, ROW_PASSES, Pass, is_wanted
from stepgraph.config import CompileConfig
from stepgraph.env import get_logger, read_env
from stepgraph.errors import CompileError
from stepgraph.files.whole_file import whole_file

ORDER = (*MODEL_PASSES, *ROW_PASSES, *PROGRAM_PASSES)


def run_passes(
    passes: tuple[Pass, ...],
    subject: Any,
    context: Any,
    config: CompileConfig,
    graphs: Callable[[], Mapping[str, fx.GraphModule]],
    check: Callable[[str], None] | None = None,
    before: str = "",
) -> int:
    """Run passes over a subject, in order; returns the number of rewrites.

    Under STEPGRAPH_DUMP every graph is written before the first pass, and after each under the pass's number in ORDER.
    STEPGRAPH_LOG=debug says what each rewrote and how long it took.

    Args:
        passes: One of the three literals of `stepgraph.compiler.specializing.passes`.
        subject: What they rewrite in place.
        context: What they see beside it.
        config: Which of them are wanted.
        graphs: Says the subject's graphs, by the names of their dumps; a pass may add some.
        check: Called with a pass's name after it, under STEPGRAPH_CHECK=1.
        before: What the dump before the first pass is called; empty for none.

    Raises:
        CompileError: STEPGRAPH_DISABLE_PASS names no pass that can be left out, or a check failed.
    """
    env, log, total = read_env(), get_logger("passes"), 0
    refuse_other_names(env.disabled_passes)
    first = ORDER.index(passes[0])
    if before:
        _dump(env.dump, graphs(), first, before)
    for position, rewrite in enumerate(passes, start=first + 1):
        name = rewrite.__name__
        if name in env.disabled_passes or not is_wanted(rewrite, config):
            continue
        started = time.perf_counter()
        count = rewrite(subject, context)
        milliseconds = 1e3 * (time.perf_counter() - started)
        if env.check:
            for gm in graphs().values():
                gm.graph.lint()
        log.debug("%s: %s made %d rewrites in %.1f ms", _listed(graphs()), name, count, milliseconds)
        _dump(env.dump, graphs(), position, name)
        if env.check and check is not None:
            check(name)
        total += count
    for gm in graphs().values():
        gm.graph.lint()
        gm.recompile()
    return total


def refuse_other_names(disabled: frozenset[str]) -> None:
    """Refuse names in STEPGRAPH_DISABLE_PASS that are those of no pass, or of one that no program goes without."""
    optional = {rewrite.__name__ for rewrite in ORDER if rewrite not in NEEDED}
    unknown = sorted(disabled - optional)
    if unknown:
        raise CompileError(
            f"STEPGRAPH_DISABLE_PASS names {unknown[0]!r}; the passes that can be left out: {', '.join(sorted(optional))}"
        )


def _listed(graphs: Mapping[str, fx.GraphModule]) -> str:
    names = list(graphs)
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _dump(folder: Path | None, graphs: Mapping[str, fx.GraphModule], number: int, name: str) -> None:
    """STEPGRAPH_DUMP: write graphs to files."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for label, gm in graphs.items():
        gm.recompile()
        with whole_file(folder / f"{label}-{number:02d}-{name}.py") as partial:
            partial.write_text(gm.print_readable(print_output=False), encoding="utf-8")
