"""The Triton backends: NVIDIA and AMD GPUs."""
