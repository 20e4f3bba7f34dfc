"""`ejk.write_kv_cache` by a Pallas kernel for TPUs."""
