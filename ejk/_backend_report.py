"""`ejk.backend_report`: which backends can run a call, and why the others cannot."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ejk import _backend, _dispatch, _registry
from ejk._backend import Backend
from ejk._describe import describe
from ejk._errors import UnsupportedError
from ejk._nearest import did_you_mean
from ejk._page_attention import page_attention


@dataclasses.dataclass(frozen=True)
class BackendReport:
    """What each backend says of one call on one platform.

    Attributes:
        platform: the platform that was asked about.
        chosen: the backend that runs the call: the first that does not refuse; None if all do.
        refusals: by backend, best first, every reason why it cannot run the call; none if it can.
            Empty where static facts answer the call: no tokens, no sequences, no pages, no table.
    """

    platform: str
    chosen: str | None
    refusals: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        if not self.refusals:
            return "static facts answer the call, without a backend"
        lines = [f"on {self.platform}: {self.chosen or 'no backend'}"]
        for name, refusals in self.refusals.items():
            lines += [f"  {name}: {reason}" for reason in refusals or ("can run the call",)]
        return "\n".join(lines)


def backend_report(
    *args: Any,
    operation: Callable[..., Any] = page_attention,
    platform: str | None = None,
    backend: str | Backend | None = None,
    **kwargs: Any,
) -> BackendReport:
    """Ask which backends can run a call, without running it.

    Args:
        *args: the call's arguments; `jax.ShapeDtypeStruct` may stand for arrays.
        operation: the function that would be called.
        platform: `"cpu"`, `"cuda"`, `"rocm"` or `"tpu"`; the default device's if None. `"gpu"` is
            `"rocm"` on a machine whose default device is such a one, else `"cuda"`.
        backend: the call's; the report is then about that one alone.
        **kwargs: the call's keyword arguments.

    Returns:
        A report that prints as a few lines.

    Raises:
        TypeError, ValueError: what the call itself would raise.

    Examples:
        >>> import jax, jax.numpy as jnp, ejk
        >>> pool = jax.ShapeDtypeStruct((8, 2, 16, 64), jnp.float32)
        >>> args = (jnp.ones((1, 4, 64)), pool, pool, jnp.array([20]), jnp.array([[3, 5]]))
        >>> ejk.backend_report(*args, platform="cpu").chosen
        'xla'
    """
    if not callable(operation):
        raise TypeError(
            f"operation={describe(operation)} must be a function, as ejk.page_attention"
        )
    if not isinstance(backend, str | Backend | None):
        raise TypeError(f"backend={describe(backend)} must be str or Backend or None")
    if platform in (None, "gpu"):
        default = default_platform()
        platform = default if platform is None or default == "rocm" else "cuda"
    if platform not in _backend.PLATFORMS:
        raise ValueError(
            f"platform={platform!r} must be one of {', '.join(_backend.PLATFORMS)}, gpu or None"
            f"{did_you_mean(str(platform), _backend.PLATFORMS)}"
        )
    call = functools.partial(_call, operation, args, kwargs)
    try:
        jaxpr = jax.make_jaxpr(call)(_arrays(args, kwargs))
    except TypeError as error:  # its arrays are called traced, as those that stand for them are
        error.add_note(
            f"Asked about {getattr(operation, '__name__', operation)}: operation= names another."
        )
        raise
    for problem, choice in _dispatch.calls(jaxpr.jaxpr):
        if backend is not None:
            choice = _registry.choose(backend, type(problem), choice.backends)
        refusals = {b.name: choice.refusals(b, problem, platform) for b in choice.backends}
        try:
            chosen = choice.select(problem, platform).name
        except UnsupportedError:
            chosen = None
        return BackendReport(platform, chosen, refusals)
    return BackendReport(platform, None, {})


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def _arrays(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*args, *kwargs.values()) if _is_array(x)
    ]


def _call(
    operation: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    arrays: Sequence[jax.Array],
) -> Any:
    """Call with the arrays replaced, and everything else static as it would be."""
    rest = iter(arrays)
    replaced = [next(rest) if _is_array(x) else x for x in args]
    return operation(*replaced, **{k: next(rest) if _is_array(x) else x for k, x in kwargs.items()})


def default_platform() -> str:
    """The default device's, as lowering spells it: JAX's "gpu" is CUDA's or ROCm's."""
    client = jax.devices()[0].client
    if client.platform != "gpu":
        return client.platform
    return "rocm" if "rocm" in client.platform_version else "cuda"
