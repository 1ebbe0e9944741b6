"""What stands on the board as JSON: how serving is, and what the supervisor has done.

Owns the two records and their spelling. Standard library only: the supervisor reads them.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llm_worker.link.board import Section

HURRY = signal.SIGUSR2  # to a serving that drains already: give up what is in flight


@dataclass(frozen=True, slots=True)
class KvFacts:
    """What it takes to index the engine's KV blocks."""

    sources: Sequence[Sequence[Any]]  # rank, endpoint, replay endpoint or None, topic
    block_size: int  # tokens; of the blocks that events name
    max_tokens: int  # of a request


@dataclass(frozen=True, slots=True)
class Status:
    """Serving, as it says itself."""

    pid: int
    state: str  # one of lifecycle.State
    since: float  # Unix seconds
    phase: str = ""  # of the start; empty once it is over
    reason: str = ""  # why it entered this state
    engine_pids: Sequence[int] = ()  # engine cores; each gone is an engine that died
    segments: Sequence[str] = ()  # shared memory that the engine has mapped
    model_name: str = ""
    vllm_version: str = ""  # empty before it is imported
    engine: dict[str, Any] | None = None  # capacity and limits; None before it is up
    kv: KvFacts | None = None  # None: no KV events, or not up yet

    def write(self, section: Section) -> None:
        """Put it on the board."""
        section.write(json.dumps(asdict(self), default=str).encode())

    @classmethod
    def read(cls, section: Section) -> Status | None:
        """As it stands on the board; None before serving has said anything."""
        written = section.read()
        return None if written is None else cls.parse(written.payload)

    @classmethod
    def parse(cls, payload: bytes) -> Status:
        """What `write` has put there."""
        values = json.loads(payload)
        kv = values.pop("kv")
        return cls(**values, kv=None if kv is None else KvFacts(**kv))


@dataclass(frozen=True, slots=True)
class Supervision:
    """What the supervisor has done."""

    asked_to_stop: bool = False
    observer_restarts: int = 0
    last_exit: dict[str, Any] | None = field(default=None)  # reason and Unix timestamp

    def write(self, section: Section) -> None:
        """Put it on the board."""
        section.write(json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, section: Section) -> Supervision:
        """As it stands on the board."""
        written = section.read()
        return cls() if written is None else cls(**json.loads(written.payload))
