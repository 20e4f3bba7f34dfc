"""`ejk.load_tuning` and `ejk.tuning`: which entries are used, and what a bad file is told."""

import functools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ejk
from ejk import _registry, _tuning
from ejk._page_attention import BACKENDS
from ejk.backends.page_attention import PageAttentionProblem

pytestmark = pytest.mark.fast

POOL = np.ones((8, 2, 16, 64), np.float32)
ARGS = (np.ones((2, 4, 64), np.float32), POOL, POOL,
        np.array([20, 1], np.int32), np.array([[3, 5], [1, 0]], np.int32))  # fmt: skip
FACTS = {"num_seqs": 2, "num_heads": 4, "query_dtype": "float32"}
ENTRY = {
    "operation": "page_attention", "backend": "xla", "device_kind": "cpu", "facts": FACTS,
    "fields": {"block_kv": 16},
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    """What writes entries to a file of tuning; nothing is loaded afterwards."""

    def write(*entries, name="tuning.json"):
        path = tmp_path / name
        path.write_text(json.dumps({"version": 1, "entries": entries}))
        return path

    yield write
    _tuning.set_process(())


@pytest.fixture
def ran(monkeypatch):
    """The `block_kv` of each XLA backend that ran, in order of the traces."""
    seen = []
    run = ejk.XlaPageAttention.run

    def seeing(self, *args):
        seen.append(self.block_kv)
        return run(self, *args)

    monkeypatch.setattr(ejk.XlaPageAttention, "run", seeing)
    jax.clear_caches()
    return seen


def call(**options):
    return ejk.page_attention(*ARGS, **options)


def test_an_entry_is_used_where_all_its_facts_are_the_calls(file, ran):
    expected = call()
    with ejk.tuning(file(ENTRY)):
        np.testing.assert_allclose(call(), expected, rtol=1e-6)
        call(backend="xla")
        call(backend=ejk.XlaPageAttention())
        assert ran == [None, 16, 16]  # a name and a plain object are one program
        ejk.page_attention(ARGS[0][:1], POOL, POOL, ARGS[3][:1], ARGS[4][:1])
        assert ran[3:] == [None]  # of one sequence


@pytest.mark.parametrize(
    "changed",
    [
        {"device_kind": "NVIDIA H100 80GB HBM3"},
        {"operation": "ragged_page_attention"},
        {"backend": "triton"},
        {"facts": FACTS | {"head_dim": 128}},
        {"facts": FACTS | {"query_dtype": "bfloat16"}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_an_entry_for_something_else_is_not(changed, file, ran):
    with ejk.tuning(file(ENTRY | changed)):
        call()
    assert ran == [None]


def test_what_the_caller_fixed_stays(file, ran):
    with ejk.tuning(file(ENTRY)):
        call(backend=ejk.XlaPageAttention(block_kv=32))
        call(num_splits=2)  # its bits must not follow from the batch
    assert ran == [32, None]


def test_fields_that_cannot_run_a_call_are_not_used(file):
    backend = ejk.TritonPageAttention(interpret=True)
    wide = ENTRY | {"backend": "triton", "fields": {"block_kv": 2**20}}
    problem = _problem(backend)
    with ejk.tuning(file(wide)):
        choice = _registry.choose(backend, PageAttentionProblem, BACKENDS)
        assert choice.select(problem, "cpu") == backend
    with ejk.tuning(file(wide | {"fields": {"block_kv": 32}})):
        choice = _registry.choose(backend, PageAttentionProblem, BACKENDS)
        assert choice.select(problem, "cpu") == ejk.TritonPageAttention(32, interpret=True)


def _problem(backend):
    from ejk import _dispatch

    traced = jax.make_jaxpr(functools.partial(ejk.page_attention, backend=backend))(*ARGS)
    [(problem, _)] = _dispatch.calls(traced.jaxpr)
    return problem


def test_the_most_facts_count_and_the_first_table(file, ran):
    special = ENTRY | {"facts": FACTS | {"page_size": 16}, "fields": {"block_kv": 32}}
    other = file(ENTRY | {"fields": {"block_kv": 64}}, name="other.json")
    with ejk.tuning(file(special, ENTRY)):
        call()
        with ejk.tuning(other):
            call()
        call()
    assert ran == [32, 64]  # the last is the first program again


def test_a_program_that_was_traced_is_traced_anew_where_tuning_changed(file, ran):
    program = jax.jit(lambda *args: ejk.page_attention(*args))
    path = file(ENTRY)
    program(*ARGS)
    ejk.load_tuning(path)
    for _ in range(2):
        program(*ARGS)
        ejk.load_tuning(path)  # the same file: nothing is traced again
    assert ran == [None, 16]


def test_a_file_that_is_loaded_again_is_what_it_holds_now(file, ran):
    ejk.load_tuning(file(ENTRY))
    call()
    ejk.load_tuning(file())
    call()
    assert ran == [16, None]


def test_tuning_of_a_block_is_its_threads_and_a_loaded_one_everybodys(file):
    found = []
    see = lambda: found.append(len(_tuning.active()))  # noqa: E731
    with ejk.tuning(file(ENTRY)):
        see()
        _in_thread(see)
    ejk.load_tuning(file(ENTRY))
    _in_thread(see)
    assert found == [1, 0, 1]


def _in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_a_gradient_and_a_vmap_are_tuned_too(file, ran):
    with ejk.tuning(file(ENTRY, ENTRY | {"facts": {"num_seqs": 6}})):
        jax.grad(lambda q: ejk.page_attention(q, *ARGS[1:]).sum())(jnp.asarray(ARGS[0]))
        folded = jnp.ones((3, *ARGS[0].shape), jnp.float32)
        jax.vmap(lambda q: ejk.page_attention(q, *ARGS[1:]))(folded)
    assert ran == [16, 16]


BAD = {
    "{": "must be JSON",
    "[]": "must be an object with version and entries",
    '{"entries": []}': "version=None must be 1",
    '{"version": 1}': "entries must be a list",
    '{"version": 1, "entries": [3]}': "entries[0]: must be an object",
}
BAD_ENTRY = {
    "has no facts, fields": {"facts": None, "fields": None},
    "device_kind=3 must be a string": {"device_kind": 3},
    "facts must be an object": {"facts": 3},
    "operation 'attention' must be one of page_attention, ragged_page_attention, write_kv_cache, "
    "copy_kv_cache: did you mean 'page_attention'?": {"operation": "attention"},
    "backend 'tritn' must be one of mosaic_gpu, triton, pallas, xla: did you mean 'triton'?":
        {"backend": "tritn"},
    "facts: fact 'num_seq' must be one of num_seqs, num_heads": {"facts": {"num_seq": 2}},
    "facts: num_seqs=[2] must be a number, a string, true, false or null":
        {"facts": {"num_seqs": [2]}},
    "facts: num_splits=2 must be 0": {"facts": {"num_splits": 2}},
    "fields: field 'block' must be one of block_kv: did you mean 'block_kv'?":
        {"fields": {"block": 16}},
    "fields: field 'compute_capability' must be one of block_kv, num_warps, num_stages":
        {"backend": "triton", "fields": {"compute_capability": 90}},
    "fields: block_kv=48 must be a power of two":
        {"backend": "triton", "fields": {"block_kv": 48}},
    "fields: block_kv='16' must be an int": {"fields": {"block_kv": "16"}},
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_named_with_the_rule(text, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ejk.TuningError) as error:
        ejk.load_tuning(path)
    assert str(error.value).startswith(f"{path}: ") and BAD[text] in str(error.value)


def test_a_file_of_other_bytes_is_named(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ejk.TuningError, match=f"{path}: must be JSON: 'utf-8' codec"):
        ejk.load_tuning(path)


def test_a_file_of_brackets_is_named(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ejk.TuningError, match=f"{path}: must be JSON: maximum recursion depth"):
        ejk.load_tuning(path)


def test_no_open_file_is_read_and_closed(tmp_path):
    """Which is what `open` does of an int, as of standard input and of 0."""
    with (tmp_path / "open.json").open("w+") as file:
        for use in (ejk.load_tuning, ejk.tuning):
            with pytest.raises(TypeError, match=r"^path=.* must be a str or an os\.PathLike"):
                use(file.fileno())
        file.write("still open")


@pytest.mark.parametrize("rule", BAD_ENTRY)
def test_a_bad_entry_is_named_with_the_rule(rule, file):
    entry = {name: x for name, x in (ENTRY | BAD_ENTRY[rule]).items() if x is not None}
    path = file(ENTRY, entry)
    with pytest.raises(ejk.TuningError) as error, ejk.tuning(path):
        pass
    assert str(error.value).startswith(f"{path}: entries[1]: {rule}")
    assert not _tuning.active()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        ejk.load_tuning(tmp_path / "none.json")
