"""The checks of what each attention to pages is given, and the static facts of the call."""

from ejk._arguments import Arguments, check_sizes, facts_of, visible_bound
from ejk._indices import exceeds, least, rounded_bound, static_int
from ejk._typing import Array, Flag, StaticInt
from ejk.backends.page_attention import PageAttentionProblem
from ejk.backends.page_attention_plan import PageAttentionPlan, PlanFacts
from ejk.backends.ragged_page_attention import RaggedPageAttentionProblem

FEW_TOKENS = 8  # new tokens of a decode step or a draft: rounded up they could ask for wide blocks


def page_attention_problem(
    given: Arguments, num_splits: StaticInt, plan: PageAttentionPlan | None
) -> PageAttentionProblem:
    """Check the arguments and collect the static facts of the call."""
    facts = facts_of(given, num_seqs=given.query.shape[0])
    bound = visible_bound(given, facts)
    if plan is not None:
        plan.check(PlanFacts.of(facts, given.sliding_window))
    return PageAttentionProblem(
        **vars(facts),
        num_splits=static_int("num_splits", num_splits, at_least=0),
        plan=None if plan is None else plan.problem,
        visible_bound=bound,
    )


def ragged_page_attention_problem(
    given: Arguments,
    cu_q_lens: Array,
    max_q_len: StaticInt | None,
    positions: Array | None,
    tree_mask: Array | None,
    causal: Flag,
) -> RaggedPageAttentionProblem:
    """Check the arguments and collect the static facts of the call."""
    total_tokens, num_seqs = given.query.shape[0], given.context_lens.shape[0]
    facts = facts_of(given, num_seqs)
    check_sizes(cu_q_lens=(cu_q_lens, "num_seqs + 1", num_seqs + 1))
    if exceeds(total_tokens, 2**31 - 1):
        raise ValueError(
            f"total_tokens={total_tokens} must be below 2**31: rows are counted in 32 bits"
        )
    check_sizes(
        positions=(positions, "total_tokens", total_tokens),
        tree_mask=(tree_mask, "total_tokens", total_tokens),
    )
    q_len_bound = total_tokens
    if max_q_len is not None:
        rounded = rounded_bound("max_q_len", max_q_len, exact_up_to=FEW_TOKENS)
        q_len_bound = least(q_len_bound, rounded)
    if tree_mask is not None and not causal:
        raise ValueError(
            "causal=False must come without tree_mask, which says itself what new tokens see: "
            "leave one of them out"
        )
    counts_positions = facts.has_window or facts.has_alibi
    return RaggedPageAttentionProblem(
        **vars(facts),
        total_tokens=total_tokens,
        has_positions=positions is not None and counts_positions,
        tree_width=0 if tree_mask is None else max(tree_mask.shape[1], 1),
        q_len_bound=max(q_len_bound, 1),
        visible_bound=visible_bound(given, facts),
        causal=bool(causal),
    )
