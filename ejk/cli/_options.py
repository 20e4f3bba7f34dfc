"""The options that commands share, and the batch that they describe."""

import dataclasses
import pathlib
from collections.abc import Collection
from typing import Annotated, Any

import typer

from ejk._backend import Backend
from ejk._nearest import did_you_mean
from ejk.cli._batch import CACHES, FLOATS, MODELS, OPERATIONS, Batch, shape_of
from ejk.cli._devices import DEVICES

LARGEST = 2**31 - 1

Operation = Annotated[str, typer.Option(help=f"One of {', '.join(OPERATIONS)}.")]
SHAPE_HELP = f"heads/kv_heads/head_dim, as 32/8/128, or one of {', '.join(MODELS)}."
ShapeText = Annotated[str, typer.Option("--shape", help=SHAPE_HELP)]


def positive(given: str | int) -> int:
    """Return an integer; raise unless it is one of at least 1 that an int32 holds."""
    text = str(given)
    if not text.isdecimal() or not text.strip("0"):
        raise typer.BadParameter(f"{given} must be an integer of at least 1")
    if len(text) > 10 or int(text) > LARGEST:
        raise typer.BadParameter(f"{text[:20]} must be at most {LARGEST:,}, what an int32 holds")
    return int(text)


NumSeqs = Annotated[int, typer.Option("--batch", parser=positive, help="Sequences.")]
Context = Annotated[
    int, typer.Option("--context", parser=positive, help="Tokens of each, the new ones included.")
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        "--new-tokens",
        parser=positive,
        help="New tokens of each; 1, or of ragged batches the whole context.",
    ),
]
PageSize = Annotated[int, typer.Option("--page-size", parser=positive, help="Tokens of a page.")]
Dtype = Annotated[str, typer.Option(help=f"Of queries: one of {', '.join(FLOATS)}.")]
CacheDtype = Annotated[
    str | None, typer.Option("--cache", help=f"Of pools, if another: one of {', '.join(CACHES)}.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field of the backend, as block_kv=64; may be repeated."),
]


def check_writable(option: str, path: pathlib.Path) -> None:
    """Raise unless a file can be written there, before what it is to hold has taken its time."""
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} must exist", param_hint=f"'{option}'")
    is_new = not path.exists()
    if not (is_new or path.is_file()):
        raise typer.BadParameter(
            f"{path} must be a file" + ": it is a folder" * path.is_dir(), param_hint=f"'{option}'"
        )
    try:
        with path.open("a"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        rule = f"{path} cannot be written: {error.strerror}"
        raise typer.BadParameter(rule, param_hint=f"'{option}'") from None


def one_of(option: str, given: str, known: Collection[str]) -> str:
    """Return what was given; raise unless it is known."""
    if given not in known:
        rule = f"{given!r} must be one of {', '.join(known)}"
        if (meant := _MEANT.get(given.lower())) in known:
            rule += f": did you mean {meant!r}?"
        # A number is seldom mistyped: who asks for sm_75 does not mean sm_87.
        elif _letters(given) not in map(_letters, known):
            rule += did_you_mean(given, known)
        raise typer.BadParameter(rule, param_hint=f"'{option}'")
    return given


_MEANT = {"fp8": "float8_e4m3fn", **{name: device.target for name, device in DEVICES.items()}}
"""What is called otherwise elsewhere. The name that is nearest to h100 is that of another chip."""


def _letters(name: str) -> str:
    return "".join(letter for letter in name if not letter.isdecimal())


def batch_of(
    operation: str,
    shape: str,
    num_seqs: int,
    context: int,
    new_tokens: int | None,
    page_size: int,
    dtype: str,
    cache: str | None,
) -> Batch:
    """Check the options and return the batch that they describe."""
    one_of("--operation", operation, OPERATIONS)
    one_of("--dtype", dtype, FLOATS)
    one_of("--cache", cache or dtype, CACHES)
    try:
        found = shape_of(shape)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--shape'") from None
    dims = {"head_dim": found.head_dim, "value_head_dim": found.value_head_dim}
    for name, size in dims.items():
        if cache == "int4" and (size or 0) % 2:
            rule = f"{shape!r}: {name}={size} must be even with --cache int4: a byte has two values"
            raise typer.BadParameter(rule, param_hint="'--shape'")
    if new_tokens is None:
        new_tokens = context if operation == "ragged" else 1
    if operation == "decode" and new_tokens != 1:
        rule = f"{new_tokens} must be 1 with --operation decode: of more, use ragged"
        raise typer.BadParameter(rule, param_hint="'--new-tokens'")
    if new_tokens > context:
        rule = f"{new_tokens} must be at most --context {context}, which counts them"
        raise typer.BadParameter(rule, param_hint="'--new-tokens'")
    name = f"{operation} {shape}, {num_seqs:,} x {context:,}"
    name += f", {new_tokens:,} new" * (new_tokens > 1)
    batch = Batch(
        operation, name, found, num_seqs, context, new_tokens, page_size, dtype, cache or dtype
    )
    if max(batch.num_pages, batch.num_tokens) > LARGEST or batch.pool_bytes >= 2**63:
        rule = f"{num_seqs} x --context {context} must be at most {LARGEST:,} pages and new tokens"
        raise typer.BadParameter(f"{rule}, and 2^63 bytes", param_hint="'--batch'")
    return batch


def with_fields(backend: Backend, given: Collection[str]) -> Any:
    """Return a backend with fields that were given as `name=value`."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} must be name=value", param_hint="'--set'")
        one_of("--set", name, backend.tunable)
        is_int = value.removeprefix("-").isdecimal() and len(value) <= 10
        found[name] = int(value) if is_int else value
    try:
        return dataclasses.replace(backend, **found)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="'--set'") from None
