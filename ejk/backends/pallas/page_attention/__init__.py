"""`ejk.page_attention` by a Pallas kernel for TPUs."""
