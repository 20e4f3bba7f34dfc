"""Numbers of a call: poison everywhere, then what some sequence sees."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ejk.testing import oracle, poison
from ejk.testing.configurations import F32, INT4, Configuration
from ejk.testing.oracle import Array
from ejk.testing.shapes import Shape


def draw_tables(
    rng: np.random.Generator,
    shape: Shape,
    num_seqs: int,
    dtype: npt.DTypeLike,
    share: bool,
    invalid: float,
) -> Array:
    """Make block tables; a share of the entries names no page."""
    pages = np.resize(rng.permutation(shape.num_pages), (num_seqs, shape.max_blocks))
    if share:
        pages[:, 0] = pages[0, 0]
    broken = poison.invalid_entries(rng, pages.shape, dtype, shape.num_pages)
    return np.where(rng.random(pages.shape) < invalid, broken, pages.astype(dtype))


def draw_pools(
    rng: np.random.Generator,
    config: Configuration,
    tables: Array,
    seen: Mapping[int, Collection[int]],
    magnitudes: tuple[Any, Any],
) -> tuple[Array, Array | None, Array, Array, tuple[Any, Any]]:
    """Poison both pools, then write the positions that each sequence sees.

    Returns the keys, the values, which slots some sequence sees, which entries it needs, and the
    scales of both.
    """
    shape, dtype = config.shape, config.holds
    pool_shape = (shape.num_pages, shape.page_size, shape.num_kv_heads)
    live = np.zeros(pool_shape[:2], bool)
    needed = np.zeros(tables.shape, bool)
    for s, positions in seen.items():
        for j in positions:
            block, slot = divmod(j, shape.page_size)
            needed[s, block] = True
            if poison.is_page(tables[s, block], shape.num_pages):
                live[int(tables[s, block]), slot] = True
    widths = [shape.head_dim] if shape.latent else [shape.head_dim, shape.width]
    pools: list[Any] = []
    scales: list[Any] = []
    for width, magnitude in zip(widths, magnitudes):
        pool = poison.numbers(rng, (*pool_shape, width // (1 + (dtype == INT4))), dtype)
        clean = magnitude * rng.standard_normal((live.sum(), shape.num_kv_heads, width))
        scale = draw_scales(rng, config, clean)
        over = scale if np.ndim(scale) < 1 else scale[..., None]
        pool[live] = oracle.quantised(clean.astype(np.float32), over, dtype)
        if config.scales == "token":
            of_tokens = poison.numbers(rng, pool_shape, F32)
            of_tokens[live] = scale
            scale = of_tokens
        pools.append(pool)
        scales.append(scale)
    if shape.latent:
        return pools[0], None, live, needed, (scales[0], None)
    return pools[0], pools[1], live, needed, (scales[0], scales[1])


def draw_scales(rng: np.random.Generator, config: Configuration, clean: Array) -> Any:
    """Make the scales of rows `clean [tokens, num_kv_heads, width]`, so that no code saturates."""
    if config.scales == "none":
        return None
    axis = {"scalar": None, "head": (0, 2), "token": 2}[config.scales]
    largest = oracle.LARGEST.get(config.holds.name)
    if largest is None:
        shape = np.abs(clean).max(axis, initial=0).shape
        return np.exp(rng.standard_normal(shape)).astype(np.float32)
    size = np.abs(clean).max(axis, initial=0).astype(np.float32) / np.float32(largest)
    return np.where(size == 0, np.float32(1), size * np.float32(1 + 1e-6))


def draw_options(config: Configuration, rng: np.random.Generator, window: Any) -> dict[str, Any]:
    heads = config.shape.num_heads
    slopes = (2.0 ** -(1 + np.arange(heads) % 8)).astype(np.float32)
    sinks = rng.standard_normal(heads).astype(np.float32)
    sinks[rng.random(heads) < 0.2] = -np.inf
    drawn = {
        "sliding_window": 1 if window is None else window,
        "attn_logits_soft_cap": 2.0,
        "sinks": sinks,
        "alibi_slopes": slopes,
        "attn_scale": float(np.float32(rng.uniform(0.05, 1.0) * config.shape.head_dim**-0.5)),
    }
    return {name: value for name, value in drawn.items() if name in config.features}
