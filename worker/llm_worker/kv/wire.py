"""vLLM's KV-event payload → records, and back. The only module that knows the wire format.

A batch is ``[timestamp, events, rank?]``. Two encodings of an event are live: positional arrays
(vLLM up to 0.23, every vintage: they grew at the end) and maps keyed by field name (0.24 on).
Fields that are unknown here are skipped, events of an unknown type are counted, and an event that
is broken costs itself, never its batch. Token ids are skipped in C unless they are asked for.
Pure: no I/O, no clock, no logging.
Long: every encoding there was, next to each other.
Source: vllm/distributed/kv_events.py, 0.9.0.1 to 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from llm_worker.kv.records import (
    HASH_MASK,
    MAX_HASH_BYTES,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    Hash,
)

MAX_PAYLOAD_BYTES = 16 << 20  # a step of a million token ids is 5 MB

_MEDIA = {None: "gpu", "gpu": "gpu", "GPU": "gpu", "CPU": "cpu", "STORAGE": "storage"}
if TYPE_CHECKING:
    _AnyHash: TypeAlias = Hash
else:  # what a decoder takes
    _AnyHash = int | Annotated[bytes, Meta(min_length=1, max_length=MAX_HASH_BYTES)]


class Batch(Struct, array_like=True, gc=False):
    """One step's events, in order.

    ``rejected`` holds a reason (UNDECODABLE_REASONS) for each event that was dropped, ``unknown``
    counts events of a type that is not known here. They are no fields: a payload cannot set them.
    """

    timestamp: float  # unix seconds, the engine's clock
    events: list[Event]
    rank: int | None = None  # of data parallelism; not said by 0.9.0

    @property
    def rejected(self) -> Sequence[str]:
        """Why events were dropped."""
        return ()

    @property
    def unknown(self) -> int:
        """Events of a type that is not known here."""
        return 0


class _PartialBatch(Batch):
    """A batch of which not every event was understood."""

    reasons: list[str] = []  # a struct copies it
    unknown_events: int = 0

    @property
    def rejected(self) -> Sequence[str]:
        return self.reasons

    @property
    def unknown(self) -> int:
        return self.unknown_events


class WireError(ValueError):
    """A payload is no batch. Handled by the listener: count, mark stale, go on."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"undecodable KV batch: {reason}")
        self.reason = reason  # one of UNDECODABLE_REASONS


class _StoredWithTokens(BlockStored, tag="BlockStored", rename={"token_ids": "token_ids"}):
    token_ids: Any = None


_RENAMED = {"hashes": "block_hashes", "parent": "parent_block_hash", "group": "group_idx"}


class _OtherStored(BlockStored, tag="BlockStored", rename=_RENAMED):
    """As 0.32 never says it: signed hashes, media of other names, no group."""

    hashes: list[_AnyHash]
    parent: _AnyHash | None = None
    medium: str | None = None  # type: ignore[assignment]
    group: int | None = None  # type: ignore[assignment]


class _OtherStoredWithTokens(_OtherStored, tag="BlockStored", rename={"token_ids": "token_ids"}):
    token_ids: Any = None


class _OtherRemoved(BlockRemoved, tag="BlockRemoved", rename=_RENAMED):
    hashes: list[_AnyHash]
    medium: str | None = None  # type: ignore[assignment]
    group: int | None = None  # type: ignore[assignment]


class _PositionalStored(Struct, array_like=True, tag="BlockStored", gc=False):
    hashes: list[_AnyHash]
    parent: _AnyHash | None
    token_ids: Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None  # from 0.10.2 on
    adapter: str | None = None  # 0.14
    extra_keys: list[Any] | None = None  # 0.17
    group: int | None = None  # 0.20
    kind: str | None = None
    sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None


class _PositionalRemoved(Struct, array_like=True, tag="BlockRemoved", gc=False):
    hashes: list[_AnyHash]
    medium: str | None = None
    group: int | None = None
    locality: str | None = None
    ownership: str | None = None


class _PositionalCleared(Struct, array_like=True, tag="AllBlocksCleared", gc=False):
    medium: str | None = None


_Wire = TypeVar("_Wire")


class _Envelope(Struct, Generic[_Wire], array_like=True, gc=False):
    timestamp: float
    events: list[_Wire]
    rank: Any = None


class _EventError(Exception):
    """One event of a batch is dropped."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


class Decoder:
    """Payloads of one publisher → batches. It tries the encoding first that it saw last.

    Args:
        token_ids: Whether stored blocks carry their token ids, which are most of a payload.
    """

    def __init__(self, *, token_ids: bool = False) -> None:
        self._token_ids = token_ids
        stored: Any = _StoredWithTokens if token_ids else BlockStored
        other: Any = _OtherStoredWithTokens if token_ids else _OtherStored
        encodings = (
            stored | BlockRemoved | AllBlocksCleared,
            other | _OtherRemoved | AllBlocksCleared,
            _PositionalStored | _PositionalRemoved | _PositionalCleared,
        )
        envelope: Any = _Envelope
        self._events = [_decode(events) for events in encodings]
        self._batches = [_decode(envelope[events]) for events in encodings]
        if not token_ids:
            self._batches[0] = _decode(Batch)
        self._raw, self._any = _decode(envelope[Raw]), _decode(Any)
        self._decode = self._batches[0]

    def decode(self, payload: bytes | memoryview) -> Batch:
        """Return the batch that ``payload`` holds, without the events that are broken.

        Raises:
            WireError: It is no batch at all: "msgpack", "batch" or "too_large".
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise WireError("too_large")
        try:
            batch = self._decode(payload)
        except _ERRORS:
            batch = self._decode_otherwise(payload)
        if type(batch) is not Batch:
            return self._today(batch)
        events: list[Any] = batch.events
        for event in events:  # what the wire says otherwise
            kind, medium = type(event), event.medium
            if kind is BlockStored:
                if event.lora_id is not None and event.adapter is None:
                    event.adapter = str(event.lora_id)
            elif kind is AllBlocksCleared and medium is None:
                continue
            event.medium = "gpu" if medium == "GPU" else _medium(medium)
        return batch

    def _decode_otherwise(self, payload: bytes | memoryview) -> Any:
        """Try the other encodings as a whole, then event by event.

        Raises:
            WireError: It is no batch.
        """
        for decode in self._batches:
            try:
                batch = decode(payload)
            except _ERRORS:
                continue
            self._decode = decode
            return batch
        try:
            envelope = self._raw(payload)
        except msgspec.ValidationError:
            raise WireError("batch") from None
        except _ERRORS:
            raise WireError("msgpack") from None
        batch = _PartialBatch(envelope.timestamp, [], _rank(envelope.rank))
        for raw in envelope.events:
            try:
                event = self._event(raw)
            except _EventError as error:
                batch.reasons.append(error.reason)
                continue
            if event is None:
                batch.unknown_events += 1
            else:
                batch.events.append(event)
        return batch

    def _today(self, wire: Any) -> Batch:
        """Return a batch of today's records; a partial one has them."""
        if type(wire) is _PartialBatch:
            return wire
        return Batch(
            wire.timestamp, [self._record(event) for event in wire.events], _rank(wire.rank)
        )

    def _record(self, event: Any) -> Event:
        """Return the record of an event, whatever its encoding."""
        kind, medium = type(event), event.medium
        if kind is AllBlocksCleared or kind is _PositionalCleared:
            return AllBlocksCleared(medium=medium and _medium(medium))
        hashes = [value & HASH_MASK if type(value) is int else value for value in event.hashes]
        medium, group = _medium(medium), event.group or 0
        if kind is _PositionalRemoved or isinstance(event, BlockRemoved):
            return BlockRemoved(
                hashes=hashes,
                medium=medium,
                group=group,
                locality=event.locality,
                ownership=event.ownership,
            )
        adapter, lora_id, parent = event.adapter, event.lora_id, event.parent
        token_ids = event.token_ids if self._token_ids else None
        return BlockStored(
            hashes=hashes,
            parent=parent & HASH_MASK if type(parent) is int else parent,
            block_size=event.block_size,
            medium=medium,
            adapter=str(lora_id) if adapter is None and lora_id is not None else adapter,
            group=group,
            extra_keys=event.extra_keys,
            kind=event.kind,
            locality=event.locality,
            sliding_window=event.sliding_window,
            ownership=event.ownership,
            lora_id=lora_id,
            token_ids=self._any(token_ids) if type(token_ids) is Raw else token_ids,
        )

    def _event(self, raw: Raw) -> Event | None:
        """Return one event, whatever its encoding; None when its type is unknown.

        Raises:
            _EventError: It can't be understood.
        """
        for decode in self._events:
            try:
                return self._record(decode(raw))
            except _ERRORS:
                continue
        try:
            wire: Any = self._any(raw)
        except _ERRORS:
            raise _EventError("event") from None
        if isinstance(wire, list) and wire:
            names = _POSITIONS.get(wire[0]) if isinstance(wire[0], str) else None
            wire = dict(zip(names or ("type",), wire, strict=False))
        if not isinstance(wire, dict) or not isinstance(kind := wire.get("type"), str):
            raise _EventError("event")
        medium = _known(wire, "medium", str)
        if kind == "AllBlocksCleared":
            return AllBlocksCleared(medium=medium and _medium(medium))
        if kind not in _POSITIONS:
            return None
        hashes = _known(wire, "block_hashes", list)
        if hashes is None:
            raise _EventError("event")
        hashes = [_hash(value) for value in hashes]
        group = _known(wire, "group_idx", int) or 0
        locality, ownership = _told(wire, "locality", str), _told(wire, "ownership", str)
        if kind == "BlockRemoved":
            return BlockRemoved(
                hashes=hashes,
                medium=_medium(medium),
                group=group,
                locality=locality,
                ownership=ownership,
            )
        parent, lora_id = wire.get("parent_block_hash"), _known(wire, "lora_id", int)
        adapter = _known(wire, "lora_name", str)
        return BlockStored(
            hashes=hashes,
            parent=None if parent is None else _hash(parent),
            block_size=_told(wire, "block_size", int) or 0,
            medium=_medium(medium),
            adapter=str(lora_id) if adapter is None and lora_id is not None else adapter,
            group=group,
            extra_keys=_told(wire, "extra_keys", list),
            kind=_told(wire, "kv_cache_spec_kind", str),
            locality=locality,
            sliding_window=_told(wire, "kv_cache_spec_sliding_window", int),
            ownership=ownership,
            lora_id=lora_id,
            token_ids=wire.get("token_ids") if self._token_ids else None,
        )


_POSITIONS = {
    "BlockStored": (
        "type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id",
        "medium", "lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window", "locality", "ownership",
    ),
    "BlockRemoved": ("type", "block_hashes", "medium", "group_idx", "locality", "ownership"),
    "AllBlocksCleared": ("type", "medium"),
}  # fmt: skip


def _decode(kind: Any) -> Callable[[bytes | memoryview], Any]:
    return msgspec.msgpack.Decoder(kind).decode


def _rank(value: object) -> int | None:
    return value if type(value) is int else None


def _medium(name: str | None) -> str:
    return _MEDIA.get(name) or str(name).lower()


def _hash(value: object) -> Hash:
    if type(value) is int:
        return value & HASH_MASK
    if type(value) is bytes and 0 < len(value) <= MAX_HASH_BYTES:
        return value
    raise _EventError("hash")


def _told(wire: dict[Any, Any], name: str, kind: type) -> Any:
    """Return a field if it is of its type, else None: a block is where it is without it."""
    value = wire.get(name)
    return value if type(value) is kind else None


def _known(wire: dict[Any, Any], name: str, kind: type) -> Any:
    """Return a field that says where a block is, or None.

    Raises:
        _EventError: It is of another type: guessing would corrupt the index.
    """
    value = wire.get(name)
    if value is not None and type(value) is not kind:
        raise _EventError("event")
    return value


class _WireStored(
    Struct,
    tag_field="type",
    tag="BlockStored",
    omit_defaults=True,
    gc=False,
):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: Any
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None


class _WireRemoved(Struct, tag_field="type", tag="BlockRemoved", omit_defaults=True, gc=False):
    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class _WireCleared(Struct, tag_field="type", tag="AllBlocksCleared", omit_defaults=True, gc=False):
    medium: str | None = None


_ENCODER = msgspec.msgpack.Encoder()


def encode(timestamp: float, events: Sequence[Event], rank: int | None) -> bytes:
    """Return a batch in vLLM 0.32's format. Blocks without token ids have an empty list of them."""
    wire: list[Struct] = []
    for event in events:
        medium = event.medium and event.medium.upper()
        if isinstance(event, BlockStored):
            wire.append(
                _WireStored(
                    event.hashes,
                    event.parent,
                    event.token_ids or [],
                    event.block_size,
                    event.lora_id,
                    medium,
                    event.adapter,
                    event.extra_keys,
                    event.group,
                    event.kind,
                    event.sliding_window,
                    event.locality,
                    event.ownership,
                )
            )
        elif isinstance(event, BlockRemoved):
            wire.append(
                _WireRemoved(event.hashes, medium, event.group, event.locality, event.ownership)
            )
        else:
            wire.append(_WireCleared(medium))
    return _ENCODER.encode([timestamp, wire, rank])
