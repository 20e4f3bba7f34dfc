"""What the Triton backends have in common: platforms, target, first refusals, checks of fields."""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

from ejk._backend import Backend
from ejk.backends._fields import at_least, check_interpret
from ejk.backends.gpu import H100, Target, cannot_compile
from ejk.backends.triton import _launch

# What a field must at least be; blocks and warps must be powers of two, too.
BLOCKS = {"block_rows": 16, "block_kv": 16, "few_block_kv": 16}
WARPS = {"num_warps": 1, "few_num_warps": 1}
OTHERS = {
    "num_stages": 1, "few_num_stages": 1, "split_tokens": 1, "num_sms": 1, "least_saved_bytes": 0,
}  # fmt: skip
LEAST = BLOCKS | WARPS | OTHERS | {"compute_capability": 80}

Call = Callable[..., tuple[Any, ...]]
"""`_launch.call` that knows the target."""


class TritonBackend(Backend):
    """Kernels launched through jax-triton, or interpreted: subclass it and an operation's class.

    `num_sms` is a field of those whose sizes follow from it; to the others any number will do.
    """

    name = "triton"
    compute_capability: int | None
    num_sms: int | None = H100["num_sms"]
    interpret: bool

    def __post_init__(self) -> None:
        check_interpret(self)
        at_least(self, **{field: least for field, least in LEAST.items() if field in vars(self)})
        for field in BLOCKS | WARPS:
            value = vars(self).get(field)
            if value is not None and value & (value - 1):
                raise ValueError(f"{field}={value} must be a power of two")
            if value is not None and value > 32 and field in WARPS:
                raise ValueError(f"{field}={value} must be at most 32, 1,024 threads")

    @property
    def platforms(self) -> tuple[str, ...]:
        return ("cpu",) if self.interpret else ("cuda", "rocm")

    @property
    def only_if_asked(self) -> tuple[str, ...]:
        return () if self.interpret else ("rocm",)

    @property
    def has_target(self) -> bool:
        return self.compute_capability is not None

    def target(self, platform: str) -> Target | None:
        """Return the GPU to compile for, None where none is known."""
        return Target.of(platform, self.compute_capability, self.num_sms)

    def limits(self, problem: Any, platform: str) -> Sequence[str]:
        if missing := _launch.available(platform):
            return (missing,)
        target = self.target(platform)
        if target is None or target.is_too_old:
            h100 = ", ".join(f"{field}={x}" for field, x in H100.items() if field in vars(self))
            return (cannot_compile(target, platform, f"{type(self).__name__}({h100})"),)
        return self.limits_on(target, problem)

    def run(self, problem: Any, operands: Any, platform: str) -> Sequence[Any]:
        target = self.target(platform)
        assert target is not None  # or `limits` would have refused
        capability = target.compute_capability
        call = functools.partial(
            _launch.call, compute_capability=capability, interpret=self.interpret
        )
        return self.run_on(target, problem, operands, call)

    @abc.abstractmethod
    def limits_on(self, target: Target, problem: Any) -> Sequence[str]:
        """Say why this problem's sizes cannot run on `target`; empty if they can."""

    @abc.abstractmethod
    def run_on(self, target: Target, problem: Any, operands: Any, call: Call) -> Sequence[Any]:
        """Run the problem on `target`, each launch a `call`."""


def kernel_inputs(operands: Any, names: Sequence[str], work: Any) -> dict[str, Any]:
    """Return an attention kernel's inputs by parameter, in its order; `work` is the plan."""
    arrays = operands._asdict() | {"work": work}
    for value, key in (("value_cache", "key_cache"), ("value_scale", "key_scale")):
        if arrays[value] is None:
            arrays[value] = arrays[key]
    arrays |= {"key": arrays["key_cache"], "value": arrays["value_cache"]}
    return {f"{name}_ptr": arrays[name] for name in names}
