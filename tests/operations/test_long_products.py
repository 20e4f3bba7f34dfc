"""Sums of many float32 products: how far a logit of wide heads may be off, and is."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from entries import ragged_edge

import ejk
from ejk.backends.triton._sizes import LONGEST_CHAIN
from ejk.testing.bounds import Rows, assert_close, one_rounding
from ejk.testing.configurations import Configuration
from ejk.testing.ragged_page_attention import build_ragged
from ejk.testing.recipes import build_case
from ejk.testing.shapes import BY_NAME

LATENT = Configuration(
    BY_NAME["deepseek-v3, an eighth"], np.dtype(np.float32), "HND",
    frozenset({"sliding_window", "attn_logits_soft_cap"}),
)  # fmt: skip


@pytest.mark.one_in(2)
@ragged_edge
@pytest.mark.parametrize("window", [1, 2])
def test_rows_that_see_one_token_or_two(entry, window):
    """Their LSE is little but a logit: nothing else hides the errors of its 576 products."""
    for seed in range(2 if "interpreted" in entry.name else 20):
        case = build_ragged(
            LATENT, np.array([48, 40]), np.array([0, 6, 13]), extras=frozenset({"tree_mask"}),
            window=jnp.int32(window), seed=seed, magnitudes=(2.0, 1.0),
        )  # fmt: skip
        assert_close(case, *entry(case))


WIDE = {
    "shape": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 576, "page_size": 64, "max_blocks": 3,
              "num_pages": 1, "latent": True, "value_head_dim": 512},
    "dtype": "float32", "lens": [192, 193, 36], "cu_q_lens": [2, 12, 12, 12], "total": 13,
    "share": True, "magnitudes": [2.0, 1.0], "seed": 4294967295,
}  # fmt: skip
"""A call that was drawn: 64 tokens, each seen three times."""


@pytest.mark.cpu
def test_xla_adds_up_in_chains():
    case = build_case("ragged_page_attention", WIDE)
    options = {"value_head_dim": 512, "return_lse": True, "backend": "xla"}
    assert_close(case, *ejk.ragged_page_attention(*case.arguments(), **options))


@pytest.mark.cpu
@pytest.mark.parametrize("length", [64, 576])
def test_one_chain_of_576_is_beyond_the_bound(length):
    case = build_case("ragged_page_attention", WIDE)
    (out, lse), rows = case.expected(), Rows(case)
    for r in range(2, 12):
        for h in range(4):
            _, keys, _, values = rows.of(r, 0)
            query = np.broadcast_to(rows.query[r, h], keys.shape)
            logits = np.float32(576**-0.5) * chains(query, keys.astype(np.float32), length)
            weights = np.exp((logits - logits.max()).astype(np.float64))
            out[r, h] = weights @ values.astype(np.float64) / weights.sum()
    given = out.astype(np.float32), lse.astype(np.float32)
    with contextlib.nullcontext() if length == 64 else pytest.raises(AssertionError):
        assert_close(case, *given)


def chains(query, keys, length):
    """Add products up as the kernel does: `length` one after the other, then their sums."""
    total = None
    for first in range(0, query.shape[1], length):
        s = np.zeros(len(query), np.float32)
        for d in range(first, min(first + length, query.shape[1])):
            # Exact in float64: one rounding each, as a fused multiply-add.
            s = (s + query[:, d].astype(np.float64) * keys[:, d]).astype(np.float32)
        total = s if total is None else total + s
    return total


@pytest.mark.cpu
def test_the_kernels_order_keeps_the_bound_of_the_lse():
    """Rows of one token: without the size of the sums, some are beyond it."""
    rng = np.random.default_rng(0)
    query, keys = (2 * rng.standard_normal((2, 100_000, 576))).astype(np.float32)
    scale = np.float32(576**-0.5)
    products = query.astype(np.float64) * keys
    exact = float(scale) * products.sum(1)
    error = np.abs(scale * chains(query, keys, LONGEST_CHAIN) - exact)
    plain = np.abs(scale * np.einsum("rd,rd->r", query, keys) - exact)
    allowed = 2 * plain + [one_rounding(x, np.float32) for x in exact]
    largest = np.maximum(1, np.abs(exact))
    assert (error / (allowed + 2e-6 * largest)).max() > 1
    largest = np.maximum(largest, scale * np.sqrt((products**2).sum(1)))
    assert (error / (allowed + 2e-6 * largest)).max() < 0.6
