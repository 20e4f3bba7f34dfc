"""`python -m ejk`: the command line, which takes the extra `cli`."""

import sys


def main() -> None:
    """Run a command; without typer and rich, say what installs them."""
    try:
        import rich as _rich
        import typer as _typer
    except ModuleNotFoundError as error:
        print(f'{error.name} is not installed: pip install "ejk[cli]"', file=sys.stderr)
        sys.exit(2)
    del _rich, _typer
    from ejk.cli.app import app

    app(prog_name="ejk")


if __name__ == "__main__":
    main()
