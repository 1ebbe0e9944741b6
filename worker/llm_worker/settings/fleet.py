"""Settings of the fleet service: its command line and the variables ``KV_INDEX_*``.

A program of its own beside the worker, so a reader of its own; a flag wins over its variable. Every
problem is collected and they are reported together. Never connects to anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from llm_worker.errors import ConfigError
from llm_worker.settings import setting as rows

ENV_PREFIX = "KV_INDEX_"
_PORTS = range(1, 65536)
_SYNTAX = (
    "write zmq://HOST:PORT[,replay=PORT] for a worker's plane, "
    "vllm://HOST:PORT[,replay=PORT][,worker=NAME][,ranks=N][,topic=TOPIC] for a vLLM server, "
    "or nats://HOST:PORT"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where events come from: one ``--source``."""

    kind: str  # "zmq", "vllm" or "nats"
    host: str
    port: int  # vllm: of rank 0
    replay_port: int | None = None  # vllm: of rank 0; None: nobody to ask
    worker: str = ""  # vllm: its name; a plane says it itself
    ranks: int = 1  # vllm
    topic: str = ""  # vllm
    url: str = ""  # nats: with credentials

    def __str__(self) -> str:
        return f"{self.kind}://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """The resolved settings of one fleet service."""

    sources: tuple[Endpoint, ...]
    host: str
    port: int  # 0: any free port
    max_blocks: int | None
    gone_seconds: float
    resolve_seconds: float
    log_format: str  # "text" or "json"

    def to_json(self) -> str:
        """The configuration, without secrets."""
        values: dict[str, Any] = dataclasses.asdict(self)
        values["sources"] = [
            {key: value for key, value in dataclasses.asdict(source).items() if key != "url"}
            for source in self.sources
        ]
        return json.dumps(values, indent=2) + "\n"


class Setting(rows.Setting):
    """One flag and its variable."""

    env_prefix = ENV_PREFIX

    @property
    def env(self) -> str:
        """The environment spelling."""
        return super().env + ("S" if self.name == "source" else "")


SETTINGS = (
    Setting("source", "", "where events come from; once for each, or several in one variable"),
    Setting("host", "127.0.0.1", "address to serve on"),
    Setting("port", "8082", "port to serve on; 0 takes any free one"),
    Setting("max-blocks", "", "blocks that all workers' indexes hold together; empty: no bound"),
    Setting("gone-seconds", "300", "how long a worker may be away before its blocks are forgotten"),
    Setting("resolve-seconds", "10", "how often host names are looked up again"),
    Setting("log-format", "text", "`text` or `json`"),
)


def load(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[FleetConfig, bool]:
    """The settings, and whether they were only to be checked.

    Raises:
        ConfigError: something is wrong; carries every problem, each naming its fix.
        SystemExit: ``--help`` was asked for.
    """
    environment = os.environ if environment is None else environment
    problems: list[str] = []
    given = _parse(arguments, problems)
    known = {setting.env for setting in SETTINGS}
    problems += [
        f"unknown environment variable {name}: choose from {', '.join(sorted(known))}"
        for name in environment
        if name.startswith(ENV_PREFIX) and name not in known
    ]

    def read(name: str, convert: Callable[[str], T], fallback: T) -> T:
        setting = next(each for each in SETTINGS if each.name == name)
        text = given.get(name) or environment.get(setting.env) or setting.default
        try:
            return convert(text)
        except ValueError as error:
            problems.append(f"{setting.flag} ({setting.env}): {error}")
            return fallback

    sources: list[Endpoint] = []
    texts = given["source"] or (environment.get(ENV_PREFIX + "SOURCES") or "").split()
    for text in texts:
        try:
            sources.append(endpoint(text))
        except ValueError as error:
            problems.append(f"--source ({ENV_PREFIX}SOURCES): {error}")
    if not texts:
        problems.append(f"no --source ({ENV_PREFIX}SOURCES): {_SYNTAX}")
    names = [source.worker for source in sources if source.kind == "vllm"]
    problems += [
        f"--source: two vLLM servers are called {name!r}: give them different worker= names"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    config = FleetConfig(
        sources=tuple(dict.fromkeys(sources)),
        host=read("host", rows.host, ""),
        port=read("port", _port_or_zero, 0),
        max_blocks=read("max-blocks", rows.count, None),
        gone_seconds=read("gone-seconds", _seconds, 0.0),
        resolve_seconds=read("resolve-seconds", _seconds, 0.0),
        log_format=read("log-format", _log_format, ""),
    )
    if problems:
        raise ConfigError(problems)
    return config, bool(given["check_config"])


def endpoint(text: str) -> Endpoint:
    """What one ``--source`` says.

    Raises:
        ValueError: it cannot be one; says what can.
    """
    address, *options = text.split(",")
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("zmq", "vllm", "nats", "tls") or not parts.hostname or port is None:
        raise ValueError(f"{_shown(text)!r} is no source: {_SYNTAX}")
    if parts.path or parts.query or port not in _PORTS:
        raise ValueError(f"{_shown(text)!r} is no source: {_SYNTAX}")
    values = dict(_option(option) for option in options)
    allowed = {"zmq": {"replay"}, "vllm": {"replay", "worker", "ranks", "topic"}}
    unknown = sorted(set(values) - allowed.get(parts.scheme, set()))
    if unknown:
        raise ValueError(f"{_shown(text)!r}: unknown option {', '.join(unknown)}; {_SYNTAX}")
    if parts.scheme in ("nats", "tls"):
        return Endpoint("nats", parts.hostname, port, url=address)
    replay = rows.port(values["replay"]) if "replay" in values else None
    if parts.scheme == "zmq":
        return Endpoint("zmq", parts.hostname, port, replay or port + rows.PLANE_REPLAY_OFFSET)
    ranks = rows.count(values.get("ranks", "1")) or 1
    if port + ranks - 1 not in _PORTS or (replay is not None and replay + ranks - 1 not in _PORTS):
        raise ValueError(f"{text!r}: rank {ranks - 1} would be beyond port 65535")
    worker = values.get("worker") or f"{parts.hostname}:{port}"
    return Endpoint("vllm", parts.hostname, port, replay, worker, ranks, values.get("topic", ""))


def help_text() -> str:
    """The table of settings."""
    return "\n".join(
        [
            "usage: python -m llm_worker.fleet --source SOURCE [--source SOURCE ...] [...]",
            "",
            "One index of the KV blocks of many workers: /kv/status, /kv/match, /kv/dump, /live,",
            "/ready and /metrics. Each flag can also be set in the environment: --max-blocks is",
            f"{ENV_PREFIX}MAX_BLOCKS; all sources, with spaces between, are {ENV_PREFIX}SOURCES. A",
            "flag wins.",
            "",
            *rows.help_rows(SETTINGS),
            "",
            "  --check-config  print the resolved configuration and don't start",
            "",
            "A SOURCE: " + _SYNTAX + ".",
            "",
        ]
    )


class _Parser(argparse.ArgumentParser):
    """Raises what it would print, as the other problems are not known yet."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(arguments: Sequence[str], problems: list[str]) -> dict[str, Any]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--source", action="append", default=[])
    parser.add_argument("--check-config", action="store_true")
    for setting in SETTINGS[1:]:
        parser.add_argument(setting.flag, dest=setting.name)
    try:
        given, unknown = parser.parse_known_args(list(arguments))
    except ValueError as error:
        problems.append(str(error))
        return {"source": [], "check_config": False}
    problems += [f"unknown option {argument}: see --help" for argument in unknown]
    return vars(given)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not value:
        raise ValueError(f"{text!r} is no option: {_SYNTAX}")
    return name, value


def _shown(text: str) -> str:
    """Without credentials."""
    return re.sub(r"//[^/@]*@", "//…@", text)


def _port_or_zero(text: str) -> int:
    return 0 if text == "0" else rows.port(text)


def _log_format(text: str) -> str:
    return rows.choice(text, ("text", "json"))


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{text!r} is not a number of seconds above 0")
    return number
