"""The XLA backends: any platform."""
