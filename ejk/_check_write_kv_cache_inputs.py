"""`ejk.check_write_kv_cache_inputs`: the rules that only the device's values can break."""

from collections.abc import Iterator
from typing import Any

from ejk._arguments import check_sizes
from ejk._check_values import Rule, check_values
from ejk._pools import check_pool
from ejk._typing import Cache, Slots, Tables, TokenRows, typed
from ejk.backends.layouts import CacheLayout


@typed
def check_write_kv_cache_inputs(
    key: TokenRows,
    value: TokenRows | None,
    key_cache: Cache,
    value_cache: Cache | None,
    slot_mapping: Slots,
    *,
    block_tables: Tables | None = None,
    cache_layout: CacheLayout = "HND",
) -> None:
    """Check the slots that `ejk.write_kv_cache` takes as they come.

    A slot is -1, which writes nothing, or in `[0, num_pages * page_size)`; no two tokens have the
    same; and with `block_tables`, it is in a page that one of its entries names. Others are skipped
    by the call, or the later token stays: nearly always a caller's mistake. The arguments are those
    of `ejk.write_kv_cache`; of the new tokens and pools only the shapes are used.

    With concrete arrays this waits for the device and raises. Under `jit` it adds checks of
    `jax.experimental.checkify`: transform the function with `checkify.checkify`.

    Args:
        key: as in `ejk.write_kv_cache`.
        value: as in `ejk.write_kv_cache`.
        key_cache: as in `ejk.write_kv_cache`.
        value_cache: as in `ejk.write_kv_cache`.
        slot_mapping: as in `ejk.write_kv_cache`.
        block_tables: of the sequences that the tokens belong to, as attention is given them. What
            is there past a sequence's length counts as named, too.
        cache_layout: as in `ejk.write_kv_cache`.

    Raises:
        ValueError: with concrete arrays, naming the token, its slot and the rule.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> pool, rows = jnp.zeros((8, 2, 16, 64)), jnp.ones((3, 2, 64))
        >>> ejk.check_write_kv_cache_inputs(rows, rows, pool, pool, jnp.array([5, -1, 5]))
        Traceback (most recent call last):
        ValueError: slot_mapping[0]=5 must be one token's alone: of several the last one stays
    """
    num_pages, _, page_size = check_pool(key_cache, cache_layout)
    num_slots = num_pages * page_size
    check_sizes(slot_mapping=(slot_mapping, "num_tokens", key.shape[0]))

    def rules(xp: Any, slots: Any, tables: Any) -> Iterator[Rule]:
        yield (
            (slots < -1) | (slots >= num_slots),
            0,
            f"slot_mapping[{{i0}}]={{value}} must be in [0, {num_slots}), or -1 to write nothing",
        )
        order = xp.sort(slots)
        alike = xp.searchsorted(order, slots, side="right") - xp.searchsorted(order, slots)
        yield (
            (slots >= 0) & (alike > 1),
            0,
            "slot_mapping[{i0}]={value} must be one token's alone: of several the last one stays",
        )
        if tables is not None:
            yield (
                (slots >= 0) & ~xp.isin(slots // page_size, tables),
                0,
                f"slot_mapping[{{i0}}]={{value}} must be in a page that block_tables names: a page "
                f"has {page_size} slots",
            )

    check_values(rules, slot_mapping, block_tables, limits=(num_slots, num_pages))
