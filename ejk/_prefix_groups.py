"""`prefix_groups=` of both attentions and of their plans: its checks, and the operands it makes."""

from typing import Any

from ejk._indices import Size, as_int32
from ejk._typing import PrefixGroups


def num_prefix_groups(prefix_groups: PrefixGroups | None, num_seqs: Size) -> Size:
    """Check the groups of so many sequences, and return how many there may be."""
    if prefix_groups is None:
        return 0
    groups, num_pages = prefix_groups
    if groups.shape[0] != num_seqs:
        raise ValueError(
            f"prefix_groups[0].shape[0]={groups.shape[0]} must be num_seqs={num_seqs}: the group "
            "of each sequence, -1 for none"
        )
    return num_pages.shape[0]


def prefix_operands(prefix_groups: PrefixGroups | None, max_blocks: Size) -> dict[str, Any]:
    """Return the groups as operands, if there are any."""
    if prefix_groups is None or prefix_groups[1].shape[0] == 0:
        return {}
    groups, num_pages = prefix_groups
    return {
        "prefix_groups": as_int32(groups, num_pages.shape[0]),
        "prefix_pages": as_int32(num_pages, max_blocks),
    }
