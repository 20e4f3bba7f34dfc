"""Runs Triton kernels on the CPU, inside `jax.jit`, and checks every access."""
