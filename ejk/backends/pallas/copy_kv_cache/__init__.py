"""`ejk.copy_kv_slots` and `ejk.copy_kv_pages` by Pallas kernels for TPUs."""
