"""Settings of one worker: its command line and the variables ``LLM_WORKER_*``.

Ours are few and start with ``--worker-``; everything else on the command line is vLLM's and passes
through verbatim. A setting is a row of the table and a field of the values, no more. Nothing here
imports vLLM, nor prometheus_client, which looks for its multiprocess directory when it is first
imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_worker.errors import ConfigError
from llm_worker.settings import endpoint, ports, vllm_arguments
from llm_worker.settings import setting as rows
from llm_worker.settings.endpoint import REPLAY_OFFSET, Endpoint
from llm_worker.settings.ports import Listener

ENV_PREFIX = "LLM_WORKER_"
FLAG_PREFIX = "--worker-"
TINY = "tiny"
# Written by the worker itself for its child processes, not a setting.
INTERNAL_ENV = frozenset({"LLM_WORKER_PARENT_PID"})
_COMMANDS = {
    "--check-config": "print the resolved configuration and don't start",
    "--dump-config-to FILE": "write it to FILE and start",
}


@dataclass(frozen=True, slots=True)
class GoodputTargets:
    """A request counts as goodput when it meets all three, in seconds."""

    ttft_seconds: float = 1.0  # arrival to first token
    tpot_seconds: float = 0.1  # mean time per output token after the first
    e2e_seconds: float = 30.0  # arrival to last token


@dataclass(frozen=True, slots=True)
class KvEvents:
    """Ports of vLLM's KV-event publisher; rank *n* uses port + *n*."""

    port: int
    replay_port: int


@dataclass(frozen=True, slots=True)
class KvIndex:
    """The index of the engine's KV blocks, and where its events go on to."""

    plane: Endpoint | None  # None: nowhere
    max_blocks: int | None  # of all ranks
    connector: Endpoint | None = None  # rank 0's own events of an offloading connector: merged


@dataclass(frozen=True, slots=True)
class Config:
    """The resolved settings of one worker."""

    model: str | None  # a name, a path or "tiny"; None leaves the choice to vLLM's own options
    engine_args: tuple[str, ...]  # vLLM's, verbatim, --model and the positional model taken out
    system_host: str
    system_port: int  # 0: any free port
    system_token_file: Path | None
    namespace: str
    component: str
    kv_events: KvEvents | None
    kv_index: KvIndex | None  # None: the engine publishes no KV events
    worker_id: str | None  # None: host name and system port
    multiproc_dir: str | None  # a directory, "auto", or None: single process
    log_format: str  # one of `setting.LOG_FORMATS`
    log_level: str  # one of `setting.LOG_LEVELS`
    lame_duck_seconds: float  # unready, but new connections are still accepted
    drain_seconds: float
    goodput: GoodputTargets
    state_dir: Path | None

    @property
    def constant_labels(self) -> dict[str, str]:
        """Labels that every exported series carries."""
        labels = {"llm_namespace": self.namespace, "llm_component": self.component}
        return {name: value for name, value in labels.items() if value}

    @property
    def open_to_others(self) -> bool:
        """Whether the system server listens beyond this machine."""
        return not rows.is_loopback(self.system_host)

    def token(self) -> str | None:
        """The bearer token, read now; None when no token file is set."""
        if self.system_token_file is None:
            return None
        return self.system_token_file.read_text(encoding="utf-8").strip()

    def to_json(self) -> str:
        """The resolved configuration, without secrets."""
        values = dataclasses.asdict(self)
        if self.kv_index is not None:
            plane, connector = self.kv_index.plane, self.kv_index.connector
            values["kv_index"]["plane"] = None if plane is None else str(plane)
            values["kv_index"]["connector"] = None if connector is None else connector.to_dict()
        return json.dumps(values, indent=2, default=str) + "\n"


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line asked for."""

    config: Config
    check_only: bool  # --check-config
    dump_to: Path | None  # --dump-config-to FILE
    vllm_help: bool  # --help=..., --version and so on stand among vLLM's arguments
    warnings: tuple[str, ...]  # to be logged


class Setting(rows.Setting):
    """One of our settings: "system-port" is --worker-system-port and LLM_WORKER_SYSTEM_PORT."""

    flag_prefix = FLAG_PREFIX
    env_prefix = ENV_PREFIX


def _goodput(text: str) -> GoodputTargets:
    targets: dict[str, float] = {}
    for part in text.split(","):
        objective, _, value = part.strip().partition("=")
        if objective not in ("ttft", "tpot", "e2e"):
            raise ValueError(f"{part!r}: write ttft=1.0,tpot=0.1,e2e=30 (seconds, above 0)")
        targets[f"{objective}_seconds"] = rows.seconds_above_zero(value)
    return GoodputTargets(**targets)


def _multiproc_dir(text: str) -> str:
    if text != "auto" and not Path(text).is_dir():
        raise ValueError(f"{text} is not a directory: create it, or use auto")
    return text


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "model",
        "",
        "model when vLLM's --model is not given; `tiny` makes one on the spot",
        rows.optional(str),
    ),
    Setting("system-host", "127.0.0.1", "address of the system server", rows.host),
    Setting(
        "system-port",
        "8081",
        "port of the system server; 0 takes any free one",
        rows.port_or_zero,
    ),
    Setting(
        "system-token-file",
        "",
        "file with the bearer token that writing routes ask for",
        rows.optional(rows.token_file),
    ),
    Setting(
        "namespace",
        "",
        "value of the label llm_namespace on every series; empty: no label",
        rows.label,
    ),
    Setting(
        "component",
        "",
        "value of the label llm_component on every series; empty: no label",
        rows.label,
    ),
    Setting(
        "kv-events-port",
        "",
        "publish KV-cache events on this port + rank; empty: off",
        rows.optional(rows.port),
    ),
    Setting(
        "kv-replay-port",
        "",
        "replay of KV-cache events, + rank; empty: events port + 100",
        rows.optional(rows.port),
    ),
    Setting(
        "kv-plane",
        "zmq://127.0.0.1:20280",
        "where indexed KV events go; or `nats://HOST:4222`, `off`",
        endpoint.plane,
    ),
    Setting(
        "kv-connector-events",
        "",
        "`HOST:PORT[,replay=PORT]` of an offloading connector's own KV events, + rank: merged",
        rows.optional(endpoint.connector),
    ),
    Setting(
        "kv-max-blocks",
        "",
        "blocks that the KV index holds at most; empty: no bound",
        rows.optional(rows.count),
    ),
    Setting(
        "id",
        "",
        "name of this worker among others; empty: host name and system port",
        rows.optional(rows.name),
    ),
    Setting(
        "multiproc-dir",
        "",
        "prometheus_client's multiprocess directory; `auto` makes one",
        rows.optional(_multiproc_dir),
        inherits="PROMETHEUS_MULTIPROC_DIR",
    ),
    Setting("log-format", "text", "`text` or `json`", rows.choice(*rows.LOG_FORMATS)),
    Setting(
        "log-level", "info", "`debug`, `info`, `warning` or `error`", rows.choice(*rows.LOG_LEVELS)
    ),
    Setting(
        "lame-duck-seconds",
        "0",
        "how long new requests are still taken after SIGTERM, while `/ready` says no",
        rows.seconds,
    ),
    Setting(
        "drain-seconds",
        "30",
        "how long in-flight requests may take after SIGTERM",
        rows.seconds,
    ),
    Setting("goodput", "ttft=1.0,tpot=0.1,e2e=30", "targets in seconds, met jointly", _goodput),
    Setting(
        "state-dir",
        "",
        "directory that remembers how the last run ended; empty: off",
        rows.optional(rows.directory),
    ),
)


def load(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Command:
    """Resolve the settings from ``arguments`` (without the program) and the environment.

    Raises:
        ConfigError: something is wrong; carries every problem, each naming its fix.
    """
    environment = os.environ if environment is None else environment
    reader = rows.Reader(
        SETTINGS,
        arguments,
        environment,
        commands=_COMMANDS,
        not_ours=vllm_arguments.THEIRS | INTERNAL_ENV,
    )
    problems = reader.problems
    model, theirs = vllm_arguments.take_model(reader.rest, problems)
    problems += vllm_arguments.spelled_out_problems(theirs)
    vllm_help = vllm_arguments.asks_for_help(theirs)

    values: dict[str, Any] = reader.values
    values["model"] = model or values["model"]
    values["engine_args"] = tuple(theirs)
    values["worker_id"] = values["id"]
    values["kv_events"] = _kv_events(reader, theirs)
    values["kv_index"] = _kv_index(reader, theirs)
    config = Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})

    if not (vllm_help or config.model or vllm_arguments.option(theirs, "--config") is not None):
        problems.append(
            "no model: give --model NAME (or LLM_WORKER_MODEL); --model tiny needs no download"
        )
    problems += ports.problems(_listeners(config, reader.bad, theirs, problems))
    if problems:
        raise ConfigError(problems)
    dump_to = reader.commands.get("--dump-config-to")
    return Command(
        config,
        check_only="--check-config" in reader.commands,
        dump_to=None if dump_to is None else Path(dump_to),
        vllm_help=vllm_help,
        warnings=tuple(reader.warnings),
    )


def goodput_from_env(environment: Mapping[str, str] | None = None) -> GoodputTargets:
    """The goodput targets of a plain ``vllm serve`` that loads our stat logger as a plugin.

    Looks at no other variable: whatever else is wrong there is no matter of the plugin's.

    Raises:
        ConfigError: LLM_WORKER_GOODPUT cannot be parsed.
    """
    environment = os.environ if environment is None else environment
    (setting,) = (setting for setting in SETTINGS if setting.name == "goodput")
    reader = rows.Reader([setting], (), environment, commands=())
    if reader.problems:
        raise ConfigError(reader.problems)
    targets: GoodputTargets = reader.values["goodput"]
    return targets


def parent_pid_from_env() -> int | None:
    """The worker that started this engine process; None in any other process."""
    value = os.environ.get("LLM_WORKER_PARENT_PID", "")
    return int(value) if value.isdecimal() else None


def cache_directory(environment: Mapping[str, str] | None = None) -> Path:
    """Where files live that can be made again; made below the temporary directory without a home.

    Raises:
        ConfigError: what is there below the temporary directory may be somebody else's.
    """
    environment = os.environ if environment is None else environment
    base = environment.get("XDG_CACHE_HOME") or environment.get("HOME")
    if base and os.access(base, os.W_OK):
        root = Path(base) if environment.get("XDG_CACHE_HOME") else Path(base) / ".cache"
        return root / "llm-worker"
    return _own_directory(Path(tempfile.gettempdir()) / f"llm-worker-{os.getuid()}")


def _own_directory(path: Path) -> Path:
    """A directory at a name that anybody can guess, and that nobody else can write to."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError([f"cannot make {path}: {error}: set XDG_CACHE_HOME"]) from error
    if found.st_uid != os.getuid() or found.st_mode != stat.S_IFDIR | 0o700:
        fix = "remove it, or set XDG_CACHE_HOME to a directory of your own"
        raise ConfigError([f"{path} is not a directory of ours with mode 0700: {fix}"])
    return path


def help_text() -> str:
    """The table of our settings."""
    usage = """\
usage: python -m llm_worker [--worker-... VALUE] [vLLM engine and server arguments]

Runs vLLM in this process, serves vLLM's own API (--port, 8000) and a system server
(/live /ready /health /version /metrics /engine/info). Each flag can also be set in
the environment: --worker-system-port is LLM_WORKER_SYSTEM_PORT. A flag wins.
"""
    theirs = "vLLM's own options: --help=all, --help=ModelConfig and so on.\n"
    return rows.help_text(usage, SETTINGS, _COMMANDS) + theirs


def _kv_events(reader: rows.Reader, theirs: Sequence[str]) -> KvEvents | None:
    port, replay_port = reader.values["kv_events_port"], reader.values["kv_replay_port"]
    if port is None:
        if replay_port is not None:
            reader.problem("kv_replay_port", "needs --worker-kv-events-port as well")
        return None
    if vllm_arguments.option(theirs, "--kv-events-config") is not None:
        reader.problem(
            "kv_events_port", "vLLM's --kv-events-config sets the KV events as well: keep one"
        )
    return KvEvents(port, replay_port or port + REPLAY_OFFSET)


def _kv_index(reader: rows.Reader, theirs: Sequence[str]) -> KvIndex | None:
    values = reader.values
    asked = values["kv_events_port"] is not None or "kv_events_port" in reader.bad
    if not asked and vllm_arguments.option(theirs, "--kv-events-config") is None:
        for field in ("kv_max_blocks", "kv_connector_events"):
            if values[field] is not None:
                reader.problem(field, "there is no index without --worker-kv-events-port")
        return None
    return KvIndex(values["kv_plane"], values["kv_max_blocks"], values["kv_connector_events"])


def _listeners(
    config: Config, bad: set[str], theirs: Sequence[str], problems: list[str]
) -> list[Listener]:
    """Whatever will listen in this worker, as far as the command line tells."""
    found: list[Listener] = []
    option, number = vllm_arguments.option, vllm_arguments.number
    ranks = number(theirs, "--data-parallel-size", "-dp", default=1, problems=problems)
    if option(theirs, "--uds") is None and option(theirs, "--config") is None:
        port = number(theirs, "--port", default=vllm_arguments.DEFAULT_PORT, problems=problems)
        host = (option(theirs, "--host") or "").strip("[]")
        found.append(Listener("the API (--port)", host, port))
    if not bad & {"system_host", "system_port"}:
        what = f"the system server ({FLAG_PREFIX}system-port)"
        found.append(Listener(what, config.system_host, config.system_port))
    if config.kv_events is not None and "kv_replay_port" not in bad:
        events, replay = config.kv_events.port, config.kv_events.replay_port
        found.append(Listener(f"the KV events ({FLAG_PREFIX}kv-events-port)", "*", events, ranks))
        found.append(Listener("the replay of the KV events", "*", replay, ranks))
    plane = None if config.kv_index is None else config.kv_index.plane
    if plane is not None and plane.kind == "zmq" and "kv_plane" not in bad:
        found.append(Listener(f"the KV plane ({FLAG_PREFIX}kv-plane)", plane.host, plane.port))
        found.append(Listener("the replay of the KV plane", plane.host, plane.replay_port or 0))
    return found
