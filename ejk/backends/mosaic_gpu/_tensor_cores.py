"""What Hopper's tensor cores take: rows of a product, and tiles of shared memory."""

ROWS = 64  # of a product: query rows of a warpgroup, or in decode of a program
SWIZZLED_BYTES = 128  # of a row of swizzled shared memory
SWIZZLED = SWIZZLED_BYTES // 2  # its elements of 16 bits
TILE_ROWS = 8  # that lie together in it; a copy to or from it takes as many, or more
