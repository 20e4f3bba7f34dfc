"""What `jax.export` has to be told of `ejk`'s kernels."""

import jax

from ejk.backends.triton import _launch


def export_disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """Return what `jax.export.export(..., disabled_checks=...)` needs to accept the kernels.

    JAX promises compatibility over time for the custom calls that it knows; jax-triton's is not
    one of them. An exported CUDA kernel serves the compute capability that it was made for.

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
    return [jax.export.DisabledSafetyCheck.custom_call(_launch.CUSTOM_CALL_TARGET)]
