"""`ejk.ragged_page_attention` by Triton kernels."""
