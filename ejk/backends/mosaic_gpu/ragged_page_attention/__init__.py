"""`ejk.ragged_page_attention` by a Pallas Mosaic GPU kernel."""
