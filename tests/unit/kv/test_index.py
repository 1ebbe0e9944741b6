"""Which rank holds which block: stores, removals, copies, media, bounds, matches, snapshots."""

from __future__ import annotations

import gc
import itertools
import sys
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import (
    MAX_CHAIN_TAILS,
    MAX_LANES,
    MAX_NAME_CHARACTERS,
    MISS_REASONS,
    SWEEP_LANES,
    Source,
)
from llm_worker.kv.records import HASH_MASK, AllBlocksCleared, BlockRemoved, BlockStored, Event


def stored(*hashes: int | bytes, parent: int | bytes | None = None, **where: object) -> BlockStored:
    return BlockStored(hashes=list(hashes), parent=parent, **{"block_size": 16} | where)  # type: ignore[arg-type]


def removed(*hashes: int | bytes, medium: str = "gpu", group: int = 0) -> BlockRemoved:
    return BlockRemoved(hashes=list(hashes), medium=medium, group=group)


def source_of(*events: Event, max_blocks: int | None = None) -> Source:
    source = Index(max_blocks=max_blocks).source("worker", 0)
    source.apply(events)
    return source


def state(source: Source) -> dict[tuple[object, ...], int]:
    """Everything a source holds: block → number of copies, size and parent in the key."""
    return {
        (
            lane.medium,
            lane.group,
            lane.adapter,
            value,
            parent,
            lane.sizes.get(value, lane.block_size),
        ): 1 + lane.copies.get(value, 0)
        for lane in source.lanes()
        for value, parent in lane.parents.items()
    }


def consistent(source: Source) -> bool:
    """The laws that hold after every event, for an index of this source alone."""
    stats, held = source.stats, sum(source.blocks().values())
    budget = source._budget
    if budget.max_blocks is not None and budget.room_blocks + held != budget.max_blocks:
        return False
    ledger = stats.stored_blocks - stats.removed_blocks - stats.cleared_blocks
    return held == ledger and all(
        lane.copies.keys() <= lane.parents.keys()
        and lane.sizes.keys() <= lane.parents.keys()
        and all(copies > 0 for copies in lane.copies.values())
        for lane in source.lanes()
    )


def test_blocks_are_chained_by_parent() -> None:
    """Within an event each block's parent is the one before it."""
    source = source_of(stored(1, 2, 3), stored(4, parent=3))
    (lane,) = source.lanes()
    assert lane.parents == {1: None, 2: 1, 3: 2, 4: 3}
    assert source.blocks() == {"gpu": 4} and source.hashes() == {1, 2, 3, 4}


def test_a_block_that_the_engine_holds_twice_is_there_until_both_are_removed() -> None:
    """vLLM does not deduplicate: it says stored once, and removed once, per physical block."""
    source = source_of(stored(1, 2), stored(1, 2, 3), stored(3, parent=2))
    assert source.blocks() == {"gpu": 3} and source.stats.duplicate_blocks == 3
    source.apply([removed(2), removed(1)])
    assert source.hashes() == {1, 2, 3} and source.stats.duplicate_removed_blocks == 2
    source.apply([removed(2), removed(1)])
    assert source.hashes() == {3} and source.stats.removed_blocks == 2
    source.apply([removed(2)])
    assert source.stats.unknown_removed_blocks == 1 and consistent(source)


def test_a_block_twice_in_one_event_is_two_copies() -> None:
    """Each hash of an event is a physical block."""
    source = source_of(stored(1, 1, 2))
    assert source.stats.duplicate_blocks == 1 and source.blocks() == {"gpu": 2}
    source.apply([removed(1)])
    assert source.hashes() == {1, 2}
    source.apply([removed(1)])
    assert source.hashes() == {2} and consistent(source)


def test_a_removal_in_the_same_batch_sees_what_came_just_before_it() -> None:
    """A copy, a clear, another size: what was looked up for the removal before is not what is."""
    source = source_of(stored(1), removed(9), stored(1), removed(1), max_blocks=9)
    assert source.hashes() == {1} and consistent(source)
    source.apply([removed(9), AllBlocksCleared(), removed(1)])
    assert source.stats.unknown_removed_blocks == 3 and consistent(source)
    source.apply([stored(1), removed(9), stored(2, block_size=4), removed(2), stored(2)])
    (lane,) = source.lanes()
    assert set(lane.parents) == {1, 2} and not lane.sizes and consistent(source)
    source.apply([stored(5, group=1), stored(5, medium="cpu")])
    source.apply([removed(9), removed(5, group=1), removed(5, medium="cpu"), removed(1)])
    assert source.hashes() == {2} and consistent(source)


def test_blocks_of_another_size_are_remembered_with_it() -> None:
    """A partial block shares its lane with full ones; a placeholder's zero is no size to keep."""
    source = source_of(stored(1, 2), stored(3, parent=2, block_size=4), stored(9, medium="cpu"))
    lane, other = source.lanes()
    assert (lane.block_size, lane.sizes) == (16, {3: 4})
    source.apply([removed(3), removed(9, medium="cpu"), stored(8, medium="cpu", block_size=64)])
    assert not lane.sizes and (other.block_size, other.sizes) == (64, {})


def test_the_ends_of_chains_are_not_remembered_without_bound() -> None:
    """They only save memory."""
    source = source_of()
    for number in range(3 * MAX_CHAIN_TAILS):
        source.apply([stored(number)])
    (lane,) = source.lanes()
    assert len(lane.chain_tails) <= MAX_CHAIN_TAILS


def test_the_ends_of_chains_are_bounded_in_every_lane_of_a_batch() -> None:
    """A hybrid model's groups take turns in each batch."""
    source = source_of()
    for number in range(2 * MAX_CHAIN_TAILS):
        source.apply([stored(number), stored(number, group=1)])
        source.apply([removed(number), removed(number, group=1)])
    assert [len(lane.chain_tails) <= MAX_CHAIN_TAILS for lane in source.lanes()] == [True, True]


def test_batches_are_counted_while_blocks_are_not_of_the_engines_size() -> None:
    """Each of them: a publisher of another model, or a worker with other settings of this name."""
    source = source_of()
    source.block_size = 16
    source.apply([stored(1)])
    assert source.stats.odd_size_batches == 0
    source.apply([stored(2, block_size=128), stored(3, block_size=128)])
    assert source.stats.odd_size_batches == 1
    source.apply([stored(4)])
    assert source.stats.odd_size_batches == 1
    source.apply([AllBlocksCleared(), stored(5, block_size=128)])
    source.apply([stored(6, block_size=128)])
    source.apply([stored(7, block_size=128)])
    assert source.stats.odd_size_batches == 4
    source.apply([AllBlocksCleared(), stored(8)])
    assert source.stats.odd_size_batches == 4


def test_where_nobody_says_the_size_of_blocks_it_is_that_of_the_first() -> None:
    """A fleet index listens to engines that it cannot ask."""
    source = source_of(stored(1, block_size=128), stored(2, block_size=128))
    assert source.stats.odd_size_batches == 0
    source.apply([stored(3, parent=2)])
    source.apply([stored(4, block_size=128)])
    source.apply([stored(5, parent=4)])
    assert source.stats.odd_size_batches == 2
    source.apply([AllBlocksCleared(), stored(1)])
    assert source.stats.odd_size_batches == 2


def test_sizes_that_may_differ_are_not_counted() -> None:
    """Partial blocks, hybrid models' groups, connectors, and a publisher that does not say."""
    source = source_of()
    source.block_size = 16
    source.apply([stored(1, block_size=4, kind="mamba"), stored(2, block_size=0)])
    source.apply([stored(3, medium="cpu", block_size=64)])
    assert source.stats.odd_size_batches == 0
    source.apply([stored(3, block_size=64), stored(3, block_size=32, group=1)])
    source.apply([stored(4, block_size=64), stored(4, block_size=32, group=1)])
    assert source.stats.odd_size_batches <= 1


def test_media_groups_adapters_ranks_and_workers_are_kept_apart() -> None:
    """What happens to a block in one place says nothing of another."""
    index = Index()
    source = index.source("one", 0)
    source.apply([stored(1), stored(1, medium="cpu"), stored(1, group=1), stored(2, adapter="a")])
    for worker, rank in (("one", 1), ("two", 0)):
        index.source(worker, rank).apply([stored(1)])
    source.apply([removed(1, medium="cpu")])
    assert source.blocks() == {"gpu": 3, "cpu": 0}
    source.apply([removed(1, group=1)])
    assert source.hashes(group=1) == set() and source.hashes(group=0) == {1, 2}
    assert [s.hashes() for s in index.sources()] == [{1, 2}, {1}, {1}]
    assert index.unique_blocks() == 2 and index.held_blocks() == 4
    assert index.source("one", 0) is source


def test_a_removal_finds_its_block_whatever_the_adapter() -> None:
    """The wire's removal does not say the adapter; the hash was made with it."""
    events = [stored(n, adapter=f"adapter {n}" if n else None) for n in range(50)]
    source = source_of(*events)
    source.apply([removed(*range(0, 50, 2))])
    assert source.hashes() == set(range(1, 50, 2)) and source.stats.unknown_removed_blocks == 0


def test_a_clear_forgets_a_rank_or_one_of_its_media() -> None:
    """AllBlocksCleared is of one rank; some publishers narrow it to a medium."""
    index = Index(max_blocks=10)
    source, other = index.source("one", 0), index.source("one", 1)
    other.apply([stored(9)])
    source.apply([stored(1, 2), stored(1, 2, medium="cpu"), AllBlocksCleared(medium="cpu")])
    assert source.blocks() == {"gpu": 2} and source.stats.cleared_blocks == 2
    source.apply([stored(3), AllBlocksCleared(), stored(4), removed(1)])
    assert source.hashes() == {4} and other.hashes() == {9}
    assert source.stats.unknown_removed_blocks == 1 and index.room_blocks == 8


def test_the_bound_is_kept_refusals_are_counted_and_the_source_is_stale() -> None:
    """An index that is full answers less, never more; a clear makes it true again."""
    source = source_of(stored(1, 2, 3), max_blocks=4)
    source.trust.synchronised()
    source.apply([stored(4, 5, 6, parent=3)])
    assert source.hashes() == {1, 2, 3, 4} and source.stats.refused_blocks == 2
    assert source.stale == {"index_full"} and consistent(source)
    source.apply([stored(1), removed(2), stored(7), removed(5)])  # a copy needs no room
    assert source.hashes() == {1, 3, 4, 7} and source.stats.unknown_removed_blocks == 1
    source.trust.drifted()
    source.apply([AllBlocksCleared(), stored(8)])
    assert source.hashes() == {8} and source.stale == {"audit"} and consistent(source)


def test_a_clear_of_all_media_says_so_and_one_of_none_may_be_of_the_gpus() -> None:
    """Both take all; the second tells whether it took what it may not have meant."""
    source = source_of(stored(1), stored(1, medium="cpu"))
    assert source.apply([AllBlocksCleared(medium="all")]) is False
    assert not source.hashes() and not source.beside_gpu()
    assert source.apply([stored(1), AllBlocksCleared()]) is False
    assert source.apply([stored(2, medium="cpu"), AllBlocksCleared(), stored(3)]) is True
    assert source.hashes() == {3} and consistent(source)


def test_the_bound_is_of_all_sources_together() -> None:
    """A fleet's index has one budget; a worker that leaves gives its part back."""
    index = Index(max_blocks=3)
    index.source("one", 0).apply([stored(1, 2)])
    index.source("two", 0).apply([stored(1, 2)])
    assert index.source("two", 0).stats.refused_blocks == 1
    assert index.remove_worker("one") == 1 and index.remove_worker("one") == 0
    assert index.room_blocks == 2 and [s.worker for s in index.sources()] == ["two"]


def test_a_publisher_cannot_make_lanes_without_end() -> None:
    """Names of adapters are the publisher's."""
    source = source_of(*(stored(n, adapter=str(n)) for n in range(MAX_LANES + 5)))
    assert len(source.lanes()) == MAX_LANES and source.stats.refused_blocks == 5
    assert "index_full" in source.stale and not source.has_room()


def test_names_that_are_no_names_are_not_kept() -> None:
    """A medium is a label on the page of metrics, and a name takes no room of the bound."""
    source = source_of(
        stored(1, medium="m" * 10_000),
        stored(2, adapter="a" * 10_000),
        stored(3, medium="m" * MAX_NAME_CHARACTERS, adapter="a" * MAX_NAME_CHARACTERS),
    )
    assert source.hashes() == {3} and source.stats.refused_blocks == 2
    assert "index_full" in source.stale


def test_adapters_that_hold_nothing_any_more_cost_nothing() -> None:
    """However many came and went: neither is the bound reached, nor does each removal see them."""
    source = source_of(max_blocks=10)
    for number in range(MAX_LANES + 5):
        source.apply([stored(number, adapter=str(number)), stored(number, group=1)])
        assert source.hashes() == {number} and len(source.lanes()) <= SWEEP_LANES + 1
        source.apply([removed(number), removed(number, group=1)])
    assert "index_full" not in source.stale and not source.stats.refused_blocks
    assert source.stats.unknown_removed_blocks == 0 and consistent(source)


def test_there_is_room_again_once_a_tenth_of_the_index_is_free() -> None:
    """Then it is worth while to read a source anew."""
    index = Index(max_blocks=20)
    source = index.source("one", 0)
    source.apply([stored(*range(30))])
    assert "index_full" in source.stale and not source.has_room()
    source.apply([removed(1)])
    assert not source.has_room()
    source.apply([removed(2)])
    assert source.has_room()


def test_a_new_source_is_stale_until_someone_vouches_for_it() -> None:
    """Nothing was received yet: what the engine holds is unknown."""
    source = source_of()
    assert source.stale == {"unsynchronised"}
    source.trust.synchronised()
    assert not source.stale


def test_the_longest_prefix_is_found_per_worker_rank_and_medium() -> None:
    """The best first; a source that cannot be trusted comes after one that can."""
    index = Index()
    for worker, events in {
        "short": [stored(1, 2), stored(1, 2, 3, medium="cpu")],
        "long": [stored(1, 2, 3, 4)],
        "stale": [stored(1, 2, 3, 4)],
        "other": [stored(2, 3, 4)],
    }.items():
        index.source(worker, 0).apply(events)
        if worker != "stale":
            index.source(worker, 0).trust.synchronised()
    found = index.match([1, 2, 3, 4, 5])
    assert [(held.worker, held.medium, held.blocks) for held in found] == [
        ("long", "gpu", 4),
        ("stale", "gpu", 4),
        ("short", "cpu", 3),
        ("short", "gpu", 2),
    ]
    assert found[1].stale == {"unsynchronised"} and not found[0].stale
    assert index.match([]) == [] == index.match([7])
    assert index.match_stats.requests == Counter(hit=1, miss=2)
    assert sum(index.match_stats.seconds.counts) == 3


def test_a_match_is_of_one_adapter_and_group_and_of_any_kind_of_hash() -> None:
    """Signed integers are understood, and bytes."""
    index = Index()
    index.source("w", 0).apply(
        [stored(HASH_MASK, 5), stored(b"x", b"y"), stored(HASH_MASK, adapter="a", group=1)]
    )
    assert [held.blocks for held in index.match([-1, 5, 6])] == [2]
    assert [held.blocks for held in index.match([b"x", b"y"])] == [2]
    assert [held.blocks for held in index.match([-1, 5], adapter="a", group=1)] == [1]
    assert index.match([-1], adapter="a") == []


@pytest.mark.parametrize(
    ("events", "blocks", "reason"),
    [
        ([stored(1, 2, 3)], 3, None),
        ([stored(1, 2)], 2, "absent"),
        ([stored(1), stored(3, parent=2)], 1, "hole"),
        ([stored(2, 3, parent=1)], 0, "hole"),
        ([stored(1, 2), stored(3, parent=2, medium="cpu")], 2, "other_medium"),
        ([stored(1, 2, 3, adapter="a")], 0, "other_adapter"),
        ([stored(1, 2, 3, group=1)], 0, "other_group"),
        ([stored(4)], 0, "unseen"),
        ([], 0, "unseen"),
    ],
)
def test_a_match_says_why_it_ends(events: list[Event], blocks: int, reason: str | None) -> None:
    """A person who asks why a worker was not chosen gets an answer."""
    index = Index()
    source = index.source("worker", 0)
    source.apply(events)
    (held,) = [h for h in index.match([1, 2, 3], misses=True) if h.medium == "gpu"]
    assert (held.blocks, held.miss) == (blocks, reason)
    assert reason is None or reason in MISS_REASONS


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "chains"), [(8, 1), (1, 1), (1, 64)])
def test_the_memory_that_is_reported_is_what_was_allocated(blocks: int, chains: int) -> None:
    """Within a twentieth: chains in one event, a block per event, and many requests at a time."""
    step = 0x9E3779B97F4A7C15  # hashes as wide as real ones
    numbers = iter(range(1, 40_001))
    ends = [0] * chains
    gc.collect()
    tracemalloc.start()
    index = Index()
    source = index.source("w", 0)
    for turn in range(40_000 // blocks):
        hashes = [next(numbers) * step & HASH_MASK for _ in range(blocks)]
        parent = ends[turn % chains] + 0  # an equal object, not the same, as a decoder's are
        source.apply([stored(*hashes, parent=parent + (1 << 63) - (1 << 63) if parent else None)])
        ends[turn % chains] = hashes[-1]
    del hashes, parent
    ends.clear()
    gc.collect()
    traces = tracemalloc.take_snapshot().traces
    tracemalloc.stop()
    # What was asked for, in the steps of 16 bytes in which small objects are given out.
    allocated = sum((trace.size + 15) & ~15 for trace in traces)
    assert index.memory_bytes() == pytest.approx(allocated, rel=0.05)
    # The table, and one object per block: a parent is the key that it equals.
    (lane,) = source.lanes()
    assert allocated < sys.getsizeof(lane.parents) + 56 * 40_000


def test_a_snapshot_makes_an_empty_source_equal() -> None:
    """With copies, sizes, parents, media, groups and adapters."""
    source = source_of(
        stored(1, 2, 3, kind="full_attention"),
        stored(4, 5, parent=2),
        stored(2, parent=1),
        stored(6, parent=5, block_size=4),
        stored(1, 2, medium="cpu"),
        stored(7, adapter="a", group=3, sliding_window=128),
        stored(*range(1000, 3000)),
        removed(1500),
    )
    events = list(source.snapshot())
    assert max(len(event.hashes) for event in events) <= 512 and len(events) < 20
    copy = source_of(*events)
    assert state(copy) == state(source)
    assert [lane.kind for lane in copy.lanes()] == [lane.kind for lane in source.lanes()]


HASHES = st.lists(st.integers(1, 12), max_size=5)
WHERE = st.fixed_dictionaries(
    {"medium": st.sampled_from(["gpu", "cpu"]), "group": st.sampled_from([0, 1])}
)
EVENTS = st.lists(
    st.one_of(
        st.builds(
            lambda hashes, parent, where, adapter, size: BlockStored(
                hashes=hashes, parent=parent, block_size=size, adapter=adapter, **where
            ),
            HASHES,
            st.one_of(st.none(), st.integers(1, 12)),
            WHERE,
            st.sampled_from([None, None, "a"]),
            st.sampled_from([16, 16, 4]),
        ),
        st.builds(lambda hashes, where: BlockRemoved(hashes=hashes, **where), HASHES, WHERE),
        st.builds(AllBlocksCleared, medium=st.sampled_from([None, "gpu", "cpu"])),
    ),
    max_size=25,
)


def expected(events: list[Event]) -> Counter[tuple[object, ...]]:
    """The same in the plainest way: one count per place and hash."""
    counts: Counter[tuple[object, ...]] = Counter()
    adapters: list[str | None] = []
    for event in events:
        if isinstance(event, AllBlocksCleared):
            for key in [k for k in counts if event.medium in (None, k[0])]:
                del counts[key]
            continue
        for value in event.hashes:
            if isinstance(event, BlockStored):
                key = (event.medium, event.group, event.adapter, value)
                counts[key] += 1
                if event.adapter not in adapters:
                    adapters.append(event.adapter)
                continue
            for key in list(counts):
                if key[0] == event.medium and key[1] == event.group and key[3] == value:
                    counts[key] -= 1
                    if not counts[key]:
                        del counts[key]
                    break
    return counts


def counted(source: Source) -> Counter[tuple[object, ...]]:
    return Counter({key[:4]: copies for key, copies in state(source).items()})


ONE_ADAPTER = EVENTS.map(
    lambda events: [
        BlockStored(**{n: getattr(e, n) for n in e.__struct_fields__} | {"adapter": None})
        if isinstance(e, BlockStored)
        else e
        for e in events
    ]
)


@settings(max_examples=300, deadline=None)
@given(events=ONE_ADAPTER)
def test_the_index_is_what_counting_each_block_gives(events: list[Event]) -> None:
    """Stored adds one, removed takes one, cleared takes all: the fast paths give the same."""
    source = source_of(*events)
    assert counted(source) == expected(events)
    assert consistent(source)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(events=EVENTS, cuts=st.lists(st.integers(0, 25), max_size=4), splits=st.booleans())
def test_any_split_of_a_stream_gives_the_same_index(
    events: list[Event], cuts: list[int], splits: bool
) -> None:
    """Where batches begin, and where an event is cut in two, makes no difference."""
    whole, parts = source_of(*events), source_of()
    pieces: list[Event] = []
    for event in events:
        if splits and not isinstance(event, AllBlocksCleared):
            parent = event.parent if isinstance(event, BlockStored) else None
            for value in event.hashes:
                pieces.append(
                    stored(
                        value,
                        parent=parent,
                        block_size=event.block_size,
                        medium=event.medium,
                        adapter=event.adapter,
                        group=event.group,
                    )
                    if isinstance(event, BlockStored)
                    else removed(value, medium=event.medium, group=event.group)
                )
                parent = value
        else:
            pieces.append(event)
    bounds = [0, *sorted(min(cut, len(pieces)) for cut in cuts), len(pieces)]
    for start, end in itertools.pairwise(bounds):
        parts.apply(pieces[start:end])
        assert consistent(parts)
    assert counted(parts) == counted(whole)
    assert parts.stats.stored_blocks == whole.stats.stored_blocks
    assert parts.stats.duplicate_blocks == whole.stats.duplicate_blocks
    assert parts.stats.unknown_removed_blocks == whole.stats.unknown_removed_blocks


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, bound=st.integers(0, 8))
def test_a_bounded_index_holds_no_more_and_nothing_else(events: list[Event], bound: int) -> None:
    """Full, it holds a part of what was stored, within its bound, and says that it is a part."""
    source = source_of(*events, max_blocks=bound)
    assert consistent(source) and sum(source.blocks().values()) <= bound
    stores = [event for event in events if isinstance(event, BlockStored)]
    assert source.hashes() <= {value for event in stores for value in event.hashes}
    cleared = [n for n, event in enumerate(events) if event == AllBlocksCleared()]
    if source.stats.refused_blocks and not cleared:
        assert "index_full" in source.stale


@settings(max_examples=200, deadline=None)
@given(events=EVENTS)
def test_every_snapshot_makes_an_empty_source_equal(events: list[Event]) -> None:
    """Whatever happened before."""
    source = source_of(*events)
    assert counted(source_of(*source.snapshot())) == counted(source)
