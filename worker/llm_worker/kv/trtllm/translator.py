"""TensorRT-LLM's KV-cache events → records.

Pure: no I/O, no clock, no logging; never imports TensorRT-LLM. `poller` asks the engine.

An event is a dict, as ``KVCacheEventSerializer`` makes it (tensorrt_llm/_utils.py, 1.0 to 1.3); ids
are counted for each rank::

    {"event_id": 7, "window_size": 4096, "attention_dp_rank": 0, "data": …}
    data  {"type": "created", "num_blocks_per_cache_level": [gpu, host]}
          {"type": "stored", "parent_hash": …, "blocks": [{"block_hash": …, "cache_level": 0,
              "tokens": [{"token_id": …, "token_extra_id": 0}, …], "mm_keys": […]}, …]}
          {"type": "removed", "block_hashes": […]}
          {"type": "updated", "block_hash": …, "cache_level": {"old_value": 0, "new_value": 1}}

The rank is there with attention DP only. KV-cache manager V2 adds ``layer_group_id`` and
``hash_algo``, and its ``v2_sha256`` hashes are hexadecimal text. ``{}`` is no event.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_worker.kv.records import AllBlocksCleared, BlockRemoved, BlockStored, Event, Hash
from llm_worker.kv.trtllm.publisher import unsigned

UNTOLD_BLOCKS = 100_000  # remembered, of each rank
MEDIA = ("gpu", "cpu", "storage")  # by cache level
EVENT_TYPES = ("created", "stored", "removed", "updated", "unknown")
LOSS_REASONS = (
    "gap",  # engine's event ids were left out: its buffer ran over, or we asked too late
    "malformed",  # an event of no shape we know
    "window",  # blocks of a longer window turned up: what was told was of the wrong one
)
FILTER_REASONS = (
    "window",  # events of a shorter attention window, or another layer group
    "partial",  # blocks with fewer tokens than fill one, and their removals
    "known",  # blocks stored that were told already: TensorRT-LLM holds each once
    "oversized",  # blocks with more tokens than fill one: our block size is not the engine's
    "untold",  # removals and moves of blocks that were never told
)


class Told(NamedTuple):
    """What to tell of one rank. ``lost``: forget all first, for something was missed."""

    rank: int
    lost: bool
    events: list[Event]


@dataclass(slots=True)
class TranslatorStats:
    """What came, and what became of it."""

    events: Counter[str] = field(default_factory=Counter)  # by EVENT_TYPES
    filtered_events: int = 0  # of another window
    filtered_blocks: Counter[str] = field(default_factory=Counter)  # by FILTER_REASONS
    gaps: int = 0  # holes in the event ids
    missed_events: int = 0  # ids in them
    losses: Counter[str] = field(default_factory=Counter)  # by LOSS_REASONS
    restarts: int = 0  # event ids began again


class _MalformedError(Exception):
    """An event of no shape we know."""


class _Known(NamedTuple):
    """A block that was told."""

    level: int
    parent: Hash | None
    adapter: str | None


class Translator:
    """Events of one engine, all its ranks, in their order → what to tell of each rank.

    Only blocks of the longest attention window (and of it, the first layer group) are told: a
    prefix can be reused as far as that one reaches. The ``created`` events, which come first, say
    which it is. Blocks that are not full are never told, nor are their removals.

    When events were missed, what the engine holds is not known, and TensorRT-LLM has no way to ask.
    The rank is then told as lost: readers forget it and are left in doubt until the engine starts
    again. Ids are judged before anything is filtered.
    """

    def __init__(self, block_size: int) -> None:
        """``block_size`` is TensorRT-LLM's ``tokens_per_block``."""
        self.block_size = block_size
        self.stats = TranslatorStats()
        self._ranks: dict[int, _Rank] = {}

    def translate(self, raw_events: Iterable[Any]) -> list[Told]:
        """Take in events; what they say of each rank, in order."""
        told: list[Told] = []
        for raw in raw_events:
            if not raw:
                continue
            rank = raw.get("attention_dp_rank") if isinstance(raw, Mapping) else None
            number = rank if isinstance(rank, int) else 0
            state = self._ranks.get(number)
            if state is None:
                state = self._ranks[number] = _Rank(self.block_size, self.stats)
            loss, events = state.take(raw)
            if loss:
                self.stats.losses[loss] += 1
                told.append(Told(number, True, events))
            elif told and told[-1].rank == number:
                told[-1].events.extend(events)
            elif events:
                told.append(Told(number, False, events))
        return told

    def known_blocks(self) -> dict[int, int]:
        """How many blocks are told of, by rank."""
        return {rank: len(state.known) for rank, state in self._ranks.items()}


class _Rank:
    """One attention-DP rank."""

    def __init__(self, block_size: int, stats: TranslatorStats) -> None:
        self.block_size = block_size
        self.stats = stats
        self.reset()

    def reset(self) -> None:
        """Begin again, as the engine did."""
        self.next_id = 0
        self.begun = False  # the `created` events, which come first, are over
        self.window: int | None = None
        self.layer_group: int | None = None
        self.known: dict[Hash, _Known] = {}
        self.untold: OrderedDict[Hash, str] = OrderedDict()  # why, of blocks that never were told

    def take(self, raw: Any) -> tuple[str, list[Event]]:
        """Why the rank is lost, if it is, and what there is to tell after that."""
        try:
            event_id, data, kind = _parts(raw)
        except (_MalformedError, KeyError, TypeError):
            self.stats.events["unknown"] += 1
            return self._lose("malformed"), []
        self.stats.events[kind if kind in EVENT_TYPES else "unknown"] += 1
        events: list[Event] = []
        loss = ""
        if event_id < self.next_id and (event_id == 0 or kind == "created"):
            self.stats.restarts += 1
            self.reset()
            events.append(AllBlocksCleared())
        if event_id != self.next_id:
            self.stats.gaps += 1
            self.stats.missed_events += max(0, event_id - self.next_id)
            loss = self._lose("gap")
            events.clear()
        self.next_id = event_id + 1
        try:
            return self._read(raw, data, kind, loss, events)
        except (_MalformedError, KeyError, TypeError, ValueError, AttributeError):
            return self._lose("malformed"), []

    def _read(
        self, raw: Any, data: Any, kind: str, loss: str, events: list[Event]
    ) -> tuple[str, list[Event]]:
        window, group = raw.get("window_size"), raw.get("layer_group_id")
        if kind == "created" or window is not None:
            loss = self._judge_window(window, group) or loss
        if kind not in ("stored", "removed", "updated"):
            return loss, events
        self.begun = True
        if (window is not None and window != self.window) or (
            group is not None and self.layer_group is not None and group != self.layer_group
        ):
            self.stats.filtered_events += 1
            self.stats.filtered_blocks["window"] += _blocks(data, kind)
        elif kind == "stored":
            events.extend(self._stored(data))
        elif kind == "removed":
            events.extend(self._removed([_hash(value) for value in data["block_hashes"]]))
        else:
            events.extend(self._updated(data))
        return loss, events

    def _judge_window(self, window: Any, group: Any) -> str:
        """Learn the longest window; "window" if one comes late that is longer."""
        if window is not None and type(window) is not int:
            raise _MalformedError
        if window is None or (self.window is not None and window <= self.window):
            if window == self.window and group is not None and not self.begun:
                self.layer_group = (
                    group if self.layer_group is None else min(self.layer_group, group)
                )
            return ""
        late = self.window is not None and self.begun
        self.window, self.layer_group = window, group
        return self._lose("window") if late else ""

    def _lose(self, reason: str) -> str:
        self.known.clear()
        self.untold.clear()
        return reason

    def _stored(self, data: Mapping[str, Any]) -> Iterator[Event]:
        """One event for each run of new blocks with the same level and adapter."""
        parent = None if data["parent_hash"] is None else _hash(data["parent_hash"])
        run: list[_Block] = []
        before_run = parent
        for block in self._full(data["blocks"]):
            known = self.known.get(block.hash)
            new = known is None or known.level != block.level
            if run and not (new and block.continues(run[-1])):
                yield self._event(run, before_run)
                run = []
            if not run:
                before_run = parent
            if not new:
                self.stats.filtered_blocks["known"] += 1
            else:
                if known is not None:
                    yield BlockRemoved(hashes=[block.hash], medium=_medium(known.level))
                self.known[block.hash] = _Known(block.level, parent, block.adapter)
                self.untold.pop(block.hash, None)
                run.append(block)
            parent = block.hash
        if run:
            yield self._event(run, before_run)

    def _event(self, run: list[_Block], parent: Hash | None) -> Event:
        return BlockStored(
            hashes=[block.hash for block in run],
            parent=parent,
            block_size=self.block_size,
            medium=_medium(run[0].level),
            adapter=run[0].adapter,
            extra_keys=[block.extra for block in run] if any(b.extra for b in run) else None,
            token_ids=[token for block in run for token in block.tokens],
        )

    def _full(self, blocks: Iterable[Any]) -> Iterator[_Block]:
        """The blocks up to the first that is not full."""
        reason = ""
        for raw in blocks:
            tokens = raw["tokens"]
            value = _hash(raw["block_hash"])
            if not reason and len(tokens) != self.block_size:
                reason = "partial" if len(tokens) < self.block_size else "oversized"
            if not reason:
                yield _Block(value, raw, tokens)
                continue
            self.stats.filtered_blocks[reason] += 1
            self.untold[value] = reason
            if len(self.untold) > UNTOLD_BLOCKS:
                self.untold.popitem(last=False)

    def _removed(self, hashes: Iterable[Hash]) -> Iterator[Event]:
        by_level: dict[int, list[Hash]] = {}
        for value in hashes:
            known = self.known.pop(value, None)
            if known is None:
                self.stats.filtered_blocks[self.untold.pop(value, "untold")] += 1
            else:
                by_level.setdefault(known.level, []).append(value)
        for level, gone in by_level.items():
            yield BlockRemoved(hashes=gone, medium=_medium(level))

    def _updated(self, data: Mapping[str, Any]) -> Iterator[Event]:
        """A block moved between cache levels: there before it leaves here."""
        value = _hash(data["block_hash"])
        difference = data.get("cache_level")
        if difference is None:  # only its priority
            return
        level = difference["new_value"]
        if type(level) is not int:
            raise _MalformedError
        known = self.known.get(value)
        if known is None:
            self.stats.filtered_blocks[self.untold.get(value, "untold")] += 1
            return
        if _medium(level) != _medium(known.level):
            yield BlockStored(
                hashes=[value],
                parent=known.parent,
                block_size=self.block_size,
                medium=_medium(level),
                adapter=known.adapter,
            )
            yield BlockRemoved(hashes=[value], medium=_medium(known.level))
        self.known[value] = known._replace(level=level)


class _Block:
    """A full block of a ``stored`` event."""

    __slots__ = ("adapter", "extra", "hash", "level", "tokens")

    def __init__(self, value: Hash, raw: Mapping[str, Any], tokens: Iterable[Any]) -> None:
        self.hash = value
        level = raw.get("cache_level")
        self.level = level if type(level) is int and level >= 0 else 0
        number = raw.get("lora_id")
        self.adapter: str | None = raw.get("lora_name") or (str(number) if number else None)
        # A multimodal placeholder may be text, which no token id is. The hash tells them apart.
        ids = (token["token_id"] for token in tokens)
        self.tokens = [token if type(token) is int else 0 for token in ids]
        # vLLM's order: adapter, multimodal items, salt.
        extra: list[Any] = [raw["lora_name"]] if raw.get("lora_name") else []
        extra.extend((key["hash"], key["start_offset"]) for key in raw.get("mm_keys") or ())
        extra.extend([raw["cache_salt"]] if raw.get("cache_salt") else [])
        self.extra = extra or None

    def continues(self, other: _Block) -> bool:
        """One event can hold both."""
        return (self.level, self.adapter) == (other.level, other.adapter)


def _parts(raw: Any) -> tuple[int, Any, str]:
    event_id, data = raw["event_id"], raw["data"]
    kind = data["type"]
    if type(event_id) is not int or not isinstance(kind, str):
        raise _MalformedError
    return event_id, data, kind


def _hash(value: Any) -> Hash:
    """Numbers are 64 bits, signed or not; text is hexadecimal.

    Raises:
        _MalformedError: neither.
        ValueError: more than 64 bits, or no hexadecimal.
    """
    if type(value) is int:
        return unsigned(value)
    if isinstance(value, str) and value:
        return bytes.fromhex(value)
    raise _MalformedError


def _medium(level: int) -> str:
    return MEDIA[min(level, len(MEDIA) - 1)]


def _blocks(data: Mapping[str, Any], kind: str) -> int:
    if kind == "updated":
        return 1
    return len(data["blocks" if kind == "stored" else "block_hashes"])
