"""The commands under one name, and how wrong arguments are told: in one line."""

import inspect
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ejk._version import __version__
from ejk.cli import bench, check, compile, doctor, explain, repro, tune


class OneLine(TyperGroup):
    """A group of commands that says what is wrong with arguments in one line, with exit code 2."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(given or ["--help"], *rest, **options | {"standalone_mode": False})
        except typer.Abort:
            code = 130
        except Exception as error:
            # typer's own errors have no public base class in every version.
            if not hasattr(error, "format_message"):
                raise
            said = " ".join(getattr(error, "format_message")().split())  # noqa: B009
            context = getattr(error, "ctx", None)
            where = "ejk" if context is None else context.command_path
            print(f"{where}: {said}", file=sys.stderr)
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=OneLine,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Say what ejk runs on this machine, how fast, in which pieces, and what is in its way.",
)


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"ejk {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Say which ejk this is.")
    ] = False,
) -> None:
    del version


for command in (doctor, bench, tune, compile, explain, check, repro):
    function = getattr(command, command.__name__.rpartition(".")[2])
    # Without it the list of commands cuts each of them off.
    summary = " ".join(inspect.cleandoc(function.__doc__).partition("\n\n")[0].split())
    app.command(short_help=summary)(function)
