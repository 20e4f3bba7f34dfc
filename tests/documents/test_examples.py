"""The examples that people copy: what each says of itself holds."""

import difflib
import pathlib

import dense_cache
import jax
import jax.numpy as jnp
import numpy as np
import paged_cache
import pytest
import rollouts
from decoder import Config, random_params, rotated

from ejk.paging import PageManager

CONFIG = Config()
PROMPTS = ([5, 1, 7, 2, 11], [3], [*range(20, 41)])


@pytest.fixture(autouse=True)
def defaults_of_jax():
    """Examples are written as their readers' programs are."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def poisoned(make):
    """Make what `make` makes, of NaN."""
    return lambda *args, **kwargs: jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan), make(*args, **kwargs)
    )


@pytest.mark.fast
def test_a_dense_cache_is_replaced_in_fewer_than_20_lines():
    files = [pathlib.Path(module.__file__) for module in (dense_cache, paged_cache)]
    dense, paged = (path.read_text().split('"""', 2)[2].splitlines() for path in files)
    changed = [line for line in difflib.ndiff(dense, paged) if line[0] in "+-" and line[2:].strip()]
    assert 0 < len(changed) < 20, "\n".join(changed)


def test_a_paged_cache_gives_the_tokens_of_a_dense_one(monkeypatch):
    params = random_params(CONFIG)
    tokens, logits = dense_cache.generate(CONFIG, params, PROMPTS, 12)
    monkeypatch.setattr(paged_cache, "empty_cache", poisoned(paged_cache.empty_cache))
    paged_tokens, paged_logits = paged_cache.generate(CONFIG, params, PROMPTS, 12)
    np.testing.assert_array_equal(paged_tokens, tokens)
    np.testing.assert_allclose(paged_logits, logits, rtol=0, atol=1e-5)
    assert len(np.unique(tokens)) > 6  # or the prompts would not matter


PROMPT, GROUP, NUM_NEW, TEMPERATURE = np.arange(1, 22), 4, 12, 0.8


def drawn(monkeypatch, group=GROUP, **options):
    empty = poisoned(rollouts.ejk.empty_kv_cache)
    with monkeypatch.context() as patch:
        patch.setattr(rollouts.ejk, "empty_kv_cache", empty)
        return rollouts.rollouts(
            CONFIG, random_params(CONFIG), PROMPT, group=group, num_new=NUM_NEW,
            temperature=TEMPERATURE, **options
        )  # fmt: skip


def test_rollouts_have_the_log_probabilities_of_the_trainer(monkeypatch):
    step, groups = rollouts.step, []
    monkeypatch.setattr(rollouts, "step", lambda *a: groups.append(a[4]) or step(*a))
    found = drawn(monkeypatch)
    assert all((g.groups == 0).all() and g.num_pages[0] == 1 for g in groups[1:])
    of_trainer = rollouts.trainer_log_probs(
        CONFIG, random_params(CONFIG), PROMPT, found.tokens, TEMPERATURE
    )
    np.testing.assert_allclose(found.log_probs, of_trainer, rtol=0, atol=1e-5)
    assert found.mask.all() and len({tuple(sample) for sample in found.tokens}) == GROUP
    # The prompt's full page is held once; its other one, to which all samples write, is copied.
    assert found.most_pages == 1 + GROUP


def test_a_sample_depends_on_no_other_and_ends(monkeypatch):
    whole = drawn(monkeypatch)
    end = int(whole.tokens[0, 3])
    cut = drawn(monkeypatch, end_token=end)
    ended = np.cumsum(whole.tokens == end, axis=1) - (whole.tokens == end) > 0
    np.testing.assert_array_equal(cut.mask, ~ended)
    assert ended.any() and not ended.all()
    np.testing.assert_array_equal(cut.tokens, np.where(ended, 0, whole.tokens))
    np.testing.assert_allclose(cut.log_probs, np.where(ended, 0, whole.log_probs), atol=1e-5)


def test_an_nnx_layer_reads_and_decodes_through_pages():
    """Prompts in chunks, then decode steps, against dense attention of the same weights."""
    nnx = pytest.importorskip("flax.nnx")
    import nnx_attention

    model = nnx_attention.Decoder(vocabulary=64, num_layers=2, rngs=nnx.Rngs(0))
    for layer in model.layers:
        layer.init_cache(num_pages=12, page_size=4)
    graph, cache, params = nnx.split(model, nnx.Cache, ...)
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
    manager = PageManager(num_pages=12, page_size=4, max_seqs=2, max_blocks=6)
    seqs = [manager.allocate(prompt) for prompt in ([*range(1, 12)], [6, 7, 8])]
    for q_lens in ([6, 2], [5, 1], None, None, None):
        batch = manager.batch(seqs, q_lens)
        before = cache
        tokens, cache = nnx_attention.step(graph, cache, params, batch.inputs, batch.max_q_len == 1)
        assert all(pool.is_deleted() for pool in jax.tree.leaves(before))  # in place
        manager.commit(batch)
        if q_lens != [6, 2]:
            manager.append(seqs, np.asarray(tokens[:2]))
    for seq in seqs:
        text = manager.tokens(seq)
        chosen = jnp.argmax(dense_nnx(nnx.merge(graph, cache, params), text[:-1]), axis=-1)
        np.testing.assert_array_equal(text[-4:], chosen[-4:])
    assert len({*manager.tokens(seqs[0])[-4:], *manager.tokens(seqs[1])[-4:]}) > 4


def dense_nnx(model, tokens):
    """Compute the logits of one sequence without a cache."""
    x, positions = model.embed(tokens), jnp.arange(len(tokens))
    for layer in model.layers:
        h = model.norm(x)
        query, key = rotated(layer.query(h), positions), rotated(layer.key(h), positions)
        dense = jax.nn.dot_product_attention(query, key, layer.value(h), is_causal=True)
        x = x + layer.out(dense)
    return model.head(model.norm(x))
