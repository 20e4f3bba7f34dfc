"""Which backend runs a call, decided for the platform that the computation is lowered for.

One primitive stands for every operation. It carries the problem (the static facts of the call)
and the backends that may run it, best first; each platform's lowering rule takes the first that
does not refuse. So CPU arrays in a GPU process, ahead-of-time compilation for a TPU and one
`jax.export` for several platforms each get the right kernel. Nothing here knows an operation.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ejk import _partition
from ejk._batching import batch
from ejk._errors import UnsupportedError
from ejk._partition import Axes, Shards
from ejk._typing import typed

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Problem(abc.ABC):
    """The static facts of one call: hashable, so that it is a parameter of the primitive."""

    operation: ClassVar[str]
    derivatives: ClassVar[str] = "has no derivatives"
    """What is said of one that was asked for in vain."""

    @property
    @abc.abstractmethod
    def features(self) -> frozenset[str]:
        """The optional features that the call uses, each named after its argument."""

    @property
    @abc.abstractmethod
    def results(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of each result."""

    @abc.abstractmethod
    def fold(self, size: int, operands: Any, axes: Any) -> "tuple[Problem, Any] | None":
        """Fold a `vmap` axis of `size` into the problem.

        `axes` holds the batched axis of each operand, or -1. The folded problem's results lead
        with an axis of `size` times their own first one. None where this cannot be done: the
        call is then mapped over the axis.
        """

    @property
    def axes(self) -> Axes | None:
        """The axes of operands and results, for problems that can be split over devices."""
        return None

    def shards(self, specs: Any, mesh: Mapping[str, int]) -> Shards:
        """Return how the problem is split where operands are by `specs`, as far as they may.

        `specs` holds a `PartitionSpec` for each operand, `mesh` the size of each of its axes.
        Raises `ValueError` where an array would have to move that is too large for it.
        """
        raise NotImplementedError


class Backend(abc.ABC):
    """A way to run one operation. Its fields are its tuning; it is hashable and immutable.

    A subclass names its `problem_type`, the `platforms` it runs on and the `features` it
    honours. What it does not declare, it refuses.
    """

    name: ClassVar[str]
    problem_type: ClassVar[type[Problem]]
    features: ClassVar[frozenset[str]]
    is_opaque: ClassVar[bool] = True
    """XLA cannot see into what is run, nor therefore split it over devices."""

    @property
    @abc.abstractmethod
    def platforms(self) -> tuple[str, ...]:
        """The platforms this object runs on, of `cpu`, `cuda`, `rocm` and `tpu`."""

    @property
    def only_if_asked(self) -> tuple[str, ...]:
        """The platforms for which automatic choice passes this object over: nobody has run it."""
        return ()

    @property
    def effects(self) -> frozenset[Any]:
        """The JAX effects of running: none, but for interpreters that call back into Python."""
        return frozenset()

    @property
    def host_callbacks(self) -> int:
        """The most `jax.experimental.buffer_callback`s of a run: an interpreter's."""
        return 0

    @abc.abstractmethod
    def limits(self, problem: Any, platform: str) -> Sequence[str]:
        """Say why this problem's sizes or dtypes cannot run on `platform`; empty if they can."""

    @abc.abstractmethod
    def run(self, problem: Any, operands: Any, platform: str) -> Sequence[jax.Array]:
        """Run the problem: traced once for each lowering, for one of `platforms`."""

    def refusals(self, problem: Problem, platform: str) -> tuple[str, ...]:
        """Every reason why this backend does not run `problem` on `platform`."""
        if not isinstance(problem, self.problem_type):
            return (f"is a backend of {self.problem_type.operation}, not of {problem.operation}",)
        if platform not in self.platforms:
            return (f"runs on {' and '.join(self.platforms)}, not on {platform}",)
        missing = sorted(problem.features - self.features)
        return (*(f"does not support {feature}" for feature in missing),
                *self.limits(problem, platform))  # fmt: skip


_registered: list[Backend] = []


@typed
def register_backend(backend: Backend) -> None:
    """Offer `backend` for automatic choice, ahead of all others of its operation.

    A backend of the same name and operation is replaced: registering
    `ejk.TritonPageAttention(compute_capability=90, num_sms=132)` is how a machine without a GPU
    lowers for one. Calls that were already traced keep their choice. `unregister_backend` undoes
    it.

    Raises:
        TypeError: `backend` is not an object of a subclass of `ejk.Backend`.
    """
    _registered[:] = [backend, *(other for other in _registered if not _same(other, backend))]


@typed
def unregister_backend(backend: Backend) -> None:
    """Take back what `register_backend` did with a backend of this name and operation."""
    _registered[:] = [other for other in _registered if not _same(other, backend)]


def _same(a: Backend, b: Backend) -> bool:
    return (a.name, a.problem_type) == (b.name, b.problem_type)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backends that may run a call, best first, and whether the caller left it to us."""

    backends: tuple[Backend, ...]
    automatic: bool

    def select(
        self, problem: Problem, platform: str | None, obstacle: str | None = None
    ) -> Backend:
        """Return the first backend that runs `problem` on `platform`, or raise every reason.

        With no platform, on any of its own. An `obstacle` is why none may run that is opaque.
        """
        reasons = []
        for backend in self.backends:
            for target in (platform,) if platform else backend.platforms:
                refusals = self.refusals(backend, problem, target)
                if obstacle and backend.is_opaque and not refusals:
                    refusals = (obstacle,)
                if not refusals:
                    return backend
                reasons += [f"{backend.name}: {refusal}" for refusal in refusals]
        raise UnsupportedError(
            f"no backend that was asked for can run this {problem.operation} call:\n  "
            + "\n  ".join(dict.fromkeys(reasons))
        )

    def refusals(self, backend: Backend, problem: Problem, platform: str) -> tuple[str, ...]:
        refusals = backend.refusals(problem, platform)
        if self.automatic and not refusals and platform in backend.only_if_asked:
            return (f"on {platform} has to be asked for by name: nobody has run it there",)
        return refusals


def choose(
    choice: str | Backend | None, problem_type: type[Problem], own: Sequence[Backend]
) -> Choice:
    """Return the backends that may run a call.

    Args:
        choice: what the caller passed as `backend=`.
        problem_type: the operation's.
        own: the operation's own backends, best first.
    """
    if isinstance(choice, Backend):
        return Choice((choice,), automatic=False)
    registered = [b for b in _registered if issubclass(problem_type, b.problem_type)]
    backends = (*registered, *(b for b in own if not any(_same(b, other) for other in registered)))
    if choice is None:
        return Choice(backends, automatic=True)
    named = tuple(backend for backend in backends if backend.name == choice)
    if not named:
        names = ", ".join(repr(backend.name) for backend in backends)
        raise ValueError(f"backend={choice!r} must be one of {names}, a backend object or None")
    return Choice(named, automatic=False)


def call(problem: Problem, choice: Choice, operands: Any) -> tuple[jax.Array, ...]:
    """Run `problem` on the first backend that can, once the platform is known."""
    if not choice.automatic:
        # What was asked for and can run nowhere is refused while the caller's line is still on
        # the stack, not when the computation is lowered.
        choice.select(problem, platform=None)
    return _run(problem, operands, _bind, choice)


def answer(
    problem: Problem, operands: Any, run: Callable[[Any, Any], Sequence[jax.Array]]
) -> tuple[jax.Array, ...]:
    """Return `run(problem, operands)`, what static facts answer, split and varying as a call's."""
    return _run(problem, vary_together(operands), _answer, run)


def _run(problem: Problem, operands: Any, run: Callable[..., Any], how: Any) -> Any:
    if problem.axes:
        if _partition.explicit_mesh(operands) is not None:
            return _split(problem, run, how, operands)
        _partition.check_placed(problem, operands)
    return run(problem, operands, how)


# An answer may use no operand, but only operands say which devices the mesh is of.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), keep_unused=True)
def _split(problem: Problem, run: Callable[..., Any], how: Any, operands: Any) -> Any:
    return _partition.split(problem, operands, functools.partial(run, how=how))


def _answer(problem: Problem, operands: Any, how: Callable[..., Any]) -> tuple[jax.Array, ...]:
    return tuple(vary_together((operands, how(problem, operands)))[1])


def _bind(problem: Problem, operands: Any, how: Choice) -> tuple[jax.Array, ...]:
    leaves, treedef = jax.tree.flatten(vary_together(operands))
    manual = set(jax.sharding.get_abstract_mesh().axis_types) == {AxisType.Manual}
    primitive = call_p if manual else split_p
    return tuple(primitive.bind(*leaves, problem=problem, choice=how, treedef=treedef))


def vary_together(operands: Any) -> Any:
    """Make every operand vary over all mesh axes of `shard_map` that any of them varies over.

    Then the results do too, and a gradient is summed over the axes that its operand lacks.
    """
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(operands)))

    def vary(x):
        missing = axes - jax.typeof(x).mat.varying
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, operands)


def calls(jaxpr: Any) -> Iterator[tuple[Problem, Choice]]:
    """Yield the problem and the choice of each call that a jaxpr holds, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive in (call_p, split_p):
            yield equation.params["problem"], equation.params["choice"]
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from calls(getattr(inner, "jaxpr", inner))


def _abstract_eval(*avals, problem, choice, treedef):
    effects = frozenset().union(*(backend.effects for backend in choice.backends))
    mesh, varying = avals[0].sharding.mesh, avals[0].mat
    results = [
        ShapedArray(
            result.shape,
            result.dtype,
            sharding=NamedSharding(mesh, PartitionSpec(*(None for _ in result.shape))),
            manual_axis_type=varying,
        )
        for result in problem.results
    ]
    return results, effects


def _lowering(platform: str) -> Callable[..., Any]:
    def rule(ctx, *args, problem, choice, treedef):
        obstacle = _partition.obstacle(ctx, platform)

        def run(problem, operands):
            backend = choice.select(problem, platform, obstacle)
            return list(backend.run(problem, operands, platform))

        def whole(*leaves):
            return run(problem, jax.tree.unflatten(treedef, leaves))

        # What a backend runs is one device's own; over which mesh axes its arrays vary is settled.
        local = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        inner = ctx.replace(avals_in=local)
        # The programs of shards cannot order their effects: an interpreter with any runs whole.
        backend = choice.select(problem, platform, obstacle)
        splits = problem.axes and not (backend.effects or obstacle)
        if splits and _partition.is_partitioned(ctx):
            callbacks = backend.host_callbacks
            return _partition.lower(inner, args, problem, treedef, run, callbacks)
        results = mlir.lower_fun(whole, multiple_results=True)(inner, *args)
        if inner.tokens_out is not None:  # they order the effects of an interpreter
            ctx.set_tokens_out(inner.tokens_out)
        return results

    return rule


def _differentiate(*args, problem, **params):
    raise NotImplementedError(f"{problem.operation} {problem.derivatives}")


def _primitive() -> Primitive:
    primitive = Primitive("ejk")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_effectful_abstract_eval(_abstract_eval)
    for platform in PLATFORMS:
        mlir.register_lowering(primitive, _lowering(platform), platform=platform)
    batching.primitive_batchers[primitive] = functools.partial(batch, primitive, call)
    ad.primitive_jvps[primitive] = _differentiate
    return primitive


# Outside `shard_map` the lowering has to know the devices that a program is split over. JAX then
# wants devices for every lowering and one mesh for the whole program: inside, it need not.
call_p = _primitive()
split_p = _primitive()
prim_requires_devices_during_lowering.add(split_p)
