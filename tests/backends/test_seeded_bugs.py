"""Bugs put into the XLA backend one at a time: the properties must catch each of them.

A mutant is a backend of its own to JAX, so that no compiled program of the sound one is reused.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_gradients
from edges import LENGTHS, config
from entries import Entry

import ejk
import ejk._arguments as arguments
import ejk.backends.reverse_mode.attention as shared
import ejk.backends.reverse_mode.page_attention as backward
import ejk.backends.xla._softmax as softmax
import ejk.backends.xla.page_attention as forward
from ejk.testing.bounds import assert_close
from ejk.testing.configurations import FEATURES
from ejk.testing.page_attention import build
from ejk.testing.shapes import BY_NAME

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.XlaPageAttention):
    bug: str = ""


def mutant(bug: str) -> Entry:
    return Entry(bug, Mutant(block_kv=16, bug=bug), examples=0, batch_invariant=False)


def holds_forward(entry):
    """The first property, on cases that every run of the suite has the like of."""
    everything = frozenset(FEATURES)
    for features in (frozenset(), everything, everything - {"sliding_window", "sinks"}):
        for dtype in (np.dtype(np.float32), BFLOAT16):
            cased = config(features=features, dtype=dtype, fused=features == everything)
            case = build(cased, LENGTHS, window=17, invalid=0.3, tables_dtype=np.int64)
            assert_close(case, *entry(case))
    for hostile in (2**32 + 1, 2**31 - 1):
        lens = np.array([-1, -(2**31), hostile, 49, 5, 0, 17, 48, 33])
        lens = lens.astype(np.int64 if hostile > 2**31 else np.int32)
        case = build(config(features=everything - {"sinks"}), lens, window=40)
        assert_close(case, *entry(case))


def holds_backward(entry):
    features = frozenset({"sinks", "alibi_slopes", "attn_logits_soft_cap"})
    case = build(config(features=features), LENGTHS, share=True, invalid=0.2)
    test_gradients.check(case, entry)
    long = config(shape=BY_NAME["two blocks"], fused=True)
    test_gradients.check(build(long, np.array([600, 672])), entry)
    test_gradients.test_what_a_sink_leaves_no_weight_has_no_gradient(entry, 0.0)


def around(function, before):
    """`function` with its `(problem, operands, ...)` changed by `before`."""
    return lambda problem, operands, *rest: function(problem, before(problem, operands), *rest)


def replace_operands(**changes):
    return lambda problem, operands: operands._replace(
        **{name: change(problem, operands) for name, change in changes.items()}
    )


context_of, span, load = forward.Context.of, forward.Context.span, forward.load_block
attend, gather, logits, product, accumulate = (
    forward._attend, softmax._gather, softmax.Block.logits, softmax.product, softmax.accumulate
)  # fmt: skip


def unselected_gather(problem, pool, pages, half, visible):
    return gather(problem, pool, pages, half, jnp.ones_like(visible))


def halves_changed(change):
    def changed(problem, pool, pages, half, visible):
        return gather(problem, pool, pages, change(half), visible)

    return changed


def interleaved_heads(problem, x):
    x = x.reshape(x.shape[0], problem.group, problem.num_kv_heads, *x.shape[2:])
    return x.swapaxes(1, 2)


def longer_window(by):
    return around(
        context_of, replace_operands(sliding_window=lambda p, o: o.sliding_window + by)
    )  # fmt: skip


def windowed(function):
    return lambda problem, operands: (
        function(problem, operands) if problem.has_window else context_of(problem, operands)
    )


def context_past_capacity(problem, operands):
    length = jnp.clip(operands.context_lens, 0, 10 * problem.capacity)
    return context_of(problem, operands)._replace(length=length)


def context_of_whole_pages(problem, operands):
    context = context_of(problem, operands)
    whole = -(-context.length // problem.page_size) * problem.page_size
    return context._replace(length=whole)


def tables_changed(change):
    tables = replace_operands(block_tables=lambda p, o: change(o.block_tables, p.num_pages))
    return around(load, tables)


def last_block_dropped(context, sizes):
    begin, end = span(context, sizes)
    return begin, end - 1


def first_block_dropped(context, sizes):
    begin, end = span(context, sizes)
    return begin + 1, end


def cap_after_slopes(block, problem, *rest):
    scores = no_cap(block, problem, *rest)
    return scores if problem.soft_cap is None else jnp.tanh(scores / 2.0) * 2.0


def earlier_blocks_forgotten(state, *rest):
    return accumulate((jnp.full_like(state[0], -jnp.inf), *state[1:]), *rest)


def no_cap(block, problem, *rest):
    return logits(block, dataclasses.replace(problem, soft_cap=None), *rest)


def no_slopes(block, problem, *rest):
    return logits(block, dataclasses.replace(problem, has_alibi=False), *rest)


def slopes_from_the_start(problem, operands, sizes, context, number):
    block = load(problem, operands, sizes, context, number)
    return block._replace(ahead=block.ahead + (context.length - 1)[:, None, None])


def low_products(formula, a, b):
    low = [x.astype(jnp.bfloat16).astype(x.dtype) for x in (a, b)]
    return product(formula, *low)


def no_sink_in_the_lse(problem, operands, *rest):
    out, _ = attend(problem, operands, *rest)
    return out, attend(dataclasses.replace(problem, has_sinks=False), operands, *rest)[1]


def lse_in_base_two(*args):
    out, lse = attend(*args)
    return out, lse * 1.4426950408889634


def wrapping_as_int32(x, bound):
    return jnp.asarray(np.asarray(x).astype(np.int32))


SCALED_SINKS = replace_operands(sinks=lambda p, o: None if o.sinks is None else o.sinks * 0.5)
NO_SCALE = replace_operands(attn_scale=lambda p, o: jnp.float32(p.head_dim**-0.5))

FORWARD = {
    "unread slots are multiplied by zero": (softmax, "_gather", unselected_gather),
    "query heads are dealt out to KV heads": (forward, "group_heads", interleaved_heads),
    "the window is one too long": (forward.Context, "of", windowed(longer_window(1))),
    "the window is one too short": (forward.Context, "of", windowed(longer_window(-1))),
    "lengths run past the capacity": (forward.Context, "of", context_past_capacity),
    "tails of pages are visible": (forward.Context, "of", context_of_whole_pages),
    "bad entries are clamped": (
        forward, "load_block", tables_changed(lambda tables, n: jnp.clip(tables, 0, n - 1)),
    ),
    "bad entries wrap": (forward, "load_block", tables_changed(lambda tables, n: tables % n)),
    "values are read from the keys' half": (softmax, "_gather", halves_changed(lambda half: 0)),
    "the values come first": (softmax, "_gather", halves_changed(lambda half: 1 - half)),
    "the last block is dropped": (forward.Context, "span", last_block_dropped),
    "the first block is dropped": (forward.Context, "span", first_block_dropped),
    "pages in reverse": (
        forward, "load_block", tables_changed(lambda tables, n: tables[:, ::-1]),
    ),
    "earlier blocks are forgotten": (softmax, "accumulate", earlier_blocks_forgotten),
    "the cap comes after the slopes": (softmax.Block, "logits", cap_after_slopes),
    "the cap is ignored": (softmax.Block, "logits", no_cap),
    "the slopes are ignored": (softmax.Block, "logits", no_slopes),
    "slopes count from the start": (forward, "load_block", slopes_from_the_start),
    "the scale is ignored": (forward, "_attend", around(attend, NO_SCALE)),
    "the sink is scaled": (forward, "_attend", around(attend, SCALED_SINKS)),
    "the sink is not in the LSE": (forward, "_attend", no_sink_in_the_lse),
    "the LSE is in base two": (forward, "_attend", lse_in_base_two),
    "float32 products are rounded to bfloat16": (softmax, "product", low_products),
    "64-bit integers are narrowed first": (arguments, "as_int32", wrapping_as_int32),
}  # fmt: skip


def overwriting_scatter(problem, grad, pages, half, block):
    return scatter(problem, jnp.zeros_like(grad), pages, half, block)


def scatter_into_keys(problem, grad, pages, half, block):
    return scatter(problem, grad, pages, shared.KEYS, block)


def scatter_of_first_readers(problem, grad, pages, half, block):
    """The first page, which all sequences share, counts for the first of them alone."""
    return scatter(problem, grad, pages, half, block.at[1:, :, : problem.page_size].set(0))


def no_slope_gradient(block, problem, operands, *rest):
    slopes = jax.lax.stop_gradient(operands.alibi_slopes)
    return logits(block, problem, operands._replace(alibi_slopes=slopes), *rest)


def weight_is_sight(sums, *given):
    added = add(sums, *given)
    return added._replace(sees=added.weights > 0)


class CaplessBlock(softmax.Block):
    logits = no_cap


scatter, add = shared._scatter, shared.Sums.add

BACKWARD = {
    "unread slots are multiplied by zero": (softmax, "_gather", unselected_gather),
    "blocks overwrite each other's gradient": (shared, "_scatter", overwriting_scatter),
    "values' gradient goes to the keys": (shared, "_scatter", scatter_into_keys),
    "shared pages count once": (shared, "_scatter", scatter_of_first_readers),
    "rows without weight see nothing": (shared.Sums, "add", weight_is_sight),
    "slopes have no gradient": (softmax.Block, "logits", no_slope_gradient),
    "the cap is ignored": (backward, "load_block", lambda *args: CaplessBlock(*load(*args))),
    "the last block is dropped": (forward.Context, "span", last_block_dropped),
}


@pytest.mark.fault("page_attention", "xla")
@pytest.mark.fast(9)
@pytest.mark.parametrize("bug", FORWARD)
def test_bugs_of_the_forward_pass_are_caught(bug, monkeypatch):
    target, name, replacement = FORWARD[bug]
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises(AssertionError):
        holds_forward(mutant(bug))


@pytest.mark.fault("page_attention", "reverse_mode")
@pytest.mark.fast(9)
@pytest.mark.parametrize("bug", BACKWARD)
def test_bugs_of_the_backward_pass_are_caught(bug, monkeypatch):
    target, name, replacement = BACKWARD[bug]
    sound = mutant(f"sound forward pass: {bug}")
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises(AssertionError):
        holds_backward(sound)


def test_the_sound_backend_is_not_accused():
    holds_forward(mutant("none"))
    holds_backward(mutant("none"))
