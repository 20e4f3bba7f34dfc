"""The Pallas backends: TPUs."""
