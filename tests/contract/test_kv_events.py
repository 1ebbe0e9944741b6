"""KV events as real engines encode them: scripts/record_kv_events recorded what is read here."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.records import HASH_MASK, AllBlocksCleared, BlockRemoved, BlockStored, Hash
from llm_worker.kv.wire import Decoder, encode

RECORDINGS = Path(__file__).parent / "kv_events"
RELEASES = sorted(path.stem for path in RECORDINGS.glob("vllm-*.json"))
ENGINES = ["engine-bytes", "engine-integers"]


def recording(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def value_of(said: Any) -> Any:
    """What JSON says, as msgpack has it."""
    if isinstance(said, dict):
        return bytes.fromhex(said["hex"])
    return [value_of(item) for item in said] if isinstance(said, list) else said


def unsigned(value: Any) -> Any:
    return value & HASH_MASK if isinstance(value, int) else value


def test_the_recordings_are_those_of_every_encoding() -> None:
    """Arrays that grew release by release, and maps: none of them can be lost unseen."""
    releases = ("0.9.0.1", "0.9.2", "0.10.2", "0.14.0", "0.17.0", "0.20.0", "0.22.0", "0.23.0")
    assert {f"vllm-{r}" for r in (*releases, "0.24.0", "0.26.0", "0.33.0")} <= set(RELEASES)
    assert {path.stem for path in RECORDINGS.glob("engine-*")} == set(ENGINES)


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("release", RELEASES)
def test_what_a_release_encodes_is_understood(release: str, token_ids: bool) -> None:
    """Every field that the release has, of every event, with either kind of hash."""
    decoder = Decoder(token_ids=token_ids)
    kinds = set()
    for line in recording(release)["batches"]:
        batch = decoder.decode(bytes.fromhex(line["payload"]))
        assert (batch.timestamp, batch.rank) == (1763637000.5, line["rank"])
        assert not batch.rejected and batch.unknown == 0
        (event,) = batch.events
        said = {name: value_of(value) for name, value in line["said"].items()}
        assert type(event).__name__ == said["type"]
        kinds.add(said["type"])
        if isinstance(event, AllBlocksCleared):
            assert event.medium is None
            continue
        assert event.hashes == [unsigned(value) for value in said["block_hashes"]]
        assert event.medium == (said.get("medium") or "gpu").lower()
        assert event.group == said.get("group_idx", 0)
        assert event.locality == said.get("locality")
        assert event.ownership == said.get("ownership")
        if isinstance(event, BlockRemoved):
            continue
        assert event.parent == unsigned(said["parent_block_hash"])
        assert event.block_size == said["block_size"]
        lora_id = said["lora_id"]
        assert event.adapter == said.get("lora_name", lora_id and str(lora_id))
        assert event.extra_keys == said.get("extra_keys")
        assert event.kind == said.get("kv_cache_spec_kind")
        assert event.sliding_window == said.get("kv_cache_spec_sliding_window")
        assert event.token_ids == (said["token_ids"] if token_ids else None)
    assert kinds == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}


def indexed(name: str) -> tuple[dict[str, Any], Source]:
    """An engine's recording, and the source that took all of it."""
    recorded = recording(name)
    source = Index().source("worker", 0)
    decoder = Decoder()
    for line in recorded["batches"]:
        batch = decoder.decode(bytes.fromhex(line["payload"]))
        assert not batch.rejected and batch.unknown == 0 and batch.rank == 0
        source.apply(batch.events)
    return recorded, source


@pytest.mark.parametrize("engine", ENGINES)
def test_the_index_comes_to_what_the_engine_holds(engine: str) -> None:
    """Block by block and copy by copy, after evictions, copies, an adapter, salts and a reset.

    The truth is the scheduler's own table.
    """
    recorded, source = indexed(engine)
    truth: Counter[tuple[int, Hash]] = Counter()
    for value, group, copies in recorded["truth"]:
        truth[group, value_of(value)] += copies
    held: Counter[tuple[int, Hash]] = Counter()
    for lane in source.lanes():
        assert lane.medium == "gpu" and lane.block_size == recorded["block_size"]
        for value in lane.parents:
            held[lane.group, value] += 1 + lane.copies.get(value, 0)
    assert held == truth and len(truth) > 10
    stats = source.stats
    assert stats.unknown_removed_blocks == 0 and stats.cleared_events == 1
    # The recording has what makes this hard.
    assert stats.removed_blocks > 20 and stats.duplicate_blocks > 2
    assert stats.duplicate_removed_blocks > 0
    assert {lane.adapter for lane in source.lanes()} == {None, "sql"}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_says_what_keys_its_hashes_were_made_with(engine: str) -> None:
    """Adapter and cache salt are extra keys; parents chain within the adapter."""
    decoder = Decoder(token_ids=True)
    stored = [
        event
        for line in recording(engine)["batches"]
        for event in decoder.decode(bytes.fromhex(line["payload"])).events
        if isinstance(event, BlockStored)
    ]
    keys = {str(key) for event in stored for key in event.extra_keys or ()}
    assert {"None", "['sql']", "['tenant']"} <= keys
    assert {event.adapter for event in stored} == {None, "sql"}
    kind = bytes if engine == "engine-bytes" else int
    for event in stored:
        assert len(event.token_ids) == len(event.hashes) * event.block_size
        assert all(isinstance(value, kind) for value in event.hashes)
    seen = {value for event in stored for value in event.hashes}
    assert all(event.parent is None or event.parent in seen for event in stored)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_said_survives_our_own_encoding(engine: str) -> None:
    """A plane re-encodes what it could not forward as it came."""
    decoder = Decoder(token_ids=True)
    for line in recording(engine)["batches"]:
        batch = decoder.decode(bytes.fromhex(line["payload"]))
        again = decoder.decode(encode(batch.timestamp, batch.events, batch.rank))
        assert again == batch


@pytest.mark.parametrize("name", [*ENGINES, *RELEASES])
def test_damaged_recordings_crash_nothing(name: str) -> None:
    """Every byte of a recorded payload flipped once, and every end cut off."""
    from llm_worker.kv.wire import WireError

    decoder = Decoder()
    for line in recording(name)["batches"][:4]:
        payload = bytearray.fromhex(line["payload"])
        source = Index(max_blocks=1000).source("worker", 0)
        for position in range(len(payload)):
            damaged = bytearray(payload)
            damaged[position] ^= 0x81
            for candidate in (bytes(damaged), bytes(payload[:position])):
                try:
                    source.apply(decoder.decode(candidate).events)
                except WireError:
                    continue
        held, stats = sum(source.blocks().values()), source.stats
        assert held == stats.stored_blocks - stats.removed_blocks - stats.cleared_blocks
