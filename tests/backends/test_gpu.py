"""What only an NVIDIA GPU can show: large pools, and programs that copy none."""

import functools
import re

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import AxisType

import ejk

pytestmark = pytest.mark.gpu

LAYERS, NUM_PAGES, KV_HEADS, PAGE, HEAD_DIM = 4, 512, 8, 16, 128


def batch(num_pages, num_seqs=4, max_blocks=32):
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((num_seqs, 32, HEAD_DIM)), jnp.bfloat16)
    tables = rng.permutation(num_pages)[: num_seqs * max_blocks].reshape(num_seqs, max_blocks)
    lens = rng.integers(1, max_blocks * PAGE, num_seqs)
    return query, jnp.asarray(lens, jnp.int32), jnp.asarray(tables, jnp.int32)


def pool(num_pages, seed):
    shape = (num_pages, KV_HEADS, PAGE, HEAD_DIM)
    return jax.jit(jax.random.normal, static_argnums=(1, 2))(
        jax.random.key(seed), shape, jnp.bfloat16
    )


def test_pool_above_2_31_elements():
    """Pages at the far end of a large pool are those of a small pool, bit for bit."""
    few, far = 256, 2**31 // (KV_HEADS * PAGE * HEAD_DIM) + 1024
    query, lens, tables = batch(few)
    small_keys, small_values = pool(few, 1), pool(few, 2)
    small = ejk.page_attention(query, small_keys, small_values, lens, tables, return_lse=True)

    def place(pages):
        large = jnp.full((far, *pages.shape[1:]), jnp.nan, pages.dtype)
        return large.at[far - few :].set(pages)

    place = jax.jit(place)
    keys, values = place(small_keys), place(small_values)
    assert keys.size > 2**31
    tables = tables + (far - few)
    large = ejk.page_attention(query, keys, values, lens, tables, return_lse=True)
    for a, b in zip(small, large, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("unroll", [1, LAYERS], ids=["loop", "unrolled"])
def test_a_stack_of_layers_in_one_pool_copies_no_pool(unroll):
    query, lens, tables = batch(NUM_PAGES)

    def step(query, keys, values, lens, tables):
        plan = ejk.plan_page_attention(
            lens,
            num_heads=32,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            page_size=PAGE,
            max_blocks=tables.shape[1],
        )

        def layer(carry, index):
            query, keys, values = carry
            slots = (tables[:, 0] + index * NUM_PAGES) * PAGE
            keys, values = ejk.write_kv_cache(query[:, ::4], query[:, 1::4], keys, values, slots)
            layer_tables = jnp.where(tables >= 0, tables + index * NUM_PAGES, -1)
            query = ejk.page_attention(query, keys, values, lens, layer_tables, plan=plan)
            return (query, keys, values), None

        indices = jnp.arange(LAYERS, dtype=jnp.int32)
        carry, _ = jax.lax.scan(layer, (query, keys, values), indices, unroll=unroll)
        return carry

    keys, values = pool(LAYERS * NUM_PAGES, 1), pool(LAYERS * NUM_PAGES, 2)
    pool_bytes, shape = keys.nbytes, f"bf16[{','.join(map(str, keys.shape))}]"
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(
        query, keys, values, lens, tables
    ).compile()  # fmt: skip
    text = compiled.as_text()
    assert "triton_kernel_call" in text
    assert not re.findall(rf"= {re.escape(shape)}\S* copy(?:-start)?\(", text)
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes / 4
    assert np.isfinite(np.asarray(compiled(query, keys, values, lens, tables)[0], np.float32)).all()


@pytest.mark.parametrize("num_tokens", [64, 8192, 20000])
def test_tokens_written_to_the_far_end_of_a_large_pool(num_tokens):
    """Bit for bit those of XLA, duplicates and slots outside among them; compared, and sorted."""
    num_pages = 2**31 // (KV_HEADS * PAGE * HEAD_DIM) + 1024
    rng = np.random.default_rng(0)
    slots = (num_pages - 1024) * PAGE + rng.integers(-5, 1024 * PAGE + 5, num_tokens)
    slots = jnp.asarray(np.where(rng.random(num_tokens) < 0.1, -1, slots), jnp.int32)
    rows = pool(num_tokens, 3)[:, :, 0]
    tails = []
    for backend in ("triton", "xla"):
        write = functools.partial(ejk.write_kv_cache, backend=backend)
        empty = jnp.zeros((num_pages, KV_HEADS, PAGE, HEAD_DIM), jnp.bfloat16)
        assert empty.size > 2**31
        keys, _ = jax.jit(write, donate_argnums=2)(rows, None, empty, None, slots)
        assert not keys[:16].any()
        tails.append(np.asarray(keys[-1024:], np.float32))
        del empty, keys
    np.testing.assert_array_equal(*tails)
    assert tails[0].any()


def mixed(num_pages, max_blocks=32):
    """A decode, a draft of 8, a chunk of 200 and a whole prefill of 300; rows of nobody around."""
    rng = np.random.default_rng(0)
    lens = jnp.asarray([500, 77, 411, 300], jnp.int32)
    bounds = jnp.asarray([3, 4, 12, 212, 512], jnp.int32)
    query = jnp.asarray(rng.standard_normal((520, 32, HEAD_DIM)), jnp.bfloat16)
    tables = rng.permutation(num_pages)[: 4 * max_blocks].reshape(4, max_blocks)
    return query, lens, jnp.asarray(tables, jnp.int32), bounds


def test_a_mixed_batch_on_a_pool_above_2_31_elements():
    """Bit for bit what the same pages at the start of a small pool give, and what XLA says."""
    few, far = 256, 2**31 // (KV_HEADS * PAGE * HEAD_DIM) + 1024
    query, lens, tables, bounds = mixed(few)
    small_keys, small_values = pool(few, 1), pool(few, 2)
    attend = functools.partial(ejk.ragged_page_attention, backend="triton", return_lse=True)
    small = attend(query, small_keys, small_values, lens, tables, bounds)
    xla = ejk.ragged_page_attention(
        query, small_keys, small_values, lens, tables, bounds, backend="xla", return_lse=True
    )
    for a, b in zip(small, xla, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=2e-2)
    outside = np.r_[0:3, 512:520]
    assert not np.asarray(small[0], np.float32)[outside].any()

    @jax.jit
    def place(pages):
        large = jnp.full((far, *pages.shape[1:]), jnp.nan, pages.dtype)
        return large.at[far - few :].set(pages)

    keys, values = place(small_keys), place(small_values)
    assert keys.size > 2**31
    large = attend(query, keys, values, lens, tables + (far - few), bounds)
    for a, b in zip(small, large, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_layers_of_a_mixed_batch_write_in_place_and_copy_no_pool():
    query, lens, tables, bounds = mixed(NUM_PAGES)

    def step(query, keys, values, lens, tables, bounds):
        for index in range(LAYERS):
            slots = jnp.arange(len(query), dtype=jnp.int32) + index * NUM_PAGES * PAGE
            keys, values = ejk.write_kv_cache(query[:, ::4], query[:, 1::4], keys, values, slots)
            own = tables + index * NUM_PAGES
            query = ejk.ragged_page_attention(query, keys, values, lens, own, bounds)
        return query, keys, values

    keys, values = pool(LAYERS * NUM_PAGES, 1), pool(LAYERS * NUM_PAGES, 2)
    pool_bytes, shape = keys.nbytes, f"bf16[{','.join(map(str, keys.shape))}]"
    arguments = (query, keys, values, lens, tables, bounds)
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
    assert not re.findall(rf"= {re.escape(shape)}\S* copy(?:-start)?\(", compiled.as_text())
    assert "triton_kernel_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * pool_bytes
    assert np.isfinite(np.asarray(compiled(*arguments)[0], np.float32)).all()


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_layers_that_a_loop_cuts_out_and_stacks():
    """XLA may give a kernel slices where they lie: what is written in place has to come through.

    Caches that a scan takes apart and puts together are bit for bit those of XLA, and those that
    were handed over are as before.
    """
    query, _, tables = batch(NUM_PAGES)
    keys, values = (pool(LAYERS * NUM_PAGES, seed) for seed in (1, 2))
    caches = [x.reshape(LAYERS, NUM_PAGES, *x.shape[1:]) for x in (keys, values)]
    before = jax.tree.map(np.asarray, caches)

    @functools.partial(jax.jit, static_argnums=0)
    def step(backend, query, caches):
        def layer(query, caches):
            slots = tables[:, 0] * PAGE
            caches = ejk.write_kv_cache(
                query[:, ::4], query[:, 1::4], *caches, slots, backend=backend
            )
            return query * 0.5, tuple(caches)

        return jax.lax.scan(layer, query, tuple(caches))

    by_triton, by_xla = step("triton", query, caches), step("xla", query, caches)
    equal(by_triton, by_xla)
    equal(caches, before)


def test_results_that_a_loop_stacks():
    """Kernels that add to one another's results, in a loop that keeps each round's."""
    query, lens, tables, bounds = mixed(NUM_PAGES)
    keys, values = pool(NUM_PAGES, 1), pool(NUM_PAGES, 2)
    queries = jnp.stack([query * (0.5 + i) for i in range(3)])
    attend = functools.partial(ejk.ragged_page_attention, backend="triton", return_lse=True)
    stacked = jax.jit(
        lambda all: jax.lax.map(lambda q: attend(q, keys, values, lens, tables, bounds), all)
    )(queries)
    for i in range(3):
        alone = attend(queries[i], keys, values, lens, tables, bounds)
        equal([x[i] for x in stacked], alone)

    # Long enough a context to be cut: parts, and rows between them.
    tables = jnp.arange(2 * 256, dtype=jnp.int32).reshape(2, 256) % NUM_PAGES
    lens = jnp.asarray([256 * PAGE - 3, 200], jnp.int32)
    attend = functools.partial(ejk.page_attention, backend="triton", return_lse=True)
    queries = queries[:, :2]
    stacked = jax.jit(
        lambda all: jax.lax.map(lambda q: attend(q, keys, values, lens, tables), all)
    )(queries)
    for i in range(3):
        equal([x[i] for x in stacked], attend(queries[i], keys, values, lens, tables))


def test_a_mixed_batch_does_not_wait_for_the_device():
    query, lens, tables, bounds = mixed(NUM_PAGES)
    keys, values = pool(NUM_PAGES, 1), pool(NUM_PAGES, 2)
    call = jax.jit(ejk.ragged_page_attention)
    with jax.transfer_guard("disallow"):
        out = call(query, keys, values, lens, tables, bounds)
    assert out.shape == query.shape


def test_nothing_waits_for_the_device():
    """Lengths and tables stay on the device: a call compiles and runs with transfers forbidden."""
    query, lens, tables = batch(NUM_PAGES)
    keys, values = pool(NUM_PAGES, 1), pool(NUM_PAGES, 2)
    call = jax.jit(ejk.page_attention)
    with jax.transfer_guard("disallow"):
        out = call(query, keys, values, lens, tables)
    assert out.shape == query.shape


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("what", ["decode, heads", "decode, sequences", "ragged", "write"])
def test_split_over_two_gpus(what, kind):
    """Each runs the kernel on its own shard, and nothing moves."""
    query, lens, tables = batch(NUM_PAGES)
    pools = {"key_cache": pool(NUM_PAGES, 1), "value_cache": pool(NUM_PAGES, 2)}
    contexts = {"query": query, "context_lens": lens, "block_tables": tables}
    rows = jnp.ones((3, KV_HEADS, HEAD_DIM), jnp.bfloat16)
    slots = jnp.array([5, -1, 77], jnp.int32)
    function, given = {
        "ragged": (ejk.ragged_page_attention, contexts | {"cu_q_lens": jnp.arange(5)}),
        "write": (ejk.write_kv_cache, {"key": rows, "value": rows, "slot_mapping": slots}),
    }.get(what, (functools.partial(ejk.page_attention, num_splits=1), contexts))
    given |= pools
    split = {"seqs": "x"} if what == "decode, sequences" else {"kv_heads": "x"}
    split_up = meshes.put(meshes.mesh(kind, x=2), given, meshes.specs(given, "HND", **split))

    def call(given):
        return function(**given, backend="triton")

    results, program = meshes.run(call, split_up)
    assert not meshes.collectives(program)
    for ours, whole in zip(jax.tree.leaves(results), jax.tree.leaves(jax.jit(call)(given))):
        ours, whole = (np.asarray(x, np.float32) for x in (ours, whole))
        if what == "ragged":
            np.testing.assert_allclose(ours, whole, rtol=2e-2, atol=2e-3)
        else:
            np.testing.assert_array_equal(ours, whole)
