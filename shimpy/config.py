"""The daemon's settings: defaults, then the config file, then SHIMPY_*, then flags.

Only this module reads the environment. A Config is frozen; a reload makes a new one. Each
setting is described once, in Config: its default, how it is read, and what it does; the
flags of `shimpy serve`, `shimpy config` and docs/config.md follow from there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields  # noqa: TID251 - settings have metadata
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from shimpy.errors import InvalidOptionError, suggest
from shimpy.units import GIB, MIB
from shimpy.values import (
    DEFAULT_BIND,
    DEFAULT_PORT,
    TOOLS,
    UNIX,
    Parser,
    Tool,
    parse_bind,
    parse_choice,
    parse_file,
    parse_folder,
    parse_int,
    parse_keep_alive,
    parse_model,
    parse_models,
    parse_origins,
    parse_pause,
    parse_seconds,
    parse_size,
    parse_stores,
    parse_switch,
    split_paths,
)

SYSTEM_CONFIG = Path("/etc/shimpy/config.toml")
APP = "shimpy"

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]
CpuMoeSetting = Literal["auto", "on", "off"]
KvSetting = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
LoadSetting = Literal["mmap", "locked"]


def _setting(default: Any, parse: Parser, metavar: str, help_text: str) -> Any:
    return field(default=default, metadata={"parse": parse, "metavar": metavar, "help": help_text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting, each under the name that it has in the config file."""

    bind: str = _setting(
        DEFAULT_BIND,
        parse_bind,
        "ADDRESS",
        "Address and port, or unix:/path, that the HTTP API listens on.",
    )
    insecure: bool = _setting(
        False,  # noqa: FBT003 - a default like the others
        parse_switch,
        "[on|off]",
        "Let other machines in without an API key.",
    )
    origins: tuple[str, ...] = _setting(
        (),
        parse_origins,
        "ORIGINS",
        "Web pages that may use the API besides this machine's own: https://chat.example, "
        "chrome-extension://*, or * for all.",
    )
    tls_cert: Path | None = _setting(
        None, parse_file, "FILE", "Certificate, with its chain, for HTTPS; with tls_key."
    )
    tls_key: Path | None = _setting(
        None, parse_file, "FILE", "The certificate's key, without a passphrase."
    )
    max_connections: int = _setting(
        1024, parse_int(1), "N", "Connections at once; one more is hung up on."
    )
    model_dirs: tuple[Path, ...] = _setting(
        (), split_paths, "DIR", "Folders of GGUF files, searched with their sub-folders."
    )
    stores: tuple[Tool, ...] = _setting(
        TOOLS,
        parse_stores,
        "TOOLS",
        "Other tools whose models are used where they lie: all, none, or some of them.",
    )
    default_model: str = _setting(
        "",
        parse_model,
        "MODEL",
        "Model of requests that name none, unless only one is loaded (llama.cpp's own clients).",
    )
    offline: bool = _setting(
        False,  # noqa: FBT003 - a default, not an argument
        parse_switch,
        "[on|off]",
        "Use no network: refuse to pull models.",
    )
    cpu_moe: CpuMoeSetting = _setting(
        "auto",
        parse_choice(*get_args(CpuMoeSetting)),
        "[auto|on|off]",
        "Keep experts in RAM: as free VRAM asks (auto), all (on) or none (off).",
    )
    n_cpu_moe: int | None = _setting(
        None,
        parse_int(0),
        "N",
        "Keep the experts of the first N layers in RAM; wins over cpu_moe.",
    )
    keep_alive: float = _setting(
        300.0, parse_keep_alive, "TIME", "How long an idle model stays loaded; negative: forever."
    )
    pinned: tuple[str, ...] = _setting(
        (),
        parse_models,
        "MODELS",
        "Models that stay loaded, once they are, whoever needs their memory, and past keep_alive.",
    )
    replan_interval: float = _setting(
        5.0,
        parse_seconds,
        "TIME",
        "How often free memory is looked at while models are loaded, to place them anew; 0: never.",
    )
    n_ctx: int | None = _setting(
        None,
        parse_int(1),
        "N",
        "Context of a model in tokens, shared by its slots, or of each on a CPU with RAM to spare; "
        "by model and memory when not set.",
    )
    n_slots: int | None = _setting(
        None,
        parse_int(1),
        "N",
        "Requests that one model serves at once; by model and memory when not set.",
    )
    kv_type: KvSetting | None = _setting(
        None, parse_choice(*get_args(KvSetting)), "TYPE", "Type of the KV cache; f16 when not set."
    )
    load_mode: LoadSetting | None = _setting(
        None,
        parse_choice(*get_args(LoadSetting)),
        "[mmap|locked]",
        "Map a model's file, or hold its weights in RAM for good, page-locked for a GPU; "
        "locked where experts pass through a GPU and there is room, when not set.",
    )
    n_threads: int | None = _setting(
        None, parse_int(1), "N", "Threads of one worker; by cores and busy workers when not set."
    )
    spare_worker: bool = _setting(
        True,  # noqa: FBT003 - a default, not an argument
        parse_switch,
        "[on|off]",
        "Keep a worker process ready, so that a load need not start one.",
    )
    max_queue: int = _setting(
        512, parse_int(0), "N", "Requests that may wait for one model; one more gets a 503."
    )
    load_timeout: float = _setting(
        600.0, parse_seconds, "TIME", "How long a model may take to load."
    )
    hang_timeout: float = _setting(
        900.0,
        parse_seconds,
        "TIME",
        "How long a worker may say nothing while requests wait for it, before it is ended.",
    )
    drain_timeout: float = _setting(
        30.0, parse_seconds, "TIME", "How long running requests may take when the daemon stops."
    )
    idle_exit: float = _setting(
        math.inf,
        parse_pause,
        "TIME",
        "End the daemon after so long without a request or a loaded model; negative: never.",
    )
    max_body: int = _setting(64 * MIB, parse_size, "SIZE", "Size of a request's body at most.")
    reserve_vram: int = _setting(
        0, parse_size, "SIZE", "VRAM per GPU that is left to other programs."
    )
    reserve_ram: int = _setting(
        512 * MIB, parse_size, "SIZE", "RAM that is left to other programs."
    )
    prefix_cache_size: int = _setting(
        2 * GIB,
        parse_size,
        "SIZE",
        "Disk for the KV caches of unloaded models, which hold prompts; 0: nothing is kept.",
    )
    parked_cache_size: int = _setting(
        1 * GIB,
        parse_size,
        "SIZE",
        "RAM for each model's caches of earlier prompts, where they would slow down others in the "
        "KV cache (on CPUs); of all models together at most a quarter of what is left; 0: none.",
    )
    log_level: LogLevel = _setting(
        "info",
        parse_choice(*get_args(LogLevel)),
        "LEVEL",
        "The least important lines that are logged.",
    )
    log_format: LogFormat = _setting(
        "auto",
        parse_choice(*get_args(LogFormat)),
        "[auto|console|json]",
        "Log lines for people (console), machines (json), or by where they go (auto).",
    )
    log_file: Path | None = _setting(
        None,
        parse_file,
        "FILE",
        "File that gets the log, at most 16 MiB and as much of what was before; stderr when not "
        "set.",
    )
    state_dir: Path = _setting(Path(), parse_folder, "DIR", "Folder of the index and the logs.")
    cache_dir: Path = _setting(Path(), parse_folder, "DIR", "Folder of what can be made again.")
    data_dir: Path = _setting(Path(), parse_folder, "DIR", "Folder of pulled models.")

    @property
    def prefix_dir(self) -> Path:
        """Where the KV caches of unloaded models are kept: prompts, in a way."""
        return self.cache_dir / "prefixes"


class LoadedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A Config and, for each setting, where its value came from."""

    config: Config
    origins: Mapping[str, str]


SETTINGS: Mapping[str, Parser] = {
    setting.name: setting.metadata["parse"] for setting in fields(Config)
}


HELP: Mapping[str, str] = {setting.name: setting.metadata["help"] for setting in fields(Config)}
METAVARS: Mapping[str, str] = {
    setting.name: setting.metadata["metavar"] for setting in fields(Config)
}


def load_config(
    *,
    flags: Mapping[str, Any] | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Return the settings from all their sources, the later winning.

    Args:
        flags: what the command line gave; None values are not given.
        file: read instead of the system's and the user's config files; that of SHIMPY_CONFIG,
            if it is set, when None.
        environ: the environment; os.environ when None.

    Raises:
        InvalidOptionError: a file that can't be read, an unknown key, or a bad value; the
            message names the source.
    """
    env = os.environ if environ is None else environ
    folders = _folders(env)
    values: dict[str, Any] = {
        "state_dir": folders["state"],
        "cache_dir": folders["cache"],
        "data_dir": folders["data"],
        "model_dirs": (folders["data"] / "models", Path.home() / "models"),
    }
    origins = dict.fromkeys(SETTINGS, "default")
    if file is None and env.get("SHIMPY_CONFIG"):
        file = Path(env["SHIMPY_CONFIG"]).expanduser()
    files = [file] if file else [SYSTEM_CONFIG, folders["config"] / "config.toml"]
    for path in files:
        if file is not None or path.is_file():
            _take(values, origins, _read_toml(path), str(path))
    _take(values, origins, _from_environ(env), "environment")
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    _take(values, origins, given, "flag")
    return LoadedConfig(config=Config(**values), origins=origins)


def client_url(environ: Mapping[str, str] | None = None) -> str:
    """Return the daemon's URL for client commands: SHIMPY_HOST, or where it would listen here.

    SHIMPY_HOST takes host, host:port, scheme://host:port and unix:/path; an address that means "all
    interfaces" is reached over loopback.

    Raises:
        InvalidOptionError: SHIMPY_HOST is no address.
    """
    env = os.environ if environ is None else environ
    text = env.get("SHIMPY_HOST", "").strip() or _own_address(env)
    if text.startswith(UNIX):
        return text
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError:
        port = None
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise InvalidOptionError(
            f"SHIMPY_HOST is {text!r}; write it like {DEFAULT_BIND} or http://host:port"
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname, parts.hostname)  # noqa: S104
    shown = f"[{host}]" if ":" in host else host
    default = {"http": DEFAULT_PORT, "https": 443}[parts.scheme]
    if "://" in text and parts.scheme == "http" and port is None:
        default = 80
    return f"{parts.scheme}://{shown}:{port or default}{parts.path.rstrip('/')}"


def _own_address(env: Mapping[str, str]) -> str:
    """Return the address that a daemon with this machine's settings listens on."""
    try:
        config = load_config(environ=env).config
    except (InvalidOptionError, OSError):
        # Commands that read the settings say what is wrong with them; the system's may be in a
        # folder that is closed to others.
        return DEFAULT_BIND
    if config.bind.startswith(UNIX):
        return config.bind
    return f"https://{config.bind}" if config.tls_cert else config.bind


def client_key(environ: Mapping[str, str] | None = None) -> str:
    """Return the API key of client commands: SHIMPY_API_KEY; "": none."""
    return (os.environ if environ is None else environ).get("SHIMPY_API_KEY", "").strip()


def config_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder of the user's config file."""
    return _folders(os.environ if environ is None else environ)["config"]


def user_config_home(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder of all programs' config files: XDG_CONFIG_HOME or ~/.config."""
    env = os.environ if environ is None else environ
    return Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME") or Path.home()) / ".config")


def _folders(env: Mapping[str, str]) -> dict[str, Path]:
    home = env.get("SHIMPY_HOME")
    if home:
        base = Path(home).expanduser().absolute()
        return {kind: base / kind for kind in ("config", "state", "cache", "data")}
    import platformdirs

    return {
        "config": platformdirs.user_config_path(APP),
        "state": platformdirs.user_state_path(APP),
        "cache": platformdirs.user_cache_path(APP),
        "data": platformdirs.user_data_path(APP),
    }


def tool_folders(environ: Mapping[str, str] | None = None) -> dict[Tool, tuple[Path, ...]]:
    """Return where other tools keep their models, by their own variables and habits.

    The folders may not be there. Sources: huggingface_hub constants.py; llama.cpp
    common/hf-cache.cpp and common.cpp (fs_get_cache_directory); ollama envconfig/config.go;
    lmstudio.js findLMStudioHome.ts; ramalama config.py.
    """
    env = os.environ if environ is None else environ
    home = Path(env.get("HOME") or Path.home())
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    data = home / ".local" / "share"
    llama_cache = _env_paths(env, "LLAMA_CACHE")
    hub = _env_paths(env, "HF_HUB_CACHE") or _env_paths(env, "HUGGINGFACE_HUB_CACHE")
    hub = hub or tuple(path / "hub" for path in _env_paths(env, "HF_HOME"))
    ollama = _env_paths(env, "OLLAMA_MODELS") or (home / ".ollama" / "models",)
    found: dict[Tool, tuple[Path, ...]] = {
        # llama.cpp keeps its downloads in the same layout, in a folder of its own if asked to.
        "huggingface": (*(hub or (cache / "huggingface" / "hub",)), *llama_cache),
        "ollama": (*ollama, Path("/usr/share/ollama/.ollama/models")),
        "lmstudio": _lmstudio_folders(home),
        "llama.cpp": llama_cache
        or (cache / "llama.cpp", home / "Library" / "Caches" / "llama.cpp"),
        "ramalama": _env_paths(env, "RAMALAMA_STORE")
        or (data / "ramalama", Path("/var/lib/ramalama")),
    }
    return {tool: tuple(dict.fromkeys(paths)) for tool, paths in found.items()}


def _env_paths(env: Mapping[str, str], name: str) -> tuple[Path, ...]:
    value = env.get(name)
    return (Path(value).expanduser().absolute(),) if value else ()


def _lmstudio_folders(home: Path) -> tuple[Path, ...]:
    """Return LM Studio's model folders: the one that it is set to, and the older usual one."""
    base = home / ".lmstudio"
    chosen: tuple[Path, ...] = ()
    try:
        pointed = (home / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip()
        base = Path(pointed) if pointed else base
        settings = json.loads((base / "settings.json").read_text(encoding="utf-8"))
        chosen = (Path(settings["downloadsFolder"]),)
    except (OSError, ValueError, KeyError, TypeError):
        # Not installed, or nothing chosen.
        pass
    return (*chosen, base / "models", home / ".cache" / "lm-studio" / "models")


def _read_toml(path: Path) -> dict[str, Any]:
    import tomli

    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidOptionError(f"can't read the config file {path}: {error.strerror}") from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidOptionError(f"the config file {path} is not valid TOML: {error}") from error


# Names of the environment that are no settings: where things are, not how they behave.
_OTHER_VARIABLES = {"SHIMPY_HOME", "SHIMPY_HOST", "SHIMPY_CONFIG", "SHIMPY_API_KEY"}


def _from_environ(env: Mapping[str, str]) -> dict[str, str]:
    return {
        key.removeprefix("SHIMPY_").lower(): value
        for key, value in env.items()
        if key.startswith("SHIMPY_") and key not in _OTHER_VARIABLES and value != ""
    }


def _variable(setting: str) -> str:
    return f"SHIMPY_{setting.upper()}"


def _take(
    values: dict[str, Any], origins: dict[str, str], given: Mapping[str, Any], source: str
) -> None:
    for key, value in given.items():
        shown = {"environment": _variable(key), "flag": f"--{key.replace('_', '-')}"}
        where = shown.get(source, f"{key} in {source}")
        if key not in SETTINGS and isinstance(value, dict):
            raise InvalidOptionError(f"[{key}] in {source}: settings stand alone, in no table")
        if key not in SETTINGS:
            known = [*map(_variable, SETTINGS), *_OTHER_VARIABLES]
            near = suggest(where, known) if source == "environment" else suggest(key, SETTINGS)
            raise InvalidOptionError(f"{where}: there is no such setting; {near}")
        try:
            values[key] = SETTINGS[key](value)
        except InvalidOptionError as error:
            raise InvalidOptionError(f"{where}: {error.message}", option=key) from None
        origins[key] = shown.get(source, source)
