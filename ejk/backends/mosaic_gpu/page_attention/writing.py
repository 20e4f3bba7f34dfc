"""How results leave: parts from registers, the output through shared memory."""

import dataclasses
import functools
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._arithmetic import LN2, rounded
from ejk.backends.mosaic_gpu.page_attention.memory import Inputs, Outputs, Shared
from ejk.backends.mosaic_gpu.page_attention.piece import Piece, is_own
from ejk.backends.mosaic_gpu.page_attention.sizes import ROWS, LatentSizes


@dataclasses.dataclass(frozen=True)
class Writing:
    """A warpgroup's writing: of its half of the values' entries, where its keys were."""

    inputs: Inputs
    outputs: Outputs
    shared: Shared
    sizes: LatentSizes
    piece: Piece
    half: int

    def write(self, out: Any, lse: Any) -> None:
        """Write a part, or where the piece is all of its sequence the result; `lse` is log2."""
        outputs, piece = self.outputs, self.piece
        if self.sizes.num_parts:

            @pl.when(piece.part >= 0)
            def _() -> None:
                outputs.part_out.at[piece.part, self._heads, self._entries][...] = out
                self._write_lse(outputs.part_lse, piece.part, lse)

        @pl.when(piece.part < 0)
        def _() -> None:
            # By TMA: a store of 16 bits from these registers fills no sector of 32 bytes.
            self.shared.keys.at[0, self.half][...] = rounded(out, outputs.out.dtype)
            plgpu.commit_smem()
            for i in range(self.sizes.tokens):
                own = is_own(piece.token + i, piece, self.inputs)
                pl.when(own)(functools.partial(self._copy, i))
            plgpu.wait_smem_to_gmem(0)
            self._write_lse(outputs.lse, piece.seq, lse * LN2)

    @property
    def _heads(self) -> Any:
        return pl.ds(self.piece.head, ROWS)

    @property
    def _entries(self) -> Any:
        return pl.ds(self.half * self.sizes.half, self.sizes.half)

    def _copy(self, i: int) -> None:
        """Start to copy a token's rows."""
        rows = ROWS // self.sizes.tokens
        plgpu.copy_smem_to_gmem(
            self.shared.keys.at[0, self.half, pl.ds(i * rows, rows)],
            self.outputs.out.at[self.piece.token + i, pl.ds(self.piece.head, rows), self._entries],
        )

    def _write_lse(self, ref: Any, row: Any, lse: Any) -> None:
        if self.half == 0:
            ref.at[row, self._heads][...] = lse
