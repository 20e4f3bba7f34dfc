"""`ejk.layer_block_tables` and `ejk.layer_slot_mapping`: one layer of a pool of all layers."""

import jax
import jax.numpy as jnp
import numpy as np

from ejk._describe import describe
from ejk._indices import Size, as_int32, exceeds, static_int, static_size
from ejk._typing import Array, ScalarInt, Slots, StaticInt, StaticSize, Tables, typed


@typed
def layer_block_tables(
    block_tables: Tables, layer: ScalarInt, *, num_pages: StaticSize
) -> jax.Array:
    """Return a table that names the pages of one layer in a pool of all layers.

    The pool is `[num_layers * num_pages, ...]`, one layer after the other; the table names pages
    of the first. An entry outside `[0, num_pages)` becomes -1: added to as it is, it would name
    another layer's page.

        of_layer = block_tables + layer * num_pages     where an entry is in [0, num_pages), else -1

    Args:
        block_tables: any integer dtype.
        layer: at least 0. May be traced, as in a `jax.lax.scan` over layers.
        num_pages: of one layer.

    Returns:
        int32, of the shape of `block_tables`.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: a size out of range, or a layer whose ids are no 32-bit integers.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> print(ejk.layer_block_tables(jnp.array([[3, -1], [8, 0]]), 2, num_pages=8))
        [[19 -1]
         [-1 16]]
    """
    pages = static_size("num_pages", num_pages, at_least=0)
    return _of_layer("num_pages", block_tables, layer, pages)


@typed
def layer_slot_mapping(
    slot_mapping: Slots, layer: ScalarInt, *, num_pages: StaticSize, page_size: StaticInt
) -> jax.Array:
    """Return the slots of one layer in a pool of all layers: `ejk.layer_block_tables` of slots.

        of_layer = slot + layer * num_pages * page_size

    A slot outside `[0, num_pages * page_size)`, -1 included, becomes -1 and writes nothing: added
    to as it is, it would overwrite another layer's token.

    Args:
        slot_mapping: as of `ejk.write_kv_cache` to the first layer. Any integer dtype.
        layer: at least 0. May be traced.
        num_pages: of one layer.
        page_size: slots of a page.

    Returns:
        int32 `[num_tokens]`.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: a size out of range, or a layer whose slots are no 32-bit integers.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> print(ejk.layer_slot_mapping(jnp.array([5, -1]), 2, num_pages=8, page_size=16))
        [261  -1]
    """
    slots = static_size("num_pages", num_pages, at_least=0)
    slots *= static_int("page_size", page_size, at_least=1)
    return _of_layer("num_pages * page_size", slot_mapping, layer, slots)


def _of_layer(name: str, indices: Array, layer: ScalarInt, size: Size) -> jax.Array:
    """Move indices into `[0, size)` to where a layer's begin."""
    if isinstance(layer, int | np.integer):
        static_int("layer", layer, at_least=0)
        if exceeds((int(layer) + 1) * size, 2**31 - 1):
            raise ValueError(
                f"(layer + 1) * {name}={(int(layer) + 1) * size} must be below 2**31: ids and "
                f"slots are 32-bit (layer={describe(layer)})"
            )
    found = jnp.asarray(as_int32(indices, size))
    nth = jnp.asarray(as_int32(layer, 2**31 - 1))
    # A traced layer whose ids leave 32 bits would wrap to the pages of another.
    exists = (found >= 0) & (found < size) & (nth >= 0) & (nth <= (2**31 - 1 - found) // size)
    return jnp.where(exists, found + nth * size, -1)
