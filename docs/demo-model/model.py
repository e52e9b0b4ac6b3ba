"""DeepSeek-MoE in PyTorch, operation for operation what llama.cpp's `deepseek` graph computes.

Sources: llama.cpp src/models/deepseek.cpp and llm_graph_context::build_moe_ffn. The router's
softmax runs over all routed experts, the chosen weights are not normalised again, RoPE turns
neighbouring pairs (LLAMA_ROPE_TYPE_NORM), and the head shares the embedding's matrix.

Every expert is computed for every token and the unchosen ones are multiplied by zero: at this
size three large matrix products are faster than gathering.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of the model; row lengths are multiples of 32, the block of Q8_0."""

    n_vocab: int = 4096
    n_ctx: int = 2048
    n_embd: int = 256
    n_layer: int = 8
    n_head: int = 4
    n_head_kv: int = 2
    # Width of the dense layer's feed-forward network.
    n_ff: int = 768
    n_layer_dense: int = 1
    n_expert: int = 20
    n_expert_used: int = 6
    n_expert_shared: int = 2
    # Width of one expert.
    n_ff_exp: int = 64
    rope_base: float = 10000.0
    rms_eps: float = 1e-6

    @property
    def n_embd_head(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head


class Attention(nn.Module):
    """Causal attention with grouped keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        kv_width = config.n_head_kv * config.n_embd_head
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k = nn.Linear(config.n_embd, kv_width, bias=False)
        self.v = nn.Linear(config.n_embd, kv_width, bias=False)
        self.output = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x: (batch, time, n_embd); rope: (time, n_embd_head / 2, 2), cosines and sines."""
        n_batch, n_time, _ = x.shape
        heads = (n_batch, n_time, -1, self.config.n_embd_head)
        q = rotate(self.q(x).view(heads), rope).transpose(1, 2)
        k = rotate(self.k(x).view(heads), rope).transpose(1, 2)
        v = self.v(x).view(heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.output(y.transpose(1, 2).reshape(n_batch, n_time, -1))


class FeedForward(nn.Module):
    """The gated network of the dense layer and of the shared experts."""

    def __init__(self, n_embd: int, n_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(n_embd, n_ff, bias=False)
        self.up = nn.Linear(n_embd, n_ff, bias=False)
        self.down = nn.Linear(n_ff, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns down(silu(gate x) * up x)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MixtureOfExperts(nn.Module):
    """Routed experts, of which n_expert_used run per token, beside the shared ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.n_expert, config.n_ff_exp, config.n_embd)
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.gate = nn.Parameter(torch.empty(shape))
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(config.n_expert, config.n_embd, config.n_ff_exp))
        self.shared = FeedForward(config.n_embd, config.n_ff_exp * config.n_expert_shared)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output and the load-balancing loss (1 when the experts share equally)."""
        n_expert, n_used = self.config.n_expert, self.config.n_expert_used
        # The router decides in float32, as the exported one does.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router.weight.float())
            probs = logits.softmax(dim=-1)
        chosen = probs.topk(n_used, dim=-1).indices
        mask = torch.zeros_like(probs).scatter(-1, chosen, 1.0)

        hidden = F.silu(F.linear(x, self.gate.flatten(0, 1))) * F.linear(x, self.up.flatten(0, 1))
        weights = (probs * mask).to(hidden.dtype)
        hidden = hidden.unflatten(-1, (n_expert, -1)) * weights.unsqueeze(-1)
        down = self.down.transpose(0, 1).flatten(1)
        routed = F.linear(hidden.flatten(-2), down)

        # Switch Transformer, eq. 4: share of tokens times mean probability, per expert.
        shares = mask.flatten(0, -2).mean(dim=0) / n_used
        balance = n_expert * (shares * probs.flatten(0, -2).mean(dim=0)).sum()
        return routed + self.shared(x), balance


class Block(nn.Module):
    """One layer: attention, then a dense network or a mixture of experts."""

    def __init__(self, config: ModelConfig, index: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.rms_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.n_embd, eps=config.rms_eps)
        self.is_dense = index < config.n_layer_dense
        self.ffn: FeedForward | MixtureOfExperts = (
            FeedForward(config.n_embd, config.n_ff) if self.is_dense else MixtureOfExperts(config)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the residual stream after this layer, and its load-balancing loss."""
        x = x + self.dropout(self.attn(self.attn_norm(x), rope))
        y = self.ffn_norm(x)
        if isinstance(self.ffn, MixtureOfExperts):
            out, balance = self.ffn(y)
        else:
            out, balance = self.ffn(y), x.new_ones((), dtype=torch.float32)
        return x + self.dropout(out), balance


class DeepSeekMoE(nn.Module):
    """The whole model; the head is the embedding's matrix."""

    def __init__(self, config: ModelConfig, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_vocab, config.n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(config, i, dropout) for i in range(config.n_layer))
        self.output_norm = nn.RMSNorm(config.n_embd, eps=config.rms_eps)
        self.register_buffer("rope", rope_table(config), persistent=False)
        self._initialise()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (batch, time, n_vocab) and the mean load-balancing loss."""
        x = self.dropout(self.embedding(tokens))
        rope = self.rope[: tokens.shape[1]]
        balances = []
        for block in self.blocks:
            x, balance = block(x, rope)
            balances.append(balance)
        logits = F.linear(self.output_norm(x), self.embedding.weight)
        return logits, torch.stack(balances).mean()

    def set_dropout(self, share: float) -> None:
        """Sets the share of activations that training drops."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share

    def _initialise(self) -> None:
        """Normal weights, those that write to the residual stream scaled down by depth."""
        std = 0.02
        residual_std = std / (2 * self.config.n_layer) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                is_residual = name.endswith(("attn.output.weight", "down.weight", "down"))
                nn.init.normal_(parameter, std=residual_std if is_residual else std)


def rope_table(config: ModelConfig) -> Tensor:
    """Returns (n_ctx, n_embd_head / 2, 2): cosine and sine of each position and frequency."""
    half = torch.arange(0, config.n_embd_head, 2, dtype=torch.float64) / config.n_embd_head
    angles = torch.outer(torch.arange(config.n_ctx, dtype=torch.float64), config.rope_base**-half)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns neighbouring pairs of x (batch, time, head, width) by the angles of rope."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
