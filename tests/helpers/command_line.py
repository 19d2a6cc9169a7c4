"""The command line, called in this process."""

import json

from typer.testing import CliRunner

from stepgraph.cli.main import app

runner = CliRunner()


def invoke(*arguments: object) -> str:
    """Run a command that must succeed; its standard output."""
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(*arguments: object) -> str:
    """Run a command that must fail with one clear error; the error."""
    result = runner.invoke(app, [*(str(a) for a in arguments), "--json"])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return json.loads(result.stdout)["error"]
