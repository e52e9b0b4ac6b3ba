"""From what was asked for to the message that loads it. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from shimpy.config import Config
from shimpy.placement.figures import Setup
from shimpy.placement.placement import PlanOptions, Rung
from shimpy.placement.search import setup_of
from shimpy.protocol.messages import Load
from shimpy.registry.model import Model

# llama.cpp's own default: tokens of one decode call, in micro-batches of n_ubatch.
N_BATCH = 2048


def with_defaults(options: PlanOptions, config: Config) -> PlanOptions:
    """Return the options with the config's values where nothing was asked for."""
    cpu_moe = options.cpu_moe
    if cpu_moe == "auto":
        cpu_moe = config.cpu_moe if config.n_cpu_moe is None else config.n_cpu_moe
    return replace(
        options,
        n_ctx=options.n_ctx or config.n_ctx,
        n_slots=options.n_slots or config.n_slots,
        kv_type=options.kv_type or config.kv_type,
        load_mode=options.load_mode or config.load_mode,
        cpu_moe=cpu_moe,
    )


def load_message(model: Model, rung: Rung, n_threads: int) -> Load:
    """Return the message that loads a model as a rung places it."""
    placement = rung.placement
    return replace(
        simulated_load(model, setup_of(placement)),
        load_mode=placement.load_mode,
        n_threads=n_threads,
    )


def with_prefixes(load: Load, model: Model, config: Config) -> Load:
    """Return the message, with where its worker keeps prefixes beyond its life."""
    if not config.prefix_cache_size or load.embedding:
        return load
    return replace(
        load,
        prefix_dir=str(config.prefix_dir),
        prefix_cache_bytes=config.prefix_cache_size,
        digest=model.digest,
    )


def simulated_load(model: Model, setup: Setup) -> Load:
    """Return the message that loads a model in all that its memory depends on."""
    layout, context = setup.layout, setup.context
    shape = model.shape
    embeds = shape is not None and (shape.is_embedding or shape.is_reranker)
    return Load(
        path=str(model.path),
        shards=[str(path) for path in model.files] if len(model.files) > 1 else [],
        n_ctx=context.n_ctx,
        n_slots=context.n_slots,
        kv_unified=context.kv_unified,
        # An embedding model computes a text whole: its batch is its micro-batch.
        n_batch=context.n_ubatch if embeds else max(N_BATCH, context.n_ubatch),
        n_ubatch=context.n_ubatch,
        n_gpu_layers=layout.n_gpu_layers,
        n_cpu_moe=layout.n_cpu_moe,
        kv_type=context.kv_type,
        flash_attn="auto" if context.flash_attn else "off",
        devices=list(setup.devices),
        tensor_split=list(layout.split) if len(layout.split) > 1 else [],
        embedding=embeds,
    )
