"""Attention to pages where the sizes alone may say what the result is."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ejk import _dispatch
from ejk._backend import Choice
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.xla._softmax import finish, nothing_seen


def attend_or_answer(
    attend: Callable[[Any, Choice, Any], Sequence[jax.Array]],
    sinks_of_rows: Callable[[Any, Any], jax.Array | None],
) -> Callable[[Any, Choice, Any], Sequence[jax.Array]]:
    """Return `attend(problem, choice, operands)`, answered where no token is there to see.

    `sinks_of_rows(problem, operands)` is each row's sink, which is then its LSE.
    """

    def nothing_visible(problem: PagedProblem, operands: Any) -> tuple[jax.Array, ...]:
        state = nothing_seen((problem.num_rows, problem.num_heads), problem.value_head_dim)
        out, lse = finish(state, sinks_of_rows(problem, operands))
        return (out.astype(problem.out_dtype), lse)[: len(problem.results)]

    def run(problem: PagedProblem, choice: Choice, operands: Any) -> Sequence[jax.Array]:
        if problem.is_empty:
            return _dispatch.answer(problem, nothing_visible, operands)
        return attend(problem, choice, operands)

    return run
