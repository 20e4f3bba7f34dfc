"""The checks of lists: tokens, and how many of them each sequence has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Integers = int | np.integer | Sequence[int] | npt.NDArray[np.integer]

MOST = 2**31 - 1  # of a token's id


def integers(name: str, value: Any) -> Int64s:
    """Read a flat array of integers in `[0, 2**31)`; a number is an array of one."""
    x = np.asarray(value)
    if x.ndim > 1:
        raise TypeError(f"{name} has {x.ndim} axes, and must be an integer or a flat list of them")
    if x.dtype.kind not in "iu" and x.size:
        raise TypeError(f"{name}={value!r:.80} must be integers in [0, {MOST}]")
    x = x.reshape(-1)
    wrong = np.flatnonzero((x < 0) | (x > MOST))
    if wrong.size:
        raise ValueError(f"{name}[{wrong[0]}]={x[wrong[0]]} must be in [0, {MOST}]")
    return x.astype(np.int64)


def dealt_out(num_tokens: int, num_seqs: int, q_lens: Any | None) -> Int64s:
    """Say how many of the packed tokens each sequence gets."""
    if q_lens is None:
        if num_seqs == 1:
            return np.array([num_tokens])
        if num_tokens != num_seqs:
            raise ValueError(
                f"tokens[{num_tokens}] must be one for each of {num_seqs} sequences: of any other "
                "number say in q_lens how many each gets"
            )
        return np.ones(num_seqs, np.int64)
    lens = _one_each("q_lens", q_lens, num_seqs)
    if lens.sum() != num_tokens:
        raise ValueError(f"q_lens, of sum {lens.sum()}, must deal out all of tokens[{num_tokens}]")
    return lens


def chosen(waiting: Int64s, q_lens: Any | None, seqs: Int64s) -> Int64s:
    """Say how many of its waiting tokens each sequence computes."""
    lens = waiting if q_lens is None else _one_each("q_lens", q_lens, seqs.size)
    wrong = np.flatnonzero((lens < 1) | (lens > waiting))
    if wrong.size:
        i = wrong[0]
        if not waiting[i]:
            raise ValueError(f"seqs[{i}]={seqs[i]} has no token to compute: append one")
        raise ValueError(
            f"q_lens[{i}]={lens[i]} must be from 1 to {waiting[i]}, the tokens of "
            f"seqs[{i}]={seqs[i]} that are not computed"
        )
    return lens


def kept(lens: Int64s, num_tokens: Any, seqs: Int64s) -> Int64s:
    """Say how many of its tokens each sequence keeps."""
    ends = _one_each("num_tokens", num_tokens, seqs.size)
    wrong = np.flatnonzero(ends > lens)
    if wrong.size:
        i = wrong[0]
        raise ValueError(
            f"num_tokens[{i}]={ends[i]} must be at most {lens[i]}, the tokens of "
            f"seqs[{i}]={seqs[i]}"
        )
    return ends


def _one_each(name: str, value: Any, num_seqs: int) -> Int64s:
    """Read an integer for each sequence."""
    x = integers(name, value)
    if x.size != num_seqs:
        raise ValueError(f"{name}[{x.size}] must be one for each of {num_seqs} sequences")
    return x
