"""The routes that change which models there are, against a real app, store and workers."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.server.harness import Running, running_app
from tests.synthetic import CHAIN_TEXT, write_llama

HELLO = {"prompt": "hello", "stream": False}


@pytest.fixture
async def app(tmp_path: Path, chain_model: Path) -> AsyncIterator[Running]:
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(chain_model, folder / "chain.gguf")
    async with running_app(folder, tmp_path / "state") as running:
        yield running


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def _upload(app: Running, data: bytes) -> str:
    digest = _digest(data)
    response = await app.client.post(f"/api/blobs/{digest}", content=data)
    assert response.status_code == 201, response.text
    return digest


async def _create_stored(app: Running, chain_model: Path, name: str = "mine", **more: Any) -> str:
    digest = await _upload(app, await asyncio.to_thread(chain_model.read_bytes))
    body = {"model": name, "files": {"chain-Q8_0.gguf": digest}, **more}
    lines = await app.lines("/api/create", body)
    assert lines[-1] == {"status": "success"}
    return digest


async def _names(app: Running) -> list[str]:
    tags = (await app.client.get("/api/tags")).json()["models"]
    return [model["name"] for model in tags]


async def _show(app: Running, name: str) -> dict[str, Any]:
    response = await app.client.post("/api/show", json={"model": name})
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


# --- blobs -----------------------------------------------------------------------------------


async def test_a_blob_is_there_once_it_was_uploaded(app: Running) -> None:
    data = b"x" * 3_000_000
    digest = _digest(data)
    assert (await app.client.head(f"/api/blobs/{digest}")).status_code == 404
    assert (await app.client.post(f"/api/blobs/{digest}", content=data)).status_code == 201
    assert (await app.client.head(f"/api/blobs/{digest}")).status_code == 200
    assert (await app.client.post(f"/api/blobs/{digest}", content=data)).status_code == 200
    assert app.services.store.blobs.path(digest).read_bytes() == data


async def test_a_blob_that_is_not_what_it_says_is_refused_and_not_kept(app: Running) -> None:
    digest = _digest(b"right")
    response = await app.client.post(f"/api/blobs/{digest}", content=b"wrong")
    assert response.status_code == 400
    assert "digest mismatch" in response.json()["error"]
    assert list(app.services.store.blobs.folder.iterdir()) == []


@pytest.mark.parametrize("digest", ["nonsense", "sha256:12", "md5:" + "0" * 64])
async def test_no_digest_is_refused(app: Running, digest: str) -> None:
    response = await app.client.post(f"/api/blobs/{digest}", content=b"x")
    assert response.status_code == 400
    assert "digest" in response.json()["error"]


async def test_an_upload_that_breaks_off_leaves_nothing(app: Running) -> None:
    digest = _digest(b"whole")

    async def half() -> AsyncIterator[bytes]:
        yield b"wh"
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        await app.client.post(f"/api/blobs/{digest}", content=half())
    await app.services.lifecycle.wait_idle()
    blobs = app.services.store.blobs.folder
    assert not blobs.exists() or list(blobs.iterdir()) == []
    assert (await app.client.post(f"/api/blobs/{digest}", content=b"whole")).status_code == 201


async def test_an_upload_that_the_disk_can_not_hold_is_refused(
    app: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first byte where its length is known; else as soon as it is too much."""
    usage = shutil.disk_usage(app.services.store.root)
    room = 64 * 1024 * 1024 + 100
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=room))
    data = b"x" * 200
    digest = _digest(data)
    response = await app.client.post(f"/api/blobs/{digest}", content=data)
    assert response.status_code == 507
    assert "200 B" in response.json()["error"]

    async def chunks() -> AsyncIterator[bytes]:
        yield data

    response = await app.client.post(f"/api/blobs/{digest}", content=chunks())
    assert response.status_code == 507
    assert list(app.services.store.blobs.folder.iterdir()) == []
    assert (await app.client.post(f"/api/blobs/{_digest(b'y')}", content=b"y")).status_code == 201


# --- create ----------------------------------------------------------------------------------


async def test_a_model_is_made_of_an_uploaded_file_and_runs(
    app: Running, chain_model: Path
) -> None:
    digest = await _upload(app, await asyncio.to_thread(chain_model.read_bytes))
    lines = await app.lines(
        "/api/create", {"model": "Mine:V1", "files": {"chain.gguf": digest}, "system": "Be brief."}
    )
    assert [line["status"] for line in lines] == [
        "parsing GGUF",
        f"using existing layer {digest}",
        "writing manifest",
        "success",
    ]
    assert await _names(app) == ["chain:latest", "mine:v1"]
    answer = (await app.client.post("/api/generate", json={"model": "mine:v1", **HELLO})).json()
    assert answer["response"] == CHAIN_TEXT


async def test_a_split_model_is_made_of_its_shards_in_their_order(
    app: Running, tmp_path: Path
) -> None:
    """In the store their names are digests: the manifest knows their order, not the names."""
    first = await asyncio.to_thread(write_llama, tmp_path / "m.gguf", split_max_tensors=8)
    parts = {}
    for path in sorted(first.parent.glob("m-*.gguf")):
        parts[path.name] = await _upload(app, await asyncio.to_thread(path.read_bytes))
    assert len(parts) > 2
    files = dict(reversed(parts.items()))
    await app.lines("/api/create", {"model": "split", "files": files})
    model = await app.services.registry.resolve("split")
    assert [f"sha256:{path.name[7:]}" for path in model.files] == list(parts.values())
    body = {"model": "split", "options": {"num_predict": 2, "temperature": 0}, **HELLO}
    answer = await app.client.post("/api/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["eval_count"] == 2


async def test_a_model_made_from_another_shares_its_file_and_has_its_own_settings(
    app: Running,
) -> None:
    lines = await app.lines(
        "/api/create",
        {
            "model": "pirate",
            "from": "chain",
            "system": "You are a pirate.",
            "parameters": {"num_predict": 3, "stop": "x", "temperature": 0},
            "messages": [{"role": "user", "content": "Ahoy"}],
            "license": ["MIT"],
            "template": "{{ .System }}|{{ .Prompt }}|",
        },
    )
    assert lines[-1] == {"status": "success"}
    shown = await _show(app, "pirate")
    assert shown["system"] == "You are a pirate."
    assert shown["license"] == "MIT"
    assert shown["messages"] == [{"role": "user", "content": "Ahoy"}]
    assert shown["template"] == "{{ .System }}|{{ .Prompt }}|"
    assert 'TEMPLATE """{{ .System }}|{{ .Prompt }}|"""' in shown["modelfile"]
    assert shown["details"]["parent_model"] == "chain:latest"
    assert dict(line.split() for line in shown["parameters"].splitlines()) == {
        "num_predict": "3", "stop": '"x"', "temperature": "0",
    }  # fmt: skip
    answer = (await app.client.post("/api/generate", json={"model": "pirate", **HELLO})).json()
    assert (answer["eval_count"], answer["done_reason"]) == (3, "length")
    blobs = app.services.store.blobs.folder
    assert not blobs.exists() or list(blobs.iterdir()) == []


async def test_create_without_streaming_answers_once(app: Running) -> None:
    body = {"model": "two", "from": "chain", "stream": False}
    response = await app.client.post("/api/create", json=body)
    assert response.json() == {"status": "success"}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"from": "chain"}, 400, "model is required"),
        ({"model": "x"}, 400, "from"),
        ({"model": "x", "from": "nope"}, 404, "nope"),
        ({"model": "bad name!", "from": "chain"}, 400, "bad name"),
        ({"model": "demo", "from": "chain"}, 400, "demo"),
        ({"model": "chain", "from": "chain"}, 400, "chain"),
        ({"model": "x", "files": {"m.gguf": "sha256:" + "0" * 64}}, 404, "000"),
        ({"model": "x", "files": {"m.gguf": "nonsense"}}, 400, "digest"),
        ({"model": "x", "files": {"m.safetensors": "sha256:" + "0" * 64}}, 400, "GGUF"),
        ({"model": "x", "from": "chain", "quantize": "q4_K_M"}, 400, "quantize"),
        ({"model": "x", "from": "chain", "adapters": {"a": "b"}}, 400, "adapters"),
        ({"model": "x", "from": "chain", "parameters": {"tempreature": 1}}, 400, "temperature"),
        ({"model": "x", "from": "chain", "parameters": {"top_k": "a"}}, 400, "top_k"),
        ({"model": "x", "from": "chain", "template": "{% for"}, 400, "template"),
        ({"model": "x", "from": "chain", "template": "{{ if }}"}, 400, "template"),
    ],
)
async def test_what_can_not_be_created_is_refused_with_its_reason(
    app: Running, body: dict[str, Any], status: int, word: str
) -> None:
    response = await app.client.post("/api/create", json={**body, "stream": False})
    assert response.status_code == status, response.text
    assert word in response.json()["error"]
    assert await _names(app) == ["chain:latest"]


async def test_a_file_that_is_no_model_makes_none(app: Running) -> None:
    digest = await _upload(app, b"<!DOCTYPE html>")
    body = {"model": "x", "files": {"m.gguf": digest}, "stream": False}
    response = await app.client.post("/api/create", json=body)
    assert response.status_code == 422
    assert "web page" in response.json()["error"]
    assert await _names(app) == ["chain:latest"]


# --- delete and copy -------------------------------------------------------------------------


async def test_a_deleted_model_is_gone_with_its_file(app: Running, chain_model: Path) -> None:
    digest = await _create_stored(app, chain_model)
    assert (await app.client.post("/api/generate", json={"model": "mine", **HELLO})).is_success
    response = await app.client.request("DELETE", "/api/delete", json={"model": "mine"})
    assert (response.status_code, response.content) == (200, b"")
    assert await _names(app) == ["chain:latest"]
    assert digest not in app.services.store.blobs
    missing = await app.client.request("DELETE", "/api/delete", json={"model": "mine"})
    assert missing.status_code == 404
    assert "model 'mine' not found" in missing.json()["error"]


async def test_a_file_stays_while_a_copy_needs_it(app: Running, chain_model: Path) -> None:
    digest = await _create_stored(app, chain_model, "one")
    body = {"source": "one", "destination": "two"}
    response = await app.client.post("/api/copy", json=body)
    assert (response.status_code, response.content) == (200, b"")
    await app.client.request("DELETE", "/api/delete", json={"model": "one"})
    assert await _names(app) == ["chain:latest", "two:latest"]
    assert digest in app.services.store.blobs
    assert (await app.client.post("/api/generate", json={"model": "two", **HELLO})).is_success


async def test_a_copy_of_a_model_in_a_folder_takes_no_room(app: Running) -> None:
    body = {"source": "chain", "destination": "mine/copy:v2"}
    assert (await app.client.post("/api/copy", json=body)).status_code == 200
    assert await _names(app) == ["chain:latest", "mine/copy:v2"]
    model = await app.services.registry.resolve("mine/copy:v2")
    assert model.path.name == "chain.gguf"
    deleted = await app.client.request("DELETE", "/api/delete", json={"name": "mine/copy:v2"})
    assert deleted.status_code == 200
    assert model.path.exists()


async def test_a_copy_whose_file_goes_is_broken_and_says_so(app: Running) -> None:
    await app.client.post("/api/copy", json={"source": "chain", "destination": "two"})
    (await app.services.registry.resolve("two")).path.unlink()
    (model,) = (await app.client.get("/api/models")).json()["models"]
    assert model["name"] == "two:latest"
    assert "chain.gguf" in model["error"]
    assert "is gone" in model["error"]


async def test_a_model_in_a_folder_is_not_deleted(app: Running) -> None:
    response = await app.client.request("DELETE", "/api/delete", json={"model": "chain"})
    assert response.status_code == 400
    assert "chain.gguf" in response.json()["error"]
    assert await _names(app) == ["chain:latest"]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"source": "nope", "destination": "x"}, 404, "model 'nope' not found"),
        ({"source": "chain"}, 400, "destination"),
        ({"source": "chain", "destination": "!!"}, 400, "!!"),
        ({"source": "chain", "destination": "chain"}, 400, "another name"),
    ],
)
async def test_what_can_not_be_copied(
    app: Running, body: dict[str, str], status: int, word: str
) -> None:
    response = await app.client.post("/api/copy", json=body)
    assert response.status_code == status
    assert word in response.json()["error"]


# --- settings --------------------------------------------------------------------------------


async def _set(app: Running, name: str, **changes: Any) -> dict[str, Any]:
    response = await app.client.post("/api/settings", json={"model": name, "set": changes})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_settings_of_a_model_in_a_folder_last_and_are_used(
    app: Running, tmp_path: Path
) -> None:
    answer = await _set(app, "chain", num_predict=2, stop=["zzz"], n_ctx=512, keep_alive="-1")
    assert answer["model"] == "chain:latest"
    assert answer["settings"]["parameters"] == {"num_predict": 2, "stop": ["zzz"], "num_ctx": 512}
    generated = (await app.client.post("/api/generate", json={"model": "chain", **HELLO})).json()
    assert (generated["eval_count"], generated["done_reason"]) == (2, "length")
    (resident,) = (await app.client.get("/api/ps")).json()["models"]
    assert resident["context_length"] == 512
    assert int(resident["expires_at"][:4]) > 2200
    wanted = {"model": "chain", **HELLO, "options": {"num_predict": 4}}
    generated = (await app.client.post("/api/generate", json=wanted)).json()
    assert generated["eval_count"] == 4
    stored = tmp_path / "state" / "store" / "settings" / "chain" / "latest.json"
    assert msgspec.json.decode(stored.read_bytes())["parameters"]["num_predict"] == 2


async def test_unset_gives_back_what_is_below(app: Running) -> None:
    await app.lines("/api/create", {"model": "m", "from": "chain", "parameters": {"top_k": 7}})
    await _set(app, "m", top_k=9, system="Hi", cpu_moe="on")
    body = {"model": "m", "unset": ["top_k", "system", "cpu_moe"]}
    answer = (await app.client.post("/api/settings", json=body)).json()
    assert answer["settings"] == {}
    assert answer["effective"]["parameters"] == {"top_k": 7}


async def test_an_alias_is_a_name_of_the_model(app: Running) -> None:
    await _set(app, "chain", aliases="gpt-4, fast:q1")
    for name in ("gpt-4", "fast:q1", "fast"):
        generated = await app.client.post("/api/generate", json={"model": name, **HELLO})
        assert generated.json()["response"] == CHAIN_TEXT
    assert (await _show(app, "gpt-4"))["aliases"] == ["gpt-4:latest", "fast:q1"]
    await app.lines("/api/create", {"model": "m", "from": "chain"})
    assert (await app.services.registry.resolve("m")).aliases == ()
    response = await app.client.request("DELETE", "/api/delete", json={"model": "gpt-4"})
    assert "another name" in response.json()["error"]


async def test_a_template_that_is_set_is_used(app: Running) -> None:
    before = (await app.client.post("/api/generate", json={"model": "chain", **HELLO})).json()
    await _set(app, "chain", template="{{ .Prompt }} {{ .Prompt }} {{ .Prompt }}")
    after = (await app.client.post("/api/generate", json={"model": "chain", **HELLO})).json()
    assert after["prompt_eval_count"] != before["prompt_eval_count"]


async def test_a_raw_model_gets_prompts_as_they_are_and_chats_by_its_template(app: Running) -> None:
    async def n_prompts() -> tuple[int, int, int, int]:
        chat = {"messages": [{"role": "user", "content": "abc"}]}
        own = {"prompt": "abc", "template": "{{ .Prompt }}{{ .Prompt }}"}
        counts = []
        for path, body in (
            ("/api/generate", {"prompt": "abc"}),
            ("/api/generate", {"prompt": "abc", "raw": True}),
            ("/api/generate", own),
            ("/api/chat", chat),
        ):
            given = {"model": "chain", "stream": False, "keep_alive": 0} | body
            answer = await app.client.post(path, json=given)
            counts.append(int(answer.json()["prompt_eval_count"]))
        return counts[0], counts[1], counts[2], counts[3]

    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    await _set(app, "chain", template=template)
    prompt, raw, own, chat = await n_prompts()
    assert raw < own < prompt == chat
    await _set(app, "chain", raw="on")
    assert (await _show(app, "chain"))["settings"]["raw"] is True
    assert await n_prompts() == (raw, raw, own, chat)
    await _set(app, "chain", raw=False)
    assert await n_prompts() == (prompt, raw, own, chat)


async def test_system_and_messages_open_every_conversation(app: Running) -> None:
    body = {"model": "chain", "messages": [{"role": "user", "content": "x"}], "stream": False}

    async def n_prompt(**more: Any) -> int:
        answer = (await app.client.post("/api/chat", json=body | more)).json()
        return int(answer["prompt_eval_count"])

    plain = await n_prompt()
    system = [{"role": "system", "content": "Be kind."}]
    with_system = await n_prompt(messages=[*system, *body["messages"]])
    await _set(app, "chain", system="Be kind.")
    assert await n_prompt() == with_system > plain
    # The request's own wins.
    other = [{"role": "system", "content": "Be kind!"}]
    assert await n_prompt(messages=[*other, *body["messages"]]) == with_system
    await _set(app, "chain", messages=[{"role": "user", "content": "a"},
                                       {"role": "assistant", "content": "b"}])  # fmt: skip
    assert await n_prompt() > with_system


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"nope": 1}, "nope"),
        ({"top_k": "x"}, "top_k"),
        ({"cpu_moe": "maybe"}, "cpu_moe"),
        ({"cpu_moe": -1}, "cpu_moe"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"system": 1}, "system"),
        ({"raw": "maybe"}, "raw"),
        ({"aliases": "a b"}, "aliases"),
        ({"aliases": "other"}, "other"),
        ({"messages": [{"role": "x"}]}, "messages"),
        ({"template": "{% for"}, "template"),
    ],
)
async def test_what_can_not_be_set(app: Running, changes: dict[str, Any], word: str) -> None:
    await app.client.post("/api/copy", json={"source": "chain", "destination": "other"})
    response = await app.client.post("/api/settings", json={"model": "chain", "set": changes})
    assert response.status_code == 400, response.text
    assert word in response.json()["error"]
    assert app.services.store.settings((await app.services.registry.resolve("chain")).name).is_empty


# --- upkeep ----------------------------------------------------------------------------------


async def test_gc_removes_what_nothing_needs(app: Running, chain_model: Path) -> None:
    kept = await _create_stored(app, chain_model)
    unused = await _upload(app, b"unused")
    young = (await app.client.post("/api/gc")).json()
    assert (young["n_files"], young["n_kept"], young["kept_bytes"]) == (0, 1, 6)
    old = (await app.client.post("/api/gc", json={"all": True})).json()
    assert (old["n_files"], old["freed_bytes"]) == (1, 6)
    assert kept in app.services.store.blobs
    assert unused not in app.services.store.blobs


async def test_verify_finds_a_damaged_file(app: Running, chain_model: Path) -> None:
    digest = await _create_stored(app, chain_model)
    size = (await asyncio.to_thread(chain_model.stat)).st_size
    lines = await app.lines("/api/verify", {})
    assert lines[0]["completed"] == lines[0]["total"] == size
    assert [line["status"] for line in lines[1:]] == ["verified", "success"]
    path = app.services.store.blobs.path(digest)
    data = bytearray(await asyncio.to_thread(path.read_bytes))
    data[-1] ^= 1
    path.write_bytes(data)
    lines = await app.lines("/api/verify", {"models": ["mine"]})
    assert [line["status"] for line in lines[1:]] == ["damaged", "failed"]
    assert "damaged" in lines[1]["problem"]


async def test_only_the_stores_models_can_be_verified(app: Running) -> None:
    response = await app.client.post("/api/verify", json={"models": ["chain"]})
    assert response.status_code == 400
    assert "chain" in response.json()["error"]
    response = await app.client.post("/api/verify", json={"models": ["nope"]})
    assert response.status_code == 404
