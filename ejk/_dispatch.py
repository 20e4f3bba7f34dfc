"""Which backend runs a call, decided for the platform that the computation is lowered for.

One primitive stands for every operation. It carries the problem (the static facts of the call)
and the backends that may run it, best first; each platform's lowering rule takes the first that
does not refuse. So CPU arrays in a GPU process, ahead-of-time compilation for a TPU and one
`jax.export` for several platforms each get the right kernel. Nothing here knows an operation.
"""

import abc
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, Primitive, jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ejk import _jax, _partition
from ejk._batching import batch
from ejk._errors import Mendable, UnsupportedError
from ejk._nearest import did_you_mean
from ejk._partition import Axes, Shards
from ejk._reverse_mode import refuse_forward_mode
from ejk._typing import typed

CPU_INSTEAD = (
    ": call it under jax.default_device(jax.devices('cpu')[0]), or set JAX_PLATFORMS=cpu, or leave "
    "interpret=True out"
)
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Problem(abc.ABC):
    """The static facts of one call: hashable, so that it is a parameter of the primitive."""

    operation: ClassVar[str]

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

        `axes` holds the batched axis of each operand, or -1. Of the folded problem's results
        `folded_axis` is `size` times as long. None where this cannot be done: the call is then
        mapped over the axis.
        """

    @property
    def folded_axis(self) -> int:
        """The axis of every result that `fold` makes longer, and before which `vmap` puts its."""
        return 0

    @property
    def symbolic_sizes(self) -> tuple[str, ...]:
        """The sizes that `jax.export` leaves to those who run what it exports: `num_seqs=n`."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        sizes = ((field.name, getattr(self, field.name)) for field in fields)
        return tuple(
            f"{name}={size}"
            for name, size in sizes
            if any(map(jax.export.is_symbolic_dim, size if isinstance(size, tuple) else (size,)))
        )

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

    def __new__(cls, *args: Any, **fields: Any) -> "Backend":
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        names = [parameter.name for parameter in parameters]
        wrong = next((name for name in fields if name not in names), None)
        if wrong and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise TypeError(
                f"{cls.__name__} has no field {wrong!r}{did_you_mean(wrong, names)}; its fields "
                f"are {', '.join(names) or 'none'}"
            )
        for attribute in ("name", "features"):
            if not hasattr(cls, attribute) and attribute not in names:
                raise TypeError(f"{cls.__name__} must have a class attribute {attribute}")
        if cls.__hash__ is None:
            raise TypeError(f"{cls.__name__} must be hashable: @dataclasses.dataclass(frozen=True)")
        return super().__new__(cls)

    @property
    @abc.abstractmethod
    def platforms(self) -> tuple[str, ...]:
        """The platforms this object runs on, of `cpu`, `cuda`, `rocm` and `tpu`."""

    @property
    def only_if_asked(self) -> tuple[str, ...]:
        """The platforms for which automatic choice passes this object over: nobody has run it."""
        return ()

    @property
    def has_target(self) -> bool:
        """Its fields say for which device it compiles, as only someone who means it does.

        Registered for automatic choice it is not passed over for want of what can be mended, such
        as an installation: the call raises. It still is for features and sizes that it lacks.
        """
        return False

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
            where = f"runs on {' and '.join(self.platforms)}, not on {platform}"
            return (where + CPU_INSTEAD * bool(getattr(self, "interpret", False)),)
        if self.is_opaque and problem.symbolic_sizes:
            sizes = ", ".join(problem.symbolic_sizes)
            return (f"compiles for sizes that are static, and {sizes} is symbolic",)
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


Refusals = list[tuple[Backend, str]]
"""What several backends said of one call, each with one reason."""


def _unsupported(problem: Problem, refused: Refusals) -> UnsupportedError:
    reasons = dict.fromkeys(f"{backend.name}: {refusal}" for backend, refusal in refused)
    return UnsupportedError(
        f"no backend that was asked for can run this {problem.operation} call:\n  "
        + "\n  ".join(reasons)
    )


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
        return self.weigh(problem, platform, obstacle)[0]

    def weigh(
        self, problem: Problem, platform: str | None, obstacle: str | None = None
    ) -> tuple[Backend, Refusals]:
        """Return what `select` does, and why the better backends do not run."""
        refused: Refusals = []
        for backend in self.backends:
            for target in (platform,) if platform else backend.platforms:
                refusals = self.refusals(backend, problem, target)
                if (
                    self.automatic
                    and backend.has_target
                    and any(isinstance(r, Mendable) for r in refusals)
                ):
                    raise _unsupported(problem, [(backend, refusal) for refusal in refusals])
                if obstacle and backend.is_opaque and not refusals:
                    refusals = (obstacle,)
                if not refusals:
                    return backend, refused
                refused += [(backend, refusal) for refusal in refusals]
        raise _unsupported(problem, refused + self._interpreted(problem, platform))

    def _interpreted(self, problem: Problem, platform: str | None) -> Refusals:
        """Say which backends would run interpreted, where a CPU is what there is."""
        if (platform or jax.default_backend()) != "cpu":
            return []
        here: Refusals = []
        for backend in self.backends:
            if getattr(backend, "interpret", True) or not dataclasses.is_dataclass(backend):
                continue  # it is interpreted already, or says nothing of an interpreter
            interpreted = dataclasses.replace(backend, interpret=True)
            if not interpreted.refusals(problem, "cpu"):
                how = f"backend={type(backend).__name__}(interpret=True)"
                here.append((backend, f"on a CPU its kernel is interpreted with {how}"))
        return here

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
    if choice in (None, "auto"):
        return Choice(backends, automatic=True)
    named = tuple(backend for backend in backends if backend.name == choice)
    if not named:
        names = list(dict.fromkeys(backend.name for backend in backends))
        raise ValueError(
            f"backend={choice!r} must be one of {', '.join(map(repr, names))}, a backend object or "
            f"None{did_you_mean(choice, names)}"
        )
    return Choice(named, automatic=False)


def _log_choice(problem: Problem, platform: str, backend: Backend, refused: Refusals) -> None:
    """Say which backend runs, as a warning where XLA does for want of what can be mended."""
    reasons = "".join(f"; not {other.name}: {refusal}" for other, refusal in refused)
    LOGGER.debug("%s on %s: %s%s", problem.operation, platform, backend.name, reasons)
    if backend.name != "xla" or platform not in ("cuda", "tpu"):
        return
    for other, refusal in refused:
        if isinstance(refusal, Mendable) and refusal not in _warned:
            _warned.add(refusal)
            LOGGER.warning(
                "%s on %s runs on xla and not on %s: %s",
                problem.operation, platform, other.name, refusal,
            )  # fmt: skip


LOGGER = logging.getLogger("ejk")
_warned: set[str] = set()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(problem, how, operands)`, traced once for all calls of a kind.

    So an eager call costs little more than one of `jax.jit` does. Operands may be NumPy arrays,
    which callers may change as soon as the call returns: `jax.jit` alone would still read them.
    """

    # A function may use no operand, but only operands say which devices the mesh is of.
    @functools.partial(jax.jit, static_argnums=(0, 1), keep_unused=True, inline=True)
    def traced(problem, how, operands):
        return function(problem, how, vary_together(operands))

    def run(problem: Problem, how: Any, operands: Any) -> Any:
        _partition.check_placed(problem, operands)
        own = jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, operands)
        return traced(problem, how, own)

    return run


def call(problem: Problem, choice: Choice, operands: Any) -> tuple[jax.Array, ...]:
    """Run `problem` on the first backend that can, once the platform is known."""
    if not choice.automatic:
        # What was asked for and can run nowhere is refused while the caller's line is still on
        # the stack, not when the computation is lowered.
        choice.select(problem, platform=None)
    leaves, treedef = jax.tree.flatten(vary_together(operands))
    mesh = _partition.explicit_mesh(map(jax.typeof, leaves))
    kinds = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).axis_types
    primitive = split_p if not kinds or AxisType.Auto in kinds else call_p
    return tuple(primitive.bind(*leaves, problem=problem, choice=choice, treedef=treedef))


@compiled
def answer(
    problem: Problem, run: Callable[[Any, Any], Sequence[jax.Array]], operands: Any
) -> tuple[jax.Array, ...]:
    """Return `run(problem, operands)`, what static facts answer, split and varying as a call's."""
    results = run(problem, operands)
    leaves, treedef = jax.tree.flatten(operands)
    types = [jax.typeof(x) for x in leaves]
    mesh = _partition.explicit_mesh(types)
    if mesh is not None:
        specs = _partition.shards(problem, treedef, types).results
        results = [jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(results, specs)]
    return tuple(vary_together((operands, results))[1])


def vary_together(operands: Any) -> Any:
    """Make every operand vary over all mesh axes of `shard_map` that any of them varies over.

    Then the results do too, and a gradient is summed over the axes that its operand lacks.
    """
    axes = frozenset().union(*(_jax.varying(x) for x in jax.tree.leaves(operands)))

    def vary(x):
        missing = axes - _jax.varying(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, operands)


def calls(jaxpr: Jaxpr) -> Iterator[tuple[Problem, Choice]]:
    """Yield the problem and the choice of each call that a jaxpr holds, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive in (call_p, split_p):
            yield equation.params["problem"], equation.params["choice"]
        for inner in jaxprs_in_params(equation.params):
            yield from calls(inner)


def _abstract_eval(*avals, problem, choice, treedef):
    effects = frozenset().union(*(backend.effects for backend in choice.backends))
    mesh = _partition.explicit_mesh(avals)
    if mesh is not None:
        specs = _partition.shards(problem, treedef, avals).results
    else:
        mesh = avals[0].sharding.mesh
        specs = [PartitionSpec(*[None] * len(result.shape)) for result in problem.results]
    results = [
        _jax.result_type(result, NamedSharding(mesh, spec), like=avals[0])
        for result, spec in zip(problem.results, specs)
    ]
    return results, effects


def _lowering(platform: str) -> Callable[..., Any]:
    def rule(ctx, *args, problem, choice, treedef):
        obstacle = _partition.obstacle(ctx, platform)

        def run(problem, operands):
            backend, refused = choice.weigh(problem, platform, obstacle)
            _log_choice(problem, platform, backend, refused)
            return list(backend.run(problem, operands, platform))

        def whole(*leaves):
            return run(problem, jax.tree.unflatten(treedef, leaves))

        types = _jax.operand_types(ctx)
        if _partition.explicit_mesh(types) is not None:

            def split(*leaves):
                def run(problem, leaves):
                    return call(problem, choice, jax.tree.unflatten(treedef, leaves))

                return _partition.split(problem, treedef, leaves, run)

            return _partition.lower_split(ctx, split, args)
        # What a backend runs is one device's own; over which mesh axes its arrays vary is settled.
        local = [ShapedArray(of.shape, of.dtype) for of in types]
        # The programs of shards cannot order their effects: an interpreter with any runs whole.
        backend = choice.select(problem, platform, obstacle)
        splits = problem.axes and not (backend.effects or obstacle)
        if splits and _jax.is_partitioned(ctx):
            callbacks = backend.host_callbacks
            return _partition.lower(ctx, args, local, problem, treedef, run, callbacks)
        return _jax.lower(ctx, whole, args, local)

    return rule


def _differentiate(primals: Any, tangents: Any, *, problem: Problem, **rest: Any) -> NoReturn:
    refuse_forward_mode(operation=problem.operation)


def _primitive() -> Primitive:
    return _jax.primitive(
        "ejk",
        _abstract_eval,
        {platform: _lowering(platform) for platform in PLATFORMS},
        batcher=functools.partial(batch, call),
        jvp=_differentiate,
    )


# Outside `shard_map` the lowering has to know the devices that a program is split over. JAX then
# wants devices for every lowering and one mesh for the whole program: inside, it need not.
call_p = _primitive()
split_p = _primitive()
_jax.require_devices(split_p)
