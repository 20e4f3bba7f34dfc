"""Mends what Triton 3.6 compiles wrong: two integers of 32 bits in one register of 64.

Its LLVM computes such pairs side by side, and lets the lower integer run over into the upper one
where nothing reads the lower: in 3 of 212 programs that copy pages or slots, of sizes drawn at
random. Lanes of a warp then compared themselves with other copies than their own, and 32 bytes of a
page were not copied. In PTX:

    mul.wide.u32  %rd17, %r19, 2147483648;    the lower integer, of up to 63 bits
    shl.b64       %rd19, %rd18, 36;           the upper one
    or.b64        %rd20, %rd17, %rd19;
    mov.b64       {_, %r25}, %rd20;           which alone is read

Cut to 32 bits, the lower one runs over no more, and a pair that was right stays what it is.
"""

import re

# Of `mended`: who changes what it returns raises this. Kernels on disk are kept under it, so those
# that an earlier `ejk` has kept, with its mends or with none, are compiled again.
VERSION = 1

_OR = re.compile(r"or\.b64\s+(%rd\d+), (%rd\d+), (%rd\d+);")
_LOWER = re.compile(r"mul\.wide\.u32\s+(%rd\d+), %r\d+, \d+;")
_UPPER = re.compile(r"shl\.b64\s+(%rd\d+), %rd\d+, (?:3[2-9]|[4-6]\d);")
_TAKEN_APART = re.compile(r"mov\.b64\s+\{[^}]*\}, (%rd\d+);")


def mended(ptx: str) -> str:
    """Return a program whose pairs do not run over; most have none, and are as they were."""
    lower, upper = ({*x.findall(ptx)} for x in (_LOWER, _UPPER))
    pairs = {*_TAKEN_APART.findall(ptx)}

    def cut(match: re.Match[str]) -> str:
        pair, *halves = match.groups()
        halves.sort(key=upper.__contains__)
        if pair not in pairs or halves[0] not in lower or halves[1] not in upper:
            return match.group()
        return (
            f"{{ .reg .b64 %cut; and.b64 %cut, {halves[0]}, 4294967295; "
            f"or.b64 {pair}, %cut, {halves[1]}; }}"
        )

    return _OR.sub(cut, ptx)
