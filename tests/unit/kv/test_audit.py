"""The auditor's verdicts, on an index and an engine that are plain objects."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from llm_worker.kv.follow.stream import Stream
from llm_worker.kv.index.audit import Auditor, digest, unpacked
from llm_worker.kv.index.index import Index
from llm_worker.kv.records import AllBlocksCleared, BlockStored
from llm_worker.kv.stats import ListenerStats
from llm_worker.kv.wire import Decoder, encode
from llm_worker.serving import core_truth as truth
from support.waiting import until


class Rank:
    """A listener without sockets."""

    def __init__(self, *, replayable: bool = True) -> None:
        self.rank = 0
        self.source = Index().source("w", 0)
        self.stats = ListenerStats("w", 0)
        self.stream = Stream(self.source, self.stats, replayable=replayable)
        if replayable:
            self.stream.connected()
            self.stream.replay_ended()
        self._next = 0

    def index(self, *hashes: int, group: int = 0, medium: str = "gpu") -> None:
        event = BlockStored(hashes=list(hashes), block_size=16, group=group, medium=medium)
        payload = encode(100.0 + self._next, [event], 0)
        self.stream.live([(self._next.to_bytes(8, "big"), payload)], 0.0)
        self._next += 1


def told(*hashes: int, sequence: int = 0, quiet: bool = True, group: int = 0) -> dict[str, Any]:
    """What an engine with these blocks tells; the keys are vLLM's: hash and group."""
    keys = [value.to_bytes(32, "big") + group.to_bytes(4, "big") for value in hashes]
    return {
        "rank": 0,
        "sequence": sequence,
        "quiet": quiet,
        "integers": True,
        **truth._contents(keys, True, True),
    }


def auditor(rank: Rank, *answers: Any) -> Auditor:
    """One that gets these answers in turn, the last one again and again."""
    left = list(answers)

    def ask(full: bool) -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    return Auditor(ask, lambda: [rank], lambda call: call())


def verdict(made: Auditor) -> dict[str, Any]:
    (only,) = made.audit()["audits"]
    return dict(only)


def test_an_index_that_holds_what_the_engine_holds_is_equal() -> None:
    """By group; what connectors hold elsewhere is not the engine's pool."""
    rank = Rank()
    rank.index(1, 2, 2**63 + 5)
    rank.index(77, medium="cpu")
    made = auditor(rank, told(2**63 + 5, 2, 1, sequence=1))
    assert verdict(made)["outcome"] == "equal"
    assert made.audit()["ok"]
    (stats,) = made.stats()
    assert stats.audits == {"equal": 2}
    assert stats.drift_blocks == 0
    assert stats.last_verdict_timestamp_seconds is not None


def test_drift_is_counted_by_block_and_mended() -> None:
    """Missing and surplus, whichever way it went wrong: the index is the engine's afterwards."""
    rank = Rank()
    rank.index(1, 2, 3)
    made = auditor(rank, told(2, 3, 4, 5))
    found = verdict(made)
    assert found["outcome"] == "drift"
    assert (found["missing_blocks"], found["surplus_blocks"]) == (2, 1)
    assert (found["engine_blocks"], found["index_blocks"]) == (4, 3)
    assert made.stats()[0].drift_blocks == 3
    assert made.stats()[0].mended_blocks == {"missing": 2, "surplus": 1}
    assert rank.source.hashes() == {2, 3, 4, 5}
    assert not rank.source.stale
    assert verdict(made)["outcome"] == "equal"
    assert made.stats()[0].drift_blocks == 0


def test_a_block_that_is_too_many_goes_with_all_its_copies() -> None:
    """As after reports of reused blocks as new ones, which count a copy each."""
    rank = Rank()
    for _ in range(3):
        rank.index(1, 2)
    verdict(auditor(rank, told(2, sequence=2)))
    assert rank.source.hashes() == {2}
    assert not rank.source.stale


def test_an_index_that_lost_batches_comes_back_by_itself() -> None:
    """As after a restart of the observer with a replay buffer that begins too late."""
    rank = Rank()
    rank.index(7)
    rank.source.trust.lost()
    made = auditor(rank, told(5, 6, 7))
    assert rank.source.stale == {"gap"}
    verdict(made)
    assert rank.source.hashes() == {5, 6, 7}
    assert not rank.source.stale


def test_what_a_mended_index_took_over_goes_out_as_well() -> None:
    """Who reads the plane has to come to the same blocks."""
    sent: list[Any] = []
    rank = Rank()
    outlet = SimpleNamespace(publish=lambda source, payload, events, at: sent.extend(events))
    rank.stream = Stream(rank.source, rank.stats, replayable=True, outlets=[outlet])
    rank.stream.connected()
    rank.stream.replay_ended()
    rank.index(1, 2)
    sent.clear()
    verdict(auditor(rank, told(2, 3)))
    told_on = [(type(event).__name__, list(event.hashes)) for event in sent]
    assert told_on == [("BlockRemoved", [1]), ("BlockStored", [3])]


def test_a_difference_that_cannot_be_mended_marks_the_source() -> None:
    """A bounded index has no room for what is missing."""
    rank = Rank()
    rank.source = Index(max_blocks=2).source("w", 0)
    rank.stream = Stream(rank.source, rank.stats, replayable=True)
    rank.stream.connected()
    rank.stream.replay_ended()
    rank.index(1, 2)
    made = auditor(rank, told(1, 2, 3))
    assert verdict(made)["outcome"] == "drift"
    assert "audit" in rank.source.stale
    assert not made.stats()[0].mended_blocks


def test_blocks_in_another_group_are_drift() -> None:
    """Hybrid models have several groups with a hash space in common."""
    rank = Rank()
    rank.index(1, 2, group=1)
    assert verdict(auditor(rank, told(1, 2, group=1)))["outcome"] == "equal"
    assert verdict(auditor(rank, told(1, 2)))["outcome"] == "drift"


def test_equality_proves_an_index_that_had_lost_batches() -> None:
    """What was lost did not matter, or was made up for since."""
    rank = Rank()
    rank.index(1)
    trust = rank.source.trust
    for fact in (trust.lost, trust.missed_first, trust.not_understood, trust.drifted):
        fact()
    trust.disconnected()
    assert verdict(auditor(rank, told(1)))["outcome"] == "equal"
    assert rank.source.stale == {"disconnected"}


def test_a_busy_engine_gets_no_verdict() -> None:
    """Nor does one that went on while it was compared."""
    rank = Rank()
    rank.index(1)
    assert verdict(auditor(rank, told(1, 2, quiet=False)))["outcome"] == "busy"
    rank.index(2)
    assert verdict(auditor(rank, told(1, sequence=0)))["outcome"] == "busy"
    went_on = auditor(rank, told(1, 3, sequence=1), told(1, 3, 4, sequence=2))
    assert verdict(went_on)["outcome"] == "busy"
    assert not rank.source.stale


def test_an_engine_that_does_not_answer_is_a_failure_and_no_drift() -> None:
    """One without our plug-in, without a publisher, or dead."""
    rank = Rank()
    rank.index(1)
    for answer in (
        RuntimeError("no such method"),
        told(1) | {"sequence": None},
        told() | {"rank": 7},
    ):
        assert verdict(auditor(rank, answer))["outcome"] == "failed"
    assert not rank.source.stale


def test_an_index_that_stays_behind_its_engine_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The listener should have had that batch long ago."""
    monkeypatch.setattr("llm_worker.kv.index.audit.CATCH_UP_SECONDS", 0.05)
    rank = Rank()
    rank.index(1)
    found = verdict(auditor(rank, told(1, 2, sequence=1)))
    assert found["outcome"] == "failed"
    assert "behind" in found["reason"]


def test_it_compares_by_itself_once_the_engine_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not again until something happened."""
    monkeypatch.setattr("llm_worker.kv.index.audit.QUIET_SECONDS", 0.01)
    rank = Rank()
    rank.index(1)
    asked: list[bool] = []

    def ask(full: bool) -> Any:
        asked.append(full)
        return [told(1)]

    made = Auditor(ask, lambda: [rank], lambda call: call(), interval_seconds=0.01)
    made.start()
    until("an audit that finds both equal", lambda: made.stats()[0].audits["equal"])
    time.sleep(0.1)
    made.close()
    assert asked == [False]


def test_a_comparison_that_breaks_is_counted_and_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is: the index's thread that is too busy, or a bug. In the log once."""
    monkeypatch.setattr("llm_worker.kv.index.audit.QUIET_SECONDS", 0.001)
    rank = Rank()
    rank.index(1)
    trouble: list[Exception] = [TimeoutError()] * 3 + [RuntimeError("a bug")] * 3

    def on_index_thread(call: Any) -> Any:
        if trouble:
            raise trouble.pop(0)
        return call()

    made = Auditor(lambda full: [told(1)], lambda: [rank], on_index_thread, interval_seconds=0.01)
    made.start()
    until("an audit that finds both equal", lambda: made.stats()[0].audits["equal"])
    made.close()
    assert made.stats()[0].audits == {"failed": 6, "equal": 1}
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_an_index_whose_thread_is_busy_is_a_failure_and_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever asked gets an answer."""
    rank = Rank()
    rank.index(1)

    def busy(_: Any) -> Any:
        raise TimeoutError

    found = verdict(Auditor(lambda full: [told(1)], lambda: [rank], busy))
    assert found["outcome"] == "failed"
    assert "busy" in found["reason"]


def test_a_verdict_is_repeated_before_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an auditor that died is told from an engine that is idle."""
    monkeypatch.setattr("llm_worker.kv.index.audit.QUIET_SECONDS", 0.001)
    monkeypatch.setattr("llm_worker.kv.index.audit.AGAIN_SECONDS", 0.05)
    rank = Rank()
    rank.index(1)
    made = Auditor(lambda full: [told(1)], lambda: [rank], lambda c: c(), interval_seconds=0.01)
    made.start()
    until("three audits that find both equal", lambda: made.stats()[0].audits["equal"] >= 3)
    made.close()


@pytest.mark.slow
def test_an_engine_that_published_nothing_proves_an_index_that_heard_nothing() -> None:
    """Where it cannot be asked for what was missed, there is no other way to know."""
    rank = Rank(replayable=False)
    rank.stream.connected()
    rank.stream.replay_failed("unavailable")
    assert rank.source.stale == {"unsynchronised"}
    assert verdict(auditor(rank, told(1, sequence=0)))["outcome"] == "failed"
    assert verdict(auditor(rank, told(sequence=-1)))["outcome"] == "equal"
    assert not rank.source.stale


def test_the_two_sides_compute_the_same_digest() -> None:
    """In the engine with numpy, in the index on Python's integers and on bytes."""
    hashes = [int(value) for value in np.random.default_rng(1).integers(0, 2**63, 1000)]
    assert digest(hashes) == tuple(told(*hashes)["digests"]["0"])
    full = [value.to_bytes(32, "big") for value in hashes]
    assert digest(full) == digest(hashes)
    keys = [value + bytes(4) for value in full]
    contents = truth._contents(keys, False, True)
    assert unpacked(contents["hashes"]["0"], contents["width"], False) == full
    assert unpacked(told(*hashes)["hashes"]["0"], 8, True) == hashes
    assert truth._contents([], True, True)["digests"] == {}


class Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    """vLLM's event, which names no medium."""


class Core:
    """An engine core as far as a reset goes: a pool, a connector or none, what was published."""

    def __init__(self, *, connector: bool) -> None:
        self.published: list[Any] = []
        self.pool: list[Any] = []
        self.kept: list[Any] = []
        self.scheduler = SimpleNamespace(
            kv_event_publisher=SimpleNamespace(_event_queue=None, publish=self._publish),
            connector=SimpleNamespace(take_events=lambda: self._take(self.kept))
            if connector
            else None,
            kv_cache_manager=SimpleNamespace(take_events=lambda: self._take(self.pool)),
        )

    def _publish(self, events: list[Any]) -> None:
        payload = msgspec.msgpack.encode((1.0, events, 0))
        self.published += Decoder().decode(payload).events

    @staticmethod
    def _take(queued: list[Any]) -> list[Any]:
        taken = queued.copy()
        queued.clear()
        return taken


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's module, as far as it is asked for."""
    module = SimpleNamespace(KVEventBatch=lambda ts, events: events, AllBlocksCleared=Cleared)
    monkeypatch.setitem(sys.modules, "vllm.distributed.kv_events", module)


@pytest.mark.usefixtures("kinds")
def test_a_reset_is_published_with_the_reset_and_never_breaks_it() -> None:
    """The hook in the engine core: what is queued goes out, and an error stays inside."""
    core = Core(connector=False)

    def reset(core: Core, *arguments: Any) -> bool:
        core.pool.append(Cleared())
        return True

    hooked = truth.announce_reset(reset)
    assert hooked(core, True, False) is True
    assert core.published == [AllBlocksCleared()]
    core.scheduler.kv_cache_manager = None
    assert hooked(core) is True


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize(
    ("asked", "pool", "connector", "media"),
    [
        ((), True, None, ["gpu"]),
        ((True, False), True, None, ["gpu"]),
        ((True, True), True, True, ["all"]),
        ((False, True), True, False, ["gpu"]),  # the connector refused
        ((False, True), False, True, ["cpu", "storage"]),
        ((False, False), False, None, []),
    ],
)
def test_a_reset_says_which_blocks_it_was_of_where_a_connector_keeps_some(
    asked: tuple[bool, ...], pool: bool, connector: bool | None, media: list[str]
) -> None:
    """What vLLM has queued says neither that, nor anything of a connector's reset.

    What the connector had to tell goes out before its clear, as behind it it would be of blocks
    that are gone.
    """
    core = Core(connector=True)
    before = BlockStored(hashes=[1], block_size=16)
    late = BlockStored(hashes=[2], block_size=16, medium="CPU")
    core.pool.append(before)
    core.kept.append(late)

    def reset(core: Core, *arguments: bool) -> bool:
        if pool:
            core.pool.append(Cleared())
        if connector:
            core.kept.append(Cleared())  # a pool of its own that says so; some say nothing
        return pool and connector is not False

    truth.announce_reset(reset)(core, *asked)
    clears = [event for event in core.published if isinstance(event, AllBlocksCleared)]
    assert [event.medium for event in clears] == media
    assert core.published[len(core.published) - len(clears) :] == clears
    told = [event.hashes for event in core.published if isinstance(event, BlockStored)]
    assert told == ([[1], [2]] if asked[1:] == (True,) else [[1]])


@pytest.mark.usefixtures("kinds")
def test_a_connector_that_cannot_tell_does_not_keep_the_reset_back() -> None:
    """It tells with the next step."""
    core = Core(connector=True)
    core.scheduler.connector = SimpleNamespace()
    core.pool.append(Cleared())
    truth.announce_reset(lambda core, **_: True)(core, reset_connector=True)
    assert core.published == [AllBlocksCleared(medium="all")]
