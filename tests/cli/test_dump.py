"""`ejk.testing.dump`: a call in a file keeps every type and layout, and is run by `ejk repro`."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from command import run

import ejk
from ejk.testing import dump, recipes
from ejk.testing.case import ATTENTIONS
from ejk.testing.dumps import load

SHAPE = {
    "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "page_size": 2, "max_blocks": 3,
    "num_pages": 9,
}  # fmt: skip
POOL = {"num_kv_heads": 1, "head_dim": 8, "value_head_dim": 8, "page_size": 2, "num_pages": 9}
CALLS = {
    "plain": ("page_attention", {}),
    "options": ("page_attention", {"features": ["sinks", "sliding_window", "attn_scale"]}),
    "fused": ("page_attention", {"fused": True, "cache_layout": "KV_HEADS_FIRST"}),
    "interleaved": ("page_attention", {"cache_layout": "INTERLEAVED", "dtype": "bfloat16"}),
    "int4": ("page_attention", {"cache_dtype": "uint8", "scales": "token"}),
    "float8": ("page_attention", {"cache_dtype": "float8_e5m2", "cache_layout": "NHD"}),
    "latent": (
        "page_attention", {"shape": {**SHAPE, "latent": True, "value_head_dim": 6}},
    ),
    "ragged": (
        "ragged_page_attention",
        {"cu_q_lens": [0, 2, 3], "total": 4, "extras": ["tree_mask"], "dtype": "float16"},
    ),
    "write": ("write_kv_cache", {"slots": [3, -1, 16]}),
    "quantising write": (
        "write_kv_cache", {"slots": [3, 17], "cache_dtype": "float8_e4m3fn", "scales": "token"},
    ),
    "slots": ("copy_kv_slots", {"sources": [3, 8], "targets": [16, 40]}),
    "pages": ("copy_kv_pages", {"sources": [3, 8], "targets": [0, -1], "dtype": "bfloat16"}),
}  # fmt: skip


def arguments(operation, call):
    """Build a case; return its positional arguments, and the others."""
    own = {"shape": SHAPE, "lens": [5, 2]} if operation in ATTENTIONS else {"shape": POOL}
    case = recipes.build_case(operation, {**own, "seed": 1, **call})
    return case.operands(), case.semantics()


@pytest.mark.fast
@pytest.mark.parametrize(("operation", "call"), CALLS.values(), ids=CALLS)
def test_a_file_keeps_every_bit(operation, call, tmp_path):
    operands, keywords = arguments(operation, call)
    path = tmp_path / "call.npz"
    dump(path, getattr(ejk, operation), *operands, **keywords)
    name, given = load(path)
    assert name == operation
    kept = [*given.values()]
    for x in (*operands, *keywords.values()):
        if hasattr(x, "dtype"):
            same = [y for y in kept if getattr(y, "dtype", None) == x.dtype]
            assert any(np.shape(y) == np.shape(x) and y.tobytes() == np.asarray(x).tobytes()
                       for y in same)  # fmt: skip
        elif x is not None:
            assert x in [y for y in kept if not hasattr(y, "dtype")]


@pytest.mark.parametrize("pages", ["all", "visible"])
@pytest.mark.parametrize(("operation", "call"), CALLS.values(), ids=CALLS)
def test_a_dumped_call_agrees(operation, call, pages, tmp_path, capsys):
    operands, keywords = arguments(operation, call)
    path = tmp_path / "call.npz"
    line = dump(path, operation, *operands, **keywords, pages=pages)
    assert line in capsys.readouterr().out
    said = run(line.removeprefix("python -m ejk "))
    assert "xla, plain: agrees with the oracle" in said and "xla, jit: agrees" in said
    if pages == "visible":
        _, given = load(path)
        axis = int(keywords["cache_layout"] == "KV_HEADS_FIRST")
        assert given["key_cache"].shape[axis] < 9


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64"])
def test_slots_of_any_type_keep_the_pages_that_they_name(dtype, tmp_path):
    """Also of one that does not hold the size of a page, and where its end is no page."""
    rows, pool = np.ones((2, 1, 8), np.float32), np.ones((4, 1, 300, 8), np.float32)
    slots = np.array([100, np.iinfo(dtype).max], dtype)
    dump(tmp_path / "call.npz", "write_kv_cache", rows, rows, pool, pool, slots, pages="visible")
    _, given = load(tmp_path / "call.npz")
    assert given["key_cache"].shape[0] == 1
    kept = -1 if dtype == "uint64" else int(np.iinfo(dtype).max)
    assert given["slot_mapping"].astype(np.int64).tolist() == [100, kept]


def test_a_planted_fault_is_told_of_a_dumped_call(tmp_path):
    operands, keywords = arguments("copy_kv_slots", {"sources": [3, 8], "targets": [16, 4]})
    line = dump(tmp_path / "call.npz", "copy_kv_slots", *operands, **keywords)
    said = run(f"{line.removeprefix('python -m ejk ')} --backend planted:DropsACopy", code=1)
    assert "drops, plain: fails" in said and "the oracle says" in said


@pytest.mark.fast
def test_a_plan_groups_and_types_of_one_element_are_kept(tmp_path):
    operands, keywords = arguments("page_attention", {})
    facts = {name: SHAPE[name] for name in list(SHAPE)[:5]}
    plan = ejk.plan_page_attention(operands[3], **facts)
    groups = np.array([0, 0], np.int32), np.array([1], np.int32)
    path = tmp_path / "call.npz"
    hints = {"plan": plan, "prefix_groups": groups, "max_context_len": 5}
    dump(path, ejk.page_attention, *operands, **keywords, **hints, attn_scale=jnp.float32(0.5))
    _, given = load(path)
    assert given["plan"] is True and given["max_context_len"] == 5
    assert given["attn_scale"].shape == () and given["attn_scale"] == np.float32(0.5)
    np.testing.assert_array_equal(given["prefix_groups"][0], groups[0])
    assert "xla, plan: agrees" in run(f"repro {path}")
    dump(path, ejk.write_kv_cache, *operands[:2], None, np.zeros(3, ml_dtypes.int4), np.zeros(3))
    assert load(path)[1]["value_cache"].dtype == ml_dtypes.int4


@pytest.mark.fast
def test_what_cannot_be_dumped_is_told_by_name(tmp_path):
    operands, keywords = arguments("page_attention", {})
    path = tmp_path / "call.npz"

    def traced(query):
        dump(path, ejk.page_attention, query, *operands[1:], **keywords)

    with pytest.raises(TypeError, match=r"query is traced .* outside of jit, .*debug.callback"):
        jax.jit(traced)(jnp.asarray(operands[0]))
    with pytest.raises(ValueError, match="axis_name='x' must be left out"):
        dump(path, ejk.page_attention, *operands, axis_name="x")
    with pytest.raises(ValueError, match=r"operation=.* must be one of page_attention"):
        dump(path, np.sum, *operands)
    with pytest.raises(ValueError, match="pages='some' must be 'all' or 'visible'"):
        dump(path, ejk.page_attention, *operands, pages="some")
    with pytest.raises(TypeError, match=r"block_tables=.* must be an array"):
        dump(path, ejk.page_attention, *operands[:4], {})
    np.savez(path, some=np.zeros(3))
    assert "is not a file of ejk.testing.dump" in run(f"repro {path}", code=2)
    path.write_bytes(b"text")
    assert "dump: it is no archive of arrays" in run(f"repro {path}", code=2)
