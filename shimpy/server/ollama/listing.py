"""How /api/tags, /api/ps, /api/show and /api/models describe models: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shimpy.chat.template import ChatTemplate
from shimpy.gguf.header import GgufArray, Header, MetadataValue
from shimpy.registry.manifest import Manifest
from shimpy.registry.model import Model
from shimpy.server.ollama.wire import format_local_time

# Longer arrays of the metadata are shown empty unless all is asked for; Ollama's own number.
_MAX_SHOWN_ARRAY = 5
_THINKING_MARKS = ("enable_thinking", "<think>", "reasoning_content", "[THINK]", "<|channel|>")
_HIDDEN_KEYS = frozenset({"general.name", "tokenizer.chat_template"})


def tag_entry(model: Model) -> dict[str, Any]:
    """Return a usable model as /api/tags lists it."""
    name = str(model.name)
    return {
        "name": name,
        "model": name,
        "modified_at": format_local_time(model.modified_s),
        "size": model.size_bytes,
        "digest": model.digest,
        "details": details(model),
        "capabilities": capabilities(model),
    }


def model_entry(model: Model) -> dict[str, Any]:
    """Return any model, a broken one with its reason, as /api/models lists it."""
    entry = tag_entry(model)
    entry |= {
        # As the older native form names them.
        "size_bytes": model.size_bytes,
        "model_type": entry["details"]["family"],
        "parameter_count": entry["details"]["parameter_size"],
        "source": model.source,
        "path": str(model.path),
        "aliases": [str(alias) for alias in model.aliases],
    }
    if model.shape is not None:
        entry["experts"] = experts(model)
    if model.error is not None:
        entry["error"] = model.error
    return entry


def details(model: Model) -> dict[str, Any]:
    """Return Ollama's `details`; its texts are empty for a broken model."""
    shape = model.shape
    if shape is None:
        return {
            "parent_model": "",
            "format": "gguf",
            "family": "",
            "families": [],
            "parameter_size": "",
            "quantization_level": "",
        }
    return {
        "parent_model": "",
        "format": "gguf",
        "family": shape.arch,
        "families": [shape.arch],
        "parameter_size": format_count(shape.n_params),
        "quantization_level": shape.quantization,
        "context_length": shape.n_ctx_train,
        "embedding_length": shape.n_embd,
    }


def experts(model: Model) -> dict[str, int]:
    """Return how many experts a model has and what their tensors take; all 0 for a dense one."""
    shape = model.shape
    if shape is None or not shape.is_moe:
        names = ("n_expert", "n_expert_used", "n_expert_shared", "tensors", "bytes")
        return dict.fromkeys(names, 0)
    return {
        "n_expert": shape.n_expert,
        "n_expert_used": shape.n_expert_used,
        "n_expert_shared": shape.n_expert_shared,
        "tensors": shape.n_expert_tensors,
        "bytes": shape.expert_bytes,
    }


def capabilities(model: Model, template: ChatTemplate | None = None) -> list[str]:
    """Return what a model can do, in Ollama's words.

    Without the compiled `template`, as in listings of hundreds, its text is searched instead.
    """
    shape = model.shape
    if shape is None:
        return []
    if shape.is_embedding or shape.is_reranker:
        return ["embedding"]
    source = shape.chat_template or ""
    if template is not None:
        has_tools, thinks = template.supports_tools, template.supports_thinking
    else:
        has_tools = "tools" in source
        thinks = any(mark in source for mark in _THINKING_MARKS)
    found = {"completion": True, "tools": has_tools, "insert": shape.has_fim, "thinking": thinks}
    return [name for name, is_there in found.items() if is_there]


def model_info(model: Model, header: Header, *, verbose: bool) -> dict[str, Any]:
    """Return the metadata as /api/show has it; long arrays are emptied unless `verbose`."""
    shown = {
        key: _shown(value, verbose=verbose)
        for key, value in header.metadata.items()
        if key not in _HIDDEN_KEYS
    }
    if model.shape is not None:
        shown["general.parameter_count"] = model.shape.n_params
        shown.setdefault(f"{model.shape.arch}.context_length", model.shape.n_ctx_train)
    return dict(sorted(shown.items()))


def tensor_rows(header: Header) -> list[dict[str, Any]]:
    """Return the tensor table as /api/show has it."""
    return [
        {"name": tensor.name, "type": tensor.type.name, "shape": list(tensor.shape)}
        for tensor in header.tensors
    ]


def shown_template(model: Model, template: ChatTemplate) -> str:
    """Return the chat template that is used: the one that is set, its file's, or a family's.

    Editors look for the text `.Suffix` in it to learn whether a model fills gaps; ours is
    Jinja, so a model that does says it in a comment.
    """
    shape = model.shape
    has_mark = shape is not None and shape.has_fim and template.source != model.settings.template
    mark = "{# fills gaps with the model's own tokens: {{ .Suffix }} #}" if has_mark else ""
    return mark + template.source


def shown_settings(model: Model) -> dict[str, Any]:
    """Return what is set about a model, as /api/show has it; `settings` is our own."""
    settings = model.settings
    return {
        "parameters": format_parameters(settings.parameters),
        "system": settings.system or "",
        "messages": [{"role": m.role, "content": m.content} for m in settings.messages or ()],
        "settings": {
            name: value
            for name, value in {
                "cpu_moe": settings.cpu_moe,
                "keep_alive": settings.keep_alive_s,
                "raw": settings.raw,
                "aliases": list(settings.aliases) if settings.aliases is not None else None,
                "notes": settings.notes,
            }.items()
            if value is not None
        },
    }


def modelfile(model: Model) -> str:
    """Return the Modelfile that would make this model; its files have their own template."""
    settings = model.settings
    lines = [
        '# Modelfile generated by "ollama show"',
        "# To build a new Modelfile based on this, replace FROM with:",
        f"# FROM {model.name}",
        "",
        f"FROM {model.path}",
    ]
    if settings.template:
        lines.append(f'TEMPLATE """{settings.template}"""')
    if settings.system:
        lines.append(f'SYSTEM """{settings.system}"""')
    for name, value in settings.parameters.items():
        items = value if isinstance(value, list | tuple) else [value]
        lines += [f"PARAMETER {name} {_quoted(item)}" for item in items]
    lines += [f'MESSAGE {m.role} """{m.content}"""' for m in settings.messages or ()]
    if settings.license:
        lines.append(f'LICENSE """{settings.license}"""')
    return "\n".join(lines) + "\n"


def parent_of(manifest: Manifest | None) -> str:
    """Return the model that a model was made from; "": none."""
    origin = manifest.origin if manifest is not None else None
    return origin.location if origin is not None and origin.kind == "model" else ""


def format_parameters(values: Mapping[str, Any]) -> str:
    """Return "name value" lines as /api/show has them; texts are quoted, lists repeat the name.

    Source: ollama server/routes.go, `%-30s %#v`.
    """
    lines = []
    for name, value in values.items():
        items: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        lines += [f"{name:<30} {_quoted(item)}" for item in items]
    return "\n".join(lines)


def format_count(count: int) -> str:
    """Return a number of parameters as Ollama writes it: "7.6B", "137M", "22.42M", "512K"."""
    for unit, size, digits in (("B", 10**9, 1), ("M", 10**6, 2)):
        if count >= size:
            number = count / size
            return f"{number:.0f}{unit}" if number.is_integer() else f"{number:.{digits}f}{unit}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)  # noqa: PLR2004 - a thousand


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(value: MetadataValue, *, verbose: bool) -> Any:
    if not isinstance(value, GgufArray):
        return value
    return list(value) if verbose or len(value) <= _MAX_SHOWN_ARRAY else []
