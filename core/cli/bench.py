"""`stepgraph bench`: measurements, each in a process of its own."""

import subprocess
import sys

import typer

bench_app = typer.Typer(no_args_is_help=True, help="Measure the runtime against its alternatives.")
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@bench_app.command(name="runtime", context_settings=FORWARDED, add_help_option=False)
def bench_runtime(context: typer.Context) -> None:
    """Time a plan's executable against eager, torch.compile, hooks and cache-dit; `--help` lists the options."""
    # The command line knows no benchmark: they import the package, never the other way round.
    finished = subprocess.run([sys.executable, "-m", "stepgraph.bench.speed.runtime", *context.args], check=False)
    if finished.returncode:
        raise typer.Exit(finished.returncode)
