"""The daemon's settings: defaults, then the config file, then SHIMPY_*, then flags.

Only this module reads the environment. A Config is frozen; a reload makes a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DEFAULT_BIND = "127.0.0.1:11435"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting, each under the name that it has in the config file."""

    # host:port that the HTTP API listens on.
    bind: str = DEFAULT_BIND
    # Folders of GGUF files, searched with their sub-folders.
    model_dirs: tuple[Path, ...] = ()
    cpu_moe: Literal["auto", "on", "off"] = "auto"
    # Experts of the first N layers stay in RAM; wins over cpu_moe.
    n_cpu_moe: int | None = None
    # Seconds an idle model stays loaded; inf: forever.
    keep_alive: float = 300.0
    # Context per model in tokens, shared by its slots; None: by model and memory.
    n_ctx: int | None = None
    # Requests that one model serves at once; None: by model and memory.
    n_slots: int | None = None
    # Type of the KV cache.
    kv_type: Literal["f16", "bf16", "q8_0", "q4_0", "f32"] | None = None
    # Threads of one worker; None: by cores and busy workers.
    n_threads: int | None = None
    # Requests that may wait for one model; one more is refused with 503.
    max_queue: int = 512
    # Seconds a model may take to load.
    load_timeout: float = 600.0
    # Seconds that running requests get when the daemon stops.
    drain_timeout: float = 30.0
    # Bytes of a request's body.
    max_body: int = 64 * 1024 * 1024
    # VRAM per GPU and host RAM that shimpy leaves to others, in bytes.
    reserve_vram: int = 0
    reserve_ram: int = 512 * 1024 * 1024
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # auto: for people on a terminal, JSON elsewhere.
    log_format: Literal["auto", "console", "json"] = "auto"
    # Where state, cache and config live; under SHIMPY_HOME when that is set.
    state_dir: Path = field(default=Path())
    cache_dir: Path = field(default=Path())
    config_dir: Path = field(default=Path())
