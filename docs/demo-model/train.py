"""Trains the model on the corpus: mixed precision on a GPU, float32 on a CPU.

Every pass over the data is drawn anew (samples.py) by processes beside the training loop. The
learning rate warms up, then follows a cosine to zero over the steps, or over the time limit
where that ends sooner, so that a run always ends annealed.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from corpus import Document, Snippet, load_documents, load_snippets
from model import DeepSeekMoE, ModelConfig
from samples import encode_stream, prompt_samples, sample_texts
from tokenizers import Tokenizer
from torch import Tensor, nn
from vocabulary import END_OF_TEXT, load_tokenizer

# Target of a prediction that does not count; token that fills up the end of a row.
_IGNORED = -100
_PADDING = 0xFFFF
_MIXED = torch.bfloat16
# Processes that draw samples while the model trains.
_N_DRAWERS = 3

# The tokens of a prompt and of its answer.
_Row = tuple[list[int], list[int]]
# Rows of tokens, padded, and which of them are answers.
_Batch = tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]
_Drawn = TypeVar("_Drawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class _LoopConfig:
    """What both stages of training need to know."""

    peak_lr: float
    n_warmup_steps: int
    weight_decay: float
    dropout: float
    balance_weight: float = 0.01
    max_grad_norm: float = 1.0
    # Seconds after which the stage has ended, annealed, whatever its steps.
    limit_s: float = math.inf
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(_LoopConfig):
    """How the model is trained."""

    n_passes: int = 14
    # Windows of n_ctx tokens in one step.
    batch_rows: int = 32
    peak_lr: float = 3e-3
    n_warmup_steps: int = 200
    weight_decay: float = 0.1
    dropout: float = 0.2
    # Pays for itself on a GPU after a minute.
    compile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig(_LoopConfig):
    """How the trained model is tuned on prompts and answers."""

    n_steps: int = 1500
    # Tokens in one step, padding included: pairs of about the same length.
    batch_tokens: int = 32768
    peak_lr: float = 1e-3
    n_warmup_steps: int = 50
    weight_decay: float = 0.1
    dropout: float = 0.1


def train(work: Path, model_config: ModelConfig, config: TrainConfig) -> DeepSeekMoE:
    """Returns a trained model; work holds documents.jsonl, snippets.jsonl, tokenizer.json."""
    torch.manual_seed(config.seed)
    model = DeepSeekMoE(model_config, dropout=config.dropout)
    loss = torch.compile(_loss) if config.compile else _loss
    with _drawers(work) as pool:
        n_steps, batches = _windows(pool, model_config.n_ctx, config)
        _fit(work, model, batches, config, n_steps=n_steps, loss_of=loss)
    return model


def tune(work: Path, model: DeepSeekMoE, config: TuneConfig) -> DeepSeekMoE:
    """Trains a model further on prompts with answers (samples.prompt_samples); returns it.

    Only the answers are scored.
    """
    torch.manual_seed(config.seed)
    model.set_dropout(config.dropout)
    with _drawers(work) as pool:
        draw = partial(_draw_pairs, model.config.n_ctx, config.batch_tokens)
        batches = chain.from_iterable(_drawn_ahead(pool, draw, count(config.seed)))
        _fit(work, model, batches, config, n_steps=config.n_steps, loss_of=_loss)
    return model


def _fit(
    work: Path,
    model: DeepSeekMoE,
    batches: Iterator[_Batch],
    config: _LoopConfig,
    *,
    n_steps: int,
    loss_of: Callable[[DeepSeekMoE, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Takes n_steps steps, or those that the time limit allows; leaves the model on its device."""
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params / 1e6:.2f} M parameters on {device}; {config}", flush=True)
    optimizer = _optimizer(model, config)
    validation = ValidationWindows(work, model.config.n_ctx)
    started = time.monotonic()
    for step, (rows, is_scored) in enumerate(islice(batches, n_steps)):
        elapsed_s = time.monotonic() - started
        progress = max(step / n_steps, elapsed_s / config.limit_s)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.peak_lr * _schedule(step, progress, config.n_warmup_steps)
        tokens = torch.from_numpy(rows).to(device, torch.long)
        loss, balance = loss_of(model, tokens, torch.from_numpy(is_scored).to(device))
        (loss + config.balance_weight * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            facts = f"loss {loss.item():.3f} balance {balance.item():.3f} {elapsed_s:.0f} s"
            print(f"step {step}/{n_steps} {facts}", flush=True)
        if step % 500 == 499:
            print(f"validation {validation.bits_per_byte(model):.4f} bits per byte", flush=True)
    print(f"validation {validation.bits_per_byte(model):.4f} bits per byte at the end", flush=True)


def save_checkpoint(path: Path, model: DeepSeekMoE) -> None:
    """Writes the sizes and the float32 weights."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    torch.save({"config": asdict(model.config), "weights": weights}, path)


def load_checkpoint(path: Path) -> DeepSeekMoE:
    """Reads what save_checkpoint wrote; the model is on the CPU and in evaluation mode."""
    checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    model = DeepSeekMoE(ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["weights"])
    return model.eval()


class ValidationWindows:
    """The validation modules, cut into windows that do not overlap."""

    def __init__(self, work: Path, n_ctx: int) -> None:
        tokenizer = load_tokenizer(work / "tokenizer.json")
        texts = [d.text for d in load_documents(work / "documents.jsonl") if d.split == "valid"]
        self.n_bytes = sum(len(text.encode()) for text in texts)
        self.rows = _rows(encode_stream(tokenizer, texts), n_ctx, first=_end_id(work))

    @torch.no_grad()
    def bits_per_byte(self, model: DeepSeekMoE) -> float:
        """Returns the model's bits per byte of UTF-8; an end-of-text token costs too."""
        model.eval()
        device = next(model.parameters()).device
        nats = 0.0
        for rows in np.array_split(self.rows, math.ceil(len(self.rows) / 8)):
            is_scored = _scored(rows)
            tokens = torch.from_numpy(rows).to(device, torch.long)
            loss, _ = _loss(model, tokens, torch.from_numpy(is_scored).to(device))
            nats += loss.item() * int(is_scored.sum())
        model.train()
        return nats / math.log(2) / self.n_bytes


def _loss(model: DeepSeekMoE, tokens: Tensor, is_scored: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean cross-entropy of the scored tokens, and the balance loss.

    tokens, is_scored: (batch, time); what pads the ends of rows is never scored.
    """
    targets = tokens[:, 1:].masked_fill(~is_scored[:, 1:], _IGNORED)
    inputs = tokens[:, :-1].masked_fill(tokens[:, :-1] == _PADDING, 0)
    with torch.autocast(tokens.device.type, _MIXED, enabled=tokens.is_cuda):
        logits, balance = model(inputs)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)
    return loss, balance


def _optimizer(model: nn.Module, config: _LoopConfig) -> torch.optim.Optimizer:
    """AdamW; norms do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    is_cuda = matrices[0].is_cuda
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.95), fused=is_cuda)


def _schedule(step: int, progress: float, n_warmup_steps: int) -> float:
    return min(1.0, (step + 1) / n_warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))


def _windows(
    pool: ProcessPoolExecutor, n_ctx: int, config: TrainConfig
) -> tuple[int, Iterator[_Batch]]:
    """Returns the number of steps and their batches of windows, each pass in random order."""
    seeds = range(config.seed * 1000, config.seed * 1000 + config.n_passes)
    passes = _drawn_ahead(pool, partial(_draw_pass, n_ctx), seeds)
    first = next(passes)
    n_steps = len(first) // config.batch_rows * config.n_passes
    rng = np.random.default_rng(config.seed)

    def batches() -> Iterator[_Batch]:
        for rows in chain([first], passes):
            n_batches = len(rows) // config.batch_rows
            shuffled = rng.permutation(rows)[: n_batches * config.batch_rows]
            for batch in np.split(shuffled, n_batches):
                yield batch, _scored(batch)

    return n_steps, batches()


def _drawn_ahead(
    pool: ProcessPoolExecutor, draw: Callable[[int], _Drawn], seeds: Iterable[int]
) -> Iterator[_Drawn]:
    """Yields draw(seed) for each seed, while the pool draws the next ones."""
    left = iter(seeds)
    pending = deque(pool.submit(draw, seed) for seed in islice(left, _N_DRAWERS))
    while pending:
        drawn = pending.popleft().result()
        pending.extend(pool.submit(draw, seed) for seed in islice(left, 1))
        yield drawn


def _draw_pairs(n_ctx: int, batch_tokens: int, seed: int) -> list[_Batch]:
    """Returns batches of prompts with answers, in random order."""
    assert _corpus is not None
    documents, snippets, tokenizer, end = _corpus
    # Enough of them that pairs of about the same length are found for every batch.
    pairs = islice(prompt_samples(documents, snippets, seed), 8192)
    prompts, answers = zip(*pairs, strict=True)
    encoded = zip(
        tokenizer.encode_batch_fast(prompts), tokenizer.encode_batch_fast(answers), strict=True
    )
    rows = [([end, *p.ids], a.ids) for p, a in encoded]
    rows = sorted((row for row in rows if _n_tokens(row) <= n_ctx), key=_n_tokens)
    batches = [_padded(batch) for batch in _by_length(rows, batch_tokens)]
    return [batches[i] for i in np.random.default_rng(seed).permutation(len(batches))]


def _n_tokens(row: _Row) -> int:
    return len(row[0]) + len(row[1])


def _by_length(rows: list[_Row], batch_tokens: int) -> list[list[_Row]]:
    """Cuts rows, sorted by length, into batches of at most batch_tokens with their padding."""
    batches: list[list[_Row]] = [[]]
    for row in rows:
        if (len(batches[-1]) + 1) * _n_tokens(row) > batch_tokens and batches[-1]:
            batches.append([])
        batches[-1].append(row)
    return batches


def _padded(batch: list[_Row]) -> _Batch:
    width = max(map(_n_tokens, batch))
    tokens = np.full((len(batch), width), _PADDING, np.uint16)
    is_answer = np.zeros((len(batch), width), np.bool_)
    for i, (prompt, answer) in enumerate(batch):
        n = len(prompt) + len(answer)
        tokens[i, :n] = prompt + answer
        is_answer[i, len(prompt) : n] = True
    return tokens, is_answer


def _drawers(work: Path) -> ProcessPoolExecutor:
    """Returns processes that hold the corpus; spawned, since this one may hold a GPU."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(_N_DRAWERS, context, initializer=_load_corpus, initargs=(work,))


_corpus: tuple[list[Document], list[Snippet], Tokenizer, int] | None = None


def _load_corpus(work: Path) -> None:
    """Runs once in each process that draws passes."""
    global _corpus  # noqa: PLW0603 - a pool's initializer has no other place to leave it
    documents = [d for d in load_documents(work / "documents.jsonl") if d.split == "train"]
    snippets = [s for s in load_snippets(work / "snippets.jsonl") if s.split == "train"]
    _corpus = (documents, snippets, load_tokenizer(work / "tokenizer.json"), _end_id(work))


def _draw_pass(n_ctx: int, seed: int) -> npt.NDArray[np.uint16]:
    assert _corpus is not None
    documents, snippets, tokenizer, end = _corpus
    stream = encode_stream(tokenizer, sample_texts(documents, snippets, seed))
    return _rows(stream, n_ctx, first=end)


def _scored(rows: npt.NDArray[np.uint16]) -> npt.NDArray[np.bool_]:
    """Marks what _rows cut out of a stream, but the first token: its row does not foretell it."""
    is_scored = rows != _PADDING
    is_scored[:, :2] = False
    return is_scored


def _rows(stream: npt.NDArray[np.uint16], n_ctx: int, *, first: int) -> npt.NDArray[np.uint16]:
    """Cuts a stream into rows (n, n_ctx + 1), each led by the token `first`, the last padded.

    Neighbours share one token, which the next row reads but does not predict.
    """
    step = n_ctx - 1
    n_rows = math.ceil((len(stream) - 1) / step)
    padded = np.full(n_rows * step + 1, _PADDING, np.uint16)
    padded[: len(stream)] = stream
    body = np.lib.stride_tricks.sliding_window_view(padded, n_ctx)[::step]
    return np.concatenate([np.full((n_rows, 1), first, np.uint16), body], axis=1)


def _end_id(work: Path) -> int:
    return load_tokenizer(work / "tokenizer.json").token_to_id(END_OF_TEXT)
