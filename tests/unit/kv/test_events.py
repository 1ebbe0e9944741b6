"""KV-event payloads → records: every encoding, and everything that is none."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_worker.kv.index.index import Index
from llm_worker.kv.records import HASH_MASK, AllBlocksCleared, BlockRemoved, BlockStored, Event
from llm_worker.kv.stats import UNDECODABLE_REASONS
from llm_worker.kv.wire import MAX_PAYLOAD_BYTES, Decoder, WireError, encode

pack = msgspec.msgpack.encode
HASHES = st.one_of(st.integers(0, HASH_MASK), st.binary(min_size=1, max_size=64))
MEDIA = st.sampled_from(["gpu", "cpu", "storage", "disk"])
NUMBERS = st.integers(0, 1 << 20)
NAMES = st.one_of(st.none(), st.text(max_size=8))
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        BlockStored,
        hashes=st.lists(HASHES, max_size=6),
        parent=st.one_of(st.none(), HASHES),
        block_size=NUMBERS,
        medium=MEDIA,
        adapter=NAMES,
        group=NUMBERS,
        extra_keys=st.one_of(st.none(), st.lists(st.one_of(st.none(), st.lists(NAMES)))),
        kind=NAMES,
        locality=NAMES,
        sliding_window=st.one_of(st.none(), NUMBERS),
        ownership=NAMES,
    ),
    st.builds(BlockRemoved, hashes=st.lists(HASHES, max_size=6), medium=MEDIA, group=NUMBERS),
    st.builds(AllBlocksCleared, medium=st.one_of(st.none(), MEDIA)),
)


def stored(**fields: Any) -> dict[str, Any]:
    """A stored block as vLLM 0.32 sends it."""
    return {
        "type": "BlockStored",
        "block_hashes": [8704213067995889238, 2115308636467158532],
        "parent_block_hash": None,
        "token_ids": list(range(64)),
        "block_size": 32,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **fields,
    }


def decoded(*events: object, rank: object = 0, token_ids: bool = False) -> list[Event]:
    batch = Decoder(token_ids=token_ids).decode(pack([1.5, events, rank]))
    assert not batch.rejected and batch.unknown == 0
    return batch.events


@given(events=st.lists(EVENTS, max_size=5), rank=st.one_of(st.none(), st.integers(0, 64)))
def test_what_was_encoded_is_decoded(events: list[Event], rank: int | None) -> None:
    """A plane's receiver has the records that its sender had."""
    batch = Decoder().decode(encode(7.25, events, rank))
    assert (batch.timestamp, batch.rank, batch.rejected, batch.unknown) == (7.25, rank, (), 0)
    assert batch.events == events


def test_encoded_events_have_the_fields_that_vllm_requires() -> None:
    """Another reader of vLLM's format (its struct has no default for these) can read ours."""
    payload = encode(1.0, [BlockStored(hashes=[1], block_size=16), BlockRemoved(hashes=[1])], 3)
    timestamp, (store, remove), rank = msgspec.msgpack.decode(payload)
    assert (timestamp, rank) == (1.0, 3)
    required = {"block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id"}
    assert required | {"type", "medium", "lora_name", "group_idx"} == set(store)
    assert store["medium"] == remove["medium"] == "GPU"


def test_token_ids_are_skipped_unless_they_were_asked_for() -> None:
    """The larger part of a payload costs no object."""
    payload = pack([1.0, [stored(token_ids=list(range(1000, 101_000)))], 0])
    decoder = Decoder()
    decoder.decode(payload)
    tracemalloc.start()
    (event,) = decoder.decode(payload).events
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()
    assert isinstance(event, BlockStored) and event.token_ids is None
    (event,) = Decoder(token_ids=True).decode(payload).events
    assert isinstance(event, BlockStored) and event.token_ids[:2] == [1000, 1001]


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize(
    ("tail", "fields"),
    [
        ((), {}),  # 0.9
        (("CPU",), {"medium": "cpu"}),  # 0.10.2
        (("GPU", "sql"), {"adapter": "sql"}),  # 0.14
        (("GPU", None, [None, ["salt"]]), {"extra_keys": [None, ["salt"]], "adapter": "7"}),  # 0.17
        (("GPU", None, None, 2), {"group": 2}),  # 0.20
        (("GPU", None, None, 2, "mamba", 128, "LOCAL", None, "tomorrow", {"x": 1}), {"group": 2}),
    ],
)
def test_positional_events_of_every_vintage(
    tail: tuple[object, ...], fields: dict[str, object], token_ids: bool
) -> None:
    """Arrays grew at their end; what is not there has its default, what is new is skipped."""
    tokens = [[1, 2], [2, 3]]  # pairs: EAGLE's bigrams
    wire = ["BlockStored", [5, -1], -2, tokens, 2, 7, *tail]
    (event,) = decoded(wire, rank=None, token_ids=token_ids)
    assert isinstance(event, BlockStored)
    assert event.hashes == [5, HASH_MASK] and event.parent == HASH_MASK - 1
    assert (event.block_size, event.lora_id) == (2, 7)
    expected: dict[str, object] = {"medium": "gpu", "group": 0, "adapter": "7"} | fields
    assert {name: getattr(event, name) for name in expected} == expected
    assert event.token_ids == (tokens if token_ids else None)
    removed, cleared = decoded(["BlockRemoved", [-1]], ["AllBlocksCleared"], token_ids=token_ids)
    assert removed == BlockRemoved(hashes=[HASH_MASK]) and cleared == AllBlocksCleared()


def test_maps_of_today_and_of_tomorrow() -> None:
    """What vLLM 0.33 added is skipped, what 0.32 has is kept."""
    (event,) = decoded(
        stored(
            extra_keys=[["a1"], None],
            group_idx=1,
            kv_cache_spec_kind="sliding_window",
            kv_cache_spec_sliding_window=128,
            locality="REMOTE",
            ownership="fs",
            session_id="one",
            lookahead_token_ids=[1, 2],
            lora_id=1,
            lora_name="a1",
        )
    )
    assert event == BlockStored(
        hashes=[8704213067995889238, 2115308636467158532],
        block_size=32,
        adapter="a1",
        lora_id=1,
        extra_keys=[["a1"], None],
        group=1,
        kind="sliding_window",
        sliding_window=128,
        locality="REMOTE",
        ownership="fs",
    )


@pytest.mark.parametrize("more", [{}, {"medium": "disk"}])
def test_an_adapter_without_a_name_is_its_number(more: dict[str, object]) -> None:
    """As before 0.14, whichever decoder takes the event."""
    (event,) = decoded(stored(lora_id=5, **more))
    assert isinstance(event, BlockStored) and (event.adapter, event.lora_id) == ("5", 5)


@pytest.mark.parametrize("value", [1, HASH_MASK, b"\x01" * 32])
def test_hashes_are_integers_or_bytes(value: int | bytes) -> None:
    """VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0 sends 32 bytes."""
    (event,) = decoded(stored(block_hashes=[value], parent_block_hash=value))
    assert isinstance(event, BlockStored) and (event.hashes, event.parent) == ([value], value)


def test_a_signed_hash_is_the_unsigned_one() -> None:
    """0.9 sends Python's hash(), others a signed 64-bit integer: the bits are what is compared."""
    (event,) = decoded(stored(block_hashes=[-1, 1], parent_block_hash=-(1 << 63)))
    assert isinstance(event, BlockStored)
    assert (event.hashes, event.parent) == ([HASH_MASK, 1], 1 << 63)
    (removed,) = decoded({"type": "BlockRemoved", "block_hashes": [-1], "medium": None})
    assert removed == BlockRemoved(hashes=[HASH_MASK])


GOOD = stored()
BROKEN: list[tuple[object, str]] = [
    (7, "event"),
    (None, "event"),
    ([], "event"),
    ([7], "event"),
    ({}, "event"),
    ({"type": 3}, "event"),
    ({"type": "BlockStored"}, "event"),
    (stored(block_hashes=7), "event"),
    (stored(block_hashes=[1.5]), "hash"),
    (stored(block_hashes=[True]), "hash"),
    (stored(block_hashes=[None]), "hash"),
    (stored(block_hashes=["text"]), "hash"),
    (stored(block_hashes=[b""]), "hash"),
    (stored(block_hashes=[b"x" * 65]), "hash"),
    (stored(parent_block_hash=1.5), "hash"),
    (["BlockStored", [1.5], None, [], 16], "hash"),
    (["BlockRemoved"], "event"),
    (stored(medium=3), "event"),  # where the block is cannot be guessed
    (stored(group_idx="0"), "event"),
    (stored(lora_name=1), "event"),
    (stored(lora_id="1"), "event"),
    ({"type": "AllBlocksCleared", "medium": 1}, "event"),
    ({"type": "BlockRemoved", "block_hashes": [{}], "medium": None}, "hash"),
]


@pytest.mark.parametrize("good", [GOOD, ["BlockStored", [3], None, [], 16]])
@pytest.mark.parametrize(("broken", "reason"), BROKEN)
def test_a_broken_event_costs_itself_only(broken: object, reason: str, good: object) -> None:
    """Its neighbours are applied, in order, and the reason is one that is counted."""
    batch = Decoder().decode(pack([1.0, [good, broken, good], 4]))
    assert len(batch.events) == 2 and batch.rank == 4
    assert batch.rejected == [reason] and reason in UNDECODABLE_REASONS


def test_what_does_not_matter_for_a_block_may_be_of_any_type() -> None:
    """A field that changed its type in some release does not lose the block."""
    odd = stored(extra_keys="?", locality=[], kv_cache_spec_kind=3, ownership=1.5, block_size="16")
    (event,) = decoded(odd)
    assert isinstance(event, BlockStored) and len(event.hashes) == 2
    assert (event.extra_keys, event.locality, event.kind, event.block_size) == (None, None, None, 0)


def test_events_of_an_unknown_type_are_counted_and_their_neighbours_are_not_lost() -> None:
    """A newer vLLM may tell more than we know, in either encoding."""
    for unknown in ({"type": "BlockPinned", "block_hashes": [1]}, ["BlockPinned", [1]]):
        batch = Decoder().decode(pack([1.0, [unknown, GOOD, unknown], 0]))
        assert batch.unknown == 2 and batch.rejected == [] and len(batch.events) == 1


def test_a_stream_may_change_its_encoding() -> None:
    """The worker was upgraded behind its endpoint; an empty batch is of either."""
    decoder = Decoder()
    positional = pack([1.0, [["BlockStored", [-3], None, [], 16]], 0])
    signed = pack([1.0, [stored(block_hashes=[-3])]])
    unsigned = pack([1.0, [stored(block_hashes=[HASH_MASK - 2])], 0])
    for payload in (positional, unsigned, positional, signed, unsigned, pack([1, [], 0]), signed):
        for event in decoder.decode(payload).events:
            assert isinstance(event, BlockStored) and event.hashes == [HASH_MASK - 2]
    decoder.decode(positional)
    assert decoder._decode is decoder._batches[2]  # tried first from now on


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "msgpack"),
        (b"\xc1", "msgpack"),
        (pack([1.0, [GOOD], 0])[:-9], "msgpack"),
        (pack([1.0, [GOOD], 0]) + b"\x00", "msgpack"),
        (b"\x93\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00\xdd\xff\xff\xff\xff", "msgpack"),  # 4 G events
        (b"\x93\x01\x91" + b"\x91" * 100_000 + b"\xc0\xc0", "msgpack"),  # nested too deeply
        (pack(None), "batch"),
        (pack({"ts": 1.0}), "batch"),
        (pack([]), "batch"),
        (pack([1.0]), "batch"),
        (pack(["now", []]), "batch"),
        (pack([1.0, {}]), "batch"),
        (bytes(MAX_PAYLOAD_BYTES + 1), "too_large"),
    ],
)
def test_what_is_no_batch_is_an_error_with_a_reason(payload: bytes, reason: str) -> None:
    """The listener counts it and marks the source stale."""
    with pytest.raises(WireError) as caught:
        Decoder().decode(payload)
    assert caught.value.reason == reason and reason in UNDECODABLE_REASONS


def test_a_lying_length_allocates_nothing() -> None:
    """A header may promise four billion hashes; memory grows with what is really there."""
    lie = (
        pack([1.0, []])[:-1]
        + b"\x91\x82\xa4type\xacBlockRemoved\xacblock_hashes\xdd\xff\xff\xff\xff"
    )
    tracemalloc.start()
    with pytest.raises(WireError):
        Decoder().decode(lie)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_memoryview_is_a_payload() -> None:
    """A frame need not be copied."""
    assert Decoder().decode(memoryview(pack([1.0, [GOOD], 0]))).events == decoded(GOOD)


def check(payload: bytes) -> None:
    """Decode anything, apply what comes out, and find the index consistent."""
    try:
        batch = Decoder().decode(payload)
    except WireError as error:
        assert error.reason in UNDECODABLE_REASONS
        return
    assert all(reason in UNDECODABLE_REASONS for reason in batch.rejected)
    index = Index(max_blocks=100)
    source = index.source("worker", 0)
    source.apply(batch.events)
    stats, held = source.stats, sum(source.blocks().values())
    assert held == stats.stored_blocks - stats.removed_blocks - stats.cleared_blocks <= 100
    assert index.room_blocks == 100 - held
    assert len(source.hashes()) <= held
    encode(batch.timestamp, batch.events, batch.rank)
    for event in source.snapshot():
        index.match(event.hashes, adapter=event.adapter, group=event.group)


ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), HASH_MASK),
        st.floats(),
        st.binary(max_size=40),
        st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "GPU", "type", ""]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=12),
        st.dictionaries(
            st.sampled_from(["type", *GOOD, "group_idx", "extra_keys", "locality"]), inner
        ),
    ),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None)
@given(payload=st.binary(max_size=200))
@example(payload=b"")
def test_no_bytes_crash_the_decoder_or_corrupt_the_index(payload: bytes) -> None:
    """Whatever arrives is a batch, or an error with a reason."""
    check(payload)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(events=st.lists(ANYTHING, max_size=4), rank=ANYTHING)
def test_no_message_crashes_the_decoder_or_corrupts_the_index(events: list[Any], rank: Any) -> None:
    """The same for what is well-formed MessagePack, with names from the wire."""
    check(pack([1.0, events, rank]))


@settings(max_examples=300, deadline=None)
@given(
    position=st.integers(0, 10_000),
    flip=st.integers(1, 255),
    cut=st.integers(0, 10_000),
    positional=st.booleans(),
)
def test_no_damage_to_a_real_payload_crashes_or_corrupts(
    position: int, flip: int, cut: int, positional: bool
) -> None:
    """One byte flipped, or the end missing."""
    events: list[object] = [GOOD, {"type": "BlockRemoved", "block_hashes": [3], "medium": "GPU"}]
    if positional:
        events = [["BlockStored", [3, -4], None, [1] * 8, 4, None, "GPU"], ["BlockRemoved", [3]]]
    payload = bytearray(pack([1.0, events, 0]))
    check(bytes(payload[: cut % len(payload)]))
    payload[position % len(payload)] ^= flip
    check(bytes(payload))
