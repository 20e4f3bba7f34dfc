"""How a plan deals out a batch, by definition: in whole numbers, on which every backend agrees."""

import itertools

import numpy as np


def plan_page_attention(
    context_lens, *, capacity, sliding_window, granule, shares, max_cuts, floors=None
):
    """Return the pieces `(seq, begin, end, part)` and the splits `(seq, first part, parts)`.

    A sequence sees by itself what is not below its floor. `sliding_window` is one of all sequences,
    or a list of one for each. With `max_cuts=0` nothing is cut.

    The largest pieces come first, equal ones in the order of sequences and positions, in which
    their parts are numbered. The last piece of a context ends with the capacity; the first begins
    at 0, or, with a window that begins at `first`, has `-1 - first` for its begin.
    """
    firsts, granules = [], []
    for s, context_len in enumerate(context_lens):
        n = min(max(int(context_len), 0), capacity)
        window = sliding_window[s] if np.ndim(sliding_window) else sliding_window
        first = 0 if window is None else max(n - max(int(window), 0), 0)
        first = first if floors is None else floors[s]
        firsts.append(first)
        granules.append(-(-(n - first) // granule))

    pieces, splits, number = [], [], 0
    for seq, sizes in enumerate(cut(granules, shares if max_cuts else 1)):
        if len(sizes) > 1:
            splits.append((seq, number, len(sizes)))
        ends = [firsts[seq] + end * granule for end in itertools.accumulate(sizes)]
        begins = [firsts[seq], *ends[:-1]]
        if sliding_window is not None:
            begins[0] = -1 - firsts[seq]
        ends[-1] = capacity
        for begin, end, size in zip(begins, ends, sizes):
            part = number if len(sizes) > 1 else -1
            pieces.append((-size, number, (seq, begin, end, part)))
            number += 1
    return [row for *_, row in sorted(pieces)], splits


def cut(granules, shares):
    """Return the sizes of each context's pieces.

    The granules of all contexts are a row, which is cut in even shares, the last of which may be
    smaller.
    """
    share = max(1, -(-sum(granules) // shares))
    pieces, begin = [], 0
    for count in granules:
        end = begin + count
        cuts = [at for at in range(begin - begin % share, end, share) if at > begin]
        pieces.append([b - a for a, b in itertools.pairwise([begin, *cuts, end])])
        begin = end
    return pieces
