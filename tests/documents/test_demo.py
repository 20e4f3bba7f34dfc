"""The parts of the demo in `examples/`, and, where asked for, the language model itself."""

import argparse
import dataclasses
import functools
import pathlib
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

import generate
import paged_decode
import smollm2

import ejk

TINY = smollm2.tiny().config
PROMPTS = ([5, 1, 7, 2, 11], [3], [8, 8, 4, 30, 21, 14, 9, 2])


@pytest.fixture(scope="module")
def tiny():
    return smollm2.tiny()


def test_rope_turns_pairs_as_complex_numbers():
    x = np.random.normal(size=(5, 3, 8)).astype(np.float32)
    positions = np.array([0, 1, 2, 50, 4000], np.int32)
    angles = positions[:, None, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    out = smollm2.rope(jnp.asarray(x), jnp.asarray(positions), 100.0)
    np.testing.assert_allclose(out, expected, atol=2e-3)  # f32 angles: 4000 has an ulp of 2.4e-4
    np.testing.assert_array_equal(out[0], x[0])


def test_rms_norm_has_unit_mean_square():
    x = jnp.asarray(np.random.normal(size=(3, 16)) * 7, jnp.float32)
    out = smollm2.rms_norm(x, jnp.full(16, 2, jnp.float32), 0.0)
    np.testing.assert_allclose((out**2).mean(-1), 4, rtol=1e-6)


def test_slots_follow_the_table():
    spec = paged_decode.CacheSpec(num_pages=9, page_size=4)
    tables = jnp.array([[7, 2, -1], [0, -1, -1]], jnp.int32)
    positions = jnp.array([[0, 5, 8, -1], [3, 4, -1, -1]], jnp.int32)
    slots = jax.vmap(lambda column: spec.slot_mapping(tables, column), 1, 1)(positions)
    np.testing.assert_array_equal(slots, [[28, 9, -1, -1], [3, -1, -1, -1]])
    of_layer = jax.vmap(lambda column: spec.of_layer(jnp.int32(2), column, tables), 1, (1, None))
    slots, tables = of_layer(slots)
    np.testing.assert_array_equal(slots, [[100, 81, -1, -1], [75, -1, -1, -1]])
    np.testing.assert_array_equal(tables, [[25, 20, -1], [18, -1, -1]])


def test_a_write_keeps_the_scales_that_it_is_given():
    spec = paged_decode.CacheSpec(num_pages=9, page_size=4)
    scales = jnp.full(2, 0.5)
    cache = ejk.empty_kv_cache(9, 2, 4, 8, dtype="float8_e4m3fn")
    cache = cache._replace(key_scale=scales, value_scale=scales)
    rows = jnp.ones((3, 2, 8))
    written = paged_decode.write(spec, cache, rows, rows, jnp.arange(3), None)
    assert written.key_scale is scales and written.value_scale is scales
    assert (written.key_cache[0, :, :3].astype(jnp.float32) == 2).all()


def test_pages_have_one_owner_and_return():
    tables = paged_decode.PageTables(2, 3, paged_decode.CacheSpec(6, page_size=4), seed=0)
    for seq, num_tokens in ((0, 1), (1, 9), (0, 4), (0, 12)):
        tables.reserve(seq, num_tokens)
    assert sorted(tables.block_tables.flat) == list(range(6))
    tables.release(1)
    assert (tables.block_tables[1] == -1).all()
    tables.reserve(1, 12)
    assert sorted(tables.block_tables.flat) == list(range(6))


def test_tokenizer_round_trip():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|im_end|>", *alphabet, "he", "12"]
    tokenizer = smollm2.build_tokenizer(
        vocabulary, ["h e", "1 2"], [smollm2._CONTROL_TOKEN] + [1] * (len(vocabulary) - 1)
    )
    model = smollm2.SmolLM2(TINY, {}, tokenizer, frozenset())
    text = "  he said: 12 naïve 🙂s\n\tdone"
    assert model.decode(model.encode(text)) == text
    he, one, two = (vocabulary.index(token) for token in ("he", "1", "2"))
    assert model.encode("<|im_end|>he12") == [0, he, one, two]  # digits stay apart
    assert model.decode(model.encode("a🙂")[:-1]) == "a"  # a character still to be completed


def follow_anew(tiny, held=lambda rows: rows):
    """The tokens that follow when each is chosen by dense attention to all tokens before it.

    `held` says what a cache makes of rows of keys and values.
    """

    def attend(layer, query, key, value, cache):
        key, value = held(key), held(value)
        out = jax.nn.dot_product_attention(query[None], key[None], value[None], is_causal=True)
        return out[0], cache

    @jax.jit
    def choose(tokens, last):
        # What follows the last token is padding, which a causal mask hides.
        positions = jnp.arange(len(tokens))
        x, _ = smollm2.hidden_states(TINY, tiny.params, tokens, positions, attend, None)
        return smollm2.logits(tiny.params, x)[last].argmax()

    def follow(prompt):
        row = list(prompt)
        for _ in range(6):
            row.append(int(choose(jnp.array(row + [0] * (16 - len(row))), len(row) - 1)))
        return row[len(prompt) :]

    return [follow(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def read_anew(tiny):
    return follow_anew(tiny)


@pytest.mark.parametrize(
    ("layout", "page_size", "prefill_chunk"),
    [
        ("HND", 1, 512),
        ("HND", 4, 1),
        ("HND", 4, 3),
        ("HND", 4, 5),
        ("HND", 16, 13),
        ("NHD", 4, 3),
        ("KV_HEADS_FIRST", 4, 512),
    ],
)
def test_tokens_are_those_of_reading_everything_anew(
    tiny, read_anew, layout, page_size, prefill_chunk
):
    """Whatever the layout, the size and the order of pages, and the size of chunks."""
    outputs = paged_decode.generate(
        tiny, PROMPTS, max_new_tokens=6, prefill_chunk=prefill_chunk, cache_layout=layout,
        page_size=page_size, seed=page_size,
    )  # fmt: skip
    assert outputs == read_anew


def rounded(largest, rows, to=jnp.round):
    """The codes up to `largest` that come nearest, times a scale of each row."""
    scale = jnp.abs(rows).max(-1, keepdims=True) / largest
    return to(rows / scale).astype(rows.dtype) * scale


HELD = {
    "int8": functools.partial(rounded, 127),
    "int4": functools.partial(rounded, 7),
    "fp8": functools.partial(rounded, 448, to=lambda x: x.astype("float8_e4m3fn")),
}


@pytest.mark.parametrize(
    ("cache", "layout", "page_size", "prefill_chunk"),
    [("int8", "HND", 4, 3), ("int4", "NHD", 1, 5), ("fp8", "KV_HEADS_FIRST", 16, 512)],
)
def test_tokens_over_a_quantised_cache_are_those_of_rounded_keys_and_values(
    tiny, read_anew, cache, layout, page_size, prefill_chunk
):
    outputs = paged_decode.generate(
        tiny, PROMPTS, max_new_tokens=6, prefill_chunk=prefill_chunk, cache=cache,
        cache_layout=layout, page_size=page_size,
    )  # fmt: skip
    expected = follow_anew(tiny, HELD[cache])
    assert outputs == expected
    assert expected != read_anew or cache != "int4"  # four bits show


@pytest.mark.parametrize("size", [1, 3, 5, 14, 99])
def test_chunks_are_all_tokens_in_order(size):
    lens = [len(prompt) for prompt in PROMPTS]
    read = [[] for _ in PROMPTS]
    for chunk in paged_decode.chunks(PROMPTS, size):
        assert len(chunk.tokens) == min(size, sum(lens))
        for seq, (begin, end) in enumerate(zip(chunk.cu_q_lens, chunk.cu_q_lens[1:])):
            rows = slice(begin, end)
            positions = range(len(read[seq]), len(read[seq]) + end - begin)
            assert chunk.positions[rows].tolist() == list(positions)
            assert (chunk.seqs[rows] == seq).all()
            read[seq] += chunk.tokens[rows].tolist()
        assert chunk.context_lens.tolist() == [len(tokens) for tokens in read]
        assert (chunk.positions[chunk.cu_q_lens[-1] :] == -1).all()
    assert read == [list(prompt) for prompt in PROMPTS]


def test_sequences_end_alone(tiny):
    whole = paged_decode.generate(tiny, PROMPTS, max_new_tokens=12)
    end = whole[0][3]
    model = dataclasses.replace(tiny, end_tokens=frozenset({end}))
    ended = [output[: output.index(end)] if end in output else output for output in whole]
    assert paged_decode.generate(model, PROMPTS, max_new_tokens=12) == ended
    assert len(ended[0]) < 12 and max(map(len, ended)) > len(ended[0])


def test_prompts_must_fit(tiny):
    with pytest.raises(ValueError, match="make 65 tokens, and the model has room for 64"):
        paged_decode.generate(tiny, PROMPTS, max_new_tokens=57)
    with pytest.raises(ValueError, match="a token in each"):
        paged_decode.generate(tiny, [[1], []], max_new_tokens=1)


def test_a_decode_step_is_compiled_once(tiny):
    paged_decode.decode_step.clear_cache()
    paged_decode.generate(tiny, PROMPTS, max_new_tokens=6, prefill_chunk=5)
    assert paged_decode.decode_step._cache_size() == 1


def test_the_most_pages_in_use_are_counted(tiny):
    steps = paged_decode.stream(tiny, PROMPTS, max_new_tokens=6, page_size=4)
    # The tokens that a step chooses are written by the next one.
    pages = [sum(-(-(len(prompt) + step) // 4) for prompt in PROMPTS) for step in range(6)]
    assert [step.most_pages for step in steps] == pages == [5, 6, 6, 6, 8, 9]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([""], "TEXT: '' must have some text"),
        (["--prompt", " \n"], "--prompt: ' \\n' must have some text"),
        (["\udcff"], "TEXT: '\\udcff' must be UTF-8"),
        (["--prompt"], "--prompt: expected one argument"),
        (["--max-new-tokens", "0"], "'0' must be a whole number from 1 to 8191"),
        (["--max-new-tokens", "-3"], "'-3' must be a whole number from 1 to 8191"),
        (["--max-new-tokens", "8192"], "'8192' must be a whole number from 1 to 8191"),
        (["--page-size", "0"], "'0' must be a whole number from 1 to 1024"),
        (["--page-size", "9" * 5000], "must be a whole number from 1 to 1024"),
        (["--prefill-chunk", "1.5"], "'1.5' must be a whole number from 1 to 65536"),
        (["--seed", "many"], "'many' must be a whole number from 0 to 4294967295"),
        (["--cache", "int2"], "choose from 'int8', 'fp8', 'int4'"),
        (["--cache-layout", "nhd"], "choose from 'HND', 'NHD', 'KV_HEADS_FIRST'"),
        (["--dtype", "f64"], "choose from 'f32', 'bf16', 'f16'"),
        (["--backend", "cudnn"], "choose from 'auto', 'xla', 'triton', 'pallas'"),
        (["--backend", "triton"], "cannot run on cpu"),
        (["--backend", "triton"], "--interpret runs its kernels on the CPU"),
        (["--backend", "pallas"], "--interpret runs its kernels on the CPU"),
        (["--backend", "pallas", "--interpret", "--dtype", "f16"], "dtype=float16"),
        (["--interpret"], "--interpret needs --backend triton or --backend pallas"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_a_line_before_the_model_loads(
    argv, message, monkeypatch, capsys
):
    monkeypatch.setattr(smollm2, "load", lambda dtype: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        generate.main(argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert len(err) < 300


def test_a_prompt_beyond_the_model_is_refused(tiny, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "load", lambda dtype: tiny)
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--prompt", "a" * 70, "--max-new-tokens", "3"])
    assert stopped.value.code == 2
    assert "make 73 tokens; the model has room for 64" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--cache", "int8"]], ids=["float", "int8"])
def test_the_demo_says_what_pages_did(tiny, options, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "load", lambda dtype: tiny)
    generate.main(["--prompt", "aaaa", "--max-new-tokens", "3", "--page-size", "4", *options])
    out = capsys.readouterr().out
    assert "at most 2 pages of 4 tokens in use at once" in out
    assert "a dense cache of 1 x 7 tokens" in out
    assert ("int8: these pages take" in out) == bool(options)


@pytest.mark.parametrize(("cache", "row_bytes"), [("int8", 12), ("fp8", 12), ("int4", 8)])
def test_the_demo_says_what_a_quantised_cache_saved(cache, row_bytes, tiny):
    args = argparse.Namespace(cache=cache, page_size=1000, dtype="float32")
    pages, quantised = generate.savings(args, tiny, most_pages=10, num_seqs=1, most=9000)
    rows = 10000 * 2 * TINY.num_layers * TINY.num_kv_heads
    paged, whole = (round(rows * size / 1e6, 1) for size in (row_bytes, 4 * TINY.head_dim))
    assert f"in use at once, {paged} MB" in pages
    assert quantised == (
        f"{cache}: these pages take {paged} MB, scales included, instead of the {whole} MB of "
        f"float32: saves {whole - paged:.1f} MB"
    )


@hypothesis.given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 9))
def test_wrapped_lines_fit_and_lose_nothing(text, width):
    spans = list(generate.wrap(text, width))
    assert all(end - start <= width for start, end in spans)
    covered = [index for start, end in spans for index in range(start, end)]
    assert covered == [index for index, character in enumerate(text) if character != "\n"]


def test_log_prints_each_passage_whole(capsys):
    passages = [generate.Passage("One", "p", []), generate.Passage("Two", "q", [])]
    log = generate.Log()
    for texts, live in ((("a", "x"), {0, 1}), (("ab", "xy"), {0, 1}), (("ab", "xyz"), {1})):
        log.show(list(zip(passages, texts)), live, last=False)
    log.show(list(zip(passages, ("ab", "xyz!"))), set(), last=True)
    assert capsys.readouterr().out == "One\npab\n\nTwo\nqxyz!\n\n"


@pytest.fixture(scope="module")
def model():
    return smollm2.load()


def write(model, **options):
    texts = ("The capital of France is", "def fibonacci(n):\n    if n")
    prompts = [model.encode(text) for text in texts]
    return paged_decode.generate(model, prompts, max_new_tokens=16, **options)


@pytest.fixture(scope="module")
def written(model):
    return write(model, **generate.backend_choices("xla", interpret=False))


@pytest.mark.demo
def test_the_model_knows_paris(model, written):
    assert model.decode(written[0]).startswith(" Paris")


@pytest.mark.demo
@pytest.mark.parametrize("name", ["triton", "pallas"])
def test_backends_write_the_same_tokens(model, written, name):
    assert write(model, **generate.backend_choices(name, interpret=True)) == written


@pytest.mark.demo
@pytest.mark.parametrize(("prefill_chunk", "page_size", "seed"), [(1, 16, 1), (5, 4, 2), (9, 1, 3)])
def test_chunks_and_pages_change_no_token(model, written, prefill_chunk, page_size, seed):
    assert written == write(model, prefill_chunk=prefill_chunk, page_size=page_size, seed=seed)


@pytest.mark.demo
def test_chunks_and_pages_change_no_token_of_the_shipped_prompts_in_bfloat16():
    model = smollm2.load(jnp.bfloat16)
    prompts = [model.encode_chat(message) for message in generate.DEFAULT_CHATS]

    def run(**options):
        return paged_decode.generate(model, prompts, max_new_tokens=64, **options)

    outputs = run()
    assert run(prefill_chunk=17, seed=1) == outputs
    assert run(prefill_chunk=7, page_size=4, seed=2) == outputs
    assert run(prefill_chunk=1, cache_layout="NHD", page_size=32) == outputs
