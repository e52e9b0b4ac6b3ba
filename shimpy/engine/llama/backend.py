"""LlamaBackend: a loaded model as the engine's loop sees it."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from shimpy.engine.backend import Chunk, FimRole, Sampler
from shimpy.engine.llama.context import Context
from shimpy.engine.llama.devices import HOST
from shimpy.engine.llama.embed import Embedder, normalized
from shimpy.engine.llama.grammar import GrammarMaker
from shimpy.engine.llama.library import version
from shimpy.engine.llama.loader import Model, OnProgress, load_model
from shimpy.engine.llama.log import LOG
from shimpy.engine.llama.sampler import LlamaSampler
from shimpy.engine.llama.vocab import Vocab
from shimpy.errors import LoadError, UnsupportedError, WorkerError
from shimpy.protocol.messages import BufferUse, Load, Sampling


class LlamaBackend:
    """See shimpy.engine.backend.Backend, which it implements.

    A model that was loaded for embeddings embeds and nothing else: `n_ctx` is then the length
    of the longest text, start and end tokens counted, and `n_embd` the number of scores of a
    ranking model.
    """

    def __init__(self, model: Model, vocab: Vocab, work: Context | Embedder, load: Load) -> None:
        self._model = model
        self._vocab = vocab
        self._work = work
        self._grammars = GrammarMaker(vocab)
        self.n_ctx = work.n_ctx
        self.kv_unified = load.kv_unified
        self.n_ctx_train = model.n_ctx_train
        self.n_slots = load.n_slots
        self.n_batch = work.n_batch
        self.n_vocab = vocab.n_tokens
        self.n_embd = work.n_embd if isinstance(work, Embedder) else model.n_embd_out
        self.add_bos = vocab.add_bos
        self.bos_id = vocab.bos_id
        self.eos_id = vocab.eos_id
        self.end_ids = vocab.end_ids
        self.between_ids = vocab.between_ids
        self.has_fim = vocab.has_fim
        self.has_encoder = model.has_encoder
        self.can_shift = isinstance(work, Context) and work.can_shift
        self.can_split = isinstance(work, Context) and work.can_split
        self.state_is_whole = not self.can_split or model.n_swa > 0
        self.state_key = _state_key(model, load, self.n_ctx)
        self.n_overridden = LOG.n_overridden
        self.is_mapped = model.is_mapped
        self.untouched_bytes = work.untouched_bytes if isinstance(work, Context) else 0

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Return the text's tokens, without start or end tokens; from any thread."""
        return self._vocab.tokenize(text, parse_special=parse_special)

    def piece(self, token: int, *, special: bool) -> bytes:
        """Return the token's bytes; those of a control token are empty unless `special`."""
        return self._vocab.piece(token, special=special)

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation; from any thread."""
        return self._vocab.is_eog(token)

    def fim_token(self, role: FimRole) -> int:
        """Return the model's fill-in-the-middle token for a role; -1: it has none."""
        return self._vocab.fim_token(role)

    def decode(self, chunks: Sequence[Chunk]) -> int:
        """Run the model over a batch of at most `n_batch` tokens; return a DecodeStatus.

        Raises:
            WorkerError: llama.cpp refused the batch, or would abort on it.
        """
        return self._context.decode(chunks)

    def decode_next(self, tokens: Sequence[int]) -> int:
        """Run the last decode's batch again, each slot's next token in place of its only one.

        Raises:
            WorkerError: that had more, or not as many; or llama.cpp refused this batch.
        """
        return self._context.decode_next(tokens)

    def make_sampler(self, sampling: Sampling, history: Sequence[int]) -> Sampler:
        """Return a sampler; `history` is the prompt, for the penalties.

        Raises:
            InvalidOptionError: an option or the grammar can't be used.
        """
        return LlamaSampler(self._context, self._vocab, self._grammars, sampling, history)

    def kv_remove(self, slot: int, start: int, end: int) -> bool:
        """Drop the positions [start, end) of a slot; end -1: to its end. False: it can't."""
        return self._context.remove(slot, start, end)

    def kv_copy(self, source: int, target: int, n: int) -> bool:
        """Let `target`, which is empty, have the first `n` positions of `source` too."""
        return self._context.copy(source, target, n)

    def kv_exchange(self, first: int, second: int) -> bool:
        """Let two slots with cells of their own exchange all that they hold."""
        return self._context.exchange(first, second)

    def kv_shift(self, slot: int, start: int, end: int, delta: int) -> None:
        """Move the positions [start, end) of a slot by `delta`.

        Raises:
            UnsupportedError: not with this model; see `can_shift`.
        """
        self._context.shift(slot, start, end, delta)

    def state_bytes(self, slot: int) -> int:
        """Return how many bytes `save_state` writes for a slot at most."""
        return self._context.state_bytes(slot)

    def save_state(self, slot: int, path: str) -> int:
        """Write what the KV cache holds for a slot to a file; return its bytes, 0: it failed."""
        return self._context.save_state(slot, path)

    def load_state(self, slot: int, path: str, n_tokens: int) -> bool:
        """Read into an empty slot what `save_state` wrote for one of `n_tokens` tokens."""
        return self._context.load_state(slot, path, n_tokens)

    def embed(self, inputs: Sequence[Sequence[int]], *, normalize: bool) -> bytes:
        """Return one little-endian float32 vector of `n_embd` for each input, in order.

        Raises:
            UnsupportedError: the model was not loaded for embeddings.
            ContextExceededError: an input is empty or longer than `n_ctx`.
            WorkerError: llama.cpp refused the batch.
        """
        if not isinstance(self._work, Embedder):
            raise UnsupportedError("this model is loaded to generate text, not for embeddings")
        return self._work.embed(inputs, normalize=normalize).astype("<f4").tobytes()

    def embed_last(self, chunks: Sequence[Chunk], *, normalize: bool) -> bytes:
        """Decode one token of each of some slots; return the model's state after each.

        One little-endian float32 vector of `n_embd` for each chunk, in their order.

        Raises:
            UnsupportedError: the model was loaded for embeddings.
            WorkerError: llama.cpp refused the batch.
        """
        states = self._context.states(chunks)
        return (normalized(states) if normalize else states).astype("<f4").tobytes()

    def set_threads(self, n_threads: int) -> None:
        """Use this many threads from the next decode on.

        Raises:
            WorkerError: fewer than one.
        """
        if n_threads < 1:
            raise WorkerError(f"{n_threads} threads; it has to be 1 or more")
        self._work.set_threads(n_threads)

    def memory(self) -> list[BufferUse]:
        """Return what llama.cpp really holds, per device."""
        uses = self._work.memory()
        if n_bytes := self._model.mapped_bytes:
            return [
                replace(use, model_bytes=n_bytes) if use.device == HOST else use for use in uses
            ]
        return uses

    def close(self) -> None:
        """Free the model; its samplers are to be closed before."""
        self._work.close()
        self._model.close()

    @property
    def _context(self) -> Context:
        if not isinstance(self._work, Context):
            raise UnsupportedError("this model is loaded for embeddings: it generates no text")
        return self._work


def open_backend(load: Load, *, on_progress: OnProgress) -> LlamaBackend:
    """Load a model as placed and make its context.

    `on_progress` takes the part of the weights in place, 0 to 1; its False stops the load.

    Raises:
        LoadError: it can't be loaded; carries llama.cpp's last error lines.
    """
    model = load_model(load, on_progress=on_progress)
    try:
        return _with_context(model, load)
    except BaseException:
        model.close()
        raise


def _state_key(model: Model, load: Load, n_ctx: int) -> str:
    """Return what keys and values depend on beside the model's files.

    That is llama.cpp, their type, and, with flash attention, how values lie; not the context's
    length, but for models that turn positions otherwise in a context over their original one
    (LongRoPE: llama_model::get_rope_factors). Slots with cells of their own are counted in it:
    llama.cpp writes their number before a slot's state. Where layers are computed is not in it:
    sums differ in their last bits there, as they do between batches of different sizes.
    """
    is_long = 0 < model.n_ctx_original < n_ctx
    n_own = 0 if load.kv_unified else load.n_slots
    return f"{version()} kv={load.kv_type} fa={load.flash_attn} long={is_long} own={n_own}"


def _with_context(model: Model, load: Load) -> LlamaBackend:
    vocab = Vocab(model.vocab_handle)
    if not vocab.exists:
        raise LoadError(f"{load.path} holds no tokenizer: its text can't be read or written")
    work = Embedder(model, load) if load.embedding else Context(model, load)
    return LlamaBackend(model, vocab, work, load)
