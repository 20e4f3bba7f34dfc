"""`ejk.page_attention` by Triton kernels."""
