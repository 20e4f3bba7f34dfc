"""The formulas of `docs/scaling.md` are what compiled programs move."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import meshes
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ejk

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "docs"))

import scaling_table

PAGE_SIZE = 16
MODEL = scaling_table.Model(layers=1, itemsize=4)  # of CPUs: XLA widens their 16-bit sums
PLANS = [
    scaling_table.Plan(heads, pages, replicas, seqs, context_len=512)
    for heads, pages, replicas, seqs in (
        (8, 1, 1, 64), (4, 1, 2, 8), (1, 1, 8, 4), (1, 8, 1, 1), (4, 2, 1, 3), (2, 2, 2, 4)
    )
]  # fmt: skip


def pool_spec(plan):
    return P(("replicas", "pages") if plan.pages > 1 else "replicas", "heads")


def layer(mesh, plan, x, w_qkv, w_out, w_in, w_down, pools, lens, tables, slots):
    """Decode with one layer: `x` [seqs, width] of every group, pools by page, head and group."""
    model, on = MODEL, jax.lax.with_sharding_constraint
    heads = P("replicas", "heads")
    query, key, value = (
        on((x @ w).reshape(len(x), -1, model.head_dim), NamedSharding(mesh, heads)) for w in w_qkv
    )

    def attend(query, key, value, pools, lens, tables, slots):
        if plan.pages == 1:
            pools = ejk.write_kv_cache(key, value, *pools, slots)
            return ejk.page_attention(query, *pools, lens, tables), pools
        first = jax.lax.axis_index("pages") * pools[0].shape[0] * PAGE_SIZE
        pools = ejk.write_kv_cache(key, value, *pools, slots - first)
        out = ejk.page_attention(query, *pools, lens, tables, axis_name="pages")
        return out, pools

    rows = P("replicas")
    if plan.pages * plan.replicas > 1:  # of one group's heads, plain jit splits the call
        inputs = (heads, heads, heads, pool_spec(plan), rows, rows, rows)
        attend = jax.shard_map(
            attend, mesh=mesh, in_specs=inputs, out_specs=(heads, pool_spec(plan))
        )
    out, pools = attend(query, key, value, pools, lens, tables, slots)
    whole = NamedSharding(mesh, rows)
    x = x + on(out.reshape(len(x), -1) @ w_out, whole)
    return x + on(jax.nn.relu(x @ w_in) @ w_down, whole), pools


@pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices")
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_layer_moves_what_the_formulas_say(plan):
    model = MODEL
    mesh = meshes.mesh(replicas=plan.replicas, pages=plan.pages, heads=plan.heads)
    blocks = plan.context_len // PAGE_SIZE
    seqs, width = plan.seqs * plan.replicas, model.width
    pool = (seqs * blocks, model.num_kv_heads, PAGE_SIZE, model.head_dim)

    def array(shape, *spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def columns(size):
        return array((width, size), None, "heads")

    kv_width = model.num_kv_heads * model.head_dim
    integers = dict(dtype=jnp.int32)
    program = (
        jax.jit(lambda *args: layer(mesh, plan, *args))
        .lower(
            array((seqs, width), "replicas"),
            (columns(width), columns(kv_width), columns(kv_width)),
            array((width, width), "heads"),
            columns(2 * width),
            array((2 * width, width), "heads"),
            (
                array(
                    pool, *(pool_spec(plan) if plan.pages * plan.replicas > 1 else P(None, "heads"))
                ),
            )
            * 2,
            array((seqs,), "replicas", **integers),
            array((seqs, blocks), "replicas", **integers),
            array((seqs,), "replicas", **integers),
        )
        .compile()
        .as_text()
    )
    moved = {"all-gather": 0, "all-reduce": 0}
    for name, size in meshes.collectives(program):
        moved[name] += size
    assert moved["all-gather"] == plan.merge_bytes(model)
    assert moved["all-reduce"] == plan.sum_bytes(model)


def test_what_a_device_receives():
    """Of one layer by hand: 64 sequences over 8 devices by heads, one over 8 by pages."""
    model = scaling_table.Model(layers=1)
    heads, _, pages, *_ = scaling_table.PLANS
    assert heads.sum_bytes(model) == 2 * 64 * 8192 * 2
    assert heads.received_sums(model) == heads.sum_bytes(model) * 7 // 4
    assert pages.received_merges(model) == 7 * 8 * 129 * 4
    assert heads.received_merges(model) == 0
    assert heads.cache_bytes(model) == 64 * 8192 * 2 * 128 * 2


def test_the_page_is_fresh():
    scaling_table.main(["--check"])
