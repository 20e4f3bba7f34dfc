"""The prefill kernel for Hopper, compiled on a machine without a GPU."""

import re

import jax
import jax.numpy as jnp
import mosaic_offline
import pytest

import ejk
from ejk.backends.mosaic_gpu._tensor_cores import ROWS
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import (
    BLOCK_KV,
    Q_SLOTS,
    STAGES,
    WARPGROUPS,
)

MOSAIC = ejk.MosaicGpuRaggedPageAttention(compute_capability=90, num_sms=132)
pytestmark = [
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="its Pallas Mosaic GPU is older"),
    pytest.mark.skipif(bool(mosaic_offline.missing()), reason=str(mosaic_offline.missing())),
]

SMALL = 5 * 1024  # bytes of shared memory beside blocks, at most

# Loads and stores in the loop of blocks that need no mask, at most: none, but two loads of what
# never changes with a soft cap, and what a thread's 160 registers do not hold with scales per token
# or with all options at once. ptxas 12.9 makes 53 and 511 of these from jax 0.12, and 53 and 514
# from 0.11.2.
SPILLS = {
    ("soft cap", 128): 2, ("token scales", 64): 53,
    ("everything", 64): 514, ("everything", 128): 60, ("everything", 256): 20,
}  # fmt: skip
FEATURES = {
    "plain": {},
    "lse": {"return_lse": True},
    "window": {"sliding_window": 1024},
    "later tokens": {"causal": False},
    "soft cap": {"attn_logits_soft_cap": 50.0},
    "sinks": {"sinks": True},
    "slopes": {"alibi_slopes": True},
    "scales": {"key_scale": 0.1, "value_scale": 0.1},
    "token scales": {"key_scale": True, "value_scale": True},
    "everything": {
        "sliding_window": 1024, "attn_logits_soft_cap": 50.0, "return_lse": True, "sinks": True,
        "alibi_slopes": True,
    },
}  # fmt: skip
VARIANTS = {
    "64": ({"shape": (32, 8, 64)}, "plain"),
    "128": ({}, "plain"),
    "128, pages of 8": ({"page_size": 8}, "plain"),
    "128, pages of 64": ({"page_size": 64}, "plain"),
    "128, pages of 256, fused": ({"page_size": 256, "fused": True}, "plain"),
    "128, float16": ({"dtype": jnp.float16}, "plain"),
    "128, groups of 1": ({"shape": (32, 32, 128)}, "plain"),
    "128, groups of 7": ({"shape": (28, 4, 128), "layout": "NHD"}, "plain"),
    "128, groups of 7, a soft cap": ({"shape": (28, 4, 128), "layout": "NHD"}, "soft cap"),
    "128, groups of 64": ({"shape": (64, 1, 128), "layout": "KV_HEADS_FIRST"}, "plain"),
    "128, LSE": ({}, "lse"),
    "128, a window": ({}, "window"),
    "128, later tokens": ({}, "later tokens"),
    "128, a soft cap": ({}, "soft cap"),
    "128, sinks": ({}, "sinks"),
    "128, slopes": ({}, "slopes"),
    "64, everything": ({"shape": (32, 8, 64)}, "everything"),
    "128, everything": ({"dtype": jnp.float16}, "everything"),
    "128, e4m3": ({"cache": jnp.float8_e4m3fn}, "plain"),
    "128, int8, a scale a head": ({"cache": jnp.int8}, "scales"),
    "128, int8, a scale a token": ({"cache": jnp.int8}, "token scales"),
    "64, a scale a token": ({"shape": (32, 8, 64), "cache": jnp.int8}, "token scales"),
    "256, a scale a token": ({"shape": (8, 4, 256), "cache": jnp.int8}, "token scales"),
    "256": ({"shape": (8, 4, 256)}, "plain"),
    "256, everything": ({"shape": (8, 4, 256), "page_size": 64}, "everything"),
}


def call(
    shape=(32, 8, 128), page_size=16, dtype=jnp.bfloat16, layout="HND", fused=False, cache=None
):
    """Return the arguments of 8 prompts of 4,096 tokens, by shape."""
    num_heads, num_kv_heads, head_dim = shape
    array = jax.ShapeDtypeStruct
    axes = {
        "HND": ("pages", "half", "heads", "slots"),
        "NHD": ("pages", "half", "slots", "heads"),
        "KV_HEADS_FIRST": ("heads", "pages", "half", "slots"),
    }[layout]
    blocks = 4096 // page_size
    sizes = {"pages": 8 * blocks, "half": 2, "heads": num_kv_heads, "slots": page_size}
    pool = array(
        (*(sizes[axis] for axis in axes if fused or axis != "half"), head_dim), cache or dtype
    )
    return (
        array((8 * 4096, num_heads, head_dim), dtype), pool, None if fused else pool,
        array((8,), jnp.int32), array((8, blocks), jnp.int32), array((9,), jnp.int32),
    )  # fmt: skip


def compiled(fields, features) -> mosaic_offline.Program:
    arguments, options = call(**fields), dict(FEATURES[features])
    per_head = jax.ShapeDtypeStruct((arguments[0].shape[1],), jnp.float32)
    options |= {name: per_head for name, x in options.items() if name in ("sinks", "alibi_slopes")}
    per_token = jax.ShapeDtypeStruct(arguments[1].shape[:-1], jnp.float32)
    options |= {name: per_token for name, x in options.items() if "scale" in name and x is True}
    return mosaic_offline.compile_call(
        "ragged_page_attention", *arguments, cache_layout=fields.get("layout", "HND"), **options,
        backend=MOSAIC,
    )  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.fast(20)
@pytest.mark.parametrize("fields, features", VARIANTS.values(), ids=VARIANTS)
def test_products_overlap_and_no_register_spills_in_a_loop(fields, features, jax_triton):
    program = compiled(fields, features)
    assert not program.serialised
    head_dim = fields.get("shape", (32, 8, 128))[-1]
    warpgroups = WARPGROUPS[head_dim]  # and one that copies
    more, fewer = program.traded
    # More is waited for without an end, which the interpreter does not see.
    assert warpgroups * more + fewer <= (warpgroups + 1) * program.registers
    queries = Q_SLOTS[head_dim] * warpgroups * ROWS
    blocks = 2 * head_dim * (queries + 2 * STAGES[head_dim] * BLOCK_KV[head_dim])
    if features == "token scales":
        blocks += 2 * 4 * BLOCK_KV[head_dim] * (STAGES[head_dim] + 1)
    assert blocks <= program.shared_memory <= blocks + SMALL
    assert program.loops
    whole = min(program.loops, key=len)  # blocks that need no mask
    spilled = [x for x in whole if re.search(r"\b(STL|LDL)\b", x)]
    assert len(spilled) <= SPILLS.get((features, head_dim), 0)
    kind = "f16" if fields.get("dtype") == jnp.float16 else "bf16"
    assert re.search(rf"wgmma.mma_async.sync.aligned.m64n\d+k16.f32.{kind}.{kind}", program.ptx)
    assert "cp.async.bulk.tensor" in program.ptx
