"""Every argument of another library that the page on migrating lists is answered when passed."""

import dataclasses
import inspect
import pathlib
import re
import subprocess
import sys
import traceback

import pytest

import ejk
from ejk._foreign_names import _FIELDS, _OPERATION

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "migrating.md"
OPERATIONS = (
    ejk.page_attention,
    ejk.ragged_page_attention,
    ejk.write_kv_cache,
    ejk.plan_page_attention,
    ejk.merge_attention_states,
)
OWN = {name for operation in OPERATIONS for name in inspect.signature(operation).parameters}
FIRST_COLUMN = re.compile(r"^\| ([^|]+) \|", re.MULTILINE)
# Code in the first column that is no argument, besides operations: values, and what pools hold.
OTHERS = {"plan", "run", "cuda", "triton", "pallas", "xla", "num_blocks", "layout"}
OTHERS |= {"uint8", "weight", "scales", "ragged_paged_attention_hd64"}


def listed():
    for cell in FIRST_COLUMN.findall(PAGE.read_text()):
        for code in re.findall(r"`([^`]+)`", cell):
            name = code.partition("=")[0]
            if re.fullmatch(r"[a-z][a-z_0-9]*", name) and not hasattr(ejk, name):
                yield name


FOREIGN = sorted(set(listed()) - OWN - OTHERS - set(_OPERATION))


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_argument_is_answered_by_name(name):
    with pytest.raises(TypeError) as info:
        ejk.ragged_page_attention(**{name: None})
    message = str(info.value)
    assert message.startswith(
        f"ragged_page_attention() got an unexpected keyword argument {name!r}: "
    )
    assert "did you mean" not in message and "the arguments are" not in message
    assert "missing" not in message


def test_nothing_private_is_suggested_behind_the_answer():
    with pytest.raises(AttributeError) as info:
        _ = ejk.flash_attention
    assert "Did you mean" not in "".join(traceback.format_exception(info.value))


def test_there_are_names_to_answer():
    assert len(FOREIGN) > 30


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_every_operation_answers_all_unknown_keywords_at_once(operation):
    with pytest.raises(TypeError) as info:
        operation(sm_scale=1.0, mask_value=0.0)
    first, second = str(info.value).splitlines()
    assert "'sm_scale': " in first and "attn_scale" in first
    assert "'mask_value': leave it out" in second


@pytest.mark.parametrize("name, own", [("key", "key_cache"), ("k", "key_cache")])
def test_the_keys_of_attention_are_the_pool(name, own):
    with pytest.raises(TypeError, match=f"argument '{name}': it is {own} here$"):
        ejk.page_attention(**{name: None})


def test_many_unknown_keywords_are_a_short_message():
    unknown = {f"{'option' * 20}{i}": None for i in range(100)}
    with pytest.raises(TypeError, match=r"\nand \d+ more$") as info:
        ejk.ragged_page_attention(**unknown)
    assert len(str(info.value)) < 2000


@pytest.mark.parametrize(
    "name, own",
    [
        ("paged_attention", "page_attention"),
        ("flash_attn_varlen_func", "ragged_page_attention"),
        ("reshape_and_cache_flash", "write_kv_cache"),
        ("copy_blocks", "copy_kv_pages"),
        ("merge_state", "merge_attention_states"),
        ("context_parallel_attention", "page_attention with axis_name="),
        ("context_parallel_ragged_attention", "ragged_page_attention with axis_name="),
    ],
)
def test_an_operation_of_another_name_is_named(name, own):
    assert not hasattr(ejk, name)
    with pytest.raises(
        AttributeError,
        match=rf"'{name}': it is ejk\.{own}( here)?(; ejk\.compat\.\S+ has its own signature)?$",
    ):
        getattr(ejk, name)
    with pytest.raises(ImportError):
        exec(f"from ejk import {name}")


def test_a_name_that_several_operations_have_is_that_of_the_one_called():
    with pytest.raises(TypeError) as info:
        ejk.empty_kv_cache(num_blocks=8, num_heads=2, page_size=16, head_dim=64)
    pages, heads = str(info.value).splitlines()
    assert pages.endswith("'num_blocks': it is num_pages here")
    assert heads.endswith("'num_heads': it is num_kv_heads here")
    with pytest.raises(TypeError, match="num_heads is an argument of ejk"):
        ejk.page_attention(num_heads=4)


FIELDS = [(operation, name) for operation, fields in _FIELDS.items() for name in fields]


@pytest.mark.parametrize("operation, name", FIELDS)
def test_tuning_is_a_field_of_a_backend_of_the_operation_that_was_called(operation, name):
    function = getattr(ejk, operation)
    with pytest.raises(TypeError, match="it is a field of a backend object") as info:
        function(**{name: None})
    backend, field = re.findall(r"backend=ejk\.(\w+)\((\w+)=\.\.\.\)", str(info.value))[0]
    assert field in {known.name for known in dataclasses.fields(getattr(ejk, backend))}
    problem = getattr(ejk, backend).problem_type.operation
    assert operation.startswith(problem.removesuffix("cache")) or problem in operation


@pytest.mark.parametrize(
    "name, mend",
    [
        ("platform", "leave it out: a call runs on the platform that it is compiled for"),
        ("mask", "leave it out, or give tree_mask of ejk.ragged_page_attention"),
        ("megacore_mode", "leave it out: it tunes another library's kernel"),
    ],
)
def test_what_would_mean_something_else_is_not_taken_for_it(name, mend):
    with pytest.raises(TypeError, match=f"'{name}': {mend}"):
        ejk.ragged_page_attention(**{name: None})


@pytest.mark.parametrize("name", ["compat.vllm", "compat.flash_attention", "testing.oracle"])
def test_what_is_loaded_when_asked_for_needs_no_import(name):
    program = f"import ejk, sys; assert 'ejk.{name}' not in sys.modules; print(ejk.{name}.__name__)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == f"ejk.{name}"


def test_a_drop_in_that_there_is_not():
    with pytest.raises(AttributeError, match=r"ejk\.compat has no 'trtllm'; it has ejkernel, "):
        _ = ejk.compat.trtllm
