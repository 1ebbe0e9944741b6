"""Settings: the only module that reads the environment and the command line.

Ours are few and start with ``--worker-`` (in the environment ``LLM_WORKER_``); a flag wins over the
environment. Everything else on the command line is vLLM's and passes through verbatim, so there is
no second list of vLLM's options here. The few of those that collide with ours are looked at, never
changed. Every problem is collected and they are reported together. Nothing here imports vLLM, nor
prometheus_client, which looks for its multiprocess directory when it is first imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llm_worker.errors import ConfigError
from llm_worker.settings import setting as rows

ENV_PREFIX = "LLM_WORKER_"
FLAG_PREFIX = "--worker-"
TINY = "tiny"
# vLLM's own options that begin like ours.
THEIRS = frozenset({"--worker-cls", "--worker-extension-cls"})
# Written by the worker itself for its child processes, not a setting.
INTERNAL_ENV = frozenset({"LLM_WORKER_PARENT_PID"})

T = TypeVar("T")


class Setting(rows.Setting):
    """One of our settings: "system-port" is --worker-system-port and LLM_WORKER_SYSTEM_PORT."""

    flag_prefix = FLAG_PREFIX
    env_prefix = ENV_PREFIX


SETTINGS: tuple[Setting, ...] = (
    Setting("model", "", "model when vLLM's --model is not given; `tiny` makes one on the spot"),
    Setting("system-host", "127.0.0.1", "address of the system server"),
    Setting("system-port", "8081", "port of the system server; 0 takes any free one"),
    Setting("system-token-file", "", "file with the bearer token that writing routes ask for"),
    Setting("namespace", "", "value of the label llm_namespace on every series; empty: no label"),
    Setting("component", "", "value of the label llm_component on every series; empty: no label"),
    Setting("kv-events-port", "", "publish KV-cache events on this port + rank; empty: off"),
    Setting("kv-replay-port", "", "replay of KV-cache events, + rank; empty: events port + 100"),
    Setting(
        "kv-plane",
        "zmq://127.0.0.1:20280",
        "where indexed KV events go; or `nats://HOST:4222`, `off`",
    ),
    Setting(
        "kv-connector-events",
        "",
        "`HOST:PORT[,replay=PORT]` of an offloading connector's own KV events, + rank: merged",
    ),
    Setting("kv-max-blocks", "", "blocks that the KV index holds at most; empty: no bound"),
    Setting("id", "", "name of this worker among others; empty: host name and system port"),
    Setting("multiproc-dir", "", "prometheus_client's multiprocess directory; `auto` makes one"),
    Setting("log-format", "text", "`text` or `json`"),
    Setting("drain-seconds", "30", "how long in-flight requests may take after SIGTERM"),
    Setting("lame-duck-seconds", "0", "how long after SIGTERM new requests are still taken"),
    Setting("goodput", "ttft=1.0,tpot=0.1,e2e=30", "targets in seconds, met jointly"),
    Setting("state-dir", "", "directory that remembers how the last run ended; empty: off"),
)

# vLLM options that make no sense with one engine behind one in-process API server.
UNSUPPORTED = {
    "--headless": "the worker always serves; start headless nodes with `vllm serve --headless`",
    "--grpc": "the worker serves HTTP; vLLM's gRPC server needs `vllm serve --grpc`",
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
class ConnectorEvents:
    """Where an offloading connector publishes KV events of its own, in vLLM's format."""

    host: str
    port: int  # rank 0's
    replay_port: int | None  # rank 0's; None: nobody to ask


@dataclass(frozen=True, slots=True)
class KvIndex:
    """The index of the engine's KV blocks, and where its events go on to."""

    plane: str | None  # zmq://HOST:PORT, replay 100 above, or nats://HOST:PORT; None: nowhere
    max_blocks: int | None  # of all ranks
    connector: ConnectorEvents | None = None  # merged with the engine's own


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
    log_format: str  # "text" or "json"
    drain_seconds: float
    lame_duck_seconds: float
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
        return not _is_loopback(self.system_host)

    def token(self) -> str | None:
        """The bearer token, read now; None when no token file is set."""
        if self.system_token_file is None:
            return None
        return self.system_token_file.read_text(encoding="utf-8").strip()

    def to_json(self) -> str:
        """The resolved configuration, without secrets."""
        values = dataclasses.asdict(self)
        return json.dumps(values, indent=2, default=str) + "\n"


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line asked for."""

    config: Config
    check_only: bool  # --check-config
    dump_to: Path | None  # --dump-config-to FILE


def load(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Command:
    """Resolve the settings from ``arguments`` (without the program) and the environment.

    Raises:
        ConfigError: something is wrong; carries every problem, each naming its fix.
    """
    environment = os.environ if environment is None else environment
    problems: list[str] = []
    ours, theirs, check_only, dump_to = _split(arguments, problems)
    values = _values(ours, environment, problems)
    reader = _Reader(values, problems)

    model, theirs = _take_model(theirs, problems)
    data_parallel = _their_int(theirs, "--data-parallel-size", "-dp", default=1, problems=problems)
    _check_theirs(theirs, problems)

    system_host = reader.host("system-host")
    system_port = reader.port("system-port", allow_zero=True)
    kv_events = _kv_events(reader, theirs, problems)
    config = Config(
        model=model or values["model"] or None,
        engine_args=tuple(theirs),
        system_host=system_host,
        system_port=system_port,
        system_token_file=reader.readable_file("system-token-file"),
        namespace=reader.label("namespace"),
        component=reader.label("component"),
        kv_events=kv_events,
        kv_index=_kv_index(reader, kv_events, theirs),
        worker_id=reader.name("id"),
        multiproc_dir=reader.multiproc_dir(
            "multiproc-dir", environment.get("PROMETHEUS_MULTIPROC_DIR", "")
        ),
        log_format=reader.choice("log-format", ("text", "json")),
        drain_seconds=reader.seconds("drain-seconds"),
        lame_duck_seconds=reader.seconds("lame-duck-seconds"),
        goodput=reader.goodput("goodput"),
        state_dir=reader.writable_directory("state-dir"),
    )
    if config.model is None and _option(theirs, "--config") is None:
        problems.append(
            "no model: give --model NAME (or LLM_WORKER_MODEL); --model tiny needs no download"
        )
    _check_ports(config, theirs, data_parallel, problems)
    if problems:
        raise ConfigError(problems)
    return Command(config, check_only, dump_to)


def goodput_from_env(environment: Mapping[str, str] | None = None) -> GoodputTargets:
    """The goodput targets of a plain ``vllm serve`` that loads our stat logger as a plugin.

    Raises:
        ConfigError: LLM_WORKER_GOODPUT cannot be parsed.
    """
    environment = os.environ if environment is None else environment
    problems: list[str] = []
    targets = _Reader(_values({}, environment, problems), problems).goodput("goodput")
    if problems:
        raise ConfigError(problems)
    return targets


def parent_pid_from_env() -> int | None:
    """The worker that started this engine process; None in any other process."""
    value = os.environ.get("LLM_WORKER_PARENT_PID", "")
    return int(value) if value.isdecimal() else None


def cache_directory(environment: Mapping[str, str] | None = None) -> Path:
    """Where files live that can be made again; the temporary directory when there is no home."""
    environment = os.environ if environment is None else environment
    base = environment.get("XDG_CACHE_HOME") or environment.get("HOME")
    if base and os.access(base, os.W_OK):
        root = Path(base) if environment.get("XDG_CACHE_HOME") else Path(base) / ".cache"
        return root / "llm-worker"
    return Path(tempfile.gettempdir()) / f"llm-worker-{os.getuid()}"


def help_text() -> str:
    """The table of our settings."""
    return "\n".join(
        [
            "usage: python -m llm_worker [--worker-... VALUE] [vLLM engine and server arguments]",
            "",
            "Runs vLLM in this process, serves vLLM's own API (--port, 8000) and a system server",
            "(/live /ready /health /version /metrics /engine/info). Each flag can also be set in",
            "the environment: --worker-system-port is LLM_WORKER_SYSTEM_PORT. A flag wins.",
            "",
            *rows.help_rows(SETTINGS),
            "",
            "  --check-config          print the resolved configuration and don't start",
            "  --dump-config-to FILE   write it to FILE and start",
            "",
            "vLLM's own options: --help=all, --help=ModelConfig and so on.",
            "",
        ]
    )


def _split(
    arguments: Sequence[str], problems: list[str]
) -> tuple[dict[str, str], list[str], bool, Path | None]:
    """Ours by setting name, vLLM's in order, and our two commands."""
    known = {setting.flag: setting.name for setting in SETTINGS}
    ours: dict[str, str] = {}
    theirs: list[str] = []
    check_only = False
    dump_to: Path | None = None
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        spelled = flag.replace("_", "-")
        if spelled == "--check-config":
            check_only = True
        elif spelled in THEIRS:
            theirs.append(argument)
        elif spelled.startswith(FLAG_PREFIX) or spelled == "--dump-config-to":
            if not equals:
                value = next(rest, "")
            if not value:
                problems.append(f"{flag} needs a value")
            elif spelled == "--dump-config-to":
                dump_to = Path(value)
            elif spelled in known:
                ours[known[spelled]] = value
            else:
                problems.append(f"unknown option {flag}{_did_you_mean(spelled, known)}")
        else:
            theirs.append(argument)
    return ours, theirs, check_only, dump_to


def _values(
    ours: Mapping[str, str], environment: Mapping[str, str], problems: list[str]
) -> dict[str, str]:
    known = {setting.env: setting for setting in SETTINGS}
    for name in environment:
        if name.startswith(ENV_PREFIX) and name not in known and name not in INTERNAL_ENV:
            problems.append(f"unknown environment variable {name}{_did_you_mean(name, known)}")
    return {
        setting.name: ours.get(setting.name, environment.get(setting.env) or setting.default)
        for setting in SETTINGS
    }


def _did_you_mean(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {close[0]}?" if close else f": choose from {', '.join(known)}"


class _Reader:
    """Turns strings into values; a bad one becomes a problem and a harmless stand-in."""

    def __init__(self, values: Mapping[str, str], problems: list[str]) -> None:
        self._values = values
        self._problems = problems

    def problem(self, name: str, what: str) -> None:
        setting = next(setting for setting in SETTINGS if setting.name == name)
        self._problems.append(f"{setting.flag} ({setting.env}): {what}")

    def checked(self, name: str, convert: Callable[[str], T], fallback: T) -> T:
        try:
            return convert(self._values[name])
        except ValueError as error:
            self.problem(name, str(error))
            return fallback

    def port(self, name: str, *, allow_zero: bool = False) -> int:
        text = self._values[name]
        if allow_zero and text.isdecimal() and not int(text):
            return 0
        return self.checked(name, rows.port, 0)

    def host(self, name: str) -> str:
        return self.checked(name, rows.host, "")

    def label(self, name: str) -> str:
        text = self._values[name]
        if len(text) > 128 or not text.isprintable():
            self.problem(name, "use up to 128 printable characters")
        return text

    def name(self, name: str) -> str | None:
        text = self._values[name]
        if len(text) > 128 or not re.fullmatch(r"[!-~]*", text):
            self.problem(name, "use up to 128 printable ASCII characters, no spaces")
        return text or None

    def count(self, name: str) -> int | None:
        return self.checked(name, rows.count, None)

    def plane(self, name: str) -> str | None:
        text = self._values[name]
        if text == "off":
            return None
        found = re.fullmatch(r"(?:zmq://[^/\s]+|nats://[^/\s]+|tls://[^/\s]+):(\d+)", text)
        if found is None or int(found[1]) > 65535 - rows.PLANE_REPLAY_OFFSET:
            self.problem(
                name,
                f"{text!r}: write zmq://HOST:PORT, nats://HOST:PORT or off; * is every address",
            )
        return text

    def connector_events(self, name: str) -> ConnectorEvents | None:
        text = self._values[name]
        if not text:
            return None
        found = re.fullmatch(r"([A-Za-z0-9_.:\[\]%-]+):(\d+)(?:,replay=(\d+))?", text)
        ports = [int(port) for port in found.groups()[1:] if port] if found else []
        if found is None or not all(1 <= port <= 65535 for port in ports):
            self.problem(name, f"{text!r}: write HOST:PORT or HOST:PORT,replay=PORT")
            return None
        return ConnectorEvents(found[1], ports[0], ports[1] if len(ports) > 1 else None)

    def choice(self, name: str, choices: Sequence[str]) -> str:
        return self.checked(name, lambda text: rows.choice(text, choices), "")

    def seconds(self, name: str) -> float:
        number = _float(self._values[name])
        if number is None or number < 0:
            self.problem(name, f"{self._values[name]!r} is not a number of seconds, 0 or more")
            return 0.0
        return number

    def goodput(self, name: str) -> GoodputTargets:
        defaults = GoodputTargets()
        targets: dict[str, float] = {}
        for part in self._values[name].split(","):
            objective, _, text = part.strip().partition("=")
            number = _float(text)
            if objective not in ("ttft", "tpot", "e2e") or number is None or number <= 0:
                self.problem(name, f"{part!r}: write ttft=1.0,tpot=0.1,e2e=30 (seconds, above 0)")
                return defaults
            targets[f"{objective}_seconds"] = number
        return dataclasses.replace(defaults, **targets)

    def readable_file(self, name: str) -> Path | None:
        if not self._values[name]:
            return None
        path = Path(self._values[name])
        try:
            content = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            self.problem(name, f"cannot read {path}: {error}")
            return None
        if not content:
            self.problem(name, f"{path} is empty; put the token into it")
        return path

    def writable_directory(self, name: str) -> Path | None:
        if not self._values[name]:
            return None
        path = Path(self._values[name])
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            self.problem(name, f"cannot write to {path}: {error}")
            return None
        return path

    def multiproc_dir(self, name: str, inherited: str) -> str | None:
        text = self._values[name] or inherited
        if text and text != "auto" and not Path(text).is_dir():
            self.problem(name, f"{text} is not a directory: create it, or use auto")
        return text or None

    def given(self, name: str) -> bool:
        return bool(self._values[name])


def _float(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _option(theirs: Sequence[str], *flags: str) -> str | None:
    """The last value of one of vLLM's options; "" when it is given without one."""
    found: str | None = None
    for index, argument in enumerate(theirs):
        flag, equals, value = argument.partition("=")
        if (flag.replace("_", "-") if flag.startswith("--") else flag) not in flags:
            continue
        following = theirs[index + 1] if index + 1 < len(theirs) else ""
        found = value if equals else ("" if following.startswith("--") else following)
    return found


def _their_int(theirs: Sequence[str], *flags: str, default: int, problems: list[str]) -> int:
    text = _option(theirs, *flags)
    if text is None:
        return default
    if not text.isdecimal():
        problems.append(f"{flags[0]}: {text!r} is not a number")
        return default
    return int(text)


def _take_model(theirs: list[str], problems: list[str]) -> tuple[str | None, list[str]]:
    """The model, from --model or from the first word, and the arguments without it."""
    model: str | None = None
    rest: list[str] = []
    arguments = iter(theirs)
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if position == 0 and not argument.startswith("-"):
            model = argument
        elif flag == "--model":
            given = value if equals else next(arguments, "")
            if not given or given.startswith("--"):
                problems.append("--model needs a value")
            elif model is not None and model != given:
                problems.append(f"two models: {model!r} and {given!r}; give one")
            model = given
        else:
            rest.append(argument)
    return model, rest


def _check_theirs(theirs: Sequence[str], problems: list[str]) -> None:
    for flag, reason in UNSUPPORTED.items():
        if _option(theirs, flag) is not None:
            problems.append(f"{flag} is not supported: {reason}")
    servers = _option(theirs, "--api-server-count", "-asc")
    if servers is not None and servers != "1":
        problems.append(
            f"--api-server-count {servers}: the worker hosts one API server; run more workers"
        )


def _kv_events(reader: _Reader, theirs: Sequence[str], problems: list[str]) -> KvEvents | None:
    if not reader.given("kv-events-port"):
        if reader.given("kv-replay-port"):
            problems.append("--worker-kv-replay-port needs --worker-kv-events-port as well")
        return None
    if _option(theirs, "--kv-events-config") is not None:
        problems.append(
            "--worker-kv-events-port and vLLM's --kv-events-config both set the KV events: keep one"
        )
    port = reader.port("kv-events-port")
    replay = reader.port("kv-replay-port") if reader.given("kv-replay-port") else port + 100
    return KvEvents(port, replay)


def _kv_index(reader: _Reader, kv_events: KvEvents | None, theirs: Sequence[str]) -> KvIndex | None:
    plane, max_blocks = reader.plane("kv-plane"), reader.count("kv-max-blocks")
    connector = reader.connector_events("kv-connector-events")
    if kv_events is None and _option(theirs, "--kv-events-config") is None:
        for name, value in (("kv-max-blocks", max_blocks), ("kv-connector-events", connector)):
            if value is not None:
                reader.problem(name, "there is no index without --worker-kv-events-port")
        return None
    return KvIndex(plane, max_blocks, connector)


def _check_ports(
    config: Config, theirs: Sequence[str], data_parallel: int, problems: list[str]
) -> None:
    """No two listeners on one port; port 0 and an address of its own never clash."""
    uses: list[tuple[str, int]] = []
    if _option(theirs, "--uds") is None and _option(theirs, "--config") is None:
        api_port = _their_int(theirs, "--port", default=8000, problems=problems)
        uses.append(("the API (--port)", api_port))
    uses.append(("the system server (--worker-system-port)", config.system_port))
    if config.kv_events is not None:
        for rank in range(data_parallel):
            uses.append((f"KV events of rank {rank}", config.kv_events.port + rank))
            uses.append((f"KV replay of rank {rank}", config.kv_events.replay_port + rank))
    if config.kv_index is not None and (config.kv_index.plane or "").startswith("zmq://"):
        plane_port = int(str(config.kv_index.plane).rpartition(":")[2])
        if plane_port:
            uses.append(("the KV plane (--worker-kv-plane)", plane_port))
            uses.append(("replay of the KV plane", plane_port + rows.PLANE_REPLAY_OFFSET))
    taken: dict[int, str] = {}
    for what, port in uses:
        if port > 65535:
            problems.append(f"{what}: port {port} is above 65535")
        elif port and port in taken:
            problems.append(f"port {port} is asked for by {taken[port]} and by {what}")
        taken.setdefault(port, what)
