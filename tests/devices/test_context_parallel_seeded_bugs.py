"""Bugs put into what splits pages over devices: the properties catch each of them."""

import dataclasses

import context_parallel
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

import ejk
import ejk._context_parallel as context
from ejk._own_pages import OwnPages
from ejk.testing.bounds import assert_close
from ejk.testing.page_attention import build

pytestmark = pytest.mark.skipif(not meshes.MANY_DEVICES, reason="needs eight devices")


@dataclasses.dataclass(frozen=True)
class Mutant(ejk.XlaPageAttention):
    """A backend of its own to JAX: no compiled program of the sound one is reused."""

    bug: str = ""


def holds(bug: str):
    """Contexts over all devices, pages of none of them, a window, slopes and sinks."""
    entry = context_parallel.Parallel(bug, Mutant(bug=bug), examples=0)
    case = build(
        context_parallel.CONFIGURATIONS[0], np.array([36, 35, 13, 2], np.int32),
        window=jnp.int32(11), invalid=0.1, seed=4,
    )  # fmt: skip
    assert_close(case, *entry(case))


def own_changed(**changes):
    """What a device takes for its own, changed by functions of it and of how it was asked."""

    def of(*arrays, **asked):
        own = OwnPages.of(*arrays, **asked)
        return own._replace(**{name: change(own, asked) for name, change in changes.items()})

    return {"OwnPages": type("Faulty", (), {"of": staticmethod(of)})}


def asked_changed(**changes):
    def of(*arrays, **asked):
        return OwnPages.of(*arrays, **asked | {k: f(asked) for k, f in changes.items()})

    return {"OwnPages": type("Faulty", (), {"of": staticmethod(of)})}


def merged_changed(change):
    merge = context.merge_attention_states
    return {"merge_attention_states": lambda outs, lses: merge(*change(outs, lses))}


BUGS = {
    "pages are those of the next device": asked_changed(
        first_page=lambda asked: asked["first_page"] + asked["num_pages"]
    ),
    "the first page of a device is nobody's": asked_changed(
        first_page=lambda asked: asked["first_page"] + 1
    ),
    "a window is that of the whole": own_changed(
        windows=lambda own, asked: jnp.full_like(own.lens, asked["sliding_window"])
    ),
    "a window is one too long": asked_changed(
        sliding_window=lambda asked: asked["sliding_window"] + 1
    ),
    "slopes count from the device's last token": own_changed(
        distances=lambda own, asked: own.before - (own.lens - 1)[:, None]
    ),
    "tails of pages are visible": own_changed(
        lens=lambda own, asked: -(-own.lens // asked["page_size"]) * asked["page_size"]
    ),
    "pages in another order": own_changed(tables=lambda own, asked: own.tables[:, ::-1]),
    "the part of a device is lost": merged_changed(lambda outs, lses: (outs[1:], lses[1:])),
    "the LSE of another device": merged_changed(
        lambda outs, lses: (outs, jnp.concatenate([lses[1:4], lses[:1], lses[4:]]))
    ),
    "the sinks are counted twice": merged_changed(
        lambda outs, lses: (jnp.concatenate([outs, outs[-1:]]), jnp.concatenate([lses, lses[-1:]]))
    ),
}


@pytest.mark.fault("context_parallel", "shared")
@pytest.mark.fast(5)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug, monkeypatch):
    for name, replacement in BUGS[bug].items():
        monkeypatch.setattr(context, name, replacement)
    with pytest.raises(AssertionError):
        holds(bug)


def test_what_is_sound_is_not_accused():
    holds("none")
