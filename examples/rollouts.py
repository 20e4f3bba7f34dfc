"""Rollouts for reinforcement learning: samples of one prompt, with their log-probabilities.

The prompt is computed once. Each sample is a fork of it: it has the same pages, and copies the last
one when it writes its first token there. `prefix_groups` names the samples as one group, so that
attention may read the pages that they share once. A sample that has ended gives its pages back and
leaves the batch. What is drawn for a sample follows from the seed, its number and the position.

The trainer's forward pass reads prompt and samples with dense attention. In float32 it gives the
tokens the log-probabilities with which they were sampled, to 1e-5: the ratio of the two policies
starts at 1. On a GPU or TPU this takes `jax.default_matmul_precision("highest")`.

Source: Group Relative Policy Optimization (Shao et al., 2024, arXiv:2402.03300).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from decoder import Config, Params, forward, random_params

import ejk
from ejk.paging import BatchInputs, PageManager, PrefixGroups

PAGE_SIZE = 16
Cache = list[tuple[jax.Array, jax.Array]]


class Rollouts(NamedTuple):
    """The samples of one prompt."""

    tokens: np.ndarray  # int32 [group, num_new], what was sampled
    log_probs: np.ndarray  # float32 [group, num_new], of these tokens
    mask: np.ndarray  # bool [group, num_new], False behind the end of a sample
    most_pages: int  # that the group held at any one time


@functools.partial(jax.jit, static_argnames=("config", "is_decode"), donate_argnames="cache")
def step(
    config: Config,
    params: Params,
    cache: Cache,
    inputs: BatchInputs,
    groups: PrefixGroups,
    is_decode: bool,
) -> tuple[jax.Array, Cache]:
    """Compute a batch's new tokens; return the logits of what follows each sequence."""

    def attend(query, key, value, cache):
        cache = ejk.write_kv_cache(key, value, *cache, inputs.slot_mapping)
        where = inputs.context_lens, inputs.block_tables
        if is_decode:
            return ejk.page_attention(query, *cache, *where, prefix_groups=groups), cache
        out = ejk.ragged_page_attention(
            query, *cache, *where, inputs.cu_q_lens, prefix_groups=groups
        )
        return out, cache

    logits, cache = forward(config, params, inputs.tokens, inputs.positions, attend, cache)
    return logits[jnp.maximum(inputs.cu_q_lens[1:] - 1, 0)], cache


@functools.partial(jax.jit, donate_argnames="cache")
def copy_pages(cache: Cache, copies: jax.Array) -> Cache:
    """Copy pages in every layer, in place."""
    return [ejk.copy_kv_pages(*pools, copies[:, 0], copies[:, 1]) for pools in cache]


@jax.jit
def sample(
    key: jax.Array, numbers: jax.Array, position: int, logits: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Draw a token for each sample; return it, and its log-probability."""
    log_probs = jax.nn.log_softmax(logits / temperature)
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), position))(numbers)
    tokens = jax.vmap(jax.random.categorical)(keys, log_probs)
    return tokens, jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]


def rollouts(
    config: Config,
    params: Params,
    prompt: Sequence[int],
    *,
    group: int,
    num_new: int,
    temperature: float = 1.0,
    end_token: int | None = None,
    seed: int = 0,
) -> Rollouts:
    """Sample `group` continuations of a prompt, each until `end_token` or `num_new` tokens."""
    blocks = -(-(len(prompt) + num_new) // PAGE_SIZE)
    manager = PageManager(
        num_pages=blocks * group, page_size=PAGE_SIZE, max_seqs=group, max_blocks=blocks
    )
    sizes = (blocks * group, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    cache = [ejk.empty_kv_cache(*sizes, dtype="float32")[:2] for _ in range(config.num_layers)]
    first = manager.allocate(prompt)
    batch = manager.batch([first])
    logits, cache = step(config, params, cache, batch.inputs, batch.prefix_groups(), False)
    manager.commit(batch)
    seqs = np.array([first, *(manager.fork(first) for _ in range(group - 1))])
    numbers, logits = np.arange(group), jnp.repeat(logits[:1], group, axis=0)
    all_tokens = np.zeros((group, num_new), np.int32)
    all_log_probs, mask = all_tokens.astype(np.float32), all_tokens.astype(np.bool_)
    most_pages = manager.statistics().used_pages
    for new in range(num_new):
        drawn = sample(jax.random.key(seed), numbers, new, logits[: len(numbers)], temperature)
        tokens, log_probs = map(np.asarray, drawn)
        all_tokens[numbers, new], all_log_probs[numbers, new] = tokens, log_probs
        mask[numbers, new] = True
        has_ended = tokens == end_token
        manager.free(seqs[has_ended])
        seqs, numbers, tokens = (x[~has_ended] for x in (seqs, numbers, tokens))
        if new == num_new - 1 or not seqs.size:
            break
        manager.append(seqs, tokens)
        most_pages = max(most_pages, manager.statistics().used_pages)
        batch = manager.batch(seqs)
        if batch.copies.size:
            cache = copy_pages(cache, batch.copies)
        logits, cache = step(config, params, cache, batch.inputs, batch.prefix_groups(), True)
        manager.commit(batch)
    return Rollouts(all_tokens, all_log_probs, mask, most_pages)


@functools.partial(jax.jit, static_argnames="config")
def trainer_log_probs(
    config: Config, params: Params, prompt: jax.Array, tokens: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Return the log-probabilities of sampled `tokens [group, num_new]`, by dense attention."""

    def attend(query, key, value, cache):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True), cache

    prompts = jnp.broadcast_to(prompt, (len(tokens), len(prompt)))
    text = jnp.concatenate([prompts, tokens], axis=1)
    positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
    logits, _ = forward(config, params, text, positions, attend, [None] * config.num_layers)
    log_probs = jax.nn.log_softmax(logits[:, len(prompt) - 1 : -1] / temperature)
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


def main() -> None:
    config, prompt = Config(), np.arange(1, 41)
    params = random_params(config)
    drawn = rollouts(config, params, prompt, group=8, num_new=24, temperature=0.8, end_token=0)
    of_trainer = trainer_log_probs(config, params, prompt, drawn.tokens, 0.8)
    worst = np.abs(np.where(drawn.mask, drawn.log_probs - of_trainer, 0)).max()
    assert worst <= 1e-5, worst
    print(f"{drawn.mask.sum()} tokens; the trainer's log-probabilities differ by {worst:.1e}")
    alone = 8 * -(-(40 + 24) // PAGE_SIZE)
    print(f"{drawn.most_pages} pages at most, and {alone} without sharing")


if __name__ == "__main__":
    main()
