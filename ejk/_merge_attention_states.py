"""`ejk.merge_attention_states`: attention over disjoint keys, put together."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from ejk._rounding import rounded
from ejk._typing import Array, typed


@typed
def merge_attention_states(
    outs: Float[Array, "parts rows heads dim"], lses: Float[Array, "parts rows heads"]
) -> tuple[jax.Array, jax.Array]:
    """Merge partial results over disjoint sets of keys into the result over all of them.

        lse = log(sum over parts of exp(lses))
        out = sum over parts of exp(lses - lse) * outs

    A part whose LSE is -inf saw nothing: its output is selected away and may hold anything. Rows
    of which no part saw a token are 0, their LSE -inf; an LSE of +inf or NaN makes its row NaN. At
    most one part may have counted the sinks. Accumulates in float32.

    Args:
        outs: partial outputs; float32 keeps what a 16-bit type would round off.
        lses: their natural-log LSEs, as `return_lse=True` gives them.

    Returns:
        The output `[rows, heads, dim]` in the dtype of `outs`, and its float32 LSE.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: axes that do not fit each other.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> outs = jnp.array([0.0, 4.0]).reshape(2, 1, 1, 1)
        >>> lses = jnp.log(jnp.array([1.0, 3.0])).reshape(2, 1, 1)
        >>> round(float(ejk.merge_attention_states(outs, lses)[0][0, 0, 0]), 6)
        3.0

    Source:
        Attention states of FlashInfer (Ye et al., 2025, arXiv:2501.01005).
    """
    if outs.shape[:3] != lses.shape:
        turned = lses.shape[::2] + lses.shape[1:2] == outs.shape[:3]
        how = "lses.swapaxes(1, 2)" if turned else "one for each part, row and head"
        raise ValueError(
            f"lses.shape={lses.shape} must be outs.shape[:3]={outs.shape[:3]}: pass {how}"
        )
    outs, lses = jnp.asarray(outs), jnp.asarray(lses).astype(jnp.float32)
    if outs.shape[0] == 0:
        return jnp.zeros(outs.shape[1:], outs.dtype), jnp.full_like(lses[:0].sum(0), -jnp.inf)
    m = lses.max(0)
    m = jnp.where(m == -jnp.inf, 0.0, m)
    saw = lses != -jnp.inf
    # Where nothing was seen both selects keep the gradient finite.
    weights = jnp.where(saw, jnp.exp(jnp.where(saw, lses - m[None], 0.0)), 0.0)
    total = weights.sum(0)
    empty = total == 0
    safe_total = jnp.where(empty, 1.0, total)
    values = jnp.where(saw[..., None], outs.astype(jnp.float32), 0.0)
    # Divided before they are multiplied: the sum of large values might be infinite.
    out = ((weights / safe_total[None])[..., None] * values).sum(0)
    return rounded(out, outs.dtype), jnp.where(empty, -jnp.inf, m + jnp.log(safe_total))
