"""Which tokens of a block rows see, in registers, by private means and by public ones.

See `_private.py`.
"""

# The types that come with MLIR's bindings are stricter than they are.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ejk.backends.mosaic_gpu._pages import in_pages
from ejk.backends.mosaic_gpu._private import ROW, SCALAR, TILE
from ejk.backends.mosaic_gpu._registers import accumulated, float32, int32, lane, scalar_of


class Seen(NamedTuple):
    """Which tokens of a block each row sees: counted from its first one, `begins` to before `ends`.

    And those whose page exists.
    """

    begins: Any  # int32 [rows]
    ends: Any
    exist: Any  # int32: a bit for each page of the block
    pages: int  # of a block


SEEN = (ROW, ROW, SCALAR)  # layouts of its arrays


def kept(plain: bool, s: Any, seen: Seen) -> Any:
    """Keep logits of tokens that are seen; others are -inf.

    A thread makes a bit for each of its tokens, of which one instruction moves several to
    predicates: a masked block takes 200 instructions less.
    """
    if plain:
        token = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=TILE)
        is_seen = in_pages(token, seen.exist, s.shape[1] // seen.pages)
        is_seen &= token >= lax.broadcast_in_dim(seen.begins, s.shape, [0])
        is_seen &= token < lax.broadcast_in_dim(seen.ends, s.shape, [0])
        return jnp.where(is_seen, s, -jnp.inf)
    result = plgpu.ShapeDtypeStruct(s.shape, jnp.float32, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(TILE, *SEEN), return_type=result)
    def keep(ctx: Any, s: Any, *given: Any) -> Any:
        del ctx
        own = [scalar_of(x) for x in s.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat]
        bits = bits_of(Seen(*given, seen.pages), s.shape[1])
        nothing, found = float32(float("-inf")), []
        for i, x in enumerate(own):
            row, bit = row_and_bit(i)
            is_kept = arith.cmpi(
                arith.CmpIPredicate.ne, arith.andi(bits[row], int32(1 << bit)), int32(0)
            )
            found.append(arith.select(is_kept, x, nothing))
        return accumulated(found, s.shape)

    return keep(s, *seen[:-1])


def row_and_bit(i: int) -> tuple[int, int]:
    """Say whose a thread's number is: in registers, two of each row take turns."""
    return i // 2 % 2, i // 4 * 2 + i % 2


def bits_of(seen: Seen, tokens: int) -> list[Any]:
    """Return a bit for each of a thread's tokens, for each of its two rows."""
    rows = (seen.begins, seen.ends)
    limits = zip(*([_own_tokens(x, tokens) for x in y.registers.flat] for y in rows))
    there = _bits_of_tokens(seen.exist.registers.item(), seen.pages, tokens // 4)
    return [arith.andi(_bits(begin, end), there) for begin, end in limits]


def _own_tokens(limit: Any, tokens: int) -> Any:
    """Return how many of a thread's tokens, two of each eight, are before a block's `limit`."""
    first = arith.shli(arith.andi(lane(), int32(3)), int32(1))
    own = arith.subi(scalar_of(limit), first)
    own = arith.minsi(arith.maxsi(own, int32(0)), int32(tokens))
    last = arith.minsi(arith.andi(own, int32(7)), int32(2))
    return arith.addi(arith.shli(arith.shrui(own, int32(3)), int32(1)), last)


def _bits(begin: Any, end: Any) -> Any:
    i32, count = ir.IntegerType.get_signless(32), arith.maxsi(arith.subi(end, begin), int32(0))
    return llvm.inline_asm(i32, [begin, count], "bmsk.clamp.b32 $0, $1, $2;", "=r,r,r")


def _bits_of_tokens(exist: Any, pages: int, bits: int) -> Any:
    """Repeat the bit of each page for a thread's tokens in it."""
    each = bits // pages
    found = []
    for page in range(pages):
        is_there = arith.shrsi(arith.shli(exist, int32(31 - page)), int32(31))
        found.append(arith.andi(is_there, int32(((1 << each) - 1) << (page * each))))
    return functools.reduce(arith.ori, found)
