"""`ejk.accepted_slots`: where the accepted tokens of draft trees are, and where they are to be."""

import jax
import jax.numpy as jnp

from ejk._arguments import check_sizes
from ejk._indices import as_int32
from ejk._partition import on_each_device
from ejk._typing import Bounds, Paths, Slots, typed


@typed
def accepted_slots(
    slot_mapping: Slots, accepted: Paths, cu_q_lens: Bounds
) -> tuple[jax.Array, jax.Array]:
    """Return the copies that put accepted drafts where their sequences go on.

    A step of `ejk.ragged_page_attention` with a `tree_mask` writes the nodes of a draft tree to the
    slots of a sequence's new tokens, one after the other. The nodes of the accepted path move to
    the first of these slots, in the order of the path:

        source[s, k] = slot_mapping[cu_q_lens[s] + accepted[s, k]]
        target[s, k] = slot_mapping[cu_q_lens[s] + k]

    Both are -1, which copies nothing, where `accepted[s, k]` is no new token of the sequence.

    Args:
        slot_mapping: the slot of each new token, as `ejk.write_kv_cache` got them. Any integer
            dtype.
        accepted: which of its sequence's new tokens are on the path, from the root on, which is new
            token 0 as a rule: what comes first takes its slot. `[num_seqs, depth]`, -1 behind the
            path's end, and nowhere before it. Any integer dtype.
        cu_q_lens: where the new tokens of each sequence begin and end. Any integer dtype.

    Returns:
        `(source_slots, target_slots)` of `ejk.copy_kv_slots`, int32 `[num_seqs * depth]` each.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: axes that do not fit each other.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> slots, bounds = jnp.array([32, 33, 34, 35]), jnp.array([0, 4])
        >>> path = jnp.array([[0, 2, 3, -1]])  # the root, its second child, and that one's child
        >>> print(*ejk.accepted_slots(slots, path, bounds))
        [32 34 35 -1] [32 33 34 -1]

    Source:
        SpecInfer (Miao et al., 2023, arXiv:2305.09781).
    """
    num_seqs, depth = accepted.shape
    total = slot_mapping.shape[0]
    check_sizes(cu_q_lens=(cu_q_lens, "num_seqs + 1", num_seqs + 1))
    slot_mapping, accepted, cu_q_lens = on_each_device(slot_mapping, accepted, cu_q_lens)
    nowhere = jnp.full(num_seqs * depth, -1, jnp.int32)
    if total == 0:
        return nowhere, nowhere
    bounds = jax.lax.cummax(jnp.clip(jnp.asarray(as_int32(cu_q_lens, total)), 0, total))
    first, q_lens = bounds[:-1, None], (bounds[1:] - bounds[:-1])[:, None]
    nodes = jnp.asarray(as_int32(accepted, total))
    nth = jnp.arange(depth, dtype=jnp.int32)[None]
    exists = (nodes >= 0) & (nodes < q_lens) & (nth < q_lens)
    slots = jnp.asarray(as_int32(slot_mapping, 2**31 - 1))

    def of(rows: jax.Array) -> jax.Array:
        return jnp.where(exists, slots[jnp.where(exists, first + rows, 0)], -1).reshape(-1)

    return of(nodes), of(nth)
