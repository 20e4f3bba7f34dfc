"""Batches whose sequences share first pages, and what packs a plan makes of them, by definition."""

import dataclasses

import numpy as np

import ejk

MARGIN = 70  # of costs: what the launch of packs takes
INTERPRETED = ejk.TritonPageAttention(interpret=True, num_sms=16, least_saved_bytes=0)


@dataclasses.dataclass(frozen=True)
class SharedCase:
    """The arguments of a call. What no token owns is NaN."""

    query: np.ndarray
    key_cache: np.ndarray
    value_cache: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    prefix_groups: tuple[np.ndarray, np.ndarray]

    def arrays(self):
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))[:5]

    def attend(self, backend, **options):
        return ejk.page_attention(*self.arrays(), backend=backend, return_lse=True, **options)

    def plan(self, backend, **changes):
        tables = self.block_tables
        return ejk.plan_page_attention(
            **dict(
                context_lens=self.context_lens, num_heads=self.query.shape[1],
                num_kv_heads=self.key_cache.shape[1], head_dim=self.query.shape[2],
                page_size=self.key_cache.shape[2], max_blocks=tables.shape[1],
                cache_dtype=self.key_cache.dtype, prefix_groups=self.prefix_groups,
                block_tables=tables, backend=backend,
            ) | changes
        )  # fmt: skip


def shared_case(
    groups, shared, own, *, seed=0, dtype=np.float32, heads=(4, 2), head_dim=16, page_size=16,
    blocks=40, num_pages=400,
):  # fmt: skip
    """Build a batch: group and own tokens of each sequence, first pages of each group."""
    r = np.random.default_rng(seed)
    shape = (num_pages, heads[1], page_size, head_dim)
    keys, values = (r.normal(size=shape).astype(dtype) for _ in range(2))
    free = list(r.permutation(num_pages))
    tables = np.full((len(groups), blocks), 2**31 - 1, np.int32)
    lens = np.zeros(len(groups), np.int32)
    is_used = np.zeros((num_pages, page_size), bool)
    prefixes = [[free.pop() for _ in range(count)] for count in shared]
    for s, (group, tokens) in enumerate(zip(groups, own, strict=True)):
        pages = prefixes[group] if 0 <= group < len(shared) else []
        lens[s] = len(pages) * page_size + tokens
        pages = [*pages, *(free.pop() for _ in range(-(-tokens // page_size)))]
        tables[s, : len(pages)] = pages
        for t in range(lens[s]):
            is_used[pages[t // page_size], t % page_size] = True
    dead = ~is_used[:, None, :, None]
    query = r.normal(size=(len(groups), heads[0], head_dim)).astype(dtype)
    keys, values = (np.where(dead, np.array(np.nan, dtype), x) for x in (keys, values))
    named = np.array(groups, np.int32), np.array(shared, np.int32)
    return SharedCase(query, keys, values, lens, tables, named)


def packs_oracle(problem, lens, tables, groups, pages):
    """Return `(tokens, members)` of each pack, as the costs of a plan say.

    Groups go by their first sequence, members by index.
    """

    def ceil_div(a, b):
        return -(-a // b)

    lens = [min(max(int(n), 0), problem.capacity) for n in lens]
    chunks = []
    for group in dict.fromkeys(int(g) for g in groups if 0 <= g < len(pages)):
        members = [s for s, g in enumerate(groups) if g == group]
        shortest = min(lens[s] for s in members) // problem.page_size
        shared = max(0, min(int(pages[group]), shortest, tables.shape[1]))
        if len(members) < 2 or any(
            (tables[s, :shared] != tables[members[0], :shared]).any() for s in members
        ):
            continue
        if shared:
            tokens = shared * problem.page_size
            chunks += [
                (tokens, members[i : i + problem.members])
                for i in range(0, len(members), problem.members)
            ]
    chunks = [chunk for chunk in chunks if len(chunk[1]) > 1]
    granules = [ceil_div(tokens, problem.granule) for tokens, _ in chunks]
    if problem.least_saved is not None:
        return [
            chunk for chunk, c in zip(chunks, granules)
            if (len(chunk[1]) - 1) * c >= problem.least_saved
        ]  # fmt: skip

    paying = [
        (chunk, c * problem.packs.granule_cost) for chunk, c in zip(chunks, granules)
        if len(chunk[1]) * c * problem.granule_cost
        > c * problem.packs.granule_cost + 3 * (len(chunk[1]) + 1)
    ]  # fmt: skip
    floors = {s: tokens for (tokens, members), _ in paying for s in members}

    def cost_of(tokens):
        return ceil_div(tokens, problem.granule) * problem.granule_cost + 3

    plain = sum(map(cost_of, lens))
    packed = sum(cost_of(n - floors.get(s, 0)) for s, n in enumerate(lens))
    packed += sum(cost + 3 * (len(chunk[1]) + 1) for chunk, cost in paying)
    plain, packed = (
        ceil_div(total * problem.programs_per_piece, problem.packs.resident)
        for total in (plain, packed)
    )
    return [chunk for chunk, _ in paying] if packed + packed // 16 + MARGIN <= plain else []
