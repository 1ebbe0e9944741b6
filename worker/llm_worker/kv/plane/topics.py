"""What planes call a stream of events: its topic, its sequence numbers, its state in a snapshot.

A stream is one rank of one worker. Its sequence is 64 bits wide: the high half is the *epoch*, the
Unix second in which its publisher started, the low half counts from 0. So a restart is a jump
forward, and whoever sees a low half of 0 knows that nothing was before.
Pure: no I/O, no logging.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import msgspec

from llm_worker.kv.records import AllBlocksCleared, BlockStored, Event
from llm_worker.kv.wire import encode

if TYPE_CHECKING:
    from llm_worker.kv.index.source import Source

EPOCH_BITS = 32
COUNTER_MASK = (1 << EPOCH_BITS) - 1
SNAPSHOT_BLOCKS = 2048  # in one batch: 10 to 20 bytes each with integer hashes
_PREFIX = b"kv@"
_PLAIN = re.compile(r"[^A-Za-z0-9-]")
_QUOTED = re.compile(r"_([0-9a-f]{2})")

T = TypeVar("T")


class OnIndexThread(Protocol):
    """Runs a callable on the thread that writes the index, between two batches."""

    def __call__(self, ask: Callable[[], T], /) -> T:
        """What the callable returns; what it raises."""


class Status(msgspec.Struct, frozen=True):
    """What a plane says of one of its streams."""

    worker: str
    rank: int
    instance: str  # of this very publisher: two with the same worker are two instances
    # Why its own index of this stream, or what comes of it here, cannot be trusted.
    stale: list[str]


class Frozen(NamedTuple):
    """One stream as it was between two batches."""

    worker: str
    rank: int
    sequence: int  # of the last batch that is in it
    blocks: Iterable[BlockStored]  # made as they are read; once


def first_sequence(epoch: int | None = None) -> int:
    """The first number of a publisher that starts now, or in the given Unix second."""
    return (int(time.time()) if epoch is None else epoch) << EPOCH_BITS


def topic(worker: str, rank: int) -> bytes:
    """``kv@<worker>@<rank>``."""
    return b"%s%s@%d" % (_PREFIX, worker.encode(), rank)


def parse_topic(name: bytes) -> tuple[str, int] | None:
    """Worker and rank, or None: no topic of a plane."""
    worker, separator, rank = name.removeprefix(_PREFIX).rpartition(b"@")
    if not (name.startswith(_PREFIX) and worker and separator and rank.isdigit()):
        return None
    try:
        return worker.decode(), int(rank)
    except UnicodeDecodeError:
        return None


def token(worker: str) -> str:
    """The worker's name as NATS allows it in names and subjects; `from_token` reads it."""
    return "".join(
        character
        if not _PLAIN.match(character)
        else "".join(f"_{b:02x}" for b in character.encode())
        for character in worker
    )


def from_token(text: str) -> str | None:
    """The worker's name, or None: `token` did not make that."""
    plain = b""
    position = 0
    for match in _QUOTED.finditer(text):
        plain += text[position : match.start()].encode() + bytes.fromhex(match[1])
        position = match.end()
    try:
        worker = (plain + text[position:].encode()).decode()
    except UnicodeDecodeError:
        return None
    return worker if worker and token(worker) == text else None


def freeze(sources: Iterable[Source], sequence: Callable[[str, int], int]) -> list[Frozen]:
    """The sources as they are; to be called on the index's thread.

    ``sequence`` gives the number of the last batch published of a worker's rank.
    """
    return [
        Frozen(
            source.worker,
            source.rank,
            sequence(source.worker, source.rank),
            source.frozen().snapshot(),
        )
        for source in sources
    ]


def batches(frozen: Frozen) -> Iterator[bytes]:
    """The stream's blocks as payloads: a clear, then stores of some thousand blocks each."""
    now = time.time()
    events: list[Event] = [AllBlocksCleared()]
    blocks = 0
    for event in frozen.blocks:
        events.append(event)
        blocks += len(event.hashes)
        if blocks >= SNAPSHOT_BLOCKS:
            yield encode(now, events, frozen.rank)
            events, blocks = [], 0
    if events:
        yield encode(now, events, frozen.rank)


def encode_status(status: Status) -> bytes:
    """As it is on the wire: a map."""
    return msgspec.msgpack.encode(status)


def decode_status(payload: bytes) -> Status:
    """The inverse.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return msgspec.msgpack.decode(payload, type=Status)


def statuses(sources: Sequence[Source], instance: str, *doubts: str) -> list[Status]:
    """What is to be said of each source; ``doubts`` are the plane's own."""
    return [
        Status(source.worker, source.rank, instance, sorted({*source.stale, *doubts}))
        for source in sources
    ]
