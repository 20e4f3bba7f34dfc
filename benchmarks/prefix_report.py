"""The tables of `docs/performance.md` about shared prefixes, from `decode.py` and `ragged.py`."""

import prefix
import ragged_batches
from ragged_programs import IN_GROUPS
from ragged_report import TRITON, Lines, figure, table


def section(lines: Lines) -> str:
    return decode_table(lines) + ragged_table(lines)


def decode_table(lines: Lines) -> str:
    rows = []
    for name in (w.name for w in prefix.PREFIX):
        line = lines.get((name, "ejk"), {})
        if "of_base" in line:
            times = f"{line['base_us']:,.1f}", f"{line['device_us']:,.1f}"
            apart = f"{line['in_calls_us']:,.1f}" if "in_calls_us" in line else "-"
            ratio = f"{1 / line['of_base']:.2f}"
            rows.append([name, *times, ratio, f"{line['plan_us']:.1f}", apart])
    if not rows:
        return ""
    return (
        "\nDecode of sequences that share the tokens of their group and have "
        f"{prefix.OWN_TOKENS} of their own, 32/8/128, bfloat16, pages of 16. Each batch runs with "
        "its groups named and without, in turns, and large groups in calls of their own. The plan "
        "is made once a step, for all layers:\n"
    ) + table("device us without groups, with groups, times as fast, plan us, in calls us", rows)


def ragged_table(lines: Lines) -> str:
    rows = []
    for batch in ragged_batches.SUITES["prefix"]:
        plain, grouped = (figure(lines, batch.name, name) for name in (TRITON, IN_GROUPS))
        if plain and grouped:
            times = f"{plain:,.1f}", f"{grouped:,.1f}", f"{plain / grouped:.2f}"
            rows.append([batch.name, *times])
    if not rows:
        return ""
    return "\nRagged batches on Triton, the same way:\n" + table(
        "device us without groups, with groups, times as fast", rows
    )
