"""Fixtures round the hub server: import them where they are needed."""

from __future__ import annotations

from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that huggingface_hub in this process takes for the real one.

    Its constants are made of HF_ENDPOINT and the like when it is imported, which was long ago.
    """
    with HubServer().running() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
    # Connections to a server that is gone are of no use to the next test.
    huggingface_hub.close_session()
