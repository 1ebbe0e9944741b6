"""Names of streams, and a stream frozen for a snapshot."""

from __future__ import annotations

import pytest

from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.plane import topics
from llm_worker.kv.records import AllBlocksCleared, BlockRemoved, BlockStored
from llm_worker.kv.wire import Decoder


@pytest.mark.parametrize("name", ["host.example:8081", "a@b@c", "a_2e", "ü/*> x", "A-z", "_"])
def test_topics_and_tokens_can_be_read_back(name: str) -> None:
    """Whatever a worker is called, its name survives the way."""
    assert topics.parse_topic(topics.topic(name, 3)) == (name, 3)
    assert topics.from_token(topics.token(name)) == name
    assert not set(topics.token(name)) & set(".*> /\\")


@pytest.mark.parametrize("text", ["", "a.b", "_", "_zz", "a_ff", "_41", "_2E"])
def test_what_is_no_token_is_none(text: str) -> None:
    """Others may have streams on the same server."""
    assert topics.from_token(text) is None


@pytest.mark.parametrize("name", [b"", b"kv@", b"kv@a", b"kv@a@x", b"kv@@1", b"a@1", b"kv@\xff@1"])
def test_what_is_no_topic_is_none(name: bytes) -> None:
    """Others may publish on the same port."""
    assert topics.parse_topic(name) is None


def held(source: Source) -> dict[str, object]:
    """All that a source holds."""
    return {
        f"{lane.medium} {lane.group} {lane.adapter}": (lane.parents, lane.copies, lane.sizes)
        for lane in source.lanes()
        if lane.parents
    }


def test_a_frozen_stream_brings_an_empty_source_to_what_was_held() -> None:
    """With second copies, media, adapters and sizes; whatever happens while it is read."""
    source = Index().source("a", 2)
    source.apply(
        [
            BlockStored(hashes=list(range(1, 6001)), block_size=16),
            BlockStored(hashes=[1, 2], block_size=16),
            BlockStored(hashes=[1], block_size=16, medium="cpu"),
            BlockStored(
                hashes=[b"x" * 32], parent=b"y" * 32, block_size=8, adapter="lora", group=1
            ),
            BlockRemoved(hashes=[500, 2]),
        ]
    )
    before = {key: tuple(dict(table) for table in tables) for key, tables in held(source).items()}  # type: ignore[attr-defined]
    (frozen,) = topics.freeze([source], lambda worker, rank: 7)
    source.apply([AllBlocksCleared(), BlockStored(hashes=[77], block_size=16)])
    payloads = list(topics.batches(frozen))
    other = Index().source("a", 2)
    other.apply([BlockStored(hashes=[99], block_size=16)])
    for payload in payloads:
        other.apply(Decoder().decode(payload).events)

    assert (frozen.worker, frozen.rank, frozen.sequence) == ("a", 2, 7)
    assert len(payloads) > 2
    assert held(other) == before


def test_a_stream_without_blocks_is_one_clear() -> None:
    """Which also says that it exists."""
    source = Index().source("a", 0)
    (payload,) = topics.batches(topics.freeze([source], lambda worker, rank: 0)[0])

    assert Decoder().decode(payload).events == [AllBlocksCleared()]
