"""Runs a command in this process."""

import shlex

from typer.testing import CliRunner

from ejk.cli.app import app


def run(line: str, code: int | None = 0) -> str:
    """Run a line, which must exit with `code` unless it is None; return what it prints."""
    result = CliRunner().invoke(app, shlex.split(line), prog_name="ejk")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert code is None or result.exit_code == code, result.output
    return result.stderr if code == 2 else result.stdout
