"""Where KV events come from or go to: one address type for both programs.

A text is taken apart here, once; what it says is a value from then on. Looks nothing up and
connects to nothing.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from llm_worker.settings import setting

REPLAY_OFFSET = 100  # who says no replay port has it this far above the port of the events
SOURCE_SYNTAX = (
    "write zmq://HOST:PORT[,replay=PORT] for a worker's plane, "
    "vllm://HOST:PORT[,replay=PORT][,worker=NAME][,ranks=N][,topic=TOPIC] for a vLLM server, "
    "or nats://HOST:PORT"
)
_PLANE_SYNTAX = "write zmq://HOST:PORT, nats://HOST:PORT or off; * is every address"
_CONNECTOR_SYNTAX = "write HOST:PORT or HOST:PORT,replay=PORT"
_OPTIONS = {"zmq": {"replay"}, "vllm": {"replay", "worker", "ranks", "topic"}}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address: of a ZMQ plane, of a NATS server, or of a publisher as vLLM has them."""

    kind: str  # "zmq", "vllm" or "nats"
    host: str  # an IPv6 address without brackets; "*", of a plane of ours: every address
    port: int  # vllm: of rank 0; 0, of a plane of ours: any free one
    replay_port: int | None = None  # vllm: of rank 0; None: nobody to ask
    worker: str = ""  # vllm: its name; a plane says it itself
    ranks: int = 1  # vllm
    topic: str = ""  # vllm
    url: str = ""  # nats: as it was given (nats:// or tls://), with credentials

    def __str__(self) -> str:
        return f"{self.kind}://{_bracketed(self.host)}:{self.port}"

    def tcp(self, rank: int = 0) -> str:
        """Where ZMQ finds the events of one rank."""
        return f"tcp://{_bracketed(self.host)}:{self.port + rank}"

    def replay_tcp(self, rank: int = 0) -> str | None:
        """Where ZMQ asks for what one rank sent before; None: nowhere."""
        if self.replay_port is None:
            return None
        return f"tcp://{_bracketed(self.host)}:{self.replay_port + rank}"

    def to_dict(self) -> dict[str, Any]:
        """What may be shown: everything but the URL, which may hold a password."""
        values = dataclasses.asdict(self)
        del values["url"]
        return values


def source(text: str) -> Endpoint:
    """What one ``--source`` of the fleet says.

    Raises:
        ValueError: it cannot be one; says what can.
    """
    address, *options = text.split(",")
    no_source = ValueError(f"{_shown(text)!r} is no source: {SOURCE_SYNTAX}")
    parts, port = _taken_apart(address)
    if parts.scheme not in ("zmq", "vllm", "nats", "tls") or not parts.hostname or not port:
        raise no_source
    values = _options(options, _OPTIONS.get(parts.scheme, set()), SOURCE_SYNTAX)
    if parts.scheme in ("nats", "tls"):
        return Endpoint("nats", parts.hostname, port, url=address)
    replay = setting.port(values["replay"]) if "replay" in values else None
    if parts.scheme == "zmq":
        return Endpoint("zmq", parts.hostname, port, replay or _replay_of(port))
    ranks = setting.count(values.get("ranks", "1")) or 1
    if max(port, replay or 0) + ranks - 1 not in setting.PORTS:
        raise ValueError(f"{text!r}: rank {ranks - 1} would be beyond port {setting.PORTS[-1]}")
    worker = values.get("worker") or f"{parts.hostname}:{port}"
    return Endpoint("vllm", parts.hostname, port, replay, worker, ranks, values.get("topic", ""))


def plane(text: str) -> Endpoint | None:
    """Where a worker's ``--worker-kv-plane`` is bound or sends to; None: ``off``.

    Raises:
        ValueError: it cannot be one; says what can.
    """
    if text == "off":
        return None
    parts, port = _taken_apart(text)
    if parts.hostname and parts.scheme == "zmq" and port is not None:
        return Endpoint("zmq", parts.hostname, port, _replay_of(port) if port else 0)
    if parts.hostname and parts.scheme in ("nats", "tls") and port:
        return Endpoint("nats", parts.hostname, port, url=text)
    raise ValueError(f"{_shown(text)!r}: {_PLANE_SYNTAX}")


def connector(text: str) -> Endpoint:
    """Where an offloading connector publishes events of its own, in vLLM's format.

    Raises:
        ValueError: it cannot be one; says what can.
    """
    address, *options = text.split(",")
    parts, port = _taken_apart(f"vllm://{address}")
    if not parts.hostname or not port:
        raise ValueError(f"{text!r}: {_CONNECTOR_SYNTAX}")
    values = _options(options, {"replay"}, _CONNECTOR_SYNTAX)
    replay = setting.port(values["replay"]) if "replay" in values else None
    return Endpoint("vllm", setting.host(parts.hostname), port, replay)


def _taken_apart(address: str) -> tuple[SplitResult, int | None]:
    """Scheme, host and so on, and the port; None where it is no address with a port."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return SplitResult("", "", "", "", ""), None
    more = parts.path or parts.query or parts.fragment or any(map(str.isspace, address))
    if more or (parts.username is not None and parts.scheme not in ("nats", "tls")):
        return parts, None
    return parts, port


def _options(options: list[str], allowed: set[str], syntax: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for option in options:
        name, _, value = option.partition("=")
        if not value:
            raise ValueError(f"{option!r} is no option: {syntax}")
        if name not in allowed:
            raise ValueError(f"unknown option {name}: {syntax}")
        values[name] = value
    return values


def _replay_of(port: int) -> int:
    if port + REPLAY_OFFSET not in setting.PORTS:
        raise ValueError(
            f"port {port}: its replay, {REPLAY_OFFSET} above, would be beyond port "
            f"{setting.PORTS[-1]}; choose a lower one"
        )
    return port + REPLAY_OFFSET


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _shown(text: str) -> str:
    """Without credentials."""
    return re.sub(r"//[^/@]*@", "//…@", text)
