"""Bugs put into the drop-ins: what holds them to the originals catches each."""

import importlib

import jax.numpy as jnp
import mutants
import pytest
import test_drop_ins

flash, jax_gpu, vllm = (
    test_drop_ins.test_flash_attention, test_drop_ins.test_jax_gpu, test_drop_ins.test_vllm,
)  # fmt: skip
decode, ragged = test_drop_ins.test_jax_tpu_decode, test_drop_ins.test_jax_tpu_ragged
v3, hd64 = test_drop_ins.test_tpu_inference, test_drop_ins.test_tpu_inference_of_heads_of_64
one_pool = test_drop_ins.test_jax_gpu_of_one_quantised_pool
BUGS = {
    "flash_attention": {
        "the window is one too short": ("left + 1 if", "left if", flash, "causal, a window", True),
        "new tokens are not counted": (
            "lens = lens + cu[1:] - cu[:-1]", "lens = lens + 0 * cu[1:]", flash, "defaults", True,
        ),
        "a chunk is one too long": (
            "self.chunk - 1, self.chunk", "self.chunk - 1, self.chunk + 1", flash, "chunks", True,
        ),
        "one token of the padding is seen": (
            "[seq] + FAR - 1", "[seq] + FAR - 2", flash, "left padding", True,
        ),
        "new tokens in the padding see it": (
            "jnp.clip(self._first() - (lens - new), 0, new)", "0 * new", flash, "left padding",
            False,
        ),
        "the LSE of another row": (
            "lse.reshape(q.shape[:-1]), 1, 2)", "lse.reshape(q.shape[:-1])[:, ::-1], 1, 2)",
            flash, "defaults", True,
        ),
        "rows of the cache in order": (
            "if cache_batch_idx is None else cache_batch_idx", "", flash, "defaults", False,
        ),
    },
    "jax_tpu": {
        "logits are scaled": (
            "lengths, page_indices, 1.0,", "lengths, page_indices, None,", decode,
            (8, 8), 16, 128, False, None,
        ),
        "codes count in 127ths": (
            "MAX_INT8 = 127.5", "MAX_INT8 = 127.0", decode, (8, 1), 64, 256, True, 1.0,
        ),
        "values have the scale of keys": (
            "key_scale=k_scale, value_scale=v_scale", "key_scale=k_scale, value_scale=k_scale",
            ragged, *test_drop_ins.RAGGED[2],
        ),
    },
    "jax_gpu": {
        "values have the scales of keys": (
            "value_scale=v_scales_pages", "value_scale=k_scales_pages", jax_gpu, None, "kv",
        ),
        "the other pool is rounded to codes": (
            ".astype(wide)", ".astype(narrow)", one_pool, "k", jnp.int8,
        ),
        "a page too few": (
            "width * k_pages.shape[2]", "(width - 1) * k_pages.shape[2]", jax_gpu, None, "",
        ),
    },
    "vllm": {
        "values have the scale of keys": (
            '"v_scale", v_scale,', '"v_scale", k_scale,', vllm, "fp8",
        ),
        "padding is written": (
            "value_cache, slot_mapping,\n        cache", "value_cache, abs(slot_mapping),\n"
            "        cache", vllm, "auto",
        ),
    },
    "tpu_inference": {
        "the scale of queries is dropped": (
            "sm_scale * q_scale", "sm_scale", v3, "queries as codes",
        ),
        "values have the scale of keys": (
            "key_scale=k_scale, value_scale=v_scale", "key_scale=k_scale, value_scale=k_scale",
            v3, "e4m3, one head of a word",
        ),
        "a value comes before its key": (
            "words * packing, 2, 64)", "words * packing, 2, 64)[..., ::-1, :]", hd64,
            "float32, a window",
        ),
        "sinks of heads of 64 are dropped": (
            "sinks=attention_sink", "sinks=None", hd64, "float32, a window",
        ),
    },
}  # fmt: skip


@pytest.mark.fault("drop-ins", "shared")
@pytest.mark.fast(5)
@pytest.mark.parametrize(
    ("library", "bug"),
    [(library, f"{library}: {bug}") for library in BUGS for bug in BUGS[library]],
)
def test_a_bug_is_caught(library, bug, monkeypatch, tmp_path):
    old, new, holds, *case = BUGS[library][bug.partition(": ")[2]]
    module = importlib.import_module(f"ejk.compat.{library}")
    monkeypatch.setattr(test_drop_ins, library, mutants.load(module, old, new, tmp_path))
    test_drop_ins.RNG.bit_generator.state = test_drop_ins.START
    with pytest.raises(AssertionError):
        holds(*case)
