"""TensorRT-LLM's KV events become records; the engine is asked again and again."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from llm_worker.exposition.exposition import Exposition
from llm_worker.kv.index.index import Index
from llm_worker.kv.records import AllBlocksCleared, BlockStored, Event
from llm_worker.kv.trtllm import poller as poller_module
from llm_worker.kv.trtllm.poller import Poller, registry
from llm_worker.kv.trtllm.translator import Told, Translator
from llm_worker.metrics import Metrics
from support.trtllm_events import (
    BLOCK_SIZE,
    Engine,
    Truth,
    block,
    contents,
    created,
    event,
    removed,
    stored,
    updated,
)
from support.waiting import until_async

NEGATIVE = -6_148_914_691_236_517_206
UNSIGNED = NEGATIVE + (1 << 64)


@pytest.fixture
def translator() -> Translator:
    return Translator(BLOCK_SIZE)


def told(translator: Translator, *events: Any) -> list[Event]:
    """What the events say of rank 0, which is not lost."""
    answers = translator.translate(events)
    assert all(answer.rank == 0 and not answer.lost for answer in answers)
    return [each for answer in answers for each in answer.events]


def summary(events: list[Event]) -> list[tuple[Any, ...]]:
    return [
        ("clear",)
        if isinstance(each, AllBlocksCleared)
        else ("store", each.hashes, each.parent, each.medium)
        if isinstance(each, BlockStored)
        else ("remove", each.hashes, each.medium)
        for each in events
    ]


def test_a_stored_event_becomes_a_record_with_everything_it_says(translator: Translator) -> None:
    """Hashes unsigned, chained from the parent, with tokens; the level is the medium."""
    blocks = [block(NEGATIVE), block(12)]
    (record,) = told(translator, created(), stored(1, *blocks, parent=11))
    assert record == BlockStored(
        hashes=[UNSIGNED, 12],
        parent=11,
        block_size=BLOCK_SIZE,
        medium="gpu",
        token_ids=[token["token_id"] for each in blocks for token in each["tokens"]],
    )


def test_removals_of_several_levels_name_each_medium(translator: Translator) -> None:
    """TensorRT-LLM says only which blocks: where they were is remembered."""
    records = told(
        translator, created(), stored(1, block(1)), stored(2, block(2, level=1)), removed(3, 1, 2)
    )
    assert summary(records)[2:] == [("remove", [1], "gpu"), ("remove", [2], "cpu")]


def test_a_block_that_moves_is_stored_there_and_removed_here(translator: Translator) -> None:
    """In this order, so that no reader thinks that it is nowhere; its parent stays."""
    records = told(
        translator,
        created(),
        stored(1, block(1), block(2)),
        updated(2, 2, 0, 1),
        updated(3, 2, 1, 2),
        updated(4, 2, None, None),
        removed(5, 2),
    )
    assert summary(records)[1:] == [
        ("store", [2], 1, "cpu"),
        ("remove", [2], "gpu"),
        ("store", [2], 1, "storage"),
        ("remove", [2], "cpu"),
        ("remove", [2], "storage"),
    ]


def test_only_the_longest_window_of_the_initial_created_events_is_told(
    translator: Translator,
) -> None:
    """A prefix is reusable as far as full attention reaches."""
    records = told(
        translator,
        created(0, window_size=32),
        created(1, window_size=128),
        created(2, window_size=64),
        stored(3, block(1), window_size=32),
        stored(4, block(1)),
        removed(5, 1, window_size=64),
        updated(6, 1, 0, 1, window_size=32),
    )
    assert summary(records) == [("store", [1], None, "gpu")]
    assert translator.stats.filtered_events == 3
    assert translator.stats.filtered_blocks["window"] == 3


def test_an_engine_without_windows_is_not_filtered(translator: Translator) -> None:
    """Releases before 1.0 do not say."""
    old = [
        {key: value for key, value in each.items() if key != "window_size"}
        for each in (created(), stored(1, block(1)), removed(2, 1))
    ]
    assert len(told(translator, *old)) == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_layer_groups_with_the_longest_window_one_is_told(
    translator: Translator, order: tuple[int, int]
) -> None:
    """KV-cache manager V2 tells of a block once for each group."""
    records = told(
        translator,
        *(created(number, layer_group_id=group) for number, group in enumerate(order)),
        created(2, layer_group_id=2, window_size=32),
        stored(3, block("ab" * 32), layer_group_id=0),
        stored(4, block("ab" * 32), layer_group_id=1),
        removed(5, "ab" * 32, layer_group_id=1),
    )
    assert summary(records) == [("store", [b"\xab" * 32], None, "gpu")]


def test_a_partial_block_is_not_told_and_neither_is_its_removal(translator: Translator) -> None:
    """Nobody can match it; a removal of what was never stored would be noise."""
    records = told(
        translator, created(), stored(1, block(1), block(2, tokens=3)), removed(2, 2), removed(3, 1)
    )
    assert summary(records) == [("store", [1], None, "gpu"), ("remove", [1], "gpu")]
    assert translator.stats.filtered_blocks["partial"] == 2


def test_a_block_longer_than_the_block_size_ends_its_event(translator: Translator) -> None:
    """Our block size is not the engine's: what cannot be told is counted, and not half told."""
    records = told(translator, created(), stored(1, block(1), block(2, tokens=5), block(3)))
    assert summary(records) == [("store", [1], None, "gpu")]
    assert translator.stats.filtered_blocks["oversized"] == 2
    assert told(translator, removed(2, 2, 3)) == []


def test_a_block_stored_twice_is_told_once(translator: Translator) -> None:
    """TensorRT-LLM holds it once; readers who count copies would keep it after its removal."""
    records = told(
        translator,
        created(),
        stored(1, block(2), parent=1),
        stored(2, block(1), block(2), block(3)),
    )
    assert summary(records) == [
        ("store", [2], 1, "gpu"),
        ("store", [1], None, "gpu"),
        ("store", [3], 2, "gpu"),
    ]


def test_adapters_and_what_else_distinguishes_a_block_is_kept(translator: Translator) -> None:
    """A LoRA's name or number, multimodal items and the salt, in vLLM's order."""
    records = told(
        translator,
        created(),
        stored(
            1,
            block(1, lora_id=7),
            block(2, lora_name="a", mm_keys=[{"hash": "ff", "start_offset": 3}], cache_salt="s"),
            block(3, lora_id=0),
        ),
    )
    assert [each.adapter for each in records if isinstance(each, BlockStored)] == ["7", "a", None]
    assert isinstance(records[1], BlockStored)
    assert records[1].extra_keys == [["a", ("ff", 3), "s"]]


def test_a_gap_in_the_ids_is_a_loss_whatever_is_filtered(translator: Translator) -> None:
    """Ids are judged first: a filtered event has an id, too, and a lost one may not be filtered."""
    told(
        translator, created(0, window_size=32), created(1), stored(2, block(1), window_size=32),
        stored(3, block(1)),
    )  # fmt: skip
    answers = translator.translate([removed(6, 9, window_size=32), stored(7, block(2))])
    assert [(each.rank, each.lost) for each in answers] == [(0, True)]
    assert summary(answers[0].events) == [("store", [2], None, "gpu")]
    assert (translator.stats.gaps, translator.stats.missed_events) == (1, 2)
    assert translator.stats.losses == {"gap": 1}
    assert told(translator, removed(8, 1)) == [], "forgotten with the loss, so never told as gone"


def test_asking_too_late_is_a_loss(translator: Translator) -> None:
    """The engine's buffer drops the oldest events: what was before is not known."""
    (answer,) = translator.translate([stored(5, block(1))])
    assert answer == Told(0, True, answer.events)
    assert translator.stats.missed_events == 5


def test_a_longer_window_that_turns_up_late_is_a_loss(translator: Translator) -> None:
    """Without the created events the first window seen is a guess."""
    translator.translate([stored(5, block(1), window_size=32)])
    (answer,) = translator.translate([stored(6, block(2))])
    assert answer.lost
    assert summary(answer.events) == [("store", [2], None, "gpu")]


def test_ids_that_begin_again_are_a_restart(translator: Translator) -> None:
    """A new engine holds nothing; it may have other windows."""
    told(translator, created(), stored(1, block(1)))
    records = told(translator, created(window_size=64), stored(1, block(2), window_size=64))
    assert summary(records) == [("clear",), ("store", [2], None, "gpu")]
    assert translator.stats.restarts == 1


def test_ranks_count_their_own_ids_and_windows(translator: Translator) -> None:
    """With attention DP, one answer holds the events of all ranks."""
    answers = translator.translate(
        [
            created(attention_dp_rank=0),
            created(attention_dp_rank=1),
            stored(1, block(1), attention_dp_rank=1),
            stored(1, block(1), attention_dp_rank=0),
            removed(5, 1, attention_dp_rank=1),
            removed(2, 1, attention_dp_rank=0),
        ]
    )
    assert [(each.rank, each.lost, len(each.events)) for each in answers] == [
        (1, False, 1), (0, False, 1), (1, True, 0), (0, False, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "broken",
    [
        event(1, {"type": "stored", "parent_hash": None}),
        event(1, {"type": "stored", "parent_hash": None, "blocks": [{"tokens": []}]}),
        stored(1, block("not hexadecimal")),
        stored(1, block(1 << 64)),
        stored(1, block(1), window_size="long"),
        event(1, {"type": "removed", "block_hashes": 3}),
        event(1, {"type": "updated", "block_hash": 1, "cache_level": {"new_value": None}}),
        {"event_id": 1},
        {"event_id": "1", "data": {"type": "removed", "block_hashes": []}},
        {"data": {"type": "removed", "block_hashes": []}},
        ["an event"],
    ],
)
def test_a_malformed_event_is_a_loss_and_the_next_one_is_read(
    translator: Translator, broken: Any
) -> None:
    """It may have changed blocks; it costs no other event."""
    told(translator, created(), stored(1, block(3)))
    assert [answer.lost for answer in translator.translate([broken])] == [True]
    assert translator.stats.losses == {"malformed": 1}
    answers = translator.translate([stored(2, block(4))])
    assert summary(answers[-1].events) == [("store", [4], None, "gpu")]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.sets(st.integers(0, 100), max_size=4))
def test_whatever_is_lost_nothing_is_claimed_that_the_engine_does_not_hold(
    seed: int, lost: set[int]
) -> None:
    """And without a loss, a rank's index is what the engine holds, with parents.

    A loss is seen at the rank's next event.
    """
    truth = Truth(seed, ranks=2)
    history = [*truth.start(), *(each for _ in range(40) for each in truth.step())]
    history += [each for rank in range(2) for each in truth.nothing(rank)]
    lost = {number for number in lost if number < len(history) - 2}
    hit = {history[number]["attention_dp_rank"] for number in lost}
    translator = Translator(BLOCK_SIZE)
    index = Index()
    doubted = set()
    for number, raw in enumerate(history):
        if number in lost:
            continue
        for answer in translator.translate([raw]):
            source = index.source("trtllm", answer.rank)
            if answer.lost:
                doubted.add(answer.rank)
                source.clear()
            source.apply(answer.events)
    assert doubted == hit
    for rank in range(2):
        source = index.source("trtllm", rank)
        expected, found = truth.expected(rank), contents(source)
        if rank not in hit:
            assert found == expected
        for lane, blocks in found.items():
            assert blocks.items() <= expected[lane].items()
        assert source.stats.duplicate_blocks == source.stats.unknown_removed_blocks == 0


def test_no_event_is_no_event(translator: Translator) -> None:
    """The serialiser makes {} of nothing."""
    assert told(translator, {}, created(), {}, None, stored(1, block(1)))


class Recorder:
    """What a publisher was told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails = False

    def batch(self) -> Any:
        if self.fails:
            raise RuntimeError("no publisher today")
        return contextlib.nullcontext()

    def publish_stored(self, *arguments: Any, **more: Any) -> None:
        self.calls.append("stored")

    def publish_removed(self, *arguments: Any, **more: Any) -> None:
        self.calls.append("removed")

    def publish_all_cleared(self, **more: Any) -> None:
        self.calls.append("cleared")

    def publish_lost(self, **more: Any) -> None:
        self.calls.append("lost")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


class Asked:
    """A poller that runs, its engine and its publishers."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.ranks: dict[int, Recorder] = {}
        self.poller = Poller(self.engine, self._publisher, Translator(BLOCK_SIZE))  # type: ignore[arg-type]

    def _publisher(self, rank: int) -> Recorder:
        return self.ranks.setdefault(rank, Recorder())

    async def __aenter__(self) -> Asked:
        self.task = asyncio.create_task(self.poller.run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


def test_the_engine_is_asked_as_long_as_the_task_runs() -> None:
    """Each rank has a publisher of its own, which is shut down at the end."""

    async def scenario() -> None:
        async with Asked() as asked:
            asked.engine.happen([created(), stored(1, block(1))])
            await until_async("the calls 'stored'", lambda: asked.ranks[0].calls == ["stored"])
            asked.engine.happen([created(attention_dp_rank=1), stored(2, block(1))])
            asked.engine.happen([stored(2, block(1), attention_dp_rank=1)])
            await until_async(
                "the second rank's block",
                lambda: 1 in asked.ranks and "stored" in asked.ranks[1].calls,
            )
            assert asked.ranks[1].calls == ["lost", "stored"]
            assert set(asked.engine.timeouts) == {0.0}
        assert asked.ranks[0].calls[-1] == asked.ranks[1].calls[-1] == "shutdown"

    asyncio.run(scenario())


def test_an_engine_that_fails_is_counted_and_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it gave before it failed is published; the log says once that it fails."""
    monkeypatch.setattr(poller_module, "ERROR_SLEEP_SECONDS", (0.001, 0.01))

    async def scenario() -> None:
        async with Asked() as asked:
            asked.engine.errors = [RuntimeError("no RPC"), TypeError("no answer"), ValueError("?")]
            asked.engine.happen([created(), stored(1, block(1))])
            await until_async(
                "errors of the question for events == 3",
                lambda: asked.poller.stats.errors["events"] == 3,
            )
            assert asked.ranks[0].calls == ["stored"]
            asked.engine.happen([removed(2, 1)])
            await until_async(
                "the calls 'stored', 'removed'",
                lambda: asked.ranks[0].calls == ["stored", "removed"],
            )
            await until_async("the poller to recover", lambda: not asked.poller.stats.failing)

    asyncio.run(scenario())
    assert sum("does not answer" in each.message for each in caplog.records) == 1


def test_an_answer_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging engine does not end the asking about anything else."""
    monkeypatch.setattr(poller_module, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(poller_module, "ERROR_SLEEP_SECONDS", (0.001, 0.01))

    class Hanging(Engine):
        async def get_kv_cache_events_async(self, timeout: float | None) -> Any:  # noqa: ASYNC109
            yield created()
            await asyncio.Event().wait()

    async def scenario() -> None:
        asked = Asked()
        asked.engine = Hanging()
        asked.poller = Poller(asked.engine, asked._publisher, Translator(BLOCK_SIZE))  # type: ignore[arg-type]
        async with asked:
            asked.engine.stats = [{"kvCacheStats": {"usedNumBlocks": 3, "maxNumBlocks": 64}}]
            await until_async(
                "errors of the question for events >= 2",
                lambda: asked.poller.stats.errors["events"] >= 2,
            )
            await until_async(
                "used blocks to be {0: 3}", lambda: asked.poller.stats.used_blocks == {0: 3}
            )

    asyncio.run(scenario())


def test_events_taken_before_the_end_are_published() -> None:
    """The engine does not give them a second time."""

    class Endless(Engine):
        async def get_kv_cache_events_async(self, timeout: float | None) -> Any:  # noqa: ASYNC109
            yield created()
            yield stored(1, block(1))
            await asyncio.Event().wait()

    async def scenario() -> None:
        asked = Asked()
        asked.poller = Poller(Endless(), asked._publisher, Translator(BLOCK_SIZE))  # type: ignore[arg-type]
        async with asked:
            await asyncio.sleep(0.02)
            assert asked.ranks[0].calls == []
        assert asked.ranks[0].calls == ["stored", "shutdown"]

    asyncio.run(scenario())


def test_a_publisher_that_fails_tells_of_the_loss_when_it_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What could not be sent is gone, and readers have to know."""
    monkeypatch.setattr(poller_module, "ERROR_SLEEP_SECONDS", (0.001, 0.01))

    async def scenario() -> None:
        async with Asked() as asked:
            asked.ranks[0].fails = True
            asked.engine.happen([created(), stored(1, block(1))])
            await until_async(
                "errors of the question for events == 1",
                lambda: asked.poller.stats.errors["events"] == 1,
            )
            asked.ranks[0].fails = False
            asked.engine.happen([stored(2, block(2))])
            await until_async(
                "the calls 'lost', 'stored'", lambda: asked.ranks[0].calls == ["lost", "stored"]
            )

    asyncio.run(scenario())


def test_metrics_are_absent_until_they_are_known() -> None:
    """Zero blocks would be a statement; counters are there from the start."""
    asked = Asked()
    exposition = Exposition(Metrics(CollectorRegistry()))
    exposition.register("trtllm", registry(asked.poller, "tiny"), add_prefix="trtllm_")
    page = exposition.render().body.decode()
    assert "trtllm_kv_used_blocks{" not in page
    assert 'trtllm_kv_losses_total{model_name="tiny",reason="gap"} 0' in page

    async def scenario() -> None:
        async with asked:
            asked.engine.stats = [
                {"iterLatencyMS": 1.0},
                {"kvCacheStats": {"usedNumBlocks": 3, "maxNumBlocks": 64}},
                '{"attentionDpRank": 1, "kvCacheStats": {"usedNumBlocks": 4, "maxNumBlocks": 64}}',
            ]
            asked.engine.happen([created(), stored(1, block(1)), removed(9, 1)])
            await until_async(
                "used blocks to be {0: 3, 1: 4}",
                lambda: asked.poller.stats.used_blocks == {0: 3, 1: 4},
            )
            await until_async("the loss to be published", lambda: "lost" in asked.ranks[0].calls)

    asyncio.run(scenario())
    page = exposition.render().body.decode()
    for line in (
        'trtllm_kv_used_blocks{engine="0",model_name="tiny"} 3',
        'trtllm_kv_used_blocks{engine="1",model_name="tiny"} 4',
        'trtllm_kv_max_blocks{engine="0",model_name="tiny"} 64',
        'trtllm_kv_losses_total{model_name="tiny",reason="gap"} 1',
        'trtllm_kv_event_ids_missed_total{model_name="tiny"} 7',
        'trtllm_kv_events_total{model_name="tiny",type="stored"} 1',
        'llm_worker_exporter_source_up{source="trtllm"} 1',
    ):
        assert line in page, f"{line} not in\n{page}"


def test_the_metrics_are_documented(repository: Path) -> None:
    """docs/tensorrt-llm.md has a row for each, with what its HELP says."""
    asked = Asked()
    document = (repository / "docs/tensorrt-llm.md").read_text(encoding="utf-8")
    families = list(registry(asked.poller, "tiny").collect())
    rows = [line for line in document.splitlines() if line.startswith("| `trtllm_")]
    assert len(rows) == len(families)
    for family, row in zip(families, rows, strict=True):
        name = f"trtllm_{family.name}" + ("_total" if family.type == "counter" else "")
        assert f"| `{name}` |" in row
        assert row.endswith(f"| {family.documentation} |")
