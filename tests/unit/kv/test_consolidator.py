"""Several sources of one worker make one stream: the union, each block once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_worker.kv.follow.consolidator import Consolidator
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.records import AllBlocksCleared, BlockRemoved, BlockStored, Event, Hash

Contents = dict[tuple[str, int, str | None], dict[Hash, Hash | None]]


def stored(*hashes: Hash, parent: Hash | None = None, medium: str = "gpu", **more: object) -> Event:
    return BlockStored(hashes=list(hashes), parent=parent, block_size=16, medium=medium, **more)  # type: ignore[arg-type]


def removed(*hashes: Hash, medium: str = "gpu", group: int = 0) -> Event:
    return BlockRemoved(hashes=list(hashes), medium=medium, group=group)


def contents(source: Source) -> Contents:
    return {
        (lane.medium, lane.group, lane.adapter): dict(lane.parents)
        for lane in source.lanes()
        if lane.parents
    }


def union(*sources: Contents) -> Contents:
    merged: Contents = {}
    for source in sources:
        for lane, blocks in source.items():
            merged[lane] = blocks | merged.get(lane, {})
    return merged


def test_the_first_source_stores_and_the_last_removes() -> None:
    """A block that two hold stays until both have dropped it."""
    merge = Consolidator()
    assert merge.feed("engine", 0, [stored(1)]) == [stored(1)]
    assert merge.feed("offload", 0, [stored(1)]) == []
    assert merge.feed("engine", 0, [removed(1)]) == []
    assert merge.feed("offload", 0, [removed(1)]) == [removed(1)]
    assert merge.stats.stored_elsewhere_blocks == 1
    assert merge.stats.held_elsewhere_blocks == 1


def test_copies_of_a_block_are_counted_within_a_source() -> None:
    """vLLM tells of every physical copy: the block goes with the last one."""
    merge = Consolidator()
    assert merge.feed("engine", 0, [stored(1, 1), stored(1)]) == [stored(1)]
    assert merge.feed("engine", 0, [removed(1)]) == []
    assert merge.feed("engine", 0, [removed(1, 1)]) == [removed(1)]


def test_media_are_not_merged() -> None:
    """That the CPU holds a copy is news, and the GPU's removal is no removal of it."""
    merge = Consolidator()
    merge.feed("engine", 0, [stored(1)])
    assert merge.feed("offload", 0, [stored(1, medium="cpu")]) == [stored(1, medium="cpu")]
    assert merge.feed("engine", 0, [removed(1)]) == [removed(1)]
    assert merge.feed("offload", 0, [removed(1, medium="cpu")]) == [removed(1, medium="cpu")]


def test_ranks_are_not_merged() -> None:
    """Each data-parallel rank has blocks of its own; a clear of one says nothing of the other."""
    merge = Consolidator()
    merge.feed("engine", 0, [stored(1)])
    assert merge.feed("engine", 1, [stored(1)]) == [stored(1)]
    assert merge.feed("engine", 1, [AllBlocksCleared()]) == [AllBlocksCleared()]
    assert merge.feed("engine", 0, [removed(1)]) == [removed(1)]


def test_a_clear_removes_what_nobody_else_holds() -> None:
    """The peer's consolidator clears everything when either source clears."""
    merge = Consolidator()
    merge.feed("engine", 0, [stored(1, 2, 3)])
    merge.feed("offload", 0, [stored(2)])
    assert merge.feed("engine", 0, [AllBlocksCleared()]) == [removed(1, 3)]
    assert merge.feed("offload", 0, [removed(2)]) == [removed(2)]


def test_a_clear_that_leaves_nothing_is_passed_on() -> None:
    """A reader in doubt of what it holds believes itself again after a clear, and nothing else."""
    merge = Consolidator()
    assert merge.feed("engine", 0, [AllBlocksCleared()]) == [AllBlocksCleared()]
    merge.feed("engine", 0, [stored(1)])
    assert merge.feed("engine", 0, [AllBlocksCleared()]) == [AllBlocksCleared()]


def test_a_clear_may_be_of_one_medium() -> None:
    """Some publishers say which tier they emptied."""
    merge = Consolidator()
    merge.feed("offload", 0, [stored(1, medium="cpu"), stored(1, medium="storage")])
    told = merge.feed("offload", 0, [AllBlocksCleared(medium="cpu")])
    assert told == [removed(1, medium="cpu")]


def test_what_is_new_keeps_its_parent() -> None:
    """Blocks known already are left out of an event without breaking its chain."""
    merge = Consolidator()
    merge.feed("offload", 0, [stored(12, parent=11)])
    told = merge.feed(
        "engine",
        0,
        [stored(11, 12, 13, parent=10, extra_keys=["a", "b", "c"], token_ids=list(range(48)))],
    )
    assert told == [
        stored(11, parent=10, extra_keys=["a"], token_ids=list(range(16))),
        stored(13, parent=12, extra_keys=["c"], token_ids=list(range(32, 48))),
    ]


def test_a_source_that_is_gone_takes_only_its_own_blocks() -> None:
    """As if it had cleared, on every rank."""
    merge = Consolidator()
    merge.feed("engine", 0, [stored(1)])
    merge.feed("offload", 0, [stored(1, 2)])
    merge.feed("offload", 1, [stored(3)])
    assert merge.drop("offload") == {0: [removed(2)], 1: [AllBlocksCleared()]}
    assert merge.sources() == {"engine": {0: 1}}
    assert merge.feed("engine", 0, [removed(1)]) == [removed(1)]


def test_a_removal_by_a_stranger_is_counted_and_nothing_else() -> None:
    """Only who stored a block can remove it."""
    merge = Consolidator()
    merge.feed("engine", 0, [stored(1)])
    assert merge.feed("offload", 0, [removed(1)]) == []
    assert merge.stats.unknown_removed_blocks == 1
    assert merge.feed("engine", 0, [removed(1)]) == [removed(1)]


def test_what_the_reader_has_no_room_for_is_neither_told_nor_remembered() -> None:
    """A block that is there already takes none; what is removed gives it back at once."""
    merge = Consolidator()
    assert merge.feed("engine", 0, [stored(1, 2, 3)], room=2) == [stored(1, 2)]
    assert merge.stats.refused_blocks == 1
    assert merge.feed("offload", 0, [stored(1), stored(4)], room=0) == []
    told = merge.feed("engine", 0, [removed(2), stored(5, 6)], room=0)
    assert told == [removed(2), stored(5)]
    assert merge.sources() == {"engine": {0: 2}, "offload": {0: 1}}
    assert merge.stats.refused_blocks == 3
    assert merge.stats.stored_elsewhere_blocks == 1
    assert merge.feed("engine", 0, [AllBlocksCleared()], room=0) == [removed(5)]


def test_no_more_lanes_are_remembered_than_the_reader_has() -> None:
    """Those that hold nothing any more make room for others."""
    merge = Consolidator(max_lanes=1)
    assert merge.feed("engine", 0, [stored(1)]) == [stored(1)]
    assert merge.feed("engine", 0, [stored(1, adapter="a")]) == []
    assert merge.stats.refused_blocks == 1
    merge.feed("engine", 0, [removed(1)])
    assert merge.feed("engine", 0, [stored(1, adapter="a")]) == [stored(1, adapter="a")]


HASHES = [*range(1, 9), b"\x01" * 32, b"\x02" * 32]
PARENTS = dict(pairwise(reversed(HASHES)))
chains = st.tuples(st.integers(0, 9), st.integers(1, 4)).map(
    lambda cut: HASHES[cut[0] : cut[0] + cut[1]]
)
media = st.sampled_from(["gpu", "cpu"])
groups = st.integers(0, 1)


def store_events(adapters: st.SearchStrategy[str | None]) -> st.SearchStrategy[Event]:
    return st.builds(
        lambda chain, medium, group, adapter: BlockStored(
            hashes=chain,
            parent=PARENTS.get(chain[0]),
            block_size=16,
            medium=medium,
            group=group,
            adapter=adapter,
        ),
        chains.map(lambda chain: chain or HASHES[:1]),
        media,
        groups,
        adapters,
    )


removals = st.builds(
    lambda hashes, medium, group: BlockRemoved(hashes=hashes, medium=medium, group=group),
    st.lists(st.sampled_from(HASHES), max_size=5),
    media,
    groups,
)
clears = st.builds(AllBlocksCleared, medium=st.none() | media)


def histories(adapters: st.SearchStrategy[str | None]) -> st.SearchStrategy[list]:  # type: ignore[type-arg]
    event = st.one_of(store_events(adapters), store_events(adapters), removals, clears)
    return st.lists(
        st.tuples(
            st.sampled_from(["engine", "cpu", "disk"]),
            st.integers(0, 1),
            st.lists(event, min_size=1, max_size=3),
        ),
        max_size=40,
    )


def check(history: list[tuple[str, int, list[Event]]], parents: bool) -> None:
    index = Index()
    merge = Consolidator()
    for source, rank, events in history:
        index.source(source, rank).apply(events)
        index.source("merged", rank).apply(merge.feed(source, rank, events))
        expected = union(
            *(contents(index.source(name, rank)) for name in ("engine", "cpu", "disk"))
        )
        found = contents(index.source("merged", rank))
        if parents:
            assert found == expected
        assert {lane: set(blocks) for lane, blocks in found.items()} == {
            lane: set(blocks) for lane, blocks in expected.items()
        }
    for rank in (0, 1):
        stats = index.source("merged", rank).stats
        assert stats.duplicate_blocks == 0, "a block was stored that was there"
        assert stats.unknown_removed_blocks == 0, "a block was removed that was not there"


@settings(deadline=None)
@given(histories(st.none()))
def test_the_merged_stream_is_the_union_of_the_sources(
    history: list[tuple[str, int, list[Event]]],
) -> None:
    """After every event, with parents; no block is stored twice or removed without being there."""
    check(history, parents=True)


@settings(deadline=None)
@given(histories(st.sampled_from([None, "a", "b"])))
def test_one_hash_under_several_adapters_is_kept_apart(
    history: list[tuple[str, int, list[Event]]],
) -> None:
    """A removal names no adapter; hashes that two adapters share are unsound, and still no harm."""
    check(history, parents=False)


@settings(deadline=None)
@given(histories(st.sampled_from([None, "a", "b"])), st.sampled_from(["engine", "cpu", "disk"]))
def test_a_dropped_source_leaves_the_union_of_the_others(
    history: list[tuple[str, int, list[Event]]], gone: str
) -> None:
    """Whatever was said before."""
    index = Index()
    merge = Consolidator()
    for source, rank, events in history:
        index.source(source, rank).apply(events)
        index.source("merged", rank).apply(merge.feed(source, rank, events))
    for rank, changes in merge.drop(gone).items():
        index.source("merged", rank).apply(changes)
    left = {"engine", "cpu", "disk"} - {gone}
    for rank in (0, 1):
        expected = union(*(contents(index.source(name, rank)) for name in left))
        found = contents(index.source("merged", rank))
        assert {k: set(v) for k, v in found.items()} == {k: set(v) for k, v in expected.items()}
