"""What may happen to a page manager, drawn from a `random.Random`: Hypothesis', or a plain one.

Tokens are 0 and 1, prompts short, pools small. So prompts begin alike, and pages run out.
"""

import hypothesis.stateful as stateful
import pytest
from hypothesis import strategies as st
from paging_model import Model

from ejk import paging


def new_model(rng, module=paging):
    page_size = rng.choice([1, 2, 3])
    return Model(
        module,
        page_size=page_size,
        num_pages=rng.choice([6, 11, 24]),
        sliding_window=rng.choice([None, None, 1, 3, 5]),
        max_seqs=rng.choice([3, 6]),
        max_blocks=12 // page_size,
        prefix_caching=rng.random() < 0.8,
    )


def tokens(rng, most=9):
    return [rng.choice([0, 0, 1]) for _ in range(rng.randint(1, most))]


def some(rng, seqs):
    seqs = list(seqs)
    return rng.sample(seqs, rng.randint(1, len(seqs)))


def grow(model, rng, seqs, most=3):
    """Append some tokens to each that has room for them."""
    rooms = {seq: min(model.most - len(model.seqs[seq].tokens), most) for seq in seqs}
    seqs = [seq for seq in seqs if rooms[seq]]
    model.append(seqs, [tokens(rng, rooms[seq]) for seq in seqs])


def compute(model, seqs):
    """Compute all that these sequences have."""
    waiting = model.waiting()
    if seqs := [seq for seq in seqs if waiting[seq]]:
        model.step(seqs, [waiting[seq] for seq in seqs], "well")


def allocate(model, rng):
    model.allocate(tokens(rng), rng.choice([None, None, "a"]), rng.choice([None, None, 1, 4]))


def repeat(model, rng):
    """A prompt begins as a sequence does."""
    ids = model.seqs[rng.choice([*model.seqs])].tokens + tokens(rng, 4)
    most = rng.choice([None, None, None, 0, 2, 5])
    model.allocate(ids[: model.most], rng.choice([None, None, "a"]), most=most)


def append(model, rng):
    grow(model, rng, some(rng, model.seqs))


def step(model, rng):
    waiting = model.waiting()
    if any(waiting.values()):
        seqs = some(rng, [seq for seq in waiting if waiting[seq]])
        q_lens = [rng.randint(1, waiting[seq]) for seq in seqs]
        model.step(seqs, q_lens, rng.choice(["well", "well", "unrun", "halfway"]))


def decode_all(model, rng):
    """Every sequence computes what it has, and grows: as in a serving loop."""
    for _ in range(rng.randint(1, 3)):
        compute(model, [*model.seqs])
        grow(model, rng, [*model.seqs], most=1)


def verify_drafts(model, rng):
    """Some tokens are rejected before their batch is committed; another comes instead."""
    seq = rng.choice([*model.seqs])
    grow(model, rng, [seq], most=4)
    if waiting := model.waiting()[seq]:
        model.step([seq], [waiting], "well", cut=(rng.randint(0, 4), tokens(rng, 1)))


def fork(model, rng):
    seq = rng.choice([*model.seqs])
    compute(model, [seq])
    for _ in range(rng.randint(1, 2)):
        model.fork(seq)


def beam(model, rng):
    """A sequence and its forks are cut near the end, and grow at once; one takes that back."""
    seq = rng.choice([*model.seqs])
    compute(model, [seq])
    before = {*model.seqs}
    for _ in range(rng.randint(1, 2)):
        model.fork(seq)
    family = [seq, *{*model.seqs} - before]
    lens = [len(model.seqs[member].tokens) - rng.choice([0, 0, 1, 2]) for member in family]
    model.truncate(family, [max(n, 0) for n in lens])
    grow(model, rng, some(rng, family))
    one = rng.choice(family)
    if rng.random() < 0.3:
        model.truncate([one], [len(model.seqs[one].numbers)])
        model.fork(one)
    compute(model, [one])


def diverge(model, rng):
    """A sequence and its fork go on from within one page; one does again before it is committed."""
    seq = rng.choice([*model.seqs])
    compute(model, [seq])
    before = {*model.seqs}
    model.fork(seq)
    family = [seq, *{*model.seqs} - before]
    keep = max(len(model.seqs[seq].tokens) - rng.randint(0, 2), 0)
    model.truncate(family, [keep] * len(family))
    grow(model, rng, family, most=2)
    one = rng.choice(family)
    if waiting := model.waiting()[one]:
        model.step([one], [waiting], "well", cut=(0, tokens(rng, 1)))


def free(model, rng):
    model.free(some(rng, model.seqs))


def truncate(model, rng):
    seqs = some(rng, model.seqs)[:2]
    model.truncate(seqs, [rng.randint(0, len(model.seqs[seq].tokens)) for seq in seqs])


def preempt(model, rng):
    ids, salt = model.preempt(rng.choice([*model.seqs]))
    if ids:
        model.allocate(ids, salt)


def reset(model, rng):
    if rng.random() < 0.3:
        model.reset()


def name_one_that_has_ended(model, rng):
    if model.ended:
        seq, before = rng.choice(model.ended), model.state()
        with pytest.raises(ValueError, match=f"^seq={seq} must be a live sequence"):
            model.manager.truncate(seq, 0)
        assert model.state() == before


WITHOUT_SEQUENCES = (allocate, reset, name_one_that_has_ended)
WITH_SEQUENCES = (
    repeat, append, step, decode_all, verify_drafts, fork, beam, diverge, free, truncate, preempt,
)  # fmt: skip


def walk(rng, steps, module=paging):
    """Do so many operations in a row; compare everything after each."""
    model = new_model(rng, module)
    often = 3 * WITH_SEQUENCES + 3 * (allocate,)
    for _ in range(steps):
        rng.choice(often + WITHOUT_SEQUENCES if model.seqs else (allocate,))(model, rng)
        model.check()
    return model


def machine(new):
    """Make Hypothesis' machine of the models that `new` draws: each operation is a rule."""
    randoms = st.randoms(use_true_random=False)

    class Machine(stateful.RuleBasedStateMachine):
        @stateful.initialize(rng=randoms)
        def begin(self, rng):
            self.model = new(rng)

        @stateful.invariant()
        def holds(self):
            if hasattr(self, "model"):
                self.model.check()

    for operation in WITHOUT_SEQUENCES + WITH_SEQUENCES:

        def run(self, rng, operation=operation):
            operation(self.model, rng)

        run.__name__ = operation.__name__
        rule = stateful.rule(rng=randoms)(run)
        if operation in WITH_SEQUENCES:
            rule = stateful.precondition(lambda self: self.model.seqs)(rule)
        setattr(Machine, operation.__name__, rule)
    return Machine
