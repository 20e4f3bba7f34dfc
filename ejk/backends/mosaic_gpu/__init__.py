"""The Pallas Mosaic GPU backends: NVIDIA GPUs of the Hopper generation."""

CUSTOM_CALL_TARGET = "mosaic_gpu_v2"
