"""Model names: `name:tag`, and the name that a GGUF file gets from its file name."""

from __future__ import annotations

import re

import msgspec

from shimpy.errors import InvalidNameError

DEFAULT_TAG = "latest"
# A file's name has at most 255; folders may come before it.
MAX_NAME_CHARS = 512

# [host/][namespace/]name[:tag]; every part starts with a letter or digit, so no "..".
_PART = r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9_-])?"
_NAME = re.compile(rf"(?P<name>{_PART}(?:/{_PART})*)(?::(?P<tag>{_PART}))?")

# A quantization at the end of a file's stem, set off from the name: the types of llama.cpp and of
# its forks (IQ4_KSS), mixes (Q4_K_M, Q3_K_XL, Q4_0_4_8), and Unsloth's "UD-" before them.
_QUANTIZATION = re.compile(
    r"[-._](?P<tag>(?:ud-)?(?:i?q\d+(?:_\d+)*(?:_[a-z]{1,3}){0,2}|tq\d_\d|bf16|fp?16|fp?32"
    r"|mxfp4(?:_moe)?|nvfp4))$",
    re.IGNORECASE,
)
_SHARD = re.compile(r"-(?P<index>[0-9]{5})-of-(?P<count>[0-9]{5})$")
_CANONICAL_TAGS = {"fp16": "f16", "fp32": "f32"}


class ModelName(msgspec.Struct, frozen=True, order=True):
    """A registered model's name, always in lower case, with its tag."""

    name: str
    tag: str = DEFAULT_TAG

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"


def parse_model_name(text: str) -> ModelName:
    """Return the name in `text`; without a tag it is `latest`, as Ollama reads it.

    Raises:
        InvalidNameError: empty, too long, or with a character that no model name has.
    """
    lowered = text.strip().lower()
    if not lowered:
        raise InvalidNameError(
            "the model's name is empty; ask for one like deepseek-moe-16b:q4_k_m"
        )
    if len(lowered) > MAX_NAME_CHARS:
        raise InvalidNameError(
            f"the model's name has {len(lowered)} characters; at most {MAX_NAME_CHARS} are allowed"
        )
    match = _NAME.fullmatch(lowered)
    if match is None:
        raise InvalidNameError(
            f"invalid model name {text!r}; a name is made of letters, digits, '.', '_', '-' and "
            "'/', with an optional ':tag'"
        )
    return ModelName(match["name"], match["tag"] or DEFAULT_TAG)


def parse_shard(stem: str) -> tuple[str, int, int] | None:
    """Return (stem without the shard's suffix, index, count) for `x-00002-of-00005`, else None."""
    match = _SHARD.search(stem)
    if match is None:
        return None
    return stem[: match.start()], int(match["index"]), int(match["count"])


def name_from_stem(stem: str) -> ModelName:
    """Return the name of a model file from its stem: lower case, its quantization as the tag.

    `deepseek-moe-16b-Q4_K_M` is `deepseek-moe-16b:q4_k_m`; where no quantization is named the
    tag is `latest`. A shard's suffix is not part of the name. Characters that no name has
    become '-'.
    """
    shard = parse_shard(stem)
    base = shard[0] if shard else stem
    match = _QUANTIZATION.search(base, 1)
    if match is None:
        return ModelName(name_part(base))
    tag = match["tag"].lower()
    return ModelName(name_part(base[: match.start()]), _CANONICAL_TAGS.get(tag, tag))


def name_part(text: str) -> str:
    """Return a text, say a folder's name, as a part of a name; "model" if nothing is left."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-") or "model"
