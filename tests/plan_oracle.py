"""How a plan deals out a batch, by definition: in whole numbers, on which every backend agrees."""

import numpy as np


def plan_page_attention(context_lens, *, capacity, sliding_window, granule, floors=None, **machine):
    """Return the pieces `(seq, begin, end, part)` and the splits `(seq, first part, parts)`.

    A sequence sees by itself what is not below its floor. `sliding_window` is one of all sequences,
    or a list of one for each; `machine` is what `count_pieces` takes.

    All pieces of a context but the last are of one size. The largest come first, of equally large
    ones the first sequence's. The last piece of a context ends with the capacity; the first begins
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
    cuts = []
    for seq, (count, parts) in enumerate(zip(granules, count_pieces(granules, **machine))):
        size = -(-count // parts)
        cuts.append((-size, seq, -(-count // size) if size else 1))

    pieces, splits = [], []
    for minus_size, seq, parts in sorted(cuts):
        first = firsts[seq]
        if parts > 1:
            splits.append((seq, len(pieces), parts))
        for i in range(parts):
            begin = first - minus_size * granule * i
            end = begin - minus_size * granule if i + 1 < parts else capacity
            if sliding_window is not None and i == 0:
                begin = -1 - first
            pieces.append((seq, begin, end, len(pieces) if parts > 1 else -1))
    return pieces, splits


def count_pieces(granules, *, max_cuts, slots=1, programs=1, granule_cost=8, memory_bound=True):
    """Return in how many equal pieces each context of so many granules is cut.

    A piece is `programs` programs, of which the machine runs `slots` at a time. A cost is a time of
    a machine whose slots are all busy. If memory bounds the programs, those whose neighbours are
    done are faster.
    """
    if not max_cuts:
        return [1] * len(granules)

    def ceil_div(a, b):
        return -(-a // b)

    def parts(count, cost):
        """As few as cost no more than `cost` each."""
        return max(1, ceil_div(count, max(1, (cost - 3) // granule_cost)))

    def cost_of(count):
        return count * granule_cost + 3

    total = sum(map(cost_of, granules))
    ideal = ceil_div(total * programs, slots)
    cap = ideal + ideal // 20 + max(8, granule_cost)
    if len(granules) > 1024:
        least = max(1, (cap - 3) // granule_cost, ceil_div(total, max_cuts * granule_cost))
        return [max(1, ceil_div(count, least)) for count in granules]

    # In waves of programs, in order, each as long as its longest.
    order = sorted(range(len(granules)), key=lambda seq: (-granules[seq], seq))
    pieces = [parts(count, cap) for count in granules]
    wave = cost_of(max(map(ceil_div, granules, pieces)))
    work, until, done = {}, {}, (0, 0)
    for seq in order:
        work[seq] = done[0]
        done = done[0] + cost_of(granules[seq]), done[1] + pieces[seq] * programs
        until[seq] = done[1]
    full_waves = 0 if len(granules) * programs <= slots else (done[1] - 1) // slots

    # The last wave's, so that it ends first, or whole, if it can end by the cap.
    last = [seq for seq in order if until[seq] > full_waves * slots]
    early = sum(pieces[seq] * programs for seq in last) - (done[1] - full_waves * slots)
    share = ceil_div(sum(cost_of(granules[seq]) for seq in last) * programs, slots)
    longest, whole = (wave - 3) // granule_cost, max(granules[seq] for seq in last)
    tried = [longest, *((share * 6 // i - 3) // granule_cost for i in range(4, 10)), whole]
    found = []
    for i, most in enumerate(max(1, most) for most in tried):
        each = {seq: max(1, ceil_div(granules[seq], most)) for seq in last}
        size = max(ceil_div(granules[seq], each[seq]) for seq in last)
        large = sum(each[seq] for seq in last if granules[seq] * 4 > most)  # others fill gaps
        running = max(0, large * programs - early)
        rest = running % slots
        is_whole = i == len(tried) - 1
        enough = slots * 5 // 8 if is_whole else slots * 4 // 5
        enough = enough if memory_bound else slots
        busy = running - rest + (max(rest, enough) if rest else 0)
        end = max(cost_of(size) * busy, share * slots)
        late = 0 if memory_bound or running > slots else 2 * granule_cost  # there is but one start
        if end <= (cap + late - full_waves * wave) * slots:
            found.append((4 * slots * is_whole - end, most))
    if found:
        _, most = max(found)
        for seq in last:
            pieces[seq] = max(1, ceil_div(granules[seq], most))
    else:
        for seq, count in enumerate(granules):
            start, waves = ceil_div(work[seq] * programs, slots), (until[seq] - 1) // slots
            if memory_bound:
                start = min(start, waves * wave)
            elif not waves:
                start = 0
            left = cap - start
            least = max(1, min(cap, 24) // granule_cost)
            limit = max(least * granule_cost + 3, left)
            pieces[seq] = 1 if cost_of(count) <= left else parts(count, limit)
    cuts = sum(pieces) - len(pieces)
    if cuts > max_cuts:
        pieces = [1 + (count - 1) * max_cuts // cuts for count in pieces]
    return pieces
