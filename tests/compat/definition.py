"""What FlashAttention and ragged paged attention document, in ten lines of NumPy."""

import numpy as np


def attend(q, k, v, scale, visible, soft_cap=None):
    """Attend from `q [rows, heads, dim]` to `k`, `v [tokens, kv_heads, dim]`.

    `visible [rows, tokens]` says what a row sees. Returns the output and the natural LSE.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(np.asarray(x, np.float64), group, axis=1) for x in (k, v))
    logits = scale * np.einsum("qhd,khd->qhk", np.asarray(q, np.float64), k)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    logits = np.where(visible[:, None], logits, -np.inf)
    top = np.maximum(logits.max(-1, keepdims=True), -1e300)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("qhk,khd->qhd", weights / np.where(total == 0, 1, total), v)
    with np.errstate(divide="ignore"):
        return out, (top + np.log(total))[..., 0]
