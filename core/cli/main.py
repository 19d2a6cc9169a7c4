"""The `stepgraph` command."""

import sys

import typer

from stepgraph.cli.accelerate import accelerate_command
from stepgraph.cli.artifact import cache_app
from stepgraph.cli.bench import bench_app
from stepgraph.cli.calibrate import calibrate_command
from stepgraph.cli.compile import compile_command
from stepgraph.cli.demo import demo_command
from stepgraph.cli.doctor import doctor_command
from stepgraph.cli.export import export_command
from stepgraph.cli.factors import factors_app
from stepgraph.cli.options import messages
from stepgraph.cli.plan import plan_app
from stepgraph.cli.run import run_command

COMMANDS = {
    "export": export_command,
    "demo": demo_command,
    "accelerate": accelerate_command,
    "compile": compile_command,
    "run": run_command,
    "calibrate": calibrate_command,
    "doctor": doctor_command,
}
GROUPS = {"plan": plan_app, "factors": factors_app, "bench": bench_app, "cache": cache_app}

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.strip() if __doc__ else None, rich_markup_mode=None)
for name, command in COMMANDS.items():
    app.command(name=name)(command)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)


def main() -> None:
    """Entry point of the `stepgraph` command."""
    try:
        app()
    except KeyboardInterrupt:
        messages.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
