"""What is refused of pages that are split over devices, when a call is traced."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from context_parallel import pool_specs
from jax.sharding import PartitionSpec

import ejk

pytestmark = pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices")

ARGUMENTS = (
    jnp.ones((2, 4, 8)), *[jnp.ones((8, 2, 4, 8))] * 2, jnp.array([5, 1]),
    jnp.zeros((2, 3), jnp.int32),
)  # fmt: skip
NAMES = ("query", "key_cache", "value_cache", "context_lens", "block_tables")


def attempt(changes, specs, **options):
    """Trace a call on two devices along `pages`, two along `data`."""
    given = dict(zip(NAMES, ARGUMENTS)) | changes
    placed = pool_specs(given, "HND") | specs

    def attend(given):
        return ejk.page_attention(**given, **{"axis_name": "pages", **options})

    mesh = meshes.mesh(data=2, pages=2)
    function = jax.shard_map(
        attend, mesh=mesh, in_specs=(placed,), out_specs=PartitionSpec(), check_vma=True
    )
    return jax.eval_shape(function, given)


@pytest.mark.parametrize(
    "name, x",
    [
        ("query", ARGUMENTS[0]),
        ("context_lens", ARGUMENTS[3]),
        ("block_tables", ARGUMENTS[4]),
        ("sinks", jnp.zeros(4)),
        ("alibi_slopes", jnp.zeros(4)),
    ],
)
def test_what_must_be_the_same_on_every_device(name, x):
    message = rf"{name} must be the same on every device along axis_name='pages', but it varies"
    with pytest.raises(ValueError, match=message):
        attempt({name: x}, {name: PartitionSpec("pages")})


def test_axes_that_there_are_not():
    message = r"axis_name='seqs' must be of the jax.shard_map around the call, whose axes are "
    with pytest.raises(ValueError, match=message + "'data', 'pages'"):
        attempt({}, {}, axis_name="seqs")
    with pytest.raises(ValueError, match=r"axis_name='pages' must be of .*, and there is none"):
        ejk.page_attention(*ARGUMENTS, axis_name="pages")
    for axis_name in ((), ("pages", "pages")):
        with pytest.raises(ValueError, match="must name one axis or several, each once"):
            attempt({}, {}, axis_name=axis_name)
    with pytest.raises(TypeError, match="axis_name=3 must be the name of a mesh axis, or a tuple"):
        attempt({}, {}, axis_name=3)


def test_a_plan_is_refused():
    """As a feature that no backend has: when the call is traced, whoever was asked for."""
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=8, page_size=4, max_blocks=3)
    plan = ejk.plan_page_attention(ARGUMENTS[3], **sizes)
    for backend in (None, "xla", ejk.TritonPageAttention(interpret=True)):
        lines = (
            r"(\n  (xla|triton|pallas): .*)*\n  (xla|triton): does not support axis_name with plan"
        )
        with pytest.raises(ejk.UnsupportedError, match=lines):
            attempt({}, {}, plan=plan, backend=backend)


def test_a_plan_is_refused_where_no_backend_is_asked():
    """Sizes alone answer a call without table entries."""
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=8, page_size=4, max_blocks=0)
    plan = ejk.plan_page_attention(ARGUMENTS[3], **sizes)
    empty = {"block_tables": ARGUMENTS[4][:, :0]}
    with pytest.raises(ejk.UnsupportedError, match="xla: does not support axis_name with plan"):
        attempt(empty, {}, plan=plan)
    attempt(empty, {})


def test_an_offset_has_an_axis():
    for offset in (1, -1, np.int32(2), jnp.int32(0)):
        with pytest.raises(ValueError, match=r"page_offset=.* must come with axis_name"):
            ejk.page_attention(*ARGUMENTS, page_offset=offset)
    out = ejk.page_attention(*ARGUMENTS, page_offset=np.int64(0))
    np.testing.assert_array_equal(out, ejk.page_attention(*ARGUMENTS))


def test_other_mistakes():
    with pytest.raises(ValueError, match="page_offset=-1 must be at least 0"):
        attempt({}, {}, page_offset=-1)
    with pytest.raises(TypeError, match=r"page_offset=.* must be an int or a 0-d integer array"):
        attempt({}, {}, page_offset=1.5)
    with pytest.raises(ValueError, match="num_heads=3 must be a multiple of num_kv_heads=2"):
        attempt({"query": jnp.ones((2, 3, 8))}, {})
    pool = jax.ShapeDtypeStruct((2**31, 2, 4, 8), jnp.float32)
    with pytest.raises(
        ValueError, match=r"devices \* local_pages=2147483648 must be below 2\*\*31"
    ):
        attempt({"key_cache": pool, "value_cache": pool}, {})
