"""Let a real language model write text through a paged cache.

    python examples/generate.py                           four messages of its own
    python examples/generate.py "Why is the sky blue?"    answer this one
    python examples/generate.py --prompt "Once upon a time" --backend triton --interpret
    python examples/generate.py --cache int8              keys and values of 8 bits

All prompts are read and continued as one batch. The model is in `smollm2.py`, the loop in
`paged_decode.py`.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeAlias

try:
    import jax
    import smollm2
    from paged_decode import QUANTISED, CacheSpec, Step, stream

    import ejk
except ImportError as error:
    sys.exit(f"error: {error}: `make demo` installs all that this needs")

DEFAULT_CHATS = (
    "What is the capital of France?",
    "Name three planets of the solar system.",
    "Write one sentence about the moon.",
    "Why is the sea salty? Answer in one sentence.",
)
Number: TypeAlias = tuple[str, int, int, int, str]
NUMBERS: tuple[Number, ...] = (
    ("max-new-tokens", 64, 1, smollm2.CONFIG.max_context_len - 1, "of each text"),
    ("page-size", 16, 1, 1024, "tokens of a page"),
    ("prefill-chunk", 512, 1, 2**16, "prompt tokens read in one call"),
    ("seed", 0, 0, 2**32 - 1, "of the order in which pages are handed out"),
)  # flags, their defaults, least and most values, and what they are
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


def new_view() -> Screen | Log:
    in_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return Screen() if in_terminal else Log()


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


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (--help lists the options)")


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def number(least: int, most: int) -> Callable[[str], int]:
    """Make a type of arguments: whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(
                f"{shortened(text)} must be a whole number from {least} to {most}"
            )
        return int(text)

    return parse


def some_text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} must have some text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be UTF-8") from None
    return text


def shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}\N{HORIZONTAL ELLIPSIS}")


def add_texts(parser: Parser) -> None:
    add = parser.add_argument
    add("chat", nargs="*", type=some_text, metavar="TEXT", help="same as --chat TEXT")
    for flag, help_text in (("chat", "answer this message"), ("prompt", "continue this text")):
        add(
            f"--{flag}",
            action="append",
            default=[],
            dest=f"{flag}s",
            type=some_text,
            metavar="TEXT",
            help=f"{help_text} (may be repeated)",
        )


def arguments(
    argv: Sequence[str] | None,
    parser: Parser | None = None,
    numbers: Sequence[Number] = NUMBERS,
    takes_texts: bool = True,
) -> argparse.Namespace:
    """Read the options that `parser` has, and those of all demos; refuse what cannot run."""
    if parser is None:
        parser = Parser(description="Let a real language model write text through a paged cache.")
    add = parser.add_argument
    if takes_texts:
        add_texts(parser)
    for flag, default, least, most, help_text in numbers:
        add(
            f"--{flag}",
            type=number(least, most),
            default=default,
            metavar="N",
            help=f"{help_text}; default: %(default)s",
        )
    add("--backend", choices=("auto", "xla", "triton", "pallas"), default="auto")
    add("--interpret", action="store_true", help="interpret the triton or pallas kernels (slow)")
    add("--dtype", choices=DTYPES, help="default: f32 on a CPU, else bf16")
    add("--cache", choices=QUANTISED, help="hold keys and values in 8 or 4 bits")
    add("--cache-layout", choices=("HND", "NHD", "KV_HEADS_FIRST"), default="HND")
    args = parser.parse_args(argv)
    if takes_texts:
        args.chats = [*args.chat, *args.chats]
        if not args.chats and not args.prompts:
            args.chats = list(DEFAULT_CHATS)
    if args.interpret and args.backend not in ("triton", "pallas"):
        parser.error("--interpret needs --backend triton or --backend pallas")
    try:
        platform = jax.devices()[0].platform
    except (RuntimeError, AssertionError):  # the latter for CUDA without a GPU
        named = os.environ.get("JAX_PLATFORMS")
        refuse(f"JAX finds no device of JAX_PLATFORMS={named!r}; JAX_PLATFORMS=cpu picks the CPU")
    args.dtype = DTYPES[args.dtype or ("f32" if platform == "cpu" else "bf16")]
    if reason := refusal(args):
        refuse(reason)
    return args


Choice: TypeAlias = str | ejk.Backend | None


def backend_choices(name: str, interpret: bool) -> dict[str, Choice]:
    """Turn the options into the backends of decoding, prefill and write, as `stream` takes them."""
    choices: list[Choice] = [None if name == "auto" else name] * 3
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
    return dict(zip(("backend", "prefill_backend", "write_backend"), choices))


def backend_reports(args: argparse.Namespace):
    """Ask `ejk`, from shapes alone, which backends will run decoding, prefill and write."""
    config = smollm2.CONFIG
    # How many pages and rows there are decides nothing here.
    spec = CacheSpec(1, args.page_size, args.cache_layout, args.cache)
    pools = jax.eval_shape(lambda: spec.empty_pools(config, args.dtype))
    key_and_value = pools.key_cache, pools.value_cache

    def rows(num_heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, num_heads, config.head_dim), args.dtype)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, "int32")

    query, new = rows(config.num_heads), rows(config.num_kv_heads)
    calls = (
        (ejk.page_attention, (query, *key_and_value, integers(1), integers(1, 1))),
        (
            ejk.ragged_page_attention,
            (query, *key_and_value, integers(1), integers(1, 1), integers(2)),
        ),
        (ejk.write_kv_cache, (new, new, *key_and_value, integers(1))),
    )
    backends = backend_choices(args.backend, args.interpret).values()
    return [
        ejk.backend_report(
            *operands,
            operation=operation,
            cache_layout=spec.layout,
            backend=backend,
            key_scale=pools.key_scale,
            value_scale=pools.value_scale,
        )
        for (operation, operands), backend in zip(calls, backends)
    ]


def refusal(args: argparse.Namespace) -> str | None:
    """Say in a line why the backend cannot run here, and what to do; None if it can."""
    for report in backend_reports(args):
        if report.chosen is None:
            reasons = "; ".join(reason for of_one in report.refusals.values() for reason in of_one)
            reason = f"--backend {args.backend} cannot run on {report.platform}: {reasons}"
            if args.interpret and report.platform != "cpu":
                return f"{reason}; JAX_PLATFORMS=cpu picks the CPU"
            if not args.interpret and report.platform == "cpu":
                return f"{reason}; --interpret runs its kernels on the CPU, in an interpreter"
            return reason
    return None


def read(model: smollm2.SmolLM2, args: argparse.Namespace) -> list[Passage]:
    """Turn the texts that were given into prompts."""
    return [
        *(Passage("Completion", text, model.encode(text)) for text in args.prompts),
        *(Passage("Chat", f"> {text}\n", model.encode_chat(text)) for text in args.chats),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    device = jax.devices()[0]
    with announced(f"Loading SmolLM2-135M as {args.dtype}"):
        model = smollm2.load(args.dtype)
        jax.block_until_ready(model.params)

    passages = read(model, args)
    most_tokens = max(len(passage.prompt) for passage in passages) + args.max_new_tokens
    if most_tokens > model.config.max_context_len:
        refuse(
            f"the longest text and --max-new-tokens {args.max_new_tokens} make {most_tokens} "
            f"tokens; the model has room for {model.config.max_context_len}"
        )
    steps = stream(
        model,
        [passage.prompt for passage in passages],
        max_new_tokens=args.max_new_tokens,
        prefill_chunk=args.prefill_chunk,
        cache=args.cache,
        cache_layout=args.cache_layout,
        page_size=args.page_size,
        seed=args.seed,
        **backend_choices(args.backend, args.interpret),
    )
    most_pages = 0

    def advance() -> set[int]:
        nonlocal most_pages
        step = next(steps, Step({}, most_pages))
        for index, token in step.new_tokens.items():
            passages[index].written.append(token)
        most_pages = step.most_pages
        return set(step.new_tokens)

    lengths = " + ".join(str(len(passage.prompt)) for passage in passages)
    with announced(f"Compiling, then reading {lengths} prompt tokens"):
        advance()
    with announced("Compiling the decode step, then taking the first"):
        live = advance()
    print()
    num_tokens, seconds = write_out(model, passages, advance, live, args.max_new_tokens)

    if num_tokens:
        print(
            f"{num_tokens / seconds:.0f} tokens/s ({num_tokens} tokens in {seconds:.1f} s, "
            f"compilation excluded; sequences in the batch: {len(passages)})"
        )

    for line in savings(args, model, most_pages, len(passages), most_tokens):
        print(line)
    chosen = backend_reports(args)[0].chosen
    kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
    print(
        f"backend {chosen}{', interpreted,' if args.interpret else ''} on "
        f"{device.platform}{kind}, {args.dtype}, layout {args.cache_layout}"
    )


def savings(
    args: argparse.Namespace, model: smollm2.SmolLM2, most_pages: int, num_seqs: int, most: int
) -> Iterator[str]:
    """Say how many bytes pages have saved, and how many a quantised cache; `most` are tokens."""

    def megabytes(num_tokens: int, cache: str | None = args.cache) -> float:
        spec = CacheSpec(1, num_tokens, cache=cache)
        pools = jax.eval_shape(lambda: spec.empty_pools(model.config, model.dtype))
        return round(pools.nbytes / 1e6, 1)

    num_tokens = most_pages * args.page_size
    paged, dense = megabytes(num_tokens), megabytes(num_seqs * most)
    yield (
        f"cache: at most {most_pages} pages of {args.page_size} tokens in use at once, "
        f"{paged:.1f} MB; a dense cache of {num_seqs} x {most} tokens takes "
        f"{dense:.1f} MB: pages {'save' if paged <= dense else 'cost'} {abs(dense - paged):.1f} MB"
    )
    if args.cache:
        whole = megabytes(num_tokens, None)
        yield (
            f"{args.cache}: these pages take {paged:.1f} MB, scales included, instead of the "
            f"{whole:.1f} MB of {args.dtype}: saves {whole - paged:.1f} MB"
        )


def write_out(
    model: smollm2.SmolLM2,
    passages: Sequence[Passage],
    advance: Callable[[], set[int]],
    live: set[int],
    max_new_tokens: int,
) -> tuple[int, float]:
    """Show the passages as they grow until all have ended; return tokens and seconds it took."""

    def texts() -> list[tuple[Passage, str]]:
        cut = (" [...]" if len(p.written) == max_new_tokens else "" for p in passages)
        return [(p, model.decode(p.written) + mark) for p, mark in zip(passages, cut)]

    view = new_view()
    num_tokens, start = 0, time.perf_counter()
    while live:
        view.show(texts(), live, last=False)
        live = advance()
        num_tokens += len(live)
    seconds = time.perf_counter() - start
    view.show(texts(), live, last=True)
    return num_tokens, seconds


def run(main: Callable[[], None]) -> None:
    """Run a demo: what it cannot do it says in a line."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, as it ends `cat`
    try:
        main()
    # RuntimeError: no such platform here, or not enough memory.
    except (ImportError, OSError, RuntimeError, ValueError, ejk.UnsupportedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run(main)
