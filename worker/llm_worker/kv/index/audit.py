"""Is the index right? Compares it with what the engine says it holds, rank by rank.

The engine tells a digest of its block pool and the number of the batch at which that is true; the
index is compared when it has applied exactly that batch. Only a quiet engine is asked to decide:
telling takes it some milliseconds, and a busy one has moved on by the time the answer is here.
A digest that differs is followed by the full set, which says how many blocks are wrong. Equality
proves the index, whatever was lost before. A difference marks it, and the index is mended: the full
set of an engine that stands still is the truth, so what is too many goes and what is missing comes
back, without its parent and its adapter, which the engine does not tell.
A comparison that breaks is one that failed: counted, logged when what it says is new, and the next
one is made as ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import xor
from typing import Any, Protocol

from llm_worker.kv.index.source import BlockSink
from llm_worker.kv.records import GPU, BlockRemoved, BlockStored, Event, Hash
from llm_worker.kv.stats import AuditStats, ListenerStats

log = logging.getLogger(__name__)

CATCH_UP_SECONDS = 2.0
INTERVAL_SECONDS = 60.0
SOON_SECONDS = 5.0  # while an index is stale; longer each time that it does not help
AGAIN_SECONDS = 600.0  # after a verdict, though nothing has happened: whoever watches sees its age
QUIET_SECONDS = 2.0
_MASK = (1 << 64) - 1

Truth = Mapping[str, Any]  # what `truth.held` returns
Digest = tuple[int, int, int]
Block = tuple[int, Hash]  # KV-cache group, hash


class Audited(Protocol):
    """What the pipeline has for one rank."""

    rank: int
    stats: ListenerStats

    @property
    def source(self) -> BlockSink:
        """What is held of it."""

    @property
    def stream(self) -> Any:
        """The account, which is told when the index is equal."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One comparison of one rank."""

    worker: str
    rank: int
    outcome: str  # equal, drift, busy, failed
    reason: str  # a sentence
    sequence: int | None = None
    engine_blocks: int | None = None
    index_blocks: int | None = None
    missing_blocks: int | None = None  # the engine has them, the index does not
    surplus_blocks: int | None = None


class Auditor:
    """Compares on demand, and by itself when an engine went quiet.

    Args:
        ask: Every rank's truth; with True the full sets. Called on the auditor's thread, and may
            raise anything.
        ranks: What is to be compared.
        on_index_thread: Runs a callable between two batches.
    """

    def __init__(
        self,
        ask: Callable[[bool], Sequence[Truth]],
        ranks: Callable[[], Sequence[Audited]],
        on_index_thread: Callable[[Callable[[], Any]], Any],
        *,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        self._ask = ask
        self._ranks = ranks
        self._on_index_thread = on_index_thread
        self._interval_seconds = interval_seconds
        self._stats: dict[int, AuditStats] = {}
        self._audited: dict[int, int | None] = {}  # the sequence of the last verdict
        self._complaint = ""  # the last one logged
        self._one_at_a_time = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-audit", daemon=True)

    def start(self) -> None:
        """Compare from now on whenever it is due and the engine is quiet."""
        self._thread.start()

    def close(self) -> None:
        """Compare no more."""
        self._stop.set()

    def stats(self) -> list[AuditStats]:
        """What was found so far, by rank."""
        return [self._of(ranked) for ranked in self._ranks()]

    def audit(self) -> dict[str, Any]:
        """Compare all ranks now; blocks for some seconds at most."""
        verdicts = self._audit(self._ranks())
        return {
            "ok": all(verdict.outcome == "equal" for verdict in verdicts),
            "audits": [asdict(verdict) for verdict in verdicts],
        }

    def _run(self) -> None:
        soon = min(SOON_SECONDS, self._interval_seconds)
        due = time.monotonic() + self._interval_seconds
        while not self._stop.wait(soon):
            # What is in doubt is compared soon, and less often the longer that does not help.
            doubted = any(ranked.source.stale for ranked in self._ranks())
            soon = min(2 * soon if doubted else SOON_SECONDS, self._interval_seconds)
            everything = time.monotonic() >= due
            if everything:
                due = time.monotonic() + self._interval_seconds
            try:
                self._look(everything=everything)
            except Exception as error:  # whatever it is, the next comparison may work
                self._complain("a comparison of the KV index broke", error)
                for stats in list(self._stats.values()):
                    stats.audits["failed"] += 1

    def _look(self, *, everything: bool = True) -> None:
        """Compare the ranks for which it is time and which are quiet; or those in doubt only."""
        due = [
            ranked
            for ranked in self._ranks()
            if (self._is_due(ranked) if everything else ranked.source.stale)
        ]
        before = [ranked.stats.sequence for ranked in due]
        if not due or self._stop.wait(QUIET_SECONDS):
            return
        quiet = [
            ranked
            for ranked, sequence in zip(due, before, strict=True)
            if ranked.stats.sequence == sequence
        ]
        if quiet:
            self._audit(quiet)

    def _is_due(self, ranked: Audited) -> bool:
        last = self._of(ranked).last_verdict_timestamp_seconds
        return (
            bool(ranked.source.stale)
            or self._audited.get(ranked.rank, -1) != ranked.stats.sequence
            or last is None
            or time.time() - last > AGAIN_SECONDS
        )

    def _complain(self, what: str, error: Exception) -> None:
        """Log it unless it is what was logged last."""
        complaint = f"{what}: {error!r}"
        if complaint != self._complaint:
            log.warning("%s", complaint)
        self._complaint = complaint

    def _of(self, ranked: Audited) -> AuditStats:
        stats = self._stats.get(ranked.rank)
        if stats is None:
            stats = self._stats[ranked.rank] = AuditStats(ranked.source.worker, ranked.rank)
        return stats

    def _audit(self, ranks: Sequence[Audited]) -> list[Verdict]:
        with self._one_at_a_time:
            try:
                truths = {truth["rank"]: truth for truth in self._ask(False)}
            except Exception as error:
                self._complain("the engine did not tell what it holds", error)
                truths = {}
            verdicts = [self._verdict(ranked, truths.get(ranked.rank)) for ranked in ranks]
            for ranked, verdict in zip(ranks, verdicts, strict=True):
                self._note(ranked, verdict)
        return verdicts

    def _note(self, ranked: Audited, verdict: Verdict) -> None:
        stats = self._of(ranked)
        stats.audits[verdict.outcome] += 1
        if verdict.outcome not in ("equal", "drift"):
            return
        self._complaint = ""
        stats.drift_blocks = (verdict.missing_blocks or 0) + (verdict.surplus_blocks or 0)
        stats.last_verdict_timestamp_seconds = time.time()
        # One that was mended is compared once more, which takes the difference back.
        self._audited[ranked.rank] = verdict.sequence if verdict.outcome == "equal" else None
        if verdict.outcome == "drift":
            log.error(
                "the KV index of rank %d differs from its engine: %d blocks missing, %d surplus",
                ranked.rank,
                verdict.missing_blocks,
                verdict.surplus_blocks,
                extra={"worker": verdict.worker, "rank": verdict.rank},
            )

    def _verdict(self, ranked: Audited, truth: Truth | None) -> Verdict:
        try:
            return self._compare(ranked, truth)
        except TimeoutError as error:
            self._complain("the KV thread did not get to a comparison", error)
            reason = "the index's thread is busy with something else"
            return Verdict(ranked.source.worker, ranked.rank, "failed", reason)

    def _compare(self, ranked: Audited, truth: Truth | None) -> Verdict:  # noqa: PLR0911
        worker, rank = ranked.source.worker, ranked.rank
        if truth is None or truth["sequence"] is None:
            return Verdict(worker, rank, "failed", "the engine did not tell what it holds")
        sequence = None if truth["sequence"] < 0 else truth["sequence"]
        if not truth["quiet"]:
            return Verdict(worker, rank, "busy", "the engine is computing", sequence)
        if not self._catch_up(ranked, sequence):
            return Verdict(
                worker,
                rank,
                "failed",
                "the index is behind the engine and not catching up",
                sequence,
            )
        blocks = self._at(ranked, sequence)
        if blocks is None:
            return Verdict(worker, rank, "busy", "the engine went on meanwhile", sequence)
        told = {int(group): tuple(digest) for group, digest in truth["digests"].items()}
        counts = (sum(digest[0] for digest in told.values()), sum(map(len, blocks.values())))
        if {group: digest(hashes) for group, hashes in blocks.items()} == told:
            if not self._on_index_thread(lambda: self._tell_equal(ranked, sequence)):
                return Verdict(worker, rank, "busy", "the engine went on meanwhile", sequence)
            return Verdict(worker, rank, "equal", "block by block", sequence, *counts, 0, 0)
        return self._count_drift(ranked, sequence)

    def _count_drift(self, ranked: Audited, sequence: int | None) -> Verdict:
        """The digests differ: by how many blocks, and do they still?"""
        worker, rank = ranked.source.worker, ranked.rank
        try:
            truth = next(truth for truth in self._ask(True) if truth["rank"] == rank)
        except Exception as error:
            self._complain("the engine did not tell what it holds", error)
            return Verdict(
                worker, rank, "failed", "the engine did not tell what it holds", sequence
            )
        blocks = self._at(ranked, sequence)
        if blocks is None or truth["sequence"] != _number(sequence):
            return Verdict(worker, rank, "busy", "the engine went on meanwhile", sequence)
        engine = {
            (int(group), value)
            for group, packed in truth["hashes"].items()
            for value in unpacked(packed, truth["width"], truth["integers"])
        }
        index = _flat(blocks)
        missing, surplus = engine - index, index - engine
        counts = (len(engine), len(index), len(missing), len(surplus))
        if not missing and not surplus:
            return Verdict(worker, rank, "equal", "block by block", sequence, *counts)
        sizes = truth.get("block_sizes", ())

        def mend() -> bool:
            ranked.source.trust.drifted()
            if ranked.stats.sequence != sequence:
                return False  # it went on: another audit will see
            ranked.stream.mend(_mending(ranked, missing, surplus, sizes))
            if _flat(_held(ranked)) != engine:
                return False  # there is no room
            ranked.stream.audited_equal()
            return True

        mended = self._on_index_thread(mend)
        if mended:
            stats = self._of(ranked)
            stats.mended_blocks.update(missing=len(missing), surplus=len(surplus))
        reason = "they differed, and the index was mended" if mended else "they differ"
        return Verdict(worker, rank, "drift", reason, sequence, *counts)

    def _catch_up(self, ranked: Audited, sequence: int | None) -> bool:
        """Whether the index got to this batch, soon enough."""
        deadline = time.monotonic() + CATCH_UP_SECONDS
        while _number(ranked.stats.sequence) < _number(sequence):
            if time.monotonic() > deadline or self._stop.is_set():
                return False
            time.sleep(0.01)
        # An engine that has published nothing cannot be heard, and can be compared.
        return sequence is None or "unsynchronised" not in ranked.source.stale

    def _at(self, ranked: Audited, sequence: int | None) -> dict[int, list[Hash]] | None:
        """The rank's blocks by group as they are just after this batch; None: it is past it."""

        def take() -> dict[int, list[Hash]] | None:
            if ranked.stats.sequence != sequence:
                return None
            return _held(ranked)

        found: dict[int, list[Hash]] | None = self._on_index_thread(take)
        return found

    def _tell_equal(self, ranked: Audited, sequence: int | None) -> bool:
        if ranked.stats.sequence != sequence:
            return False
        ranked.stream.audited_equal()
        return True


def _held(ranked: Audited) -> dict[int, list[Hash]]:
    """What is held of the engine's own pool, by group; on the index's thread."""
    found: dict[int, list[Hash]] = {}
    for lane in ranked.source.lanes():
        if lane.medium == GPU and lane.parents:
            found.setdefault(lane.group or 0, []).extend(lane.parents)
    return found


def _flat(blocks: Mapping[int, Sequence[Hash]]) -> set[Block]:
    return {(group, value) for group, hashes in blocks.items() for value in hashes}


def _mending(
    ranked: Audited, missing: set[Block], surplus: set[Block], block_sizes: Sequence[int]
) -> list[Event]:
    """Events that bring the index to what the engine holds; on the index's thread."""
    events: list[Event] = []
    for lane in ranked.source.lanes():
        if lane.medium == GPU:
            group = lane.group or 0
            # As often as there are copies of it: the engine has none.
            gone = [
                value
                for value in lane.parents
                if (group, value) in surplus
                for _ in range(1 + lane.copies.get(value, 0))
            ]
            events += [BlockRemoved(hashes=gone, group=group)] if gone else []
    for group, value in sorted(missing, key=str):
        size = block_sizes[group] if group < len(block_sizes) else 0
        # One each: a chain would make each the parent of the next.
        events.append(BlockStored(hashes=[value], block_size=size, group=group))
    return events


def _number(sequence: int | None) -> int:
    return -1 if sequence is None else sequence


def digest(hashes: Sequence[Hash]) -> Digest:
    """Blocks, xor and sum of the low 64 bits: what `truth` tells of each group."""
    low = [
        value & _MASK if isinstance(value, int) else int.from_bytes(value[-8:], "big")
        for value in hashes
    ]
    return len(low), reduce(xor, low, 0), sum(low) & _MASK


def unpacked(packed: bytes, width: int, integers: bool) -> list[Hash]:
    """The hashes that `truth` packed."""
    pieces = [packed[at : at + width] for at in range(0, len(packed), width)]
    return [int.from_bytes(piece, "big") for piece in pieces] if integers else list(pieces)
