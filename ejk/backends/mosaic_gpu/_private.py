"""What Pallas has no public operation for, or only a slower one: each beside its public form.

Each function takes `plain`: the public form, which is what the interpreter knows. The others write
instructions of Hopper with what JAX keeps to itself. All such uses are here and, for the softmax,
in `_private_softmax.py` and `_private_mask.py`, but for the registers of `_registers.py`. What each
brought was measured with the prefill kernel, 8 x 4,096 tokens, pages of 16: logits by hand, turns
by the hardware's barriers and rescaling by need 4 % together.
"""

# The types that come with MLIR's bindings are stricter than they are.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ejk.backends.mosaic_gpu._registers import accumulated, run, scalar_of
from ejk.backends.mosaic_gpu._shared_memory import transforms
from ejk.backends.mosaic_gpu._tensor_cores import SWIZZLED, SWIZZLED_BYTES, TILE_ROWS

TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)  # of what a row of such a tile has once
COLUMN = TILE.reduce(0)  # and of what a column has once
SCALAR = plgpu.Layout.WG_SPLAT(())
FIRST_BARRIER = 8  # of the hardware's named ones; Mosaic uses 0 and one a warpgroup
THREADS = 128  # of a warpgroup
TILE_BYTES = TILE_ROWS * SWIZZLED_BYTES
WGMMA_DEPTH = 16  # elements that one instruction multiplies and adds up


def issue_logits(plain: bool, s_ref: Any, q: Any, k: Any) -> Any:
    """Start the product of queries and keys: `logits` waits for it.

    The public one adds to an accumulator that has to be cleared, while the other warpgroup waits.
    """
    if not plain:
        return _products(q, k)
    for chunk in range(q.shape[0]):
        columns = slice(chunk * SWIZZLED, (chunk + 1) * SWIZZLED)
        plgpu.wgmma(s_ref, q.at[chunk], k.at[:, columns].T)
    return None


def logits(plain: bool, s_ref: Any, issued: Any, under_way: int) -> Any:
    """Wait for a product that was started, but not for the last ones under way."""
    if plain:
        issued = plgpu.wgmma_accumulator_load(s_ref, wait_n=under_way)
    else:
        plgpu.wgmma_wait(under_way)
    return lax.optimization_barrier(issued)


def _products(q: Any, k: Any) -> Any:
    """Issue q . k' of `[chunks, 64, 64]` and `[block_kv, 64 * chunks]`."""
    (chunks, rows, _), (block_kv, _) = q.shape, k.shape
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(q.dtype).name]
    result = plgpu.ShapeDtypeStruct((rows, block_kv), jnp.float32, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms(q.dtype)),) * 2, return_type=result)
    def products(ctx: Any, q: Any, k: Any) -> Any:
        del ctx
        count = block_kv // 2  # registers of a thread
        field = ir.VectorType.get((1,), ir.F32Type.get())
        q_base, k_base = _descriptor(q, TILE_BYTES), _descriptor(k, TILE_BYTES * chunks)
        # Unknown to the compiler, or it would keep the descriptors of all steps in registers.
        i64 = ir.IntegerType.get_signless(64)
        q_base = llvm.inline_asm(i64, [q_base], "mov.b64 $0, $1;", "=l,l", has_side_effects=True)
        run("wgmma.fence.sync.aligned;", "")
        registers: list[Any] = []
        for step in range(chunks * SWIZZLED // WGMMA_DEPTH):
            chunk, within = divmod(step * WGMMA_DEPTH, SWIZZLED)
            operands = [
                _moved(q_base, chunk * rows // TILE_ROWS * TILE_BYTES + within * 2),
                _moved(k_base, chunk * TILE_BYTES + within * 2),
            ]
            tied = len(registers)  # the first product of all adds to nothing
            out = llvm.inline_asm(
                llvm.StructType.get_literal([field] * count),
                [*registers, *operands],
                f"{{ .reg .pred p; setp.ne.b32 p, {int(step > 0)}, 0;"
                f" wgmma.mma_async.sync.aligned.m64n{block_kv}k16.f32.{kind}.{kind}"
                f" {{{', '.join(f'${i}' for i in range(count))}}},"
                f" ${count + tied}, ${count + tied + 1}, p, 1, 1, 0, 0; }}",
                ",".join(["=f"] * count + [str(i) for i in range(tied)] + ["l", "l"]),
                has_side_effects=True,
            )
            registers = [llvm.extractvalue(field, out, [i]) for i in range(count)]
        run("wgmma.commit_group.sync.aligned;", "")
        return accumulated(registers, (rows, block_kv))

    return products(q, k)


def _descriptor(ref: Any, stride: int) -> Any:
    """Describe rows of 128 swizzled bytes: where they are, and bytes from 8 of them to the next."""
    i64 = ir.IntegerType.get_signless(64)
    pointer = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
    address = arith.andi(pointer, arith.constant(i64, 0x3FFFF))
    address = arith.shrui(address, arith.constant(i64, 4))
    return arith.ori(address, arith.constant(i64, stride >> 4 << 32 | 1 << 62))


def _moved(descriptor: Any, number_of_bytes: int) -> Any:
    if not number_of_bytes:
        return descriptor
    i64 = ir.IntegerType.get_signless(64)
    return arith.addi(descriptor, arith.constant(i64, number_of_bytes >> 4))


def hold(plain: bool, x: Any) -> None:
    """Have ptxas compute a tile's `x` before whatever is waited for next: 1 %.

    It would else move the softmax behind the wait for the product that is under way. To each
    register belongs a store that never happens.
    """
    if not plain:
        plgpu.inline_mgpu(arg_types=(TILE,))(_hold)(x)


def _hold(ctx: Any, x: Any) -> None:
    del ctx
    for register in x.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat:
        run(
            "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $0, 0f00000000;"
            " @p st.volatile.shared.f32 [a], $0; }",
            "f",
            scalar_of(register),
        )


def take_turn(barriers: Any, warpgroup: Any) -> None:
    """Wait until the warpgroup before this one has passed the turn.

    The public barriers, None without `plain`, are in shared memory: a wait polls there.
    """
    if barriers is not None:
        plgpu.barrier_wait(barriers.at[warpgroup])
    else:
        _barrier("bar.sync", warpgroup)


def pass_turn(barriers: Any, warpgroup: Any) -> None:
    """Let `warpgroup` go on."""
    if barriers is not None:
        plgpu.barrier_arrive(barriers.at[warpgroup])
    else:
        _barrier("bar.arrive", warpgroup)


def _barrier(instruction: str, warpgroup: Any) -> None:
    @plgpu.inline_mgpu(arg_types=(SCALAR,))
    def barrier(ctx: Any, warpgroup: Any) -> None:
        del ctx
        first = arith.constant(ir.IntegerType.get_signless(32), FIRST_BARRIER)
        name = arith.addi(warpgroup.registers.item(), first)
        run(f"{instruction} $0, {2 * THREADS};", "r", name)

    barrier(warpgroup)
