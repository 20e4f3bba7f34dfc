"""What runs an operation: the contract that the author of a backend reads, and the choice.

A `Problem` is one call's static facts, a `Backend` a way to run it. Nothing here knows an
operation, nor how JAX is told of one.
"""

import abc
import dataclasses
import inspect
from collections.abc import Mapping, Sequence, Set
from typing import Any, ClassVar

import jax

from ejk import _tuning
from ejk._describe import describe
from ejk._errors import Mendable, UnsupportedError
from ejk._nearest import did_you_mean
from ejk._shards import Axes, Shards

CPU_INSTEAD = (
    ": call it under jax.default_device(jax.devices('cpu')[0]), or set JAX_PLATFORMS=cpu, or leave "
    "interpret=True out"
)
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

Tunable = Mapping[str, tuple[Any, ...]]
"""Fields of a backend that a search sets, each with the values that it tries."""


class Problem(abc.ABC):
    """The static facts of one call: hashable, so that it is a parameter of the primitive."""

    operation: ClassVar[str]
    feature_names: ClassVar[frozenset[str]]
    """All that `features` may hold. A backend can declare nothing else."""

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
    def without_gradient(self) -> Mapping[str, str]:
        """The float operands that have none, each with what a caller is told who asks for it."""
        return {}

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
    honours, of the `feature_names` of its problem. What it does not declare, it refuses. Where it
    has a field `interpret`, messages say that `interpret=True` runs its kernel on a CPU.
    """

    name: ClassVar[str]
    problem_type: ClassVar[type[Problem]]
    features: ClassVar[frozenset[str]]
    is_opaque: ClassVar[bool] = True
    """XLA cannot see into what is run, nor therefore split it over devices."""
    tunable: ClassVar[Tunable] = {}
    """What `python -m ejk tune` searches. It changes speed and last-bit rounding, nothing else."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        problem_type, features = (getattr(cls, n, None) for n in ("problem_type", "features"))
        if isinstance(features, str | list | tuple):
            raise TypeError(f"{cls.__name__}.features={features!r} must be a frozenset of names")
        if problem_type is None or not isinstance(features, Set):
            return  # it is abstract, or its objects differ
        if not hasattr(problem_type, "feature_names"):
            raise TypeError(f"{problem_type.__name__} must have a class attribute feature_names")
        for wrong in sorted(features - problem_type.feature_names):
            raise TypeError(
                f"{cls.__name__} declares {wrong!r}, which is no feature of "
                f"{problem_type.operation}{did_you_mean(wrong, problem_type.feature_names)}"
            )

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

    def passed_over(self, problem: Any, platform: str) -> tuple[str, str] | None:
        """Name the backend that automatic choice prefers to this one, and say why.

        Where that one cannot run the call, this one is chosen all the same.
        """
        return None

    @property
    def has_target(self) -> bool:
        """Its fields say for which device it compiles, as only someone who means it does.

        Registered for automatic choice it is not passed over for want of what can be mended, such
        as an installation: the call raises. It still is for features and sizes that it lacks.
        """
        return False

    @property
    def effects(self) -> frozenset[Any]:
        """The JAX effects of running, as those of calls back to Python that keep their order.

        The whole call then runs on each device: programs of shards cannot order effects.
        """
        return frozenset()

    @abc.abstractmethod
    def limits(self, problem: Any, platform: str) -> Sequence[str]:
        """Say why this problem's sizes or dtypes cannot run on `platform`; empty if they can."""

    @abc.abstractmethod
    def run(self, problem: Any, operands: Any, platform: str) -> Sequence[jax.Array]:
        """Run the problem: traced once for each lowering, for one of `platforms`.

        Results of other shapes or dtypes than those of `problem.results` are a `TypeError`.
        """

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
        missing = [f"does not support {x}" for x in sorted(problem.features - self.features)]
        return (*missing, *self.limits(problem, platform))


def check_results(backend: Backend, problem: Problem, results: Any) -> Sequence[jax.Array]:
    """Return what `backend.run` returned, if it is what `problem.results` says."""
    expected, of = problem.results, f"of {problem.operation}"
    must = f"{backend.name}: run must return {len(expected)} results {of}"
    if not isinstance(results, Sequence):
        raise TypeError(f"{must}, not {describe(results)}")
    if len(results) != len(expected):
        raise TypeError(f"{must}, not {len(results)}: one for each of problem.results")
    for i, (x, right) in enumerate(zip(results, expected)):
        if (getattr(x, "shape", None), getattr(x, "dtype", None)) != (right.shape, right.dtype):
            kind = f"{right.dtype.name}[{', '.join(map(str, right.shape))}]"
            must = f"{backend.name}: result {i} {of} must be {kind}"
            raise TypeError(f"{must}, as problem.results says, not {describe(x)}")
    return results


Refusals = list[tuple[Backend, str]]
"""What several backends said of one call, each with one reason."""


def unsupported(problem: Problem, refused: Refusals) -> UnsupportedError:
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
    tuning: _tuning.Tables = ()

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
                mendable = any(isinstance(refusal, Mendable) for refusal in refusals)
                if self.automatic and backend.has_target and mendable:
                    raise unsupported(problem, [(backend, refusal) for refusal in refusals])
                if obstacle and backend.is_opaque and not refusals:
                    refusals = (obstacle,)
                if not refusals:
                    return self._tuned(backend, problem, target), refused
                refused += [(backend, refusal) for refusal in refusals]
        raise unsupported(problem, refused + self._interpreted(problem, platform))

    def _tuned(self, backend: Backend, problem: Problem, platform: str) -> Backend:
        """Return the backend with the fields that were measured, if it runs with them."""
        tuned = _tuning.tuned(self.tuning, backend, problem, platform)
        return backend if tuned.refusals(problem, platform) else tuned

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
        if refusals or not self.automatic:
            return refusals
        if platform in backend.only_if_asked:
            return (f"on {platform} has to be asked for by name: nobody has run it there",)
        preferred, reason = backend.passed_over(problem, platform) or (None, "")
        others = (other for other in self.backends if other.name == preferred)
        if any(not other.refusals(problem, platform) for other in others):
            return (reason,)
        return ()
