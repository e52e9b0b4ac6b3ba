"""Supposed machines and models for the placement's tests."""

from __future__ import annotations

from hypothesis import strategies as st

from shimpy.gguf.arch import LayerShape, ModelShape
from shimpy.placement.hardware import Gpu, Hardware, Host
from shimpy.units import GIB, MIB

OVERHEAD_BYTES = 740 * MIB


def machine(
    *vram: float,
    ram: float = 64,
    lockable_bytes: int | None = None,
    is_shared: bool = False,
    backend: str = "CUDA",
) -> Hardware:
    """A machine with cards of so many GiB and so much RAM, all of it free."""
    gpus = tuple(
        Gpu(
            name=f"CUDA{i}",
            description="a card",
            backend=backend,
            free_bytes=int(size * GIB),
            total_bytes=int(size * GIB),
            overhead_bytes=0 if is_shared else OVERHEAD_BYTES,
            is_shared=is_shared,
        )
        for i, size in enumerate(vram)
    )
    host = Host(
        total_bytes=int(ram * GIB),
        available_bytes=int(ram * GIB),
        lockable_bytes=lockable_bytes,
        n_cores=8,
    )
    return Hardware(gpus=gpus, unusable=(), host=host)


def model(
    *,
    n_layer: int = 28,
    dense_mib: int = 24,
    expert_mib: int = 350,
    n_dense_lead: int = 1,
    n_expert: int = 64,
    n_ctx_train: int = 4096,
    state_bytes: int = 0,
    step: int = 1,
) -> ModelShape:
    """A model of equal layers; those before `n_dense_lead`, and between steps, have no experts."""
    layers = tuple(
        _layer(
            i,
            dense_bytes=dense_mib * MIB,
            expert_bytes=expert_mib * MIB
            if n_expert and _has_experts(i, n_dense_lead, step)
            else 0,
            state_bytes=state_bytes,
        )
        for i in range(n_layer)
    )
    shape_bytes = sum(layer.dense_bytes + layer.expert_bytes for layer in layers)
    return ModelShape(
        arch="deepseek" if n_expert else "llama",
        title="a model",
        quantization="Q4_K_M",
        n_params=10**9,
        file_bytes=shape_bytes + 300 * MIB,
        n_layer=n_layer,
        n_ctx_train=n_ctx_train,
        n_embd=2048,
        n_vocab=102400,
        n_head=16,
        n_ff=10944,
        n_embd_head=128,
        n_expert=n_expert,
        n_expert_used=6 if n_expert else 0,
        n_expert_ff=1408 if n_expert else 0,
        layers=layers,
        input_bytes=120 * MIB,
        output_bytes=180 * MIB,
    )


def _has_experts(index: int, n_dense_lead: int, step: int) -> bool:
    return index >= n_dense_lead and (index - n_dense_lead) % step == 0


def _layer(index: int, *, dense_bytes: int, expert_bytes: int, state_bytes: int) -> LayerShape:
    return LayerShape(
        index=index,
        dense_bytes=dense_bytes,
        expert_bytes=expert_bytes,
        n_expert_tensors=3 if expert_bytes else 0,
        largest_expert_bytes=expert_bytes // 2,
        largest_dense_bytes=dense_bytes // 3,
        n_embd_k=0 if state_bytes else 2048,
        n_embd_v=0 if state_bytes else 2048,
        state_bytes=state_bytes,
    )


MODELS = st.builds(
    model,
    n_layer=st.integers(1, 40),
    dense_mib=st.integers(1, 600),
    expert_mib=st.integers(4, 1200),
    n_dense_lead=st.integers(0, 3),
    n_expert=st.sampled_from([0, 8, 64]),
    n_ctx_train=st.sampled_from([512, 4096, 131072]),
    state_bytes=st.sampled_from([0, 0, 400_000]),
    step=st.integers(1, 3),
)
SIZES = st.floats(0.1, 80, allow_nan=False)
MACHINES = st.builds(
    lambda vram, ram, lockable, backend: machine(
        *vram, ram=ram, lockable_bytes=lockable, backend=backend
    ),
    vram=st.lists(SIZES, max_size=3),
    ram=st.floats(0.5, 200, allow_nan=False),
    lockable=st.sampled_from([None, 8 * MIB, 4 * GIB]),
    backend=st.sampled_from(["CUDA", "NPU"]),
)
