"""`ejk.page_attention` of latent caches by a Pallas Mosaic GPU kernel."""
