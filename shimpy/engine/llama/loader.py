"""Loading a model: parameters, the placement of experts, progress, and failures told well."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shimpy.engine.llama.devices import find_devices
from shimpy.engine.llama.failures import load_error
from shimpy.engine.llama.library import LL, Pointer, bind
from shimpy.engine.llama.log import LOG, install_log
from shimpy.engine.llama.page_locks import PageLocks, page_locks, whole_pages
from shimpy.engine.llama.read_ahead import read_ahead
from shimpy.engine.llama.stacks import limit_stacks
from shimpy.engine.llama.weights import spans_in_ram
from shimpy.errors import LoadError
from shimpy.protocol.messages import Load

# Takes the part of the weights that is in place, 0 to 1; only False stops the load.
OnProgress = Callable[[float], bool | None]

# llama.cpp's own pattern for --cpu-moe (common/common.h, LLM_FFN_EXPS_REGEX).
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
# llama.h, LLAMA_MAX_SEQ.
_MAX_SLOTS = 256
_PROGRESS_STEP = 0.01
# Of a load from a disk, the part that reading takes.
_READ_SHARE = 0.9

_cpu_buffer_type = bind("ggml_backend_cpu_buffer_type", ctypes.c_void_p)


class _BufferOverride(ctypes.Structure):
    """llama.h, struct llama_model_tensor_buft_override, which the bindings leave out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


class Model:
    """A loaded model; `close` frees it, after its contexts."""

    def __init__(self, handle: Pointer, *, is_mapped: bool) -> None:
        """`is_mapped`: its weights in RAM lie in the mapped file."""
        self.handle = handle
        self.is_mapped = is_mapped
        self._spans = spans_in_ram(handle) if is_mapped else []
        self._locks: PageLocks | None = None
        self.vocab_handle: Pointer = LL.llama_model_get_vocab(handle)
        self.n_ctx_train: int = LL.llama_model_n_ctx_train(handle)
        self.n_embd_out: int = LL.llama_model_n_embd_out(handle)
        self.n_cls_out: int = LL.llama_model_n_cls_out(handle)
        self.has_encoder: bool = LL.llama_model_has_encoder(handle)
        self.has_decoder: bool = LL.llama_model_has_decoder(handle)
        # Tokens in a sliding window of attention; 0: no layer has one.
        self.n_swa: int = LL.llama_model_n_swa(handle)
        # Its state is one vector a sequence, not a row a token: there are no parts of it.
        self.is_recurrent: bool = LL.llama_model_is_recurrent(handle)
        self.is_hybrid: bool = LL.llama_model_is_hybrid(handle)
        # Past this length positions are turned otherwise; 0: the file says nothing.
        original = self.metadata("{arch}.rope.scaling.original_context_length") or ""
        self.n_ctx_original = int(original) if original.isdecimal() else 0

    def metadata(self, key: str) -> str | None:
        """Return a value of the file's header as text; `{arch}` is the architecture."""
        if "{arch}" in key:
            key = key.format(arch=self.metadata("general.architecture"))
        buffer = ctypes.create_string_buffer(256)
        n = LL.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if n >= 0 else None

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the weights that lie in the mapped file; 0: none, or it is not known.

        llama.cpp counts all of a file from the first of them to the last.
        """
        return sum(end - start for start, end in self._spans)

    def lock(self, locks: PageLocks) -> bool:
        """Page-lock the mapped weights; False: it is refused, or not known where they lie."""
        if not self._spans or not locks.add(whole_pages(self._spans)):
            return False
        self._locks = locks
        return True

    def close(self) -> None:
        """Free the weights."""
        if self._locks is not None:
            self._locks.close()
        if self.handle:
            LL.llama_model_free(self.handle)
            self.handle = 0


def load_model(load: Load, *, on_progress: OnProgress, simulated: bool = False) -> Model:
    """Load the weights as placed; `simulated`: only find out what they would take.

    Raises:
        LoadError: the file, the devices or the memory do not allow it, with llama.cpp's own
            last error lines; or `on_progress` said False.
    """
    _check(load)
    install_log()
    LL.llama_backend_init()
    limit_stacks(load.devices)
    if simulated or load.load_mode == "mmap":
        return _load_once(load, on_progress, is_mapped=not simulated, simulated=simulated)
    if (locks := page_locks(load.devices)) is not None:
        model = _load_once(load, on_progress, is_mapped=True)
        if model.lock(locks):
            return model
        model.close()
    return _load_once(load, on_progress, is_mapped=False)


def _load_once(
    load: Load, on_progress: OnProgress, *, is_mapped: bool, simulated: bool = False
) -> Model:
    LOG.clear()
    progress = _Progress(on_progress)
    # Everything that the parameters point to lives in these locals until the call returns.
    devices = (ctypes.c_void_p * (len(load.devices) + 1))(*find_devices(load.devices))
    overrides = _overrides(load.n_cpu_moe)
    split = (ctypes.c_float * max(LL.llama_max_devices(), 1))(*load.tensor_split)
    params = _params(load)
    # What is read, not mapped, lies in page-locked memory where a GPU is used.
    params.load_mode = LL.LLAMA_LOAD_MODE_MMAP if is_mapped else LL.LLAMA_LOAD_MODE_NONE
    # llama.cpp asserts that nothing is mapped then.
    params.no_alloc = simulated
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    params.tensor_split = split if load.tensor_split else None
    params.progress_callback = progress.callback
    handle = None
    if not is_mapped or read_ahead(load.shards or [load.path], progress.on_read):
        handle = _load(load, params)
    if handle:
        return Model(handle, is_mapped=is_mapped)
    if progress.error is not None:
        raise progress.error
    if progress.was_cancelled:
        raise LoadError(f"loading {Path(load.path).name} was cancelled")
    raise load_error(f"llama.cpp could not load {load.path}", LOG.errors())


def _load(load: Load, params: Any) -> Pointer | None:
    handle: Pointer | None
    if load.shards:
        paths = (ctypes.c_char_p * len(load.shards))(*map(os.fsencode, load.shards))
        handle = LL.llama_model_load_from_splits(paths, len(paths), params)
    else:
        handle = LL.llama_model_load_from_file(os.fsencode(load.path), params)
    return handle


def _check(load: Load) -> None:
    """Refuse what llama.cpp would answer by aborting, or with less to go by."""
    for path in (load.path, *load.shards):
        if not os.access(path, os.R_OK):
            raise LoadError(f"{path} is not there or can't be read")
    for name, value in (
        ("n_ctx", load.n_ctx),
        ("n_batch", load.n_batch),
        ("n_ubatch", load.n_ubatch),
        ("n_threads", load.n_threads),
    ):
        if not 0 < value < 2**31:
            raise LoadError(f"{name} is {value}; it has to be 1 or more")
    if not 0 < load.n_slots <= _MAX_SLOTS:
        raise LoadError(f"{load.n_slots} slots: llama.cpp has 1 to {_MAX_SLOTS}")
    if load.flash_attn == "off" and load.kv_type.startswith("q"):
        raise LoadError(
            f"kv_type {load.kv_type} needs flash attention: set flash_attn to auto or on, "
            "or kv_type to f16"
        )
    n_devices = LL.llama_max_devices()
    if len(load.tensor_split) > n_devices:
        raise LoadError(
            f"tensor_split names {len(load.tensor_split)} devices; this build of llama.cpp "
            f"takes {n_devices}"
        )


def _params(load: Load) -> Any:
    params = LL.llama_model_default_params()
    params.n_gpu_layers = load.n_gpu_layers
    params.check_tensors = load.check_tensors
    # Repacked weights: half the speed of prefill, and a second copy beside the mapped file.
    params.use_extra_bufts = False
    return params


def _overrides(n_cpu_moe: int) -> ctypes.Array[_BufferOverride]:
    """Return the table, ended by an empty row, that keeps layers' experts in host memory.

    One pattern for all layers: llama.cpp compiles each pattern once for each tensor.
    """
    table = (_BufferOverride * 2)()
    if n_cpu_moe > 0:
        layers = "|".join(map(str, range(n_cpu_moe)))
        table[0].pattern = rf"blk\.({layers}){_EXPERTS}".encode()
        table[0].buffer_type = _cpu_buffer_type()
    return table


class _Progress:
    """What is read ahead, and llama.cpp's progress callback, called on in steps of a hundredth."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._next = 0.0
        # Where llama.cpp's own begins.
        self._start = 0.0
        self.was_cancelled = False
        self.error: BaseException | None = None
        self.callback = LL.llama_progress_callback(self._on_llama)

    def on_read(self, fraction: float) -> bool:
        """Take how much of the files is read; return whether to go on."""
        self._start = _READ_SHARE
        return self._tell(_READ_SHARE * fraction)

    def _on_llama(self, fraction: float, _user_data: ctypes.c_void_p) -> bool:
        return self._tell(self._start + (1 - self._start) * fraction)

    def _tell(self, fraction: float) -> bool:
        if fraction < self._next and fraction < 1.0:
            return True
        self._next = fraction + _PROGRESS_STEP
        try:
            self.was_cancelled = self._on_progress(fraction) is False
        except BaseException as error:  # noqa: BLE001 (it can't cross C: it waits)
            self.error = error
        return not self.was_cancelled and self.error is None
