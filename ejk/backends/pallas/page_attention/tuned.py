"""What was chosen for the decode kernel on TPUs: data only.

From the static profile of libtpu 0.0.52: predicted, not measured on a TPU.
"""

from ejk.backends.pallas._chip import MIB

ROUND_KEY_BYTES = 2 * MIB
"""Keys that are computed together: with the values, 4 MiB in flight.

Predicted, 8 KV heads of 128 entries in bfloat16, cycles of a v6e for 2,048 tokens: 5,180 in rounds
of 1 MiB, 3,820 of 2 MiB, 3,540 of 4 MiB, for which the compiler spills 500 registers and not 200.
"""

BLOCK_KV, LONG_BLOCK_KV = 1024, 2048
"""Tokens of a block, at most; the second of one KV head, of which many blocks would fill a round.

Several blocks of few KV heads make a round. Predicted, for 2,048 tokens: 2 KV heads, cycles of a
v6e, 2,270 one block a round, 1,230 four; 1 KV head, cycles of a v7x in rounds of four, 830 in
blocks of 1,024, 610 of 2,048.
"""
