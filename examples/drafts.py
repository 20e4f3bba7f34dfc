"""Drafts by prompt lookup: what a text may go on with, as it did before; and which of it is right.

The guesses are the nodes of a tree whose root is the last known token. Their rows follow the
root's in the batch, so that one call of `ejk.ragged_page_attention` computes what comes after each:
a tree mask lets a draft see its ancestors alone, and its position is its depth.

Sources: prompt lookup decoding (Saxena, 2023); trees of several guesses: SpecInfer (Miao et al.,
2023, arXiv:2305.09781).
"""

from typing import NamedTuple

import numpy as np

from ejk.paging import Batch


class Draft(NamedTuple):
    """A token that may come next: a node of a tree."""

    parent: int  # the draft before it; -1 for the last token that is known
    token: int


def look_up(tokens: list[int], most: int, candidates: int, ngram: int = 3) -> list[Draft]:
    """Guess what comes next: what came after the last tokens elsewhere, the newest places first.

    The longest run of up to `ngram` last tokens that stands elsewhere decides. Up to `candidates`
    continuations share the `most` drafts, and those that begin alike share branches.
    """
    text = np.array(tokens)
    for n in range(min(ngram, len(tokens) - 1) if most > 0 else 0, 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
        begins = np.flatnonzero((windows == text[-n:]).all(1))[::-1] + n
        if begins.size:
            break
    else:
        return []
    found = dict.fromkeys(tuple(tokens[begin : begin + most]) for begin in begins[:16].tolist())
    guesses = list(found)[: min(candidates, most)]
    numbers = dict[Draft, int]()
    for guess in guesses:
        at = -1
        for token in guess[: most // len(guesses)]:
            at = numbers.setdefault(Draft(at, token), len(numbers))
    return list(numbers)


def follow(drafts: list[Draft], chosen: list[int]) -> tuple[list[int], int]:
    """Walk from the last token to drafts that are what was chosen; return them and what is next.

    `chosen[0]` comes after the last token, `chosen[i + 1]` after draft `i`.
    """
    path, at = list[int](), -1
    numbers = {draft: number for number, draft in enumerate(drafts)}
    while (draft := Draft(at, chosen[at + 1])) in numbers:
        at = numbers[draft]
        path.append(at)
    return path, chosen[at + 1]


def tree(
    batch: Batch, drafts: list[list[Draft]], width: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return where each new token stands, and which new tokens it sees: None for all before it."""
    bounds, positions = batch.inputs.cu_q_lens, batch.inputs.positions.copy()
    if not any(drafts):
        return positions, None
    roots = [int(end) - 1 - len(of_seq) for end, of_seq in zip(bounds[1:], drafts)]
    for root, of_seq in zip(roots, drafts):
        for row, draft in enumerate(of_seq, root + 1):
            positions[row] = positions[root + 1 + draft.parent] + 1
    if (positions == batch.inputs.positions).all():
        return positions, None
    mask = causal(batch, width)
    for begin, root, of_seq in zip(bounds, roots, drafts):
        for row, draft in enumerate(of_seq, root + 1):
            mask[row] = mask[root + 1 + draft.parent]
            mask[row, row - begin] = True
    return positions, mask


def causal(batch: Batch, width: int) -> np.ndarray:
    """Let each new token see those of its sequence up to itself."""
    bounds, total = batch.inputs.cu_q_lens, batch.inputs.tokens.size
    begins = np.repeat(bounds[:-1], np.diff(bounds))
    nth = np.arange(total) - np.pad(begins, (0, total - begins.size))
    return np.arange(width) <= nth[:, None]
