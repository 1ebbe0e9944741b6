"""Settings of the fleet's KV index: its command line and the variables ``KV_INDEX_*``.

A program of its own beside the worker, so a table of its own; the reader is the worker's. Never
connects to anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_worker.errors import ConfigError
from llm_worker.settings import endpoint
from llm_worker.settings import setting as rows
from llm_worker.settings.endpoint import Endpoint

ENV_PREFIX = "KV_INDEX_"
_COMMANDS = {"--check-config": "print the resolved configuration and don't start"}


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """The resolved settings of one fleet service."""

    sources: tuple[Endpoint, ...]
    host: str
    port: int  # 0: any free port
    max_blocks: int | None
    gone_seconds: float
    resolve_seconds: float
    log_format: str  # one of `setting.LOG_FORMATS`
    log_level: str  # one of `setting.LOG_LEVELS`

    def to_json(self) -> str:
        """The configuration, without secrets."""
        values = dataclasses.asdict(self)
        values["sources"] = [source.to_dict() for source in self.sources]
        return json.dumps(values, indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class FleetCommand:
    """What the command line asked for."""

    config: FleetConfig
    check_only: bool  # --check-config
    warnings: tuple[str, ...]  # to be logged


class Setting(rows.Setting):
    """One setting of the fleet: "max-blocks" is --max-blocks and KV_INDEX_MAX_BLOCKS."""

    env_prefix = ENV_PREFIX


SETTINGS = (
    Setting(
        "source",
        "",
        "where events come from; once for each, or several in one variable",
        endpoint.source,
        repeated=True,
    ),
    Setting("host", "127.0.0.1", "address to serve on", rows.host),
    Setting("port", "8082", "port to serve on; 0 takes any free one", rows.port_or_zero),
    Setting(
        "max-blocks",
        "",
        "blocks that all workers' indexes hold together; empty: no bound",
        rows.optional(rows.count),
    ),
    Setting(
        "gone-seconds",
        "300",
        "how long a worker may be away before its blocks are forgotten",
        rows.seconds_above_zero,
    ),
    Setting(
        "resolve-seconds",
        "10",
        "how often host names are looked up again",
        rows.seconds_above_zero,
    ),
    Setting("log-format", "text", "`text` or `json`", rows.choice(*rows.LOG_FORMATS)),
    Setting(
        "log-level", "info", "`debug`, `info`, `warning` or `error`", rows.choice(*rows.LOG_LEVELS)
    ),
)


def load(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> FleetCommand:
    """Resolve the settings from ``arguments`` (without the program) and the environment.

    Raises:
        ConfigError: something is wrong; carries every problem, each naming its fix.
    """
    environment = os.environ if environment is None else environment
    reader = rows.Reader(SETTINGS, arguments, environment, commands=_COMMANDS)
    config = FleetConfig(**reader.values)
    problems = reader.problems
    problems += [f"unknown option {argument}: see --help" for argument in reader.rest]
    if not config.sources and "sources" not in reader.bad:
        problems.append(f"no --source ({ENV_PREFIX}SOURCES): {endpoint.SOURCE_SYNTAX}")
    names = [source.worker for source in config.sources if source.kind == "vllm"]
    for name in sorted({name for name in names if names.count(name) > 1}):
        reader.problem(
            "sources",
            f"two vLLM servers are called {name!r}: give them different worker= names",
        )
    if problems:
        raise ConfigError(problems)
    return FleetCommand(config, "--check-config" in reader.commands, tuple(reader.warnings))


def help_text() -> str:
    """The table of settings."""
    usage = f"""\
usage: python -m llm_worker.fleet --source SOURCE [--source SOURCE ...] [...]

One index of the KV blocks of many workers: /kv/status, /kv/match, /kv/dump, /live,
/ready and /metrics. Each flag can also be set in the environment: --max-blocks is
{ENV_PREFIX}MAX_BLOCKS; all sources, with spaces between, are {ENV_PREFIX}SOURCES. A
flag wins.
"""
    return rows.help_text(usage, SETTINGS, _COMMANDS) + f"A SOURCE: {endpoint.SOURCE_SYNTAX}.\n"
