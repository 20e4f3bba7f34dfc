"""Let a real language model answer several messages at once, through the engine of `engine.py`.

    python examples/engine.py                              four messages of its own
    python examples/engine.py "Why is the sky blue?" --temperature 0.8 --drafts 4
    python examples/engine.py --backend triton --interpret --max-new-tokens 8
    python examples/engine.py --num-pages 20 --max-seqs 2   too few pages for all: some wait

Under the texts a line says how it goes.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

try:
    import jax
    import smollm2
    from engine import BadRequestError, Engine, Request, Sampling
    from generate import (
        NUMBERS,
        Parser,
        Passage,
        announced,
        arguments,
        backend_choices,
        new_view,
        read,
        refuse,
        run,
    )
except ImportError as error:
    sys.exit(f"error: {error}: `make engine` installs all that this needs")

AnyEngine = TypeVar("AnyEngine", bound=Engine)
OPTIONS = (
    *(option for option in NUMBERS if option[0] != "seed"),
    ("seed", 0, 0, 2**31, "of the first text's random numbers; the next text has the next seed"),
    ("num-pages", 1024, 1, 2**20, "of the pool"),
    ("max-seqs", 8, 1, 1024, "texts that are written at once; others wait"),
    ("drafts", 0, 0, 64, "tokens that a step may guess for each text"),
)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Let a real language model answer several messages at once.")
    add_sampling(parser)
    args = arguments(argv, parser, OPTIONS)
    check_sampling(args)
    return args


def add_sampling(parser: Parser) -> None:
    for flag, default, help_text in (
        ("temperature", 0.0, "0 takes the likeliest token"),
        ("top-p", 1.0, "draw from the likeliest tokens that weigh so much"),
    ):
        help_text = f"{help_text}; default: %(default)s"
        parser.add_argument(f"--{flag}", type=float, default=default, metavar="X", help=help_text)


def check_sampling(args: argparse.Namespace) -> None:
    try:
        sampling(args, 0)
    except BadRequestError as error:
        refuse(str(error))


def sampling(args: argparse.Namespace, index: int) -> Sampling:
    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed + index)


def new_engine(
    model: smollm2.SmolLM2, args: argparse.Namespace, kind: type[AnyEngine] = Engine
) -> AnyEngine:
    backends = backend_choices(args.backend, args.interpret)
    return kind(
        model,
        num_pages=args.num_pages,
        page_size=args.page_size,
        max_seqs=args.max_seqs,
        prefill_chunk=args.prefill_chunk,
        num_drafts=args.drafts,
        cache=args.cache,
        cache_layout=args.cache_layout,
        backend=backends["prefill_backend"],
        write_backend=backends["write_backend"],
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    with announced(f"Loading SmolLM2-135M as {args.dtype}"):
        model = smollm2.load(args.dtype)
        jax.block_until_ready(model.params)
    engine, passages = new_engine(model, args), read(model, args)
    try:
        requests = [engine.submit(p.prompt, sampling(args, i)) for i, p in enumerate(passages)]
    except BadRequestError as error:
        refuse(str(error))

    def texts() -> Iterator[tuple[Passage, str]]:
        for request, passage in zip(requests, passages):
            cut = " [...]" if request.finish == "length" else ""
            yield passage, model.decode(request.output) + cut
        yield Passage("Engine", engine.progress(), []), ""

    def live() -> set[int]:
        return {*(r.number for r in requests if r.finish is None), len(requests)}

    with announced("Compiling, then taking the first step"):
        engine.step()
    print()
    view = new_view()
    while has_work(requests):
        engine.step()
        view.show(list(texts()), live(), last=False)
    view.show(list(texts()), set(), last=True)


def has_work(requests: Sequence[Request]) -> bool:
    return any(request.finish is None for request in requests)


if __name__ == "__main__":
    run(main)
