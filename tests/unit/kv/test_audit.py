"""The auditor's verdicts, on an index and an engine that are plain objects."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llm_worker.kv import truth
from llm_worker.kv.audit import Auditor, digest, unpacked
from llm_worker.kv.events import AllBlocksCleared, BlockStored, encode
from llm_worker.kv.index import Index
from llm_worker.kv.stats import ListenerStats
from llm_worker.kv.stream import Stream


class Rank:
    """A listener without sockets."""

    def __init__(self) -> None:
        self.rank = 0
        self.source = Index().source("w", 0)
        self.stats = ListenerStats("w", 0)
        self.stream = Stream(self.source, self.stats)
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


def test_drift_is_counted_by_block_and_marks_the_source() -> None:
    """Missing and surplus, whichever way it went wrong."""
    rank = Rank()
    rank.index(1, 2, 3)
    made = auditor(rank, told(2, 3, 4, 5))
    found = verdict(made)
    assert found["outcome"] == "drift"
    assert (found["missing_blocks"], found["surplus_blocks"]) == (2, 1)
    assert (found["engine_blocks"], found["index_blocks"]) == (4, 3)
    assert rank.source.stale == {"audit"}
    assert made.stats()[0].drift_blocks == 3


def test_blocks_in_another_group_are_drift() -> None:
    """Hybrid models have several groups with a hash space in common."""
    rank = Rank()
    rank.index(1, 2, group=1)
    assert verdict(auditor(rank, told(1, 2)))["outcome"] == "drift"
    assert verdict(auditor(rank, told(1, 2, group=1)))["outcome"] == "equal"


def test_equality_proves_an_index_that_had_lost_batches() -> None:
    """What was lost did not matter, or was made up for since."""
    rank = Rank()
    rank.index(1)
    for reason in ("gap", "missed_first", "undecodable", "audit"):
        rank.source.mark_stale(reason)
    rank.source.mark_stale("disconnected")
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
    monkeypatch.setattr("llm_worker.kv.audit.CATCH_UP_SECONDS", 0.05)
    rank = Rank()
    rank.index(1)
    found = verdict(auditor(rank, told(1, 2, sequence=1)))
    assert found["outcome"] == "failed"
    assert "behind" in found["reason"]


def test_it_compares_by_itself_once_the_engine_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not again until something happened."""
    monkeypatch.setattr("llm_worker.kv.audit.QUIET_SECONDS", 0.01)
    rank = Rank()
    rank.index(1)
    asked: list[bool] = []

    def ask(full: bool) -> Any:
        asked.append(full)
        return [told(1)]

    made = Auditor(ask, lambda: [rank], lambda call: call(), interval_seconds=0.01)
    made.start()
    deadline = time.monotonic() + 10
    while not made.stats()[0].audits["equal"]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)
    made.close()
    assert asked == [False]


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


def test_a_reset_is_published_with_the_reset_and_never_breaks_it() -> None:
    """The hook in the engine core: what is queued goes out, and an error stays inside."""
    published: list[Any] = []
    queued: list[Any] = []
    batch = SimpleNamespace(KVEventBatch=lambda ts, events: events)
    publisher = SimpleNamespace(_event_queue=None, publish=published.append)
    core = SimpleNamespace(
        scheduler=SimpleNamespace(
            kv_event_publisher=publisher,
            kv_cache_manager=SimpleNamespace(take_events=lambda: [queued.pop()] if queued else []),
        )
    )

    def reset(_: Any, *arguments: Any) -> bool:
        queued.append(AllBlocksCleared())
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "vllm.distributed.kv_events", batch)
        hooked = truth.announce_reset(reset)
        assert hooked(core, True, False) is True
        assert published == [[AllBlocksCleared()]]
        core.scheduler.kv_cache_manager = None
        assert hooked(core) is True
