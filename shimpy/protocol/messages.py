"""Every message that crosses the process boundary, grouped by its receiver.

To the worker: Load, then any number of Submit, Embed, Tokenize, Cancel, SetThreads, LimitParked;
Shutdown.
To the daemon: Hello at once; Loading, then Ready or LoadFailed; then Events, Tokenized and
PrefixNews.

A request is named by an integer that the daemon chooses and never uses again for the same
worker. Each Submit, Embed and Tokenize is answered by exactly one closing message: Done,
Failed, Embedded or Tokenized.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL_VERSION = 2

KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
LoadMode = Literal["mmap", "locked"]
FinishReason = Literal["stop", "length", "cancelled"]


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=False, omit_defaults=True):
    """Base of all messages: immutable, tagged by the class's name."""


# --- parts ------------------------------------------------------------------------------------


class Text(_Message, frozen=True):
    """A piece of a prompt; control tokens are recognised in it only where `parse_special`."""

    text: str
    parse_special: bool = False


class Tokens(_Message, frozen=True):
    """A piece of a prompt that is tokenized already."""

    ids: list[int]


class Fim(_Message, frozen=True):
    """One of the model's own fill-in-the-middle tokens."""

    role: Literal["prefix", "suffix", "middle", "repo", "separator"]


class Between(_Message, frozen=True):
    """What the model wants between two texts that it compares: BERT's [SEP], say."""


PromptPart = Text | Tokens | Fim | Between


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen; names and defaults are Ollama's."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    # llama.cpp's own further ones, off by default. Logits less than so many standard deviations
    # below the highest; with so much chance only the least likely of those over the threshold.
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    # The temperature may be so much higher and lower, by how sure the model is.
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    # Choose for filling in the middle: end rather than ramble, and tokens with a common beginning.
    infill: bool = False
    # No token that ends the text is ever chosen.
    ignore_eos: bool = False
    # None: drawn afresh for each request.
    seed: int | None = None
    # Token id to the amount that is added to its logit; -inf bans it.
    logit_bias: dict[int, float] = {}
    # A GBNF grammar with the start rule `root`; None: free text.
    grammar: str | None = None
    # How many alternatives are reported for each token; None: no logprobs at all.
    n_logprobs: int | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token and the natural logarithm of its probability before any sampler but the logits."""

    id: int
    text: str
    logprob: float
    # The bytes of the token, since a token may hold a part of a character.
    data: bytes = b""
    top: list[TokenLogprob] = []


class BufferUse(msgspec.Struct, frozen=True):
    """What llama.cpp holds on one device ("CUDA0", or "CPU" for host memory), in bytes."""

    device: str
    model_bytes: int
    context_bytes: int
    compute_bytes: int


# --- to the worker ----------------------------------------------------------------------------


class Load(_Message, frozen=True):
    """Load a model; the first message to a worker, sent once."""

    path: str
    # Tokens that all slots share, or that each has.
    n_ctx: int
    # All files of a split model in order; empty: `path` alone, or its name tells the others.
    shards: list[str] = []
    n_slots: int = 1
    # The slots share the cells of the KV cache; False: each has its own.
    kv_unified: bool = True
    n_batch: int = 2048
    n_ubatch: int = 512
    # Layers on the GPU, the output layer counted as one; 0: none.
    n_gpu_layers: int = 0
    # Experts of the first N layers stay in host memory.
    n_cpu_moe: int = 0
    load_mode: LoadMode = "mmap"
    kv_type: KvType = "f16"
    flash_attn: Literal["auto", "on", "off"] = "auto"
    n_threads: int = 1
    # Backend devices to use, by name; empty: the CPU alone.
    devices: list[str] = []
    # Share of the layers per device in `devices`; empty: by free memory.
    tensor_split: list[float] = []
    # The context computes embeddings, not next tokens.
    embedding: bool = False
    # Read the whole file and refuse NaN weights.
    check_tensors: bool = False
    # Where the state of its slots outlives the worker; "": nowhere.
    prefix_dir: str = ""
    # Bytes that all models' states together may take there.
    prefix_cache_bytes: int = 0
    # Bytes of RAM that the states of idle slots may take beside the KV cache.
    parked_cache_bytes: int = 0
    # What tells the model from every other.
    digest: str = ""


class Submit(_Message, frozen=True):
    """Generate text for a prompt."""

    request: int
    prompt: list[PromptPart]
    sampling: Sampling = Sampling()
    stop: list[str] = []
    # At most this many new tokens; -1: until the model ends or the context is full.
    n_predict: int = -1
    # Put the model's own start token first, where the model wants one.
    add_bos: bool = True
    # Tokens kept at the front when a prompt must be cut; see `truncate`.
    n_keep: int = 4
    # A prompt over the context is an error; True: its middle is cut instead.
    truncate: bool = False
    # Generation goes on past a full context by dropping the oldest half after n_keep.
    shift: bool = False
    # Done carries the ids of the prompt and of the generated tokens.
    return_tokens: bool = False
    # Do not look for a shared prefix in other slots.
    no_cache: bool = False
    # Control tokens (such as <tool_call>) appear in the text instead of vanishing.
    show_special: bool = False


class Embed(_Message, frozen=True):
    """Compute one embedding for each input, in order."""

    request: int
    inputs: list[list[PromptPart]]
    # An input over the context is cut; False: it is an error.
    truncate: bool = True
    normalize: bool = True
    # Put the model's own start and end tokens round each input.
    add_special: bool = True
    # The number of the first input, for errors that name one: they may come in several messages.
    first: int = 0


class Tokenize(_Message, frozen=True):
    """Tokenize a text, a whole prompt, or turn ids back into text when `ids` is given."""

    request: int
    text: str = ""
    ids: list[int] | None = None
    add_special: bool = False
    parse_special: bool = True
    # Tokenized just as a Submit's; `add_special` is then its add_bos.
    prompt: list[PromptPart] | None = None
    wants_pieces: bool = False


class Cancel(_Message, frozen=True):
    """End a request at the next step; answered by its Done("cancelled")."""

    request: int


class SetThreads(_Message, frozen=True):
    """Use this many threads from the next step on."""

    n_threads: int


class LimitParked(_Message, frozen=True):
    """Park no more than this from the next step on; what is over it goes, and Stats tells at once.

    Nothing happens where nothing was to be parked at the load.
    """

    n_bytes: int


class Shutdown(_Message, frozen=True):
    """Free everything and exit 0; running requests end as cancelled."""

    # Seconds that saving prefixes may take.
    save_s: float = 2.0


ToWorker = Load | Submit | Embed | Tokenize | Cancel | SetThreads | LimitParked | Shutdown


# --- to the daemon ----------------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """The worker is up and waits for Load."""

    version: int


class Loading(_Message, frozen=True):
    """How much of the weights is in place, 0 to 1."""

    fraction: float


class Ready(_Message, frozen=True):
    """The model is loaded; what it really took and what it can do."""

    memory: list[BufferUse]
    n_ctx: int
    n_ctx_train: int
    n_slots: int
    n_vocab: int
    n_embd: int
    load_s: float
    has_fim: bool = False
    has_encoder: bool = False
    add_bos: bool = False
    bos_text: str = ""
    eos_text: str = ""
    # llama.cpp's own words on each tensor whose buffer was overridden, for `ps` and the log.
    n_overridden: int = 0
    # Of the buffers, RAM that is taken only as it is used.
    untouched_bytes: int = 0
    # The weights in RAM lie in the mapped file, page-locked or not.
    is_mapped: bool = True


class LoadFailed(_Message, frozen=True):
    """The model could not be loaded; `message` holds llama.cpp's last error lines."""

    message: str
    out_of_memory: bool = False


class Delta(_Message, frozen=True):
    """New text of a request: whole characters, no part of a stop string."""

    request: int
    text: str
    n_tokens: int
    logprobs: list[TokenLogprob] = []


class Prefilled(_Message, frozen=True):
    """A prompt is in the KV cache; the first token follows."""

    request: int
    n_prompt: int
    n_cached: int


class Done(_Message, frozen=True):
    """A request has ended; all its text was in Deltas before."""

    request: int
    reason: FinishReason
    n_prompt: int
    # Of the prompt's tokens, those that were found in the KV cache.
    n_cached: int
    n_generated: int
    prefill_s: float
    decode_s: float
    queue_s: float = 0.0
    stop_string: str | None = None
    tokens: list[int] = []


class Failed(_Message, frozen=True):
    """A request could not be served; `code` is a ShimpyError's code."""

    request: int
    code: str
    message: str
    # The facts of a context_exceeded error.
    n_prompt: int = 0
    n_ctx: int = 0


StepEvent = Delta | Prefilled | Done | Failed


class Stats(_Message, frozen=True):
    """The state of the slots; told when it changes: once a second at most, or after LimitParked."""

    n_busy: int
    n_waiting: int
    n_kv_used: int
    # RAM that states of idle slots take beside the KV cache.
    parked_bytes: int = 0
    # As Ready's, by now; about.
    untouched_bytes: int = 0


class Events(_Message, frozen=True):
    """All that one step of the engine has to say, or a few quick ones: not a frame a token."""

    events: list[StepEvent]
    stats: Stats | None = None


class Embedded(_Message, frozen=True):
    """The vectors of an Embed, little-endian float32, one after the other."""

    request: int
    n_embd: int
    data: bytes
    n_tokens: int


class Tokenized(_Message, frozen=True):
    """The answer to Tokenize: both forms, but a prompt's text."""

    request: int
    ids: list[int]
    text: str
    # Each token's bytes, where they were wanted.
    pieces: list[bytes] = []


class PrefixNews(_Message, frozen=True):
    """What became of a saved prefix: the state of a slot in a file.

    saved, as the worker ends; restored; skipped: not saved for want of room; discarded: a file
    that was no good, removed.
    """

    kind: Literal["saved", "restored", "skipped", "discarded"]
    n_tokens: int
    n_bytes: int
    took_s: float = 0.0
    reason: str = ""


ToDaemon = (
    Hello | Loading | Ready | LoadFailed | Events | Embedded | Tokenized | Failed | PrefixNews
)


# --- outside a channel ------------------------------------------------------------------------


class DeviceInfo(msgspec.Struct, frozen=True):
    """A device that this build of llama.cpp can use; bytes."""

    name: str
    description: str
    kind: Literal["cpu", "gpu", "igpu", "accel"]
    backend: str
    free_bytes: int
    total_bytes: int
    # PCI bus id where the backend tells it, for matching with NVML.
    device_id: str = ""


class BuildInfo(msgspec.Struct, frozen=True):
    """What `python -m shimpy.engine --devices` prints as JSON on stdout."""

    llama_cpp: str
    devices: list[DeviceInfo]
    supports_gpu_offload: bool
    system_info: str = ""


class Simulated(msgspec.Struct, frozen=True):
    """What a load would take: one line of `python -m shimpy.engine --simulate`, as JSON.

    That reads a list of Load as JSON from stdin; lines come in any order, as they are ready.
    """

    # The number of the Load in the list, from 0.
    index: int
    memory: list[BufferUse] = []
    # Why there are no figures; empty: there are.
    error: str = ""
