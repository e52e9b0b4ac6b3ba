"""What can be wrong with the machine a daemon runs on, each with the line that mends it."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from shimpy.config import Config
from shimpy.errors import ShimpyError
from shimpy.units import GIB, format_bytes
from shimpy.values import UNIX

Verdict = Literal["ok", "warning", "failed"]

# Who runs the system's service, which has the same name.
SERVICE_USER = "shimpy"
_LITTLE_DISK = 10 * GIB
# How long another program on the address may take to answer.
_ANSWER_S = 3.0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check came to; `remedy` is the exact line that mends it."""

    check: str
    verdict: Verdict
    detail: str
    remedy: str = ""


def check_all(config: Config) -> Iterator[Finding]:
    """Yield what was found, as the user that this process runs as; blocking."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    for folder in config.model_dirs:
        yield check_folder(folder, user)
    for folder in (config.data_dir, config.state_dir, config.cache_dir):
        yield check_writable(folder, user)
    yield check_disk(config.data_dir)
    yield from check_hardware(config, user)
    yield check_port(config.bind)
    yield check_hub(config)


def check_folder(folder: Path, user: str) -> Finding:
    """Look whether a folder of models can be read."""
    check = f"models in {folder}"
    for path in [*reversed(folder.parents), folder]:
        if not os.access(path, os.X_OK) and _is_there(path):
            return Finding(
                check=check,
                verdict="failed",
                detail=f"{user} may not enter {path}",
                remedy=f"sudo setfacl -m u:{user}:x '{path}'",
            )
    if not folder.is_dir():
        return Finding(
            check=check,
            verdict="warning",
            detail="there is no such folder",
            remedy=f"mkdir -p '{folder}'",
        )
    unreadable = _first_unreadable(folder)
    if unreadable is not None:
        return Finding(
            check=check,
            verdict="failed",
            detail=f"{user} may not read {unreadable}",
            remedy=f"sudo setfacl -R -m u:{user}:rX '{folder}'",
        )
    return Finding(check=check, verdict="ok", detail=f"{user} can read it")


def check_writable(folder: Path, user: str) -> Finding:
    """Look whether a folder of the daemon's own can be written, by writing to it."""
    check = f"own folder {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".tmp-{secrets.token_hex(4)}"
        try:
            probe.write_bytes(b"x")
        finally:
            # On a full disk it is there, and empty.
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = (
            f"sudo install -d -o {user} -g {user} '{folder}' && sudo chown -R {user}: '{folder}'"
        )
        if error.errno == errno.EROFS:
            remedy = f"sudo systemctl edit shimpy  # [Service] ReadWritePaths={folder}"
        if error.errno == errno.ENOSPC:
            remedy = "shimpy gc; shimpy rm MODEL"
        return Finding(check=check, verdict="failed", detail=reason, remedy=remedy)
    return Finding(check=check, verdict="ok", detail=f"{user} can write to it")


def check_disk(folder: Path) -> Finding:
    """Look how much room there is for models."""
    there = next(path for path in [folder, *folder.parents] if path.exists())
    free = shutil.disk_usage(there).free
    if free < _LITTLE_DISK:
        return Finding(
            check="disk",
            verdict="warning",
            detail=f"{format_bytes(free)} free at {there}: most models are larger",
            remedy='data_dir = "/another/disk/shimpy"  # in config.toml',
        )
    return Finding(check="disk", verdict="ok", detail=f"{format_bytes(free)} free at {there}")


def check_hardware(config: Config, user: str) -> Iterator[Finding]:
    """Look which cards can be used, and how much memory can be page-locked."""
    from shimpy.placement.probe import probe_hardware

    try:
        hardware = probe_hardware(reserve_vram=config.reserve_vram, reserve_ram=config.reserve_ram)
    except (ShimpyError, OSError) as error:
        yield Finding(check="hardware", verdict="failed", detail=str(error), remedy="shimpy plan")
        return
    for gpu in hardware.gpus:
        free = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free"
        yield Finding(check=f"GPU {gpu.name}", verdict="ok", detail=f"{gpu.description}, {free}")
    for card in hardware.unusable:
        yield Finding(
            check=f"GPU {card.description}",
            verdict="failed",
            detail=card.reason,
            remedy=card.remedy,
        )
    closed = [path for path in _device_files() if not os.access(path, os.R_OK | os.W_OK)]
    for path in closed:
        group = path.group()
        yield Finding(
            check=f"device {path}",
            verdict="failed",
            detail=f"{user} may not open it",
            remedy=f"sudo usermod -aG {group} {user}",
        )
    if not hardware.gpus and not hardware.unusable and not closed:
        yield Finding(check="GPU", verdict="ok", detail="there is none; models run on the CPU")
    yield check_locked_memory(hardware.host.total_bytes, user, has_gpu=bool(hardware.gpus))


def check_locked_memory(total_bytes: int, user: str, *, has_gpu: bool) -> Finding:
    """Look whether experts in RAM could be page-locked; without a card nobody needs it."""
    remedy = "sudo systemctl edit shimpy  # [Service] LimitMEMLOCK=infinity"
    limit = _service_limit() if user == SERVICE_USER else None
    if limit is None:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        remedy = f"echo '{user} - memlock unlimited' | sudo tee /etc/security/limits.d/shimpy.conf"
    if limit == resource.RLIM_INFINITY:
        return Finding(check="locked memory", verdict="ok", detail="unlimited")
    detail = f"at most {format_bytes(limit)} of {format_bytes(total_bytes)}"
    if not has_gpu:
        return Finding(check="locked memory", verdict="ok", detail=f"{detail}; no card needs it")
    return Finding(
        check="locked memory",
        verdict="warning",
        detail=f"{detail}: experts in RAM may be slow to prefill",
        remedy=remedy,
    )


def _service_limit() -> int | None:
    """Return the bytes that the service may lock, which no shell's limit tells; None: no service.

    Source: systemd.exec(5), LimitMEMLOCK=.
    """
    argv = ["systemctl", "show", "--value", "--property=LimitMEMLOCK", f"{SERVICE_USER}.service"]
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True)  # noqa: S603
        text = done.stdout.strip()
        return resource.RLIM_INFINITY if text == "infinity" else int(text)
    except (OSError, ValueError):
        return None


def check_port(bind: str) -> Finding:
    """Look whether the daemon's address is free, or the daemon is there already."""
    check = f"address {bind}"
    if bind.startswith(UNIX):
        folder = Path(bind.removeprefix(UNIX)).parent
        can = os.access(folder, os.W_OK | os.X_OK)
        return Finding(
            check=check,
            verdict="ok" if can else "failed",
            detail=f"{folder} can be written" if can else f"{folder} can't be written",
            remedy="" if can else f"sudo install -d -o $USER '{folder}'",
        )
    host, _, port = bind.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host.strip("[]"), int(port)))
        except OSError as error:
            return _port_taken(check, bind, error)
    return Finding(check=check, verdict="ok", detail="it is free; no daemon runs there")


def check_hub(config: Config) -> Finding:
    """Look whether the hub answers, unless the network is not to be used."""
    if config.offline:
        return Finding(check="hub", verdict="ok", detail="not asked: offline is set")
    import httpx

    from shimpy.registry.hub import endpoint

    url = endpoint()
    try:
        answer = httpx.head(url, timeout=5.0, follow_redirects=True)
    except (httpx.HTTPError, ValueError) as error:
        return Finding(
            check="hub",
            verdict="warning",
            detail=f"{url} can't be reached ({error}); models that are here work all the same",
            remedy="export HTTPS_PROXY=http://proxy:port  # or: offline = true",
        )
    return Finding(check="hub", verdict="ok", detail=f"{url} answers ({answer.status_code})")


def _port_taken(check: str, bind: str, error: OSError) -> Finding:
    if error.errno != errno.EADDRINUSE:
        reason = error.strerror or str(error)
        return Finding(
            check=check,
            verdict="failed",
            detail=reason,
            remedy="shimpy serve --bind 127.0.0.1:11435",
        )
    import httpx

    try:
        answer = httpx.get(f"http://{bind}/api/version", timeout=_ANSWER_S, trust_env=False)
        version = answer.json()["shimpy"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return Finding(
            check=check,
            verdict="warning",
            detail="something listens there that does not answer as a daemon does",
            remedy=f"sudo ss -lptn 'sport = :{bind.rpartition(':')[2]}'",
        )
    return Finding(check=check, verdict="ok", detail=f"a daemon of version {version} answers")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return True


def _first_unreadable(folder: Path) -> Path | None:
    if not os.access(folder, os.R_OK | os.X_OK):
        return folder
    for path, folders, files in os.walk(folder):
        for name in folders:
            below = Path(path, name)
            if not os.access(below, os.R_OK | os.X_OK):
                return below
        for name in files:
            if name.endswith(".gguf") and not os.access(Path(path, name), os.R_OK):
                return Path(path, name)
    return None


def _device_files() -> list[Path]:
    names = ("nvidiactl", "nvidia-uvm", "nvidia[0-9]*", "kfd", "dri/render*")
    return [path for name in names for path in sorted(Path("/dev").glob(name))]
