"""`ejk.ragged_page_attention` by a Pallas kernel for TPUs."""
