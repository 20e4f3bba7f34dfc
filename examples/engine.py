"""A small serving engine: continuous batching over a paged cache, to read and to copy.

    engine = Engine(smollm2.load(), num_drafts=4)
    engine.submit(prompt, Sampling(temperature=0.8, seed=1))
    for request, token in engine.stream(): ...

`python examples/engine.py` answers several messages at once, `--help` lists what can be varied.

`Engine.submit` takes a request at any time, and `Engine.step` computes one batch: the next token of
every sequence that writes, its drafts, and the next chunk of prompts that are being read, in one
call of `ejk.ragged_page_attention` a layer. `ejk.paging.PageManager` says which page is whose. The
guesses are in `drafts.py`, the screen in `serve.py`.

A request's tokens are the same whatever else is in the batch, and however often it was preempted:
the random numbers of a token follow from the request's seed and the token's position alone. Drafts
change no token either, as one is accepted exactly where it is the token that would be drawn without
it. What remains is rounding: logits of another batch may differ in their last bits.
"""

import collections
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from drafts import Draft, follow, look_up, tree
from paged_decode import CacheLayout, CacheSpec, write

import ejk
from ejk.paging import Batch, BatchInputs, OutOfPagesError, PageManager, PrefixGroups

TINY = float(np.finfo(np.float32).tiny)  # devices take what is smaller for 0
LEAST_TOKENS, GROWTH = 8, 4  # a step has 8, 32, 128, ... rows: few programs, some of them padding


class BadRequestError(ValueError):
    """A request that cannot be served; the engine is as it was."""


def is_integer(x: object, least: int, end: float = math.inf) -> bool:
    return isinstance(x, int | np.integer) and bool(least <= x < end)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen, and how many."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("max_tokens", is_integer(self.max_tokens, 1), "an int, at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "finite and at least 0, for greedy"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 leaves no token out"),
            ("seed", is_integer(self.seed, 0, 2**32), "an int in [0, 2**32)"),
        ):
            if not holds:
                raise BadRequestError(f"{name}={getattr(self, name)!r} must be {rule}")


GREEDY = Sampling()


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what has been written after it."""

    number: int
    tokens: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    finish: str | None = None  # "stop", "length" or "cancelled"
    seq: int = -1  # of the page manager, while the request runs
    drafts: list[Draft] = dataclasses.field(default_factory=list[Draft])  # of the current step

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]


class Share(NamedTuple):
    """What a step computes of a request."""

    request: Request
    q_len: int
    is_last: bool  # nothing is left to compute: a token is chosen


class Picks(NamedTuple):
    """The rows of a step from which tokens are chosen, and how."""

    rows: np.ndarray  # int32
    positions: np.ndarray  # int32: of the tokens that are chosen
    temperatures: np.ndarray  # float32
    top_ps: np.ndarray  # float32
    seeds: np.ndarray  # uint32


class Operands(NamedTuple):
    """What a step's program takes, beside weights and pools."""

    inputs: BatchInputs  # positions are those in the tree
    tree_mask: np.ndarray | None
    picks: Picks
    prefix_groups: PrefixGroups | None  # sequences whose first pages are the same ones


class Engine:
    """Serves requests side by side from one pool of pages.

    Args:
        num_pages: of each layer.
        max_seqs: requests that run at once; others wait.
        prefill_chunk: prompt tokens that a step reads, of all requests together.
        num_drafts: tokens that a step may guess for each request; 0 for none.
        num_candidates: continuations that the guesses may be of: more than one make a tree.
        min_shared_pages: sequences that share fewer pages are not named to attention, which reads
            them for each: a call with groups has more launches, see `docs/performance.md`.
        cache: how keys and values are held, a name in `paged_decode.QUANTISED`; None: unrounded.
        backend: passed on to `ejk.ragged_page_attention`: None, a name or an object.
        write_backend: passed on to `ejk.write_kv_cache`.
    """

    def __init__(
        self,
        model: smollm2.SmolLM2,
        *,
        num_pages: int = 1024,
        page_size: int = 16,
        max_seqs: int = 8,
        prefill_chunk: int = 256,
        num_drafts: int = 0,
        num_candidates: int = 2,
        min_shared_pages: int = 64,
        prefix_caching: bool = True,
        cache: str | None = None,
        cache_layout: CacheLayout = "HND",
        backend: str | ejk.Backend | None = None,
        write_backend: str | ejk.Backend | None = None,
    ):
        for name, value, least in (
            ("prefill_chunk", prefill_chunk, 1),
            ("num_drafts", num_drafts, 0),
            ("num_candidates", num_candidates, 1),
            ("min_shared_pages", min_shared_pages, 1),
        ):
            if not is_integer(value, least):
                raise ValueError(f"{name}={value!r} must be an int, at least {least}")
        self.model = model
        self.prefill_chunk, self.num_drafts = prefill_chunk, num_drafts
        self.num_candidates, self.min_shared_pages = num_candidates, min_shared_pages
        self.spec = CacheSpec(num_pages, page_size, cache_layout, cache)
        self.pools = self.spec.poisoned_pools(model.config, model.dtype)
        self.room = min(num_pages * page_size, model.config.max_context_len)  # tokens of a request
        self.manager = PageManager(
            num_pages=num_pages,
            page_size=page_size,
            max_seqs=max_seqs,
            max_blocks=-(-self.room // page_size),
            prefix_caching=prefix_caching,
        )
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []  # both in the order in which they came
        self.num_requests = self.num_steps = self.num_guessed = self.num_accepted = 0
        self.backends = {"backend": backend, "write_backend": write_backend}
        self._recent = collections.deque([(time.perf_counter(), 0)], maxlen=32)  # times and tokens

    # Requests.

    def submit(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Request:
        """Take a request; it starts as soon as there is room.

        Raises:
            BadRequestError: no tokens, unknown ones, or more than fit in an empty pool.
        """
        vocabulary = self.model.params["embedding"].shape[0]
        if not len(prompt):
            raise BadRequestError("prompt is empty, and must have a token: its logits choose one")
        for i, token in enumerate(prompt):
            if not is_integer(token, 0, vocabulary):
                raise BadRequestError(f"prompt[{i}]={token!r} must be an int in [0, {vocabulary})")
        total = len(prompt) + sampling.max_tokens
        if total > self.room:
            raise BadRequestError(
                f"prompt[{len(prompt)}] and max_tokens={sampling.max_tokens} make {total} tokens, "
                f"and must be at most {self.room}: the smaller of the pool, num_pages="
                f"{self.spec.num_pages} of page_size={self.spec.page_size}, and of the model's "
                f"max_context_len={self.model.config.max_context_len}"
            )
        request = Request(self.num_requests, [int(t) for t in prompt], len(prompt), sampling)
        self.num_requests += 1
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request at once; one that has ended stays as it is."""
        if request.finish is None:
            request.finish = "cancelled"
            if request in self.running:
                self._release([request])
            else:
                self.waiting.remove(request)

    def stream(self) -> Iterator[tuple[Request, int]]:
        """Yield each token as it is chosen, until no request is left. More may come meanwhile."""
        while self.waiting or self.running:
            yield from self.step()

    def step(self) -> list[tuple[Request, int]]:
        """Compute one batch; return the tokens that it has brought."""
        self._grow()
        self._admit()
        shares = self._deal_out()
        if not shares:
            return []
        q_lens = [share.q_len for share in shares]
        seqs = [share.request.seq for share in shares]
        batch = self.manager.batch(seqs, q_lens, **self._least_sizes(sum(q_lens)))
        try:
            chosen = self._compute(batch, shares)
        except BaseException:  # without drafts, so that the step can be made again
            ends = [len(request.tokens) for request in self.running]
            self.manager.truncate([request.seq for request in self.running], ends)
            raise
        events = self._accept(batch, shares, chosen)
        self.num_steps += 1
        self._recent.append((time.perf_counter(), self._recent[-1][1] + len(events)))
        return events

    def progress(self) -> str:
        """Say in a line how it goes."""
        (begin, before), (end, after) = self._recent[0], self._recent[-1]
        pages, total = self.manager.statistics(), self.spec.num_pages
        rate = (after - before) / max(end - begin, 1e-9)
        line = (
            f"{rate:.0f} tokens/s, {len(self.running)} running, {len(self.waiting)} waiting, "
            f"{pages.used_pages} of {total} pages in use, {pages.hit_rate:.0%} of prompt tokens "
            f"found, {pages.preemptions} preempted"
        )
        if self.num_guessed:
            line += f", {self.num_accepted / self.num_guessed:.0%} of drafts accepted"
        return line

    # What a step is made of.

    def _grow(self) -> None:
        """Give each running sequence its new tokens and drafts; preempt the youngest for pages."""
        self._guess()
        while self.running:
            seqs = [request.seq for request in self.running]
            news = [
                request.tokens[known:] + [draft.token for draft in request.drafts]
                for request, known in zip(self.running, self.manager.num_tokens(seqs))
            ]
            try:
                self.manager.append(seqs, [*itertools.chain(*news)], [len(new) for new in news])
                return
            except OutOfPagesError:
                if any(request.drafts for request in self.running):
                    for request in self.running:
                        request.drafts = []
                else:
                    self._preempt(self.running.pop())

    def _guess(self) -> None:
        """Look drafts up, no more than may still be written or than a step has rows for."""
        computed = self.manager.num_computed_tokens([request.seq for request in self.running])
        for request, known in zip(self.running, computed.tolist()):
            rows = self.num_drafts - (len(request.tokens) - 1 - known)
            left = request.sampling.max_tokens - len(request.output) - 1
            request.drafts = look_up(request.tokens, min(rows, left), self.num_candidates)

    def _preempt(self, request: Request) -> None:
        self.manager.preempt(request.seq)
        request.seq = -1
        self.waiting.appendleft(request)  # it came before all that wait

    def _admit(self) -> None:
        """Start requests in the order in which they came, as long as there are pages for them."""
        while self.waiting and len(self.running) < self.manager.sizes.max_seqs:
            try:
                self.waiting[0].seq = self.manager.allocate(self.waiting[0].tokens)
            except OutOfPagesError:
                return
            self.running.append(self.waiting.popleft())

    def _deal_out(self) -> list[Share]:
        """Say how many tokens of each request are computed: a chunk of prompts, all of others."""
        seqs = [request.seq for request in self.running]
        counts = self.manager.num_tokens(seqs) - self.manager.num_computed_tokens(seqs)
        left, shares = self.prefill_chunk, list[Share]()
        for request, count in zip(self.running, counts.tolist()):
            q_len = count
            if count > 1 + self.num_drafts:
                q_len = min(count, left)
                left -= q_len
            if q_len:
                shares.append(Share(request, q_len, q_len == count))
        return shares

    def _least_sizes(self, num_tokens: int) -> dict[str, int]:
        """Choose the padded shapes of a step."""
        size, sizes = LEAST_TOKENS, self.manager.sizes
        while size < num_tokens:
            size *= GROWTH
        num_seqs = min(size, 1 << (sizes.max_seqs - 1).bit_length())
        return {"min_seqs": num_seqs, "min_tokens": size, "min_blocks": sizes.max_blocks}

    def _compute(self, batch: Batch, shares: list[Share]) -> list[int]:
        """Run the model on a batch; return the chosen token after each row that is picked."""
        few = 1 + self.num_drafts
        max_q_len = few if batch.max_q_len <= few else max(few, self.prefill_chunk)
        positions, tree_mask = tree(batch, [of.request.drafts for of in shares], max_q_len)
        inputs = batch.inputs._replace(positions=positions)
        picks = self._picks(batch, positions, shares)
        groups = batch.prefix_groups(self.min_shared_pages)
        named = groups if groups.num_pages.any() else None
        operands = Operands(inputs, tree_mask, picks, named)
        return self._run(operands, max_q_len).tolist()

    def _run(self, operands: Operands, max_q_len: int) -> np.ndarray:
        """Run the model's program, and wait for what it chooses."""
        tokens, self.pools = compute(
            self.model.params,
            self.pools,
            operands,
            config=self.model.config,
            spec=self.spec,
            max_q_len=max_q_len,
            **self.backends,
        )
        return np.asarray(tokens)

    def _picks(self, batch: Batch, positions: np.ndarray, shares: list[Share]) -> Picks:
        """Pick the last token of each sequence and its drafts; of half-read prompts nothing."""
        picked = [
            (row, positions[row] + 1, how.temperature, how.top_p, how.seed)
            for share, end in zip(shares, batch.inputs.cu_q_lens[1:].tolist())
            if share.is_last
            for how in [share.request.sampling]
            for row in range(end - 1 - len(share.request.drafts), end)
        ]
        seqs, tokens = batch.inputs.context_lens.size, batch.inputs.tokens.size
        padding = [(0, 0, 0.0, 1.0, 0)] * (min(tokens, seqs * (1 + self.num_drafts)) - len(picked))
        dtypes = np.int32, np.int32, np.float32, np.float32, np.uint32
        return Picks(*(np.array(x, dtype) for x, dtype in zip(zip(*picked, *padding), dtypes)))

    def _accept(
        self, batch: Batch, shares: list[Share], chosen: list[int]
    ) -> list[tuple[Request, int]]:
        """Keep the drafts that were chosen and the token after them; commit the batch."""
        news, ends, begin = dict[Request, list[int]](), dict[int, int](), 0
        for request in (share.request for share in shares if share.is_last):
            end = begin + 1 + len(request.drafts)
            path, token = follow(request.drafts, chosen[begin:end])
            news[request] = [request.drafts[i].token for i in path] + [token]
            self.num_guessed += len(request.drafts)
            self.num_accepted += len(path)
            # Of several branches only the first lies where its tokens belong. What is accepted of
            # another is computed again, in rows of the next step, which reads all weights anyway.
            in_place = sum(i == depth for depth, i in enumerate(path))
            ends[request.seq] = len(request.tokens) + in_place
            begin = end
        self.manager.truncate(list(ends), list(ends.values()))
        self.manager.commit(batch)
        events = [(request, token) for request in news for token in self._write(request, news)]
        self._release([request for request in news if request.finish])
        return events

    def _write(self, request: Request, news: dict[Request, list[int]]) -> Iterator[int]:
        """Append new tokens up to an end; an end token is not written."""
        for token in news[request]:
            if token in self.model.end_tokens:
                request.finish = "stop"
                return
            request.tokens.append(token)
            yield token
            if len(request.output) == request.sampling.max_tokens:
                request.finish = "length"
                return

    def _release(self, requests: list[Request]) -> None:
        self.manager.free([request.seq for request in requests])
        for request in requests:
            self.running.remove(request)


@functools.partial(
    jax.jit,
    static_argnames=("config", "spec", "max_q_len", "backend", "write_backend"),
    donate_argnames="pools",
)
def compute(
    params: smollm2.Params,
    pools: ejk.KVCache,
    operands: Operands,
    *,
    config: smollm2.Config,
    spec: CacheSpec,
    max_q_len: int,
    backend: str | ejk.Backend | None = None,
    write_backend: str | ejk.Backend | None = None,
) -> tuple[jax.Array, ejk.KVCache]:
    """Read the new tokens of a batch into their pages; choose a token after each row of `picks`."""
    inputs, tree_mask, picks, prefix_groups = operands
    # Without a tree they are those that the call finds itself, and Hopper's kernel takes none.
    positions = None if tree_mask is None else inputs.positions

    def attend(layer, query, key, value, pools):
        slots, tables = spec.of_layer(layer, inputs.slot_mapping, inputs.block_tables)
        pools = write(spec, pools, key, value, slots, write_backend)
        out = ejk.ragged_page_attention(
            query,
            pools.key_cache,
            pools.value_cache,
            inputs.context_lens,
            tables,
            inputs.cu_q_lens,
            max_q_len=max_q_len,
            positions=positions,
            tree_mask=tree_mask,
            prefix_groups=prefix_groups,
            key_scale=pools.key_scale,
            value_scale=pools.value_scale,
            cache_layout=spec.layout,
            backend=backend,
        )
        return out, pools

    hidden, pools = smollm2.hidden_states(
        config, params, inputs.tokens, inputs.positions, attend, pools
    )
    return choose(smollm2.logits(params, hidden[picks.rows]), picks), pools


def choose(logits: jax.Array, picks: Picks) -> jax.Array:
    """Choose a token of each row: the likeliest one at temperature 0, else one that is drawn.

    The largest of `logits / temperature` plus Gumbel noise is a draw from their softmax.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[1:], logits.dtype)

    def draw() -> jax.Array:
        # Below the largest one, as logits over a temperature of 1e-38 would overflow.
        below = logits - logits.max(axis=-1, keepdims=True)
        scaled = below / jnp.maximum(picks.temperatures, TINY)[:, None]
        kept = jax.lax.cond(
            (picks.top_ps < 1).any(), lambda: nucleus(scaled, picks.top_ps), lambda: scaled
        )
        drawn = jnp.argmax(kept + jax.vmap(noise)(picks.seeds, picks.positions), axis=-1)
        return jnp.where(picks.temperatures > 0, drawn.astype(jnp.int32), greedy)

    return jax.lax.cond((picks.temperatures > 0).any(), draw, lambda: greedy)


def nucleus(logits: jax.Array, top_ps: jax.Array) -> jax.Array:
    """Leave out, as -inf, what is less likely than the fewest tokens that weigh `top_ps` together.

    Source: Holtzman et al., 2020, arXiv:1904.09751.
    """
    weights = jax.nn.softmax(logits, axis=-1)
    ordered = jnp.sort(weights, axis=-1, descending=True)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    is_kept = before < jnp.maximum(top_ps, TINY)[:, None]
    least = jnp.min(ordered, axis=-1, where=is_kept, initial=1.0)
    least = jnp.where(top_ps < 1, least, 0)  # rounded, the likeliest ones may weigh 1 already
    return jnp.where(weights >= least[:, None], logits, -jnp.inf)


if __name__ == "__main__":
    import serve

    serve.run(serve.main)
