"""`ejk.write_kv_cache` by a Triton kernel."""
