"""What a person writes to say which model is to be pulled. Pure.

deepseek-moe-16b[:q4_k_m]                    the catalog's
hf.co/org/repo[:QUANT]                       a repository of the hub, huggingface.co likewise
[hf.co/]org/repo/folder/file.gguf            one file of it
https://huggingface.co/org/repo[/...]        the same, as copied from a browser
http[s]://host/path/file.gguf                a file anywhere
ollama:[host/][namespace/]name[:tag]         a model of an Ollama registry
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote, urlsplit

import msgspec

from shimpy.errors import InvalidNameError
from shimpy.names import DEFAULT_TAG, MAX_NAME_CHARS, ModelName, parse_model_name

HUB: Final = "hf.co"
OLLAMA: Final = "ollama"
OLLAMA_HOST: Final = "registry.ollama.ai"
OLLAMA_NAMESPACE: Final = "library"
_HUB_HOSTS: Final = frozenset({HUB, "huggingface.co", "www.huggingface.co"})
_SUFFIX: Final = ".gguf"
# A repository's two parts, and the parts of a path in it; none begins with a dot.
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HOST: Final = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?|\[[0-9a-fA-F:]+\](?::[0-9]+)?"
)
_MAX_CHARS: Final = 2048
# Between a repository and the path of a file, in the addresses of a browser and of downloads.
_PAGES: Final = frozenset({"blob", "resolve", "raw", "tree"})


class CatalogReference(msgspec.Struct, frozen=True, kw_only=True):
    """A name for the catalog to resolve; with the tag `latest` any quantization is meant."""

    name: ModelName

    def __str__(self) -> str:
        return str(self.name)


class HubReference(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a repository of the hub."""

    # "org/name", in the letters that the hub knows it by.
    repository: str
    # None: the main branch.
    revision: str | None = None
    # One of the two, or neither: then the best quantization for this machine is meant.
    quantization: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        text = f"{HUB}/{self.repository}"
        if self.revision is not None:
            text += f"@{self.revision}"
        if self.path is not None:
            return f"{text}/{self.path}"
        return f"{text}:{self.quantization}" if self.quantization else text


class OllamaReference(msgspec.Struct, frozen=True, kw_only=True):
    """A model of an Ollama registry."""

    host: str = OLLAMA_HOST
    namespace: str = OLLAMA_NAMESPACE
    name: str
    tag: str = DEFAULT_TAG
    # Plain HTTP, where it was asked for by `http://`.
    is_insecure: bool = False

    @property
    def address(self) -> str:
        """The URL under which the registry has it."""
        scheme = "http" if self.is_insecure else "https"
        return f"{scheme}://{self.host}/v2/{self.namespace}/{self.name}"

    def __str__(self) -> str:
        scheme = "http://" if self.is_insecure else ""
        host = "" if self.host == OLLAMA_HOST else f"{self.host}/"
        short = not host and self.namespace == OLLAMA_NAMESPACE
        namespace = "" if short else f"{self.namespace}/"
        return f"{OLLAMA}:{scheme}{host}{namespace}{self.name}:{self.tag}"


class UrlReference(msgspec.Struct, frozen=True, kw_only=True):
    """A GGUF file at an address that the user gave."""

    url: str

    @property
    def file_name(self) -> str:
        """The file's name, by the address."""
        return unquote(urlsplit(self.url).path).rpartition("/")[2]

    def __str__(self) -> str:
        return self.url


Reference = CatalogReference | HubReference | OllamaReference | UrlReference


def parse_reference(text: str) -> Reference:
    """Return what a person means.

    Raises:
        InvalidNameError: nothing that could be pulled; says how to write it.
    """
    wanted = text.strip()
    if len(wanted) > _MAX_CHARS:
        raise InvalidNameError(
            f"the model's name has {len(wanted)} characters; at most {_MAX_CHARS} are allowed"
        )
    if wanted.lower().startswith(f"{OLLAMA}:"):
        return _parse_ollama(wanted[len(OLLAMA) + 1 :])
    if "://" in wanted:
        return _parse_url(wanted)
    host, _, rest = wanted.partition("/")
    if host.lower() in _HUB_HOSTS:
        return _parse_hub(rest, wanted)
    if wanted.count("/") > 1 and wanted.lower().endswith(_SUFFIX):
        return _parse_hub(wanted, wanted)
    return CatalogReference(name=parse_model_name(wanted))


def is_name(text: str) -> bool:
    """Whether a text is what a model may be called once it is there, not only its place."""
    try:
        parse_model_name(text)
    except InvalidNameError:
        return False
    return not text.lower().endswith(_SUFFIX)


def _parse_url(text: str) -> Reference:
    try:
        parts = urlsplit(text)
        host = parts.hostname
    except ValueError as error:
        raise InvalidNameError(f"{text!r} is no address: {error}") from None
    if parts.scheme.lower() not in {"http", "https"} or not host:
        raise InvalidNameError(
            f"{text!r} can't be pulled: only addresses that begin with https:// or http:// can"
        )
    if host in _HUB_HOSTS:
        return _parse_hub(unquote(parts.path).strip("/"), text)
    if not parts.path.lower().endswith(_SUFFIX):
        raise InvalidNameError(f"{text!r} is no GGUF file; its path must end in {_SUFFIX}")
    if parts.username or parts.password:
        raise InvalidNameError("an address with a password in it would be stored; leave it out")
    return UrlReference(url=parts._replace(fragment="").geturl())


def _parse_hub(text: str, whole: str) -> HubReference:
    parts = text.split("/")
    revision = None
    if len(parts) > 2 and parts[2] in _PAGES:  # noqa: PLR2004 - org, repo, page, revision, path
        revision, parts = parts[3] if len(parts) > 3 else None, parts[:2] + parts[4:]  # noqa: PLR2004
    last, colon, quantization = parts[-1].partition(":")
    parts[-1] = last
    good = len(parts) > 1 and all(_PART.fullmatch(part) for part in parts)
    if not good or (colon and (len(parts) > 2 or not _TAG.fullmatch(quantization))):  # noqa: PLR2004
        raise InvalidNameError(
            f"{whole!r} names no model of the hub; write hf.co/org/repo, hf.co/org/repo:Q4_K_M or "
            "hf.co/org/repo/file.gguf"
        )
    path = "/".join(parts[2:]) or None
    if path is not None and not path.lower().endswith(_SUFFIX):
        raise InvalidNameError(f"{path!r} in {whole!r} is no GGUF file; it must end in {_SUFFIX}")
    asked = quantization if quantization.lower() != DEFAULT_TAG else ""
    revision = None if revision == "main" else revision
    return HubReference(
        repository="/".join(parts[:2]), revision=revision, quantization=asked or None, path=path
    )


def _parse_ollama(text: str) -> OllamaReference:
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "https", text
    *before, name = rest.split("/")
    name, _, tag = name.partition(":")
    tag = tag or DEFAULT_TAG
    namespace = before[-1] if before else OLLAMA_NAMESPACE
    host = before[-2] if len(before) > 1 else OLLAMA_HOST
    good = all(_PART.fullmatch(part) for part in (namespace, name)) and _TAG.fullmatch(tag)
    most = 2  # host and namespace
    if (
        not good
        or len(before) > most
        or scheme not in {"http", "https"}
        or not _HOST.fullmatch(host)
        or len(rest) > MAX_NAME_CHARS
    ):
        raise InvalidNameError(
            f"'ollama:{text}' names no model of an Ollama registry; write ollama:name:tag, "
            "ollama:user/name:tag or ollama:host/user/name:tag"
        )
    return OllamaReference(
        host=host, namespace=namespace, name=name, tag=tag, is_insecure=scheme == "http"
    )
