"""Pairs of integers that Triton 3.6 lets run over into each other are mended in its programs."""

import functools
import re

import pytest
from test_triton_lowering import IDS, X, custom_calls, lower, scale, scale_kernel

from ejk.backends.triton import _packed_pairs

# From the program that compares 50 copies of pages: 16 times the place among four lanes, beside
# 2^31 times the thread, which nothing reads.
WRONG = """\
	and.b32 	%r20, %r19, 3;
	mul.wide.u32 	%rd17, %r19, 2147483648;
	cvt.u64.u32 	%rd18, %r20;
	shl.b64 	%rd19, %rd18, 36;
	or.b64 	%rd20, %rd17, %rd19;
	mov.b64 	{_, %r25}, %rd20;
"""
RIGHT = {
    "an address": WRONG.replace("mov.b64 	{_, %r25}, %rd20", "add.s64 	%rd21, %rd20, %rd1"),
    "a small shift": WRONG.replace("%rd18, 36", "%rd18, 31"),
    "another sum": WRONG.replace("or.b64 	%rd20, %rd17", "or.b64 	%rd20, %rd16"),
}


def upper_half(ptx, thread):
    """Run the few instructions that there are, of registers of 64 bits."""
    found = {"%r19": thread}
    for line in re.split(r"[;{]\s*(?!\d|_)", ptx.replace("{_, %r25}", "%r25")):
        name, _, rest = line.strip(" \n\t}").partition(" ")
        operands = [x.strip() for x in rest.split(",")]
        if name in ("", ".reg"):
            continue
        result, *values = operands
        a, b = (*(found[x] if x in found else int(x) for x in values), 0)[:2]
        found[result] = {
            "and.b32": a & b, "and.b64": a & b, "or.b64": a | b, "cvt.u64.u32": a,
            "mul.wide.u32": a * b, "shl.b64": (a << b) % 2**64 if name == "shl.b64" else 0,
            "mov.b64": a >> 32,
        }[name]  # fmt: skip
    return found["%r25"]


def test_the_lower_half_runs_over_no_more():
    assert [upper_half(WRONG, thread) for thread in (1, 28, 29)] == [16, 14, 30]
    mended = _packed_pairs.mended(WRONG)
    assert [upper_half(mended, thread) for thread in range(32)] == [x % 4 * 16 for x in range(32)]
    assert _packed_pairs.mended(mended) == mended


@pytest.mark.parametrize("halves", ["%rd17, %rd19", "%rd19, %rd17"])
def test_in_either_order(halves):
    ptx = WRONG.replace("%rd17, %rd19", halves)
    assert upper_half(_packed_pairs.mended(ptx), 28) == 0


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_no_such_pair_stays(what):
    assert _packed_pairs.mended(RIGHT[what]) == RIGHT[what]


def test_the_kernels_that_run_are_mended(jax_triton, tmp_path, monkeypatch):
    """All of them, whether they are kept or not: the compiler's text is replaced by ours."""
    monkeypatch.setattr(scale_kernel, "__module__", "ejk.backends.triton.some_kernel")
    texts = []
    monkeypatch.setattr(_packed_pairs, "mended", lambda ptx: texts.append(ptx) or ptx)
    for name, value in {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_ALWAYS_COMPILE": "1"}.items():
        monkeypatch.setenv(name, value)
        vars(scale_kernel).pop("_jT_kernel_cache", None)
        module = lower(functools.partial(scale, by=19 + len(texts)), X, IDS)
        assert len(custom_calls(module)) == 1
    assert [".target sm_90a" in ptx for ptx in texts] == [True, True]
