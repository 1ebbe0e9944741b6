"""What can be asked about KV blocks over HTTP: of a worker and of the fleet service alike.

Owns the shapes of the questions and answers, and their status codes. It only calls what it was
handed; hashing prompts as the engine does is such a callable, because only the engine's own
process can. What takes longer than some milliseconds is done on a thread: probes come to this
server, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.records import MAX_HASH_BYTES, BlockStored, Hash
from llm_worker.kv.stats import ListenerStats, PlaneStats

MAX_BODY_BYTES = 16 << 20
MAX_HASHES = 1 << 20  # of one question
MAX_TOKEN_IDS = 1 << 20  # of one question, where the engine's own bound is not known
IN_PLACE_HASHES = 10_000  # are looked up at once; more on a thread, one such question at a time
_DUMP_CHUNK_BYTES = 64 << 10
_HASH_RANGE = range(-(1 << 63), 1 << 64)
_JSON = "application/json"

# prompt or token ids, adapter, cache salt → one hash per full block.
# Raises ValueError where they cannot be a request of this engine.
HashBlocks: TypeAlias = Callable[[str | Sequence[int], str | None, str | None], Sequence[Hash]]


@dataclass(frozen=True, slots=True)
class KvHandlers:
    """What the routes call; every one may be called from the server's thread and its helpers."""

    index: Index
    listeners: Callable[[], Iterable[ListenerStats]]
    planes: Callable[[], Iterable[PlaneStats]]
    hash_blocks: HashBlocks | None = None
    max_tokens: Callable[[], int | None] | None = None  # of a request; None: not known
    audit: Callable[[], Any] | None = None  # what it found, as JSON can say it; may block
    more_status: Callable[[], dict[str, Any]] | None = None  # beside sources and planes


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a match: one of the first three."""

    hashes: list[int | str] | None = None
    token_ids: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    prompt: str | None = None
    adapter: str | None = None
    cache_salt: str | None = None
    group: int = 0
    misses: bool = False  # also who holds nothing, and why


parse = msgspec.json.Decoder(Question).decode
encode = msgspec.json.Encoder().encode


class _RefusedError(Exception):
    """A request gets a status and a sentence. Handled by the route."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def reading(handlers: KvHandlers) -> list[Route]:
    """``/kv/status``, ``/kv/match`` and ``/kv/dump``: none of them changes anything."""
    large = asyncio.Lock()

    async def status(_: Request) -> Response:
        return Response(encode(_status(handlers)), media_type=_JSON)

    async def match(request: Request) -> Response:
        try:
            question = await _read(request)
            hashes = await _hashes(handlers, question)
        except _RefusedError as error:
            handlers.index.match_stats.requests["invalid"] += 1
            return _refusal(error)
        if len(hashes) <= IN_PLACE_HASHES:
            return _match(handlers, question, hashes)
        async with large:
            return await asyncio.to_thread(_match, handlers, question, hashes)

    async def dump(request: Request) -> Response:
        worker, rank = request.query_params.get("worker"), request.query_params.get("rank")
        if rank is not None and not rank.isdecimal():
            return _refusal(_RefusedError(422, f"`rank` is {rank!r:.80}: write a number"))
        sources = [
            source
            for source in handlers.index.sources()
            if worker in (None, source.worker) and (rank is None or int(rank) == source.rank)
        ]
        return StreamingResponse(_dump(sources), media_type="application/x-ndjson")

    return [
        Route("/kv/status", status),
        Route("/kv/match", match, methods=["POST"]),
        Route("/kv/dump", dump),
    ]


def writing(handlers: KvHandlers) -> list[Route]:
    """``/kv/audit``, which makes the engine tell all its blocks: for who may change the worker."""

    async def audit(_: Request) -> Response:
        if handlers.audit is None:
            body = {
                "error": "there is no engine here to compare with: ask a worker's own /kv/audit"
            }
            return Response(encode(body), 501, media_type=_JSON)
        found = await asyncio.to_thread(handlers.audit)
        return Response(encode(found), media_type=_JSON)

    return [Route("/kv/audit", audit, methods=["POST"])]


def _refusal(error: _RefusedError) -> Response:
    return Response(encode({"error": str(error)}), error.status, media_type=_JSON)


async def _read(request: Request) -> Question:
    """The question of a match.

    Raises:
        _RefusedError: it is too large or none.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise _RefusedError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
    try:
        question = parse(body)
    except msgspec.DecodeError as error:
        raise _RefusedError(400, str(error)) from None
    given = [
        name for name in ("hashes", "token_ids", "prompt") if getattr(question, name) is not None
    ]
    if len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none"
        raise _RefusedError(400, f"give one of `hashes`, `token_ids` or `prompt`: {found}")
    return question


def _match(handlers: KvHandlers, question: Question, hashes: Sequence[Hash]) -> Response:
    found = handlers.index.match(
        hashes, adapter=question.adapter, group=question.group, misses=question.misses
    )
    return Response(encode({"blocks": len(hashes), "matches": found}), media_type=_JSON)


async def _hashes(handlers: KvHandlers, question: Question) -> Sequence[Hash]:
    """What the question is about.

    Raises:
        _RefusedError: it has no such hashes.
    """
    if question.hashes is not None:
        if len(question.hashes) <= IN_PLACE_HASHES:
            return parsed_hashes(question.hashes)
        return await asyncio.to_thread(parsed_hashes, question.hashes)
    asked = question.prompt if question.token_ids is None else question.token_ids
    if handlers.hash_blocks is None or asked is None:
        raise _RefusedError(
            501,
            "only an engine can hash tokens as it does itself: send `hashes`, or ask /kv/match of "
            "a worker that serves this model",
        )
    if question.token_ids is not None:
        known = None if handlers.max_tokens is None else handlers.max_tokens()
        limit = MAX_TOKEN_IDS if known is None else known
        if len(question.token_ids) > limit:
            raise _RefusedError(
                400, f"`token_ids` has {len(question.token_ids)} entries; {limit} are allowed"
            )
    try:
        return await asyncio.to_thread(
            handlers.hash_blocks, asked, question.adapter, question.cache_salt
        )
    except ValueError as error:
        raise _RefusedError(400, str(error)) from None
    except RuntimeError as error:  # the engine's process is late, or gone
        raise _RefusedError(503, str(error)) from None


def parsed_hashes(given: list[int | str]) -> Sequence[Hash]:
    """Hashes as the index knows them: integers as they are, bytes from hexadecimal digits.

    Raises:
        _RefusedError: one is neither.
    """
    if len(given) > MAX_HASHES:
        raise _RefusedError(400, f"`hashes` has {len(given)} entries; {MAX_HASHES} are allowed")
    # A thousand at a time is usual, and looking at each takes longer than matching them.
    if set(map(type, given)) == {int} and min(given) in _HASH_RANGE and max(given) in _HASH_RANGE:
        return cast("list[Hash]", given)
    hashes: list[Hash] = []
    add = hashes.append
    for value in given:
        if type(value) is int and value in _HASH_RANGE:
            add(value)
            continue
        try:
            decoded = bytes.fromhex(value) if isinstance(value, str) else b""
        except ValueError:
            decoded = b""
        if not 0 < len(decoded) <= MAX_HASH_BYTES:
            raise _RefusedError(
                400,
                f"`hashes[{len(hashes)}]` is {value!r:.80}: write a 64-bit integer, or the hash's "
                f"bytes (at most {MAX_HASH_BYTES}) as hexadecimal digits",
            )
        add(decoded)
    return hashes


def _status(handlers: KvHandlers) -> dict[str, Any]:
    now = time.time()
    streams: dict[tuple[str, int], dict[str | None, ListenerStats]] = {}
    for stats in handlers.listeners():
        streams.setdefault((stats.worker, stats.rank), {})[stats.part] = stats
    sources = []
    for source in handlers.index.sources():
        entry: dict[str, Any] = {
            "worker": source.worker,
            "rank": source.rank,
            "ok": not source.stale,
            "stale": sorted(source.stale),
            "blocks": source.blocks(),
        }
        for part, stream in streams.get((source.worker, source.rank), {}).items():
            if part is None:
                entry |= _stream(stream, now)
            else:
                entry.setdefault("parts", {})[part] = _stream(stream, now)
        sources.append(entry)
    body: dict[str, Any] = {
        "ok": bool(sources) and all(source["ok"] for source in sources),
        "held_blocks": handlers.index.held_blocks(),
        "max_blocks": handlers.index.max_blocks,
        "sources": sources,
        "planes": [_plane(stats) for stats in handlers.planes()],
    }
    if handlers.more_status is not None:
        body |= handlers.more_status()
    return body


def _stream(stats: ListenerStats, now: float) -> dict[str, Any]:
    last = stats.last_batch_timestamp_seconds
    seen = sum(stats.lag.counts)
    return {
        "connected": stats.connected,
        "reconnects": stats.reconnects,
        "sequence": stats.sequence,
        "seconds_since_last_batch": None if last is None else round(max(0.0, now - last), 3),
        "mean_lag_seconds": round(stats.lag.total / seen, 6) if seen else None,
        "batches": {
            "applied": stats.batches_applied,
            "duplicate": stats.batches_duplicate,
            "late": stats.batches_late,
            "replayed": stats.batches_replayed,
            "lost": stats.batches_lost,
            "dropped": stats.batches_dropped,
            "held_back": stats.queue_batches,
        },
        "gaps": dict(stats.gaps),
        "replays": dict(stats.replays),
        "undecodable": dict(stats.undecodable),
        "unknown_events": stats.unknown_events,
    }


def _plane(stats: PlaneStats) -> dict[str, Any]:
    return {
        "plane": stats.plane,
        "up": stats.up,
        "sequence": stats.sequence,
        "published_batches": stats.published_batches,
        "acknowledged_batches": stats.acknowledged_batches,
        "buffered_batches": stats.buffered_batches,
        "buffer_capacity_batches": stats.buffer_capacity_batches,
        "dropped_batches": dict(stats.dropped),
        "replays_served": stats.replays_served,
        "snapshots_served": stats.snapshots_served,
        "reconnects": stats.reconnects,
    }


def _dump(sources: Sequence[Source]) -> Iterator[bytes]:
    """Lines of JSON, some at a time: for each source a line about it, then its blocks."""
    chunk = bytearray()
    for source in sources:
        about = {
            "type": "Source",
            "worker": source.worker,
            "rank": source.rank,
            "stale": sorted(source.stale),
            "blocks": source.blocks(),
        }
        chunk += encode(about) + b"\n"
        for event in source.snapshot():
            chunk += encode(_line(source, event)) + b"\n"
            if len(chunk) >= _DUMP_CHUNK_BYTES:
                yield bytes(chunk)
                chunk.clear()
    if chunk:
        yield bytes(chunk)


def _line(source: Source, event: BlockStored) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "worker": source.worker,
        "rank": source.rank,
        "medium": event.medium,
        "group": event.group,
        "adapter": event.adapter,
        "block_size": event.block_size,
        "parent": _shown(event.parent),
        "hashes": [_shown(value) for value in event.hashes],
    }


def _shown(value: Hash | None) -> int | str | None:
    return value.hex() if isinstance(value, bytes) else value
