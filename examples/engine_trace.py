"""Serve a drawn trace of requests with the engine of `engine.py`, and say how long they waited.

    python examples/engine_trace.py                               200 requests, 4 a second
    python examples/engine_trace.py --requests 64 --rate 0 --parts --max-seqs 64 --num-pages 4096
    python examples/engine_trace.py --drafts 4 --json trace.json

Requests arrive as a Poisson process, or all at once with `--rate 0`. Some of them begin with one
system prompt. Prompts are random tokens, and each request writes as many tokens as were drawn for
it, end tokens or not. Shapes are compiled before the clock starts, and those that are compiled
later are counted.

`--parts` says what the time goes into. Host: the time of a step, by the host's clock, less that of
its program from dispatch to result. Of the program, a sample of the steps is run again: whole; the
model alone, where attention gives its query back; and sampling alone. What the last two leave of
the whole is attention, its writes to the cache included.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import serve
    import smollm2
    from engine import Engine, Operands, Request, Sampling, choose, compute
    from generate import Parser, announced, arguments, number, run

    import ejk
    from ejk.paging import BatchInputs
except ImportError as error:
    sys.exit(f"error: {error}: `make engine` installs all that this needs")

PERCENTILES = 50, 90, 99
SAMPLED_STEPS, REPEATS = 8, 10  # of `--parts`
OPTIONS = (
    *(option for option in serve.OPTIONS if option[0] not in ("max-new-tokens", "seed")),
    ("seed", 0, 0, 2**31, "of the trace, and of the numbers that draw tokens"),
)


class Arrival(NamedTuple):
    """A request of the trace."""

    time: float  # seconds after the first
    prompt: list[int]
    num_tokens: int  # to write


class Served(NamedTuple):
    """When a request arrived, and when its tokens came: seconds on one clock."""

    arrival: float
    tokens: list[float]


def draw(
    seed: int, count: int, rate: float, shared: float, vocabulary: int, most: int
) -> list[Arrival]:
    """Draw a trace: exponential gaps of mean `1 / rate`, lengths of log-normal distributions.

    Args:
        rate: arrivals a second; 0: all at once.
        shared: the share of requests that begin with the system prompt, of `most // 4` tokens.
        most: tokens of a request, its prompt and what it writes.
    """
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count)) if rate else np.zeros(count)
    system = rng.integers(0, vocabulary, most // 4).tolist()

    def lengths(median: float, at_most: int) -> list[int]:
        drawn = rng.lognormal(np.log(median), 0.8, count)
        return np.clip(drawn, 1, at_most).astype(int).tolist()

    own, written = lengths(most / 12, most // 4), lengths(most / 12, most // 4)
    with_system = rng.random(count) < shared
    return [
        Arrival(float(at), system * bool(first) + rng.integers(0, vocabulary, n).tolist(), m)
        for at, first, n, m in zip(times - times[0], with_system, own, written)
    ]


def drive(engine: Engine, trace: Sequence[Arrival], sampling: Sampling) -> list[Served]:
    """Submit each request when it arrives, and note when its tokens come."""
    served = dict[Request, Served]()
    begin, left = time.perf_counter(), list(reversed(trace))
    while left or engine.running or engine.waiting:
        while left and left[-1].time <= time.perf_counter() - begin:
            arrival = left.pop()
            how = dataclasses.replace(
                sampling, max_tokens=arrival.num_tokens, seed=sampling.seed + len(served)
            )
            served[engine.submit(arrival.prompt, how)] = Served(arrival.time, [])
        if not (engine.running or engine.waiting):
            time.sleep(max(left[-1].time - (time.perf_counter() - begin), 0))
        events = engine.step()
        now = time.perf_counter() - begin
        for request, _ in events:
            served[request].tokens.append(now)
    return list(served.values())


def warm_up(engine: Engine) -> None:
    """Compile the shapes that a trace is likely to meet: more and more prompts, short and long."""
    longest = min(engine.prefill_chunk, engine.room - 4)
    num_seqs = engine.manager.sizes.max_seqs
    for length in sorted({1, *(min(8 * 4**n, longest) for n in range(8))}):
        for together in sorted({1, *(min(8 * 4**n, num_seqs) for n in range(6))}):
            for seed in range(together):
                one = [seed % 7] * (1 if seed else length)
                engine.submit(one, Sampling(4, seed=seed))
            for _ in engine.stream():
                pass
            engine.manager.reset_prefix_cache()


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Throughput in tokens a second, and percentiles of latencies in milliseconds."""
    firsts = [one.tokens[0] - one.arrival for one in served]
    wholes = [one.tokens[-1] - one.arrival for one in served]
    gaps = [
        (one.tokens[-1] - one.tokens[0]) / (len(one.tokens) - 1)
        for one in served
        if len(one.tokens) > 1
    ]
    num_tokens = sum(len(one.tokens) for one in served)
    seconds = max(one.tokens[-1] for one in served)
    latencies = {"first_token": firsts, "per_token": gaps, "whole": wholes}
    return {
        "requests": len(served),
        "tokens": num_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(num_tokens / seconds, 1),
        "milliseconds": {
            name: {f"p{p}": round(float(np.percentile(x, p)) * 1e3, 2) for p in PERCENTILES}
            for name, x in latencies.items()
            if x
        },
    }


# What the time goes into.


class Program(NamedTuple):
    """What one step has run."""

    operands: Operands
    max_q_len: int
    seconds: float  # from dispatch to result


class TimedEngine(Engine):
    """Notes each step's time and program."""

    def __init__(self, model: smollm2.SmolLM2, **options: Any):
        super().__init__(model, **options)
        self.programs: list[Program] = []
        self.seconds = 0.0  # of all steps
        self.shapes = set[str]()  # of which programs were compiled

    def step(self) -> list[tuple[Request, int]]:
        begin = time.perf_counter()
        events = super().step()
        self.seconds += time.perf_counter() - begin
        return events

    def _run(self, operands: Operands, max_q_len: int) -> np.ndarray:
        self.shapes.add(f"{jax.tree.map(np.shape, operands)} {max_q_len}")
        begin = time.perf_counter()
        tokens = super()._run(operands, max_q_len)
        took = time.perf_counter() - begin
        self.programs.append(Program(operands, max_q_len, took))
        return tokens


@functools.partial(jax.jit, static_argnames="config")
def model_alone(
    params: smollm2.Params, inputs: BatchInputs, rows: jax.Array, *, config: smollm2.Config
) -> jax.Array:
    """Score tokens as `compute` does, without cache or attention; no projection is left out."""

    def attend(layer, query, key, value, cache):
        of_heads = config.num_heads // config.num_kv_heads
        return query + jnp.repeat(key + value, of_heads, axis=1), cache

    x, _ = smollm2.hidden_states(config, params, inputs.tokens, inputs.positions, attend, None)
    return smollm2.logits(params, x[rows])


sample = jax.jit(choose)


def parts(engine: TimedEngine) -> dict[str, float]:
    """Divide the time of the mean step, in milliseconds."""
    steps = engine.programs
    again = np.mean([again_in_parts(engine, step) for step in spread(steps)], axis=0)
    program = sum(step.seconds for step in steps) / len(steps)
    whole, alone, sampling = again.tolist()
    figures = {
        "step": engine.seconds / len(steps),
        "host": engine.seconds / len(steps) - program,
        "program": program,
        "program_again": whole,
        "attention_and_cache": whole - alone - sampling,
        "rest_of_the_model": alone,
        "sampling": sampling,
    }
    return {name: round(seconds * 1e3, 3) for name, seconds in figures.items()}


def spread(steps: list[Program]) -> list[Program]:
    """Choose some steps from the first to the last."""
    return steps[:: -(-len(steps) // SAMPLED_STEPS)]


def again_in_parts(engine: TimedEngine, step: Program) -> tuple[float, float, float]:
    """Run a step again: return the seconds of all of it, of the model alone, of sampling alone."""
    params, config = engine.model.params, engine.model.config

    def whole(pools: ejk.KVCache) -> ejk.KVCache:
        return compute(
            params,
            pools,
            step.operands,
            config=config,
            spec=engine.spec,
            max_q_len=step.max_q_len,
            **engine.backends,
        )[1]

    engine.pools, of_whole = timed(whole, engine.pools)
    inputs, _, picks, _ = step.operands
    logits, of_model = timed(lambda _: model_alone(params, inputs, picks.rows, config=config), None)
    return of_whole, of_model, timed(lambda _: sample(logits, picks), None)[1]


def timed(function: Callable[[Any], Any], x: Any) -> tuple[Any, float]:
    """Call a function on what it returned, so that pools may be donated; return the median time."""
    x, times = jax.block_until_ready(function(x)), list[float]()
    for _ in range(REPEATS):
        begin = time.perf_counter()
        x = jax.block_until_ready(function(x))
        times.append(time.perf_counter() - begin)
    return x, float(np.median(times))


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Serve a drawn trace of requests, and time it.")
    add = parser.add_argument
    for flag, kind, default, metavar, help_text in (
        ("requests", number(1, 10**6), 200, "N", "how many arrive"),
        ("rate", float, 4.0, "X", "arrivals a second; 0: all at once"),
        ("shared", float, 0.5, "X", "share of the requests that begin with the system prompt"),
        ("length", number(8, 8192), 768, "N", "most tokens of a request"),
    ):
        help_text = f"{help_text}; default: %(default)s"
        add(f"--{flag}", type=kind, default=default, metavar=metavar, help=help_text)
    add("--parts", action="store_true", help="say what the time goes into")
    add("--json", type=pathlib.Path, metavar="FILE", help="write all figures there")
    serve.add_sampling(parser)
    # The trace says what each request reads, and how many tokens it writes.
    parser.set_defaults(max_new_tokens=Sampling.max_tokens)
    args = arguments(argv, parser, OPTIONS, takes_texts=False)
    if not (0 <= args.rate < 1e9 and 0 <= args.shared <= 1):
        parser.error(f"--rate {args.rate} must be at least 0, --shared {args.shared} in [0, 1]")
    serve.check_sampling(args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = options(argv)
    with announced(f"Loading SmolLM2-135M as {args.dtype}"):
        model = dataclasses.replace(smollm2.load(args.dtype), end_tokens=frozenset())
    engine = serve.new_engine(model, args, TimedEngine)
    with announced("Compiling"):
        warm_up(engine)
    before, compiled = engine.manager.statistics(), len(engine.shapes)
    engine.programs.clear()
    engine.seconds, engine.num_guessed, engine.num_accepted = 0.0, 0, 0
    most, vocabulary = min(args.length, engine.room), model.params["embedding"].shape[0]
    trace = draw(args.seed, args.requests, args.rate, args.shared, vocabulary, most)
    with announced(f"Serving {args.requests} requests"):
        served = drive(engine, trace, serve.sampling(args, 0))
    after, device = engine.manager.statistics(), jax.devices()[0]
    queried = after.queried_tokens - before.queried_tokens
    figures = {
        **summary(served),
        "prefix_hit_rate": round((after.hit_tokens - before.hit_tokens) / queried, 3),
        "preemptions": after.preemptions - before.preemptions,
        "drafts": engine.num_guessed,
        "accepted_drafts": engine.num_accepted,
        "steps": len(engine.programs),
        "compiled_while_serving": len(engine.shapes) - compiled,
        "device": device.device_kind,
        "versions": {"ejk": ejk.__version__, "jax": jax.__version__},
        "options": {name: str(value) for name, value in vars(args).items() if name != "json"},
    }
    if args.parts:
        figures["milliseconds_of_a_step"] = parts(engine)
    print(json.dumps({name: x for name, x in figures.items() if name != "options"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
