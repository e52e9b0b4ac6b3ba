"""What each layer of a model keeps per token and per sequence: KV widths and recurrent state.

Follows llama.cpp as llama-cpp-python 0.3.36 carries it: load_hparams and create_memory in
src/llama-model.cpp, src/llama-hparams.cpp, and each architecture's load_arch_hparams in
src/models/.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Final, cast

import msgspec

from shimpy.errors import GgufError
from shimpy.gguf.header import Header

# BERT-like encoders and text diffusion models compute a whole text at once and cache nothing.
UNCACHED: Final = frozenset(
    {
        "bert",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
        "wavtokenizer-dec",
    }
)
RECURRENT: Final = frozenset({"arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"})
# Hybrids whose recurrent layers are those with no KV heads.
_RECURRENT_BY_HEADS: Final = frozenset(
    {
        "bailingmoe3",
        "glm5-next",
        "granitehybrid",
        "jamba",
        "kimi-k3",
        "kimi-linear",
        "lfm2",
        "lfm2moe",
        "plamo2",
    }
)
# Hybrids that list their recurrent layers, or have full attention in every n-th layer.
_RECURRENT_BY_INTERVAL: Final = {
    "qwen3next": 4,
    "qwen35": 4,
    "qwen35moe": 4,
    "qwen4exp": 4,
    "minimax-01": 8,
}
# Sparse attention: one more key head per layer, for the indexer.
_INDEXED: Final = frozenset({"deepseek32", "glm-dsa", "minimax-m3"})
# The state of recurrent layers is always float32.
_STATE_ELEMENT_BYTES: Final = 4
_MAX_LAYERS: Final = 512


class _Window(msgspec.Struct, frozen=True):
    """How an architecture mixes windowed with full attention, where its file does not say."""

    # Every n-th layer is full; 0: all are windowed; None: only a list in the file counts.
    period: int | None
    # Within a period the full layer comes first, not last.
    full_first: bool = False
    # The window where the file names none; 0: then there is none.
    default: int = 0
    # The window is this, whatever the file says (only that it has one counts).
    fixed: int = 0


_WINDOWS: Final = {
    "afmoe": _Window(4),
    "cohere2": _Window(4),
    "cohere2moe": _Window(4, full_first=True),
    "deepseek4": _Window(0),
    "dots3note": _Window(None),
    "exaone-moe": _Window(4, default=128),
    "exaone4": _Window(4, default=4096),
    "gemma2": _Window(2, default=4096),
    "gemma3": _Window(6),
    "gemma3n": _Window(5),
    "gemma4": _Window(None),
    "gemma4-assistant": _Window(None),
    "gpt-oss": _Window(2),
    "granite_swa": _Window(None),
    "laguna": _Window(4, full_first=True),
    "lfm2": _Window(0),
    "llama4": _Window(4, default=8192, fixed=8192),
    "maple": _Window(None),
    "mellum": _Window(4),
    "mimo2": _Window(None),
    "muse-glimmer": _Window(4),
    "olmo2": _Window(4),
    "plamo3": _Window(8),
    "smallthinker": _Window(4, full_first=True, fixed=4096),
    "spark2_5": _Window(None),
    "step35": _Window(None),
}


class LayerCache(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer caches; widths are elements per token, the state bytes per sequence."""

    n_embd_k: int = 0
    n_embd_v: int = 0
    is_swa: bool = False
    state_bytes: int = 0


class CacheShape(msgspec.Struct, frozen=True, kw_only=True):
    """What all layers cache."""

    layers: tuple[LayerCache, ...]
    n_swa: int
    is_mla: bool
    # Width of one attention head's K; 0: no attention.
    n_embd_head: int


class Hparams:
    """The metadata of a model's architecture, `{arch}.{key}`, with llama.cpp's defaults."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.arch = header.get_str("general.architecture")
        self.n_layer = self.get("block_count")
        if not 0 < self.n_layer <= _MAX_LAYERS:
            raise GgufError(
                f"{header.name}: {self.arch}.block_count is {self.n_layer}; llama.cpp loads 1 to "
                f"{_MAX_LAYERS} layers"
            )

    def get(self, key: str, default: int | None = None) -> int:
        """Return a whole number that is not negative; GgufError as `Header.get_int`."""
        value = self.header.get_int(f"{self.arch}.{key}", default)
        if value < 0:
            raise GgufError(f"{self.header.name}: metadata {self.arch}.{key} is {value}, below 0")
        return value

    def get_list(self, key: str) -> tuple[int, ...] | None:
        """Return an array of whole numbers or truth values, one per layer; None: none is there.

        Raises:
            GgufError: it is shorter than the model has layers, or holds something else.
        """
        array = self.header.get_array(f"{self.arch}.{key}")
        if array is None:
            return None
        values = tuple(islice(array, self.n_layer))
        if len(values) < self.n_layer or not all(isinstance(v, int) and v >= 0 for v in values):
            raise GgufError(
                f"{self.header.name}: metadata {self.arch}.{key} is no list of {self.n_layer} "
                f"whole numbers, one per layer (it has {len(array)} values)"
            )
        return cast("tuple[int, ...]", values)

    def per_layer(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """Return one number per layer, be it a list in the file or one number for all."""
        listed = self.get_list(key)
        return (self.get(key, default),) * self.n_layer if listed is None else listed


def describe_cache(hparams: Hparams) -> CacheShape:
    """Return what each layer of the model caches.

    Raises:
        GgufError: a key that the architecture cannot do without is missing or senseless.
    """
    if hparams.arch in UNCACHED:
        none = tuple(LayerCache() for _ in range(hparams.n_layer))
        return CacheShape(layers=none, n_swa=0, is_mla=False, n_embd_head=_head_width(hparams))
    recurrent = _recurrent_layers(hparams)
    n_swa, windowed = _windowed_layers(hparams, recurrent)
    is_mla = bool(
        hparams.get("attention.key_length_mla", 0) and hparams.get("attention.value_length_mla", 0)
    )
    widths = _kv_widths(hparams, windowed, is_mla=is_mla)
    has_kv = _kv_layers(hparams, recurrent)
    state_bytes = _state_bytes(hparams) if any(recurrent) else 0
    layers = tuple(
        LayerCache(
            n_embd_k=widths[i][0] if has_kv(i) else 0,
            n_embd_v=widths[i][1] if has_kv(i) else 0,
            is_swa=windowed[i],
            state_bytes=state_bytes if recurrent[i] else 0,
        )
        for i in range(hparams.n_layer)
    )
    return CacheShape(layers=layers, n_swa=n_swa, is_mla=is_mla, n_embd_head=_head_width(hparams))


def n_nextn(hparams: Hparams) -> int:
    """Return the number of multi-token prediction blocks, the last ones of a file.

    llama.cpp neither loads nor runs them unless it drafts with them. A file of nothing else is
    a draft model, whose blocks do run.
    """
    n_blocks = hparams.get("nextn_predict_layers", 0)
    return n_blocks if n_blocks < hparams.n_layer else 0


def _recurrent_layers(hparams: Hparams) -> tuple[bool, ...]:
    arch, n_layer = hparams.arch, hparams.n_layer
    if arch in RECURRENT or arch == "falcon-h1":
        return (True,) * n_layer
    if arch in _RECURRENT_BY_HEADS:
        return tuple(n == 0 for n in hparams.per_layer("attention.head_count_kv"))
    if arch in ("nemotron_h", "nemotron_h_moe"):
        heads = hparams.per_layer("attention.head_count_kv")
        ff = hparams.per_layer("feed_forward_length")
        last = n_layer - n_nextn(hparams)
        return tuple(i < last and heads[i] == 0 and ff[i] == 0 for i in range(n_layer))
    if arch in _RECURRENT_BY_INTERVAL:
        listed = hparams.get_list("attention.recurrent_layers")
        if listed is not None:
            return tuple(bool(value) for value in listed)
        interval = hparams.get("full_attention_interval", _RECURRENT_BY_INTERVAL[arch]) or 1
        last = n_layer - n_nextn(hparams)
        return tuple(i < last and (i + 1) % interval != 0 for i in range(n_layer))
    return (False,) * n_layer


def _windowed_layers(hparams: Hparams, recurrent: tuple[bool, ...]) -> tuple[int, tuple[bool, ...]]:
    """Return the window's tokens, 0 for none, and which layers look no further back."""
    arch, n_layer = hparams.arch, hparams.n_layer
    rule = _WINDOWS.get(arch)
    none = (0, (False,) * n_layer)
    # Of exaone4 only the 32B model, known by its layers, is windowed.
    if rule is None or (arch == "exaone4" and n_layer - n_nextn(hparams) != 64):  # noqa: PLR2004
        return none
    n_swa = hparams.get("attention.sliding_window", rule.default)
    if n_swa == 0:
        return none
    n_swa = rule.fixed or n_swa
    listed = hparams.get_list("attention.sliding_window_pattern")
    if listed is not None:
        return n_swa, tuple(bool(value) for value in listed)
    if rule.period is None:
        raise GgufError(
            f"{hparams.header.name}: metadata {arch}.attention.sliding_window_pattern is missing"
        )
    if arch == "lfm2":
        return n_swa, tuple(not is_recurrent for is_recurrent in recurrent)
    period = hparams.get("attention.sliding_window_pattern", rule.period)
    last = n_layer - n_nextn(hparams)
    full = 0 if rule.full_first else period - 1
    return n_swa, tuple(i < last and (period == 0 or i % period != full) for i in range(n_layer))


def _kv_widths(
    hparams: Hparams, windowed: tuple[bool, ...], *, is_mla: bool
) -> tuple[tuple[int, int], ...]:
    """Return the widths of K and V per layer, were all of them to have a cache."""
    heads = _heads(hparams)
    heads_kv = _heads_kv(hparams, heads)
    key = _head_width(hparams)
    value = hparams.get("attention.value_length", _default_head_width(hparams, heads))
    key_swa = hparams.get("attention.key_length_swa", key)
    value_swa = hparams.get("attention.value_length_swa", value)
    indexer_width, first_indexed = _indexer(hparams)
    widths = []
    for i, n_kv in enumerate(heads_kv):
        indexer = indexer_width if i >= first_indexed else 0
        n_k = (key_swa if windowed[i] else key) * n_kv + indexer
        n_v = (value_swa if windowed[i] else value) * n_kv + (value if indexer else 0)
        # The latent serves as K and V; llama.cpp keeps it once, as K.
        widths.append((n_k, 0 if is_mla else n_v))
    return tuple(widths)


def _indexer(hparams: Hparams) -> tuple[int, int]:
    """Return the width of the sparse attention's own key, and the first layer that has one."""
    if hparams.arch not in _INDEXED:
        return 0, 0
    width = hparams.get("attention.indexer.key_length", 0)
    # In the others the dense layers at the start are sparse in attention all the same.
    is_dense_full = hparams.arch == "minimax-m3"
    return width, hparams.get("leading_dense_block_count", 0) if is_dense_full else 0


def _heads(hparams: Hparams) -> tuple[int, ...]:
    return hparams.per_layer("attention.head_count", 0 if hparams.arch in RECURRENT else None)


def _default_head_width(hparams: Hparams, heads: tuple[int, ...]) -> int:
    return hparams.get("embedding_length") // heads[0] if heads[0] else 0


def _head_width(hparams: Hparams) -> int:
    return hparams.get("attention.key_length", _default_head_width(hparams, _heads(hparams)))


def _heads_kv(hparams: Hparams, heads: tuple[int, ...]) -> tuple[int, ...]:
    if f"{hparams.arch}.attention.head_count_kv" not in hparams.header.metadata:
        return heads
    return hparams.per_layer("attention.head_count_kv")


def _kv_layers(hparams: Hparams, recurrent: tuple[bool, ...]) -> Callable[[int], bool]:
    """Return which layers have a KV cache of their own."""
    arch = hparams.arch
    if arch in RECURRENT:
        return lambda _: False
    if arch == "falcon-h1":
        return lambda _: True
    if arch in ("nemotron_h", "nemotron_h_moe"):
        ff = hparams.per_layer("feed_forward_length")
        return lambda i: not recurrent[i] and ff[i] == 0
    first_without = hparams.n_layer - n_nextn(hparams)
    if arch == "gemma3n":
        first_without = min(20, first_without)  # llama.cpp fixes it
    elif arch == "gemma4":
        first_without -= hparams.get("attention.shared_kv_layers", 0)
    return lambda i: i < first_without and not recurrent[i]


def _state_bytes(hparams: Hparams) -> int:
    """Return the bytes of recurrent state of one layer and sequence (n_embd_r and n_embd_s)."""
    n_embd = hparams.get("embedding_length")
    d_conv = hparams.get("ssm.conv_kernel", 0)
    heads = max(hparams.per_layer("attention.head_count", 0))
    if head := hparams.get("wkv.head_size", 0):
        rolling, state = hparams.get("token_shift_count", 2) * n_embd, n_embd * head
    elif taps := hparams.get("shortconv.l_cache", 0):
        rolling, state = n_embd * (taps - 1), 0
    elif head := hparams.get("kda.head_dim", 0):
        rolling = 3 * (d_conv - 1 if d_conv else 3) * heads * head
        state = head * head * heads
    else:
        d_inner = hparams.get("ssm.inner_size", 0)
        d_state = hparams.get("ssm.state_size", 0)
        groups = hparams.get("ssm.group_count", 0)
        rolling = max(d_conv - 1, 0) * (d_inner + 2 * groups * d_state)
        state = d_state * d_inner
        if hparams.arch == "minimax-01":
            head = hparams.get("attention.key_length", n_embd // heads if heads else 0)
            state = head * head * heads
    return (rolling + state) * _STATE_ELEMENT_BYTES
