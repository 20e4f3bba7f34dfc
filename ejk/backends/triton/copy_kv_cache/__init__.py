"""`ejk.copy_kv_slots` and `ejk.copy_kv_pages` by Triton kernels."""
