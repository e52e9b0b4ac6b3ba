"""What others have published of the models that `reproduce` measures.

Memory: llama.cpp's own log lines on a GH200 (llama.cpp b6686, context 4096, one sequence, f16
cache, micro-batch 512), in MiB: weights, KV cache and compute buffer on the card. Speed: the
report on shimmy's expert offload, on a GH200, whole requests with a model load in each, in
tok/s; its VRAM figures are the model buffer alone (DeepSeek, Phi) or nvidia-smi's (GPT-OSS).
Its GPT-OSS file has the experts as MXFP4 and all else as F16, not Q8_0 as the usual MXFP4 file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["gpu", "experts-in-ram"]


@dataclass(frozen=True, slots=True)
class Published:
    """One published row; None: it says nothing of it."""

    # MiB.
    weights: float | None = None
    kv: float | None = None
    compute: float | None = None
    # Of the whole card, by nvidia-smi, MiB.
    card: float | None = None
    # tok/s, end to end.
    per_s: float | None = None

    @property
    def buffers(self) -> float | None:
        """MiB of all three buffers, where they are known."""
        if self.weights is None or self.kv is None or self.compute is None:
            return None
        return self.weights + self.kv + self.compute

    def memory_text(self) -> str:
        """Return "760 + 896 + 244", or what of it is known."""
        parts = [self.weights, self.kv, self.compute]
        known = [f"{part:.0f}" for part in parts if part is not None]
        text = " + ".join(known)
        return text + (" (weights)" if len(known) == 1 else "")


PUBLISHED: dict[tuple[str, Side], Published] = {
    ("deepseek-moe-16b-Q2_K", "gpu"): Published(6326.58, 896, 236.26),
    ("deepseek-moe-16b-Q2_K", "experts-in-ram"): Published(535.07, 896, 212.00),
    ("deepseek-moe-16b-Q4_K_M", "gpu"): Published(10231.24, 896, 236.26),
    ("deepseek-moe-16b-Q4_K_M", "experts-in-ram"): Published(760.24, 896, 243.51),
    ("deepseek-moe-16b-Q8_0", "gpu"): Published(16390.94, 896, 236.26),
    ("deepseek-moe-16b-Q8_0", "experts-in-ram"): Published(1243.93, 896, 243.51),
    ("deepseek-moe-16b-F16", "gpu"): Published(weights=30.1 * 1024, per_s=26.8),
    ("deepseek-moe-16b-F16", "experts-in-ram"): Published(weights=2.3 * 1024, per_s=6.5),
    ("phi-3.5-moe-Q2_K", "gpu"): Published(14516.15, 512, 103.01),
    ("phi-3.5-moe-Q2_K", "experts-in-ram"): Published(616.15, 512, 240.89),
    ("phi-3.5-moe-Q4_K_M", "gpu"): Published(24100.66, 512, 103.01),
    ("phi-3.5-moe-Q4_K_M", "experts-in-ram"): Published(850.65, 512, 397.14),
    ("phi-3.5-moe-Q8_0", "gpu"): Published(42304.49, 512, 103.01),
    ("phi-3.5-moe-Q8_0", "experts-in-ram"): Published(1504.48, 512, 503.01),
    ("phi-3.5-moe-F16", "gpu"): Published(weights=77.7 * 1024, per_s=13.8),
    ("phi-3.5-moe-F16", "experts-in-ram"): Published(weights=2.8 * 1024, per_s=4.5),
    ("gpt-oss-20b-MXFP4", "gpu"): Published(weights=11.8 * 1024, card=12666, per_s=46.88),
    ("gpt-oss-20b-MXFP4", "experts-in-ram"): Published(weights=2.3 * 1024, card=3602, per_s=6.77),
}
