"""What `jax.export` has to be told of `ejk`'s kernels."""

import jax

from ejk.backends import mosaic_gpu
from ejk.backends.triton import _launch


def export_disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """Return what `jax.export.export(..., disabled_checks=...)` needs to accept the kernels.

    JAX promises compatibility over time for the custom calls that it knows; those of jax-triton
    and of Pallas Mosaic GPU are none of them. An exported CUDA kernel serves the compute capability
    that it was made for.

    Examples:
        >>> import jax, jax.numpy as jnp, ejk
        >>> args = (jnp.ones((1, 4, 64)), *[jnp.ones((8, 2, 16, 64))] * 2)
        >>> args += (jnp.array([20]), jnp.array([[3, 5]]))
        >>> checks = ejk.export_disabled_checks()
        >>> exported = jax.export.export(
        ...     jax.jit(ejk.page_attention), platforms=["cpu", "tpu"], disabled_checks=checks
        ... )(*args)
        >>> exported.platforms
        ('cpu', 'tpu')
    """
    targets = (_launch.CUSTOM_CALL_TARGET, mosaic_gpu.CUSTOM_CALL_TARGET)
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]
