"""Let a real language model write text through a paged cache.

    python examples/generate.py                           three prompts of its own
    python examples/generate.py "Why is the sky blue?"    answer this one
    python examples/generate.py --prompt "Once upon a time" --backend triton --interpret

All prompts are read and continued as one batch. The model is in `smollm2.py`, the loop in
`paged_decode.py`.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

import ejk

try:
    import smollm2
    from paged_decode import CacheSpec, stream
except ImportError as error:
    sys.exit(f"error: {error}")

DEFAULT_PROMPTS = ("The capital of France is", "Once upon a time")
DEFAULT_CHATS = ("Write one sentence about the moon.",)
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
DIM, BOLD, PLAIN = "\033[2m", "\033[1m", "\033[0m"


@dataclasses.dataclass
class Passage:
    """A prompt as it is shown, its tokens, and the tokens written so far."""

    title: str
    shown: str
    prompt: list[int]
    written: list[int] = dataclasses.field(default_factory=list)


class Screen:
    """Shows all passages at once in a terminal and redraws them in place as they grow."""

    def __init__(self) -> None:
        self._height = 0

    def show(self, texts: Sequence[tuple[Passage, str]], live: set[int], last: bool) -> None:
        columns, rows = shutil.get_terminal_size()
        lines = [line for passage, text in texts for line in self._lines(passage, text, columns)]
        if not last:
            lines = lines[-(rows - 1) :]  # what has scrolled away could not be redrawn
        to_top = f"\033[{self._height}F" if self._height else ""
        print(to_top + "".join(f"{line}\033[K\n" for line in lines) + "\033[J", end="", flush=True)
        self._height = len(lines)

    @staticmethod
    def _lines(passage: Passage, text: str, columns: int) -> Iterator[str]:
        yield f"{BOLD}{passage.title}{PLAIN}"
        shown = passage.shown.expandtabs(4)
        whole = shown + text.expandtabs(4)
        for start, end in wrap(whole, columns - 1):
            middle = min(max(len(shown), start), end)
            yield f"{DIM}{whole[start:middle]}{PLAIN}{whole[middle:end]}"
        yield ""


class Log:
    """Prints passages one after the other, each as it grows: for pipes and files."""

    def __init__(self) -> None:
        self._current = 0
        self._printed = -1  # characters of the current passage's text, or -1 before its title

    def show(self, texts: Sequence[tuple[Passage, str]], live: set[int], last: bool) -> None:
        while self._current < len(texts):
            passage, text = texts[self._current]
            if self._printed < 0:
                print(f"{passage.title}\n{passage.shown}", end="")
                self._printed = 0
            print(text[self._printed :], end="", flush=True)
            self._printed = len(text)
            if self._current in live and not last:
                return
            print("\n", flush=True)
            self._current, self._printed = self._current + 1, -1


def wrap(text: str, width: int) -> Iterator[tuple[int, int]]:
    """Cut `text` into lines of at most `width` characters, at spaces where there are any."""
    start = 0
    for line in text.split("\n"):
        end = start + len(line)
        while end - start > width:
            cut = text.rfind(" ", start, start + width) + 1 or start + width
            yield start, cut
            start = cut
        yield start, end
        start = end + 1


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Say what is going on, and afterwards how long it took."""
    print(f"{what} ...", end="", flush=True)
    start = time.perf_counter()
    try:
        yield
        print(f" {time.perf_counter() - start:.1f} s", end="")
    finally:
        print(flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Let a real language model write text through a paged cache."
    )
    add = parser.add_argument
    add("chat", nargs="*", metavar="TEXT", help="same as --chat TEXT")
    for flag, help_text in (("chat", "answer this message"), ("prompt", "continue this text")):
        add(
            f"--{flag}",
            action="append",
            default=[],
            dest=f"{flag}s",
            metavar="TEXT",
            help=f"{help_text} (may be repeated)",
        )
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--backend", choices=("auto", "xla", "triton", "pallas"), default="auto")
    add("--interpret", action="store_true", help="interpret the triton or pallas kernel (slow)")
    add("--dtype", choices=DTYPES, help="default: f32 on a CPU, else bf16")
    add("--cache-layout", choices=("HND", "NHD", "KV_HEADS_FIRST"), default="HND")
    add("--page-size", type=int, default=16, metavar="N", help="default: %(default)s")
    add(
        "--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens read in one call"
    )
    add("--seed", type=int, default=0, help="of the order in which pages are handed out")
    args = parser.parse_args(argv)
    args.chats = [*args.chat, *args.chats]
    if not args.chats and not args.prompts:
        args.chats, args.prompts = list(DEFAULT_CHATS), list(DEFAULT_PROMPTS)
    if args.interpret and args.backend not in ("triton", "pallas"):
        parser.error("--interpret needs --backend triton or --backend pallas")
    if min(args.max_new_tokens, args.page_size, args.prefill_chunk) < 1:
        parser.error("--max-new-tokens, --page-size and --prefill-chunk must be at least 1")
    if not all(args.prompts):
        parser.error("--prompt needs some text to continue")
    return args


Choice: TypeAlias = str | ejk.Backend | None


def backend_choices(name: str, interpret: bool) -> dict[str, Choice]:
    """Turn the options into the backends of decoding, prefill and write, as `stream` takes them."""
    if interpret:
        kinds = {
            "triton": (
                ejk.TritonPageAttention,
                ejk.TritonRaggedPageAttention,
                ejk.TritonWriteKVCache,
            ),
            "pallas": (
                ejk.PallasPageAttention,
                ejk.PallasRaggedPageAttention,
                ejk.PallasWriteKVCache,
            ),
        }[name]
        choices = [kind(interpret=True) for kind in kinds]
    else:
        # jax-triton 0.3 runs decode attention, and cannot write in place: then XLA does the rest.
        rest = "xla" if name == "xla" else None
        choices = [None if name == "auto" else name, rest, rest]
    return dict(zip(("backend", "prefill_backend", "write_backend"), choices))


def backend_report(model: smollm2.SmolLM2, spec: CacheSpec, num_seqs: int, backend):
    """Ask `ejk`, from shapes alone, which backend will run the attention of each layer."""
    config = model.config
    query = jax.ShapeDtypeStruct((num_seqs, config.num_heads, config.head_dim), model.dtype)
    pools = jax.eval_shape(lambda: spec.poisoned_pools(config, model.dtype))
    context_lens = jax.ShapeDtypeStruct((num_seqs,), jnp.int32)
    block_tables = jax.ShapeDtypeStruct((num_seqs, spec.num_pages), jnp.int32)
    return ejk.backend_report(
        query, *pools, context_lens, block_tables, cache_layout=spec.layout, backend=backend
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    device = jax.devices()[0]
    dtype = DTYPES[args.dtype or ("f32" if device.platform == "cpu" else "bf16")]
    with announced(f"Loading SmolLM2-135M as {dtype}"):
        model = smollm2.load(dtype)
        jax.block_until_ready(model.params)

    passages = [
        *(Passage("Completion", text, model.encode(text)) for text in args.prompts),
        *(Passage("Chat", f"> {text}\n", model.encode_chat(text)) for text in args.chats),
    ]
    backends = backend_choices(args.backend, args.interpret)
    # How many pages there are decides nothing here.
    spec = CacheSpec(num_pages=1, page_size=args.page_size, layout=args.cache_layout)
    report = backend_report(model, spec, len(passages), backends["backend"])
    if report.chosen is None:
        sys.exit(f"error: {report}")
    steps = stream(
        model,
        [passage.prompt for passage in passages],
        max_new_tokens=args.max_new_tokens,
        prefill_chunk=args.prefill_chunk,
        cache_layout=args.cache_layout,
        page_size=args.page_size,
        seed=args.seed,
        **backends,
    )

    def advance() -> set[int]:
        new_tokens = next(steps, {})
        for index, token in new_tokens.items():
            passages[index].written.append(token)
        return set(new_tokens)

    lengths = " + ".join(str(len(passage.prompt)) for passage in passages)
    with announced(f"Compiling, then reading {lengths} prompt tokens"):
        advance()
    with announced("Compiling the decode step, then taking the first"):
        live = advance()
    print()
    num_tokens, seconds = write_out(model, passages, advance, live)

    if num_tokens:
        print(
            f"{num_tokens / seconds:.0f} tokens/s ({num_tokens} tokens in {seconds:.1f} s, "
            f"compilation excluded; sequences in the batch: {len(passages)})"
        )
    kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
    print(
        f"backend {report.chosen}{', interpreted,' if args.interpret else ''} on "
        f"{report.platform}{kind}, {dtype}, layout {args.cache_layout}, "
        f"pages of {args.page_size} tokens"
    )


def write_out(
    model: smollm2.SmolLM2,
    passages: Sequence[Passage],
    advance: Callable[[], set[int]],
    live: set[int],
) -> tuple[int, float]:
    """Show the passages as they grow until all have ended; return tokens and seconds it took."""
    in_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    view = Screen() if in_terminal else Log()
    num_tokens, start = 0, time.perf_counter()
    while live:
        view.show([(p, model.decode(p.written)) for p in passages], live, last=False)
        live = advance()
        num_tokens += len(live)
    seconds = time.perf_counter() - start
    view.show([(p, model.decode(p.written)) for p in passages], live, last=True)
    return num_tokens, seconds


if __name__ == "__main__":
    try:
        main()
    except (ImportError, ejk.UnsupportedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
