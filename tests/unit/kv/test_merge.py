"""One source of the index out of several publishers of one rank."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_worker.kv.follow.merge import MergedRank
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import BlockSink
from llm_worker.kv.records import AllBlocksCleared, BlockRemoved, BlockStored, Event
from llm_worker.kv.wire import Decoder, encode


class Taken:
    """A plane that keeps what it was given."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def publish(
        self, source: BlockSink, payload: bytes, events: Sequence[Event], timestamp: float
    ) -> None:
        assert [type(event) for event in events]
        assert timestamp == 7.0
        self.payloads.append(payload)


def rank_of(plane: Taken | None = None) -> MergedRank:
    outlets = [] if plane is None else [plane]
    return MergedRank(Index().source("worker", 0), outlets, clock=lambda: 7.0)


def stored(*hashes: int, medium: str = "gpu") -> BlockStored:
    return BlockStored(hashes=list(hashes), parent=None, block_size=16, medium=medium)


def removed(*hashes: int, medium: str = "gpu") -> BlockRemoved:
    return BlockRemoved(hashes=list(hashes), medium=medium)


def test_a_block_stays_until_its_last_holder_drops_it() -> None:
    """And on another medium it is another block."""
    rank = rank_of()
    engine, connector = rank.part("engine"), rank.part("connector")
    engine.apply([stored(1, 2)])
    connector.apply([stored(1), stored(1, medium="cpu")])
    assert rank.source.blocks() == {"gpu": 2, "cpu": 1}
    engine.apply([removed(1, 2)])
    assert rank.source.blocks() == {"gpu": 1, "cpu": 1}
    connector.apply([removed(1)])
    assert rank.source.blocks().get("gpu", 0) == 0
    assert rank.source.blocks()["cpu"] == 1


def test_clearing_a_part_leaves_what_the_other_holds() -> None:
    """A reset of the engine's cache does not empty the connector's."""
    rank = rank_of()
    rank.part("engine").apply([stored(1, 2)])
    rank.part("connector").apply([stored(2, 3, medium="cpu"), stored(2)])
    rank.part("engine").clear()
    assert rank.source.hashes() == {2, 3}


def test_the_source_is_doubted_as_long_as_a_part_is() -> None:
    """Each part's reasons come and go with what was found out of its own publisher."""
    rank = rank_of()
    engine, connector = rank.part("engine"), rank.part("connector")
    assert rank.source.stale == {"unsynchronised"}
    engine.trust.synchronised()
    assert rank.source.stale == {"unsynchronised"}
    connector.trust.synchronised()
    assert not rank.source.stale
    engine.trust.gap_opened()
    connector.trust.gap_opened()
    connector.trust.not_understood()
    engine.trust.gap_closed()
    assert rank.source.stale == {"gap", "undecodable"}
    assert not engine.stale
    connector.trust.emptied()
    assert not rank.source.stale
    rank.source.trust.doubted_upstream(True)
    engine.trust.caught_up()
    assert rank.source.stale == {"upstream"}


def test_a_parts_clear_tells_whether_it_took_more_than_the_gpus_blocks() -> None:
    """Of its own: what the connector keeps is not the engine's to clear."""
    rank = rank_of()
    engine, connector = rank.part("engine"), rank.part("connector")
    connector.apply([stored(3, medium="cpu")])
    assert engine.apply([stored(1), AllBlocksCleared()]) is False
    assert not engine.beside_gpu()
    assert engine.apply([stored(1), stored(2, medium="cpu"), AllBlocksCleared(), stored(4)])
    assert rank.source.hashes() == {3, 4}
    assert connector.beside_gpu()
    engine.apply([stored(5, medium="cpu")])
    assert engine.apply([AllBlocksCleared(medium="all")]) is False
    assert rank.source.hashes() == {3}


def test_the_bound_of_the_index_is_the_merges_own() -> None:
    """What it refuses is not remembered beside it; who clears makes room and ends the doubt."""
    index = Index(max_blocks=3)
    rank = MergedRank(index.source("worker", 0))
    engine, connector = rank.part("engine"), rank.part("connector")
    engine.trust.synchronised()
    connector.trust.synchronised()
    engine.apply([stored(1, 2)])
    connector.apply([stored(1, 3, 4, medium="gpu"), stored(5, medium="cpu")])
    assert rank.source.hashes() == {1, 2, 3}
    assert rank.source.stale == {"index_full"}
    assert rank.source.stats.refused_blocks == 2
    assert rank.consolidator.sources() == {"engine": {0: 2}, "connector": {0: 2}}
    assert not engine.has_room()
    engine.apply([removed(2), stored(6)])
    assert rank.source.hashes() == {1, 3, 6}
    connector.clear()
    engine.clear()
    assert not rank.source.stale
    assert index.room_blocks == 3


def test_blocks_that_were_refused_stay_missing_when_the_other_publisher_clears() -> None:
    """The doubt is the part's: its own clear ends it, or nobody's."""
    index = Index(max_blocks=2)
    rank = MergedRank(index.source("worker", 0))
    engine, connector = rank.part("engine"), rank.part("connector")
    engine.trust.synchronised()
    connector.trust.synchronised()
    connector.apply([stored(1, 2, medium="cpu")])
    engine.apply([stored(10, 11)])
    assert rank.source.stale == {"index_full"}
    connector.apply([AllBlocksCleared()])
    connector.clear()
    assert not rank.source.hashes()
    assert rank.source.stale == {"index_full"}  # the engine still holds 10 and 11
    engine.apply([AllBlocksCleared(), stored(12)])
    assert rank.source.hashes() == {12}
    assert not rank.source.stale


def test_adapters_that_the_index_has_no_lane_for_are_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are as many as the publisher likes, and would take no room of the index's."""
    for module in ("follow.merge", "index.source"):
        monkeypatch.setattr(f"llm_worker.kv.{module}.MAX_LANES", 2)
    monkeypatch.setattr("llm_worker.kv.index.source.SWEEP_LANES", 2)
    rank = rank_of()
    for number in range(5):
        event = BlockStored(hashes=[number], block_size=16, adapter=str(number))
        rank.part("engine").apply([event])
    assert rank.consolidator.sources() == {"engine": {0: 2}}
    assert rank.source.hashes() == {0, 1}
    assert "index_full" in rank.source.stale


def test_names_that_are_no_names_are_not_remembered_either() -> None:
    """The same bound as the index's own."""
    rank = rank_of()
    rank.part("engine").apply([stored(1, medium="m" * 10_000), stored(2)])
    assert rank.consolidator.sources() == {"engine": {0: 1}}
    assert rank.source.hashes() == {2}
    assert rank.source.stats.refused_blocks == 1
    assert "index_full" in rank.part("engine").stale


@pytest.mark.parametrize("both", [False, True])
def test_the_memory_that_is_reported_includes_what_the_merge_remembers(both: bool) -> None:
    """Within a twentieth; blocks of one publisher, and of both."""
    payloads = [
        encode(1.0, [stored(*(hash_of(number) for number in range(start, start + 100)))], 0)
        for start in range(0, 40_000, 100)
    ]
    gc.collect()
    tracemalloc.start()
    index = Index()
    rank = MergedRank(index.source("worker", 0))
    for name in ("engine", "connector")[: 1 + both]:
        part = rank.part(name)
        for payload in payloads:
            part.apply(Decoder().decode(payload).events)
    gc.collect()
    traces = tracemalloc.take_snapshot().traces
    tracemalloc.stop()
    # What was asked for, in the steps of 16 bytes in which small objects are given out.
    allocated = sum((trace.size + 15) & ~15 for trace in traces)
    assert index.memory_bytes() == pytest.approx(allocated, rel=0.05)


def hash_of(number: int) -> int:
    """As wide as a real one."""
    return (number * 0x9E3779B97F4A7C15) % (1 << 64)


def test_planes_get_the_merged_stream() -> None:
    """What changes nothing is not published, what does is published as one batch."""
    plane = Taken()
    rank = rank_of(plane)
    rank.part("engine").apply([stored(1)])
    rank.part("connector").apply([stored(1)])
    rank.part("engine").apply([removed(1)])
    assert len(plane.payloads) == 1
    (event,) = Decoder().decode(plane.payloads[0]).events
    assert isinstance(event, BlockStored)
    assert event.hashes == [1]


EVENTS = st.one_of(
    st.builds(stored, st.integers(0, 5)),
    st.builds(lambda value: stored(value, medium="cpu"), st.integers(0, 5)),
    st.builds(removed, st.integers(0, 5)),
    st.builds(lambda value: removed(value, medium="cpu"), st.integers(0, 5)),
    st.builds(AllBlocksCleared),
    st.builds(lambda: AllBlocksCleared(medium="cpu")),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["engine", "connector"]), EVENTS), max_size=40))
def test_the_index_and_a_reader_of_the_plane_hold_the_union(
    history: list[tuple[str, Event]],
) -> None:
    """Whatever the parts say, in whatever order."""
    plane = Taken()
    rank = rank_of(plane)
    alone = {name: Index().source(name, 0) for name in ("engine", "connector")}
    for name, event in history:
        rank.part(name).apply([event])
        alone[name].apply([event])
    reader = Index().source("reader", 0)
    for payload in plane.payloads:
        reader.apply(Decoder().decode(payload).events)
    for medium in ("gpu", "cpu"):
        union = {
            value
            for source in alone.values()
            for lane in source.lanes()
            if lane.medium == medium
            for value in lane.parents
        }
        for source in (rank.source, reader):
            held = {
                value for lane in source.lanes() if lane.medium == medium for value in lane.parents
            }
            assert held == union
