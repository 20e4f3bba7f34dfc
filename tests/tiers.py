"""Which cases are run: all, or a fixed choice of them that names every backend."""

import collections
import hashlib
import inspect
import os
import re

FAST, PALLAS = 20, 40
"""The fast tier runs one in so many of what has no mark, and of what Pallas has a part in.

To lower kernels for Pallas' interpreter takes half of the time of all tests.
"""

ON_A_GPU = (
    "cli_gpu", "copy_kv_cache", "determinism", "edges", "every_layout", "first_tokens",
    "fused_pools", "gpu", "gpu_packs", "gradients", "hostile_integers", "long_products",
    "mosaic_gpu", "mosaic_gpu_ragged", "mosaic_gpu_ragged_latent", "not_finite", "page_attention",
    "prefix_groups", "processes", "ragged_gradients", "ragged_page_attention", "stale_plans",
    "vmap", "write_kv_cache", "write_transformations",
)  # fmt: skip
"""The files whose tests run the real kernels where there is a GPU; all others are a CPU's."""

THOROUGH = bool(os.environ.get("EJK_TEST_THOROUGH"))
"""Many more values and shapes are drawn, and no case is left out."""

BACKEND = re.compile("xla|triton|pallas", re.IGNORECASE)


def one_in(n, items, salt=""):
    """Choose one in `n`, and one at least of every test function for each of its backends."""
    groups = collections.defaultdict(list)
    for item in items:
        function, _, parameters = item.nodeid.partition("[")
        backends = filter(BACKEND.search, parameters.rstrip("]").split("-"))
        groups[function, *backends].append(item)
    kept = _drawn(n, items, salt)
    for group in groups.values():
        if kept.isdisjoint(group):
            kept.add(min(group, key=lambda item: _number(item, salt)))
    return kept


def full(items):
    """Choose what `make test-all` runs: what needs no GPU, nor hours."""
    left_out = ("gpu", "demo", "thorough")
    return thinned([x for x in items if not any(map(x.get_closest_marker, left_out))])


def thinned(items):
    """Choose one in `n` of what is marked `one_in(n)`, and all of the rest.

    Of a test's share and its entry's the smaller one holds.
    """
    shares = {item: [mark.args[0] for mark in item.iter_markers("one_in")] for item in items}
    marks = {item: max(share) for item, share in shares.items() if share}
    chosen = [one_in(n, [x for x in marks if marks[x] == n]) for n in {*marks.values()}]
    kept = ({*items} - {*marks}).union(*chosen)
    return [item for item in items if item in kept]


def fast(items):
    """Choose the fast tier: what is marked `fast` or `smoke`, what expects an error, some others.

    `fast(n)` is one in `n`, and one at least of each function for each of its backends; `slow` is
    none.
    """
    kept, shares, rest = set(), collections.defaultdict(list), []
    for item in items:
        mark = item.get_closest_marker("fast")
        if item.get_closest_marker("slow"):
            continue
        if mark and mark.args:
            shares[mark.args[0]].append(item)
        elif mark or item.get_closest_marker("smoke") or _expects_an_error(item):
            kept.add(item)
        else:
            rest.append(item)
    for n, marked in shares.items():
        kept |= one_in(n, marked, "fast ")
    pallas = [item for item in rest if "pallas" in item.nodeid]
    return kept | _drawn(PALLAS, pallas, "fast ") | _drawn(FAST, set(rest) - {*pallas}, "fast ")


def _expects_an_error(item):
    return "raises" in inspect.unwrap(item.function).__code__.co_names


def _drawn(n, items, salt):
    return {item for item in items if _number(item, salt) % n == 0}


def _number(item, salt):
    """A number that neighbours do not share: a checksum's would leave out rows of them.

    The folder of a file is no part of it: a file that is moved keeps its cases.
    """
    name = re.sub(r"^tests/(\w+/)+", "tests/", item.nodeid)
    digest = hashlib.blake2b((salt + name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
