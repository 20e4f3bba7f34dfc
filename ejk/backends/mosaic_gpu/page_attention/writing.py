"""How results leave: through shared memory, by TMA, which takes as many rows as there are."""

import dataclasses
import functools
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._arithmetic import LN2, rounded
from ejk.backends.mosaic_gpu.page_attention.memory import Inputs, Outputs, Shared
from ejk.backends.mosaic_gpu.page_attention.piece import Piece, is_own
from ejk.backends.mosaic_gpu.page_attention.sizes import LatentSizes


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
                self.shared.parts.at[self.half][...] = out
                self._share_lse(lse)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    self.shared.parts.at[self.half, pl.ds(0, self.sizes.rows)],
                    outputs.part_out.at[piece.part, self._heads, self._entries],
                )
                self._copy_lse(outputs.part_lse, piece.part)
                plgpu.wait_smem_to_gmem(0)

        @pl.when(piece.part < 0)
        def _() -> None:
            # From registers, a store of 16 bits would fill no sector of 32 bytes.
            self.shared.keys.at[0, self.half][...] = rounded(out, outputs.out.dtype)
            self._share_lse(lse * LN2)
            plgpu.commit_smem()
            for i in range(self.sizes.tokens):
                own = is_own(piece.token + i, piece, self.inputs)
                pl.when(own)(functools.partial(self._copy, i))
            self._copy_lse(outputs.lse, piece.seq)
            plgpu.wait_smem_to_gmem(0)

    @property
    def _heads(self) -> Any:
        return pl.ds(self.piece.head, self.sizes.rows)

    @property
    def _entries(self) -> Any:
        return pl.ds(self.half * self.sizes.half, self.sizes.half)

    def _copy(self, i: int) -> None:
        """Start to copy a token's rows."""
        rows = self.sizes.rows // self.sizes.tokens
        plgpu.copy_smem_to_gmem(
            self.shared.keys.at[0, self.half, pl.ds(i * rows, rows)],
            self.outputs.out.at[self.piece.token + i, pl.ds(self.piece.head, rows), self._entries],
        )

    def _share_lse(self, lse: Any) -> None:
        if self.half == 0:
            self.shared.maxima.at[0][...] = lse

    def _copy_lse(self, ref: Any, row: Any) -> None:
        """Start to copy the LSE, which both warpgroups have found."""
        if self.half == 0:
            lse = self.shared.maxima.at[0, pl.ds(0, self.sizes.rows)]
            plgpu.copy_smem_to_gmem(lse, ref.at[row, self._heads])
