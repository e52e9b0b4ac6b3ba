"""The Hugging Face hub: what a repository holds, and its files. The only huggingface_hub import.

Listings come from its HfApi, bytes through its HTTP session, which knows HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE, certificates and proxies. Files are fetched in ranges, from the byte at which an
earlier pull stopped: hf_hub_download begins anew each time, and so does Xet's transfer, which
therefore is not used. The hub serves files in Xet's storage over plain HTTP as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Final
from urllib.parse import quote

import msgspec
from huggingface_hub import HfApi, ModelInfo, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # lazily exported
    build_hf_headers,
    hf_raise_for_status,
)

import shimpy
from shimpy.errors import InvalidNameError, NotFoundError, OfflineError, RemoteError
from shimpy.registry.remote import (
    Body,
    RemoteFile,
    check_status,
    open_body,
    translated,
)

# Its list of what else is installed and who called is nobody's business.
constants.HF_HUB_DISABLE_TELEMETRY = True

_APP: Final = "shimpy"


class Repository(msgspec.Struct, frozen=True, kw_only=True):
    """A repository as of one commit."""

    # "org/name".
    name: str
    commit: str
    files: tuple[RemoteFile, ...]
    # As the repository's card says, "apache-2.0"; "": it does not.
    license: str = ""


def endpoint() -> str:
    """Return the hub's address, HF_ENDPOINT or the usual one."""
    return str(constants.ENDPOINT)


def fetch_repository(name: str, *, revision: str | None = None) -> Repository:
    """Return what a repository holds; blocking.

    Args:
        name: "org/name".
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        TransientError: the line broke, or the hub is busy.
        NotFoundError: there is no such repository or revision that the token may see.
        RemoteError: the hub refuses, in its own words.
        OfflineError: HF_HUB_OFFLINE is set.
    """
    with _explained(name), translated(endpoint()):
        info = HfApi(library_name=_APP, library_version=shimpy.__version__).model_info(
            name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        commit = info.sha or revision or constants.DEFAULT_REVISION
        siblings = info.siblings or []
        return Repository(
            name=info.id,
            commit=commit,
            files=tuple(
                RemoteFile(
                    path=file.rfilename,
                    size_bytes=file.size,
                    digest=f"sha256:{file.lfs.sha256}" if file.lfs else "",
                    git_oid="" if file.lfs else file.blob_id or "",
                    open=partial(_open, info.id, commit, file.rfilename),
                    url=hf_hub_url(info.id, file.rfilename, revision=commit),
                )
                for file in siblings
            ),
            license=_license(info),
        )


def _open(
    repository: str, commit: str, path: str, start: int, end: int | None
) -> AbstractContextManager[Body]:
    return _opened(repository, hf_hub_url(repository, path, revision=commit), start, end)


@contextmanager
def _opened(repository: str, url: str, start: int, end: int | None) -> Iterator[Body]:
    with (
        _explained(repository),
        open_body(
            get_session(),
            url,
            start=start,
            end=end,
            headers=build_hf_headers(library_name=_APP, library_version=shimpy.__version__),
            check=hf_raise_for_status,
            read_timeout_s=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as body,
    ):
        yield body


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours, with the hub's own reason."""
    page = f"{endpoint()}/{quote(repository)}"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OfflineError(f"{repository}: HF_HUB_OFFLINE is set; unset it to pull") from error
    except HFValidationError as error:
        raise InvalidNameError(f"{repository!r} is no repository's name: {error}") from error
    except GatedRepoError as error:
        raise RemoteError(
            f"{repository} is gated: {_reason(error)}. Ask for access at {page}, then set HF_TOKEN "
            "where the daemon runs, or log in there with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"{repository} has no such revision: {_reason(error)}") from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"there is no repository {repository} on {endpoint()}: {_reason(error)}. If it is "
            "private, set HF_TOKEN where the daemon runs, or log in there with `hf auth login`"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise NotFoundError(f"{repository}: the file is gone: {_reason(error)}") from error
    except HfHubHTTPError as error:
        check_status(error.response, lambda _: None)
        raise RemoteError(f"{repository}: the hub refuses: {_reason(error)}") from error
    except LocalTokenNotFoundError as error:
        raise RemoteError(f"{repository}: {error}") from error


def _reason(error: HfHubHTTPError) -> str:
    """Return the hub's own words in one line, or the status where it has none."""
    said = (error.server_message or "").split("\n")[0].strip().rstrip(".")
    status = f"{error.response.status_code} {error.response.reason_phrase}"
    return f"{said} ({status})" if said else status


def _license(info: ModelInfo) -> str:
    value = info.card_data.get("license") if info.card_data else None
    return value if isinstance(value, str) else ""
