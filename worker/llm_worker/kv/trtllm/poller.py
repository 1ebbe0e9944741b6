"""A TensorRT-LLM engine is asked for its KV events and statistics, for as long as the task runs.

Events go through `trtllm.Translator` to a publisher for each attention-DP rank; statistics become
metrics. An engine that fails is asked again, later and later, and every failure is counted. Never
imports TensorRT-LLM, never reads an event itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import zmq
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llm_worker.kv.records import BlockRemoved, BlockStored
from llm_worker.kv.trtllm.publisher import ZmqKvEventPublisher
from llm_worker.kv.trtllm.translator import (
    EVENT_TYPES,
    FILTER_REASONS,
    LOSS_REASONS,
    Told,
    Translator,
)

log = logging.getLogger(__name__)

# A question does not wait in the engine; the sleep between two bounds what asking costs.
STATS_TIMEOUT_SECONDS = 0.01
STATS_SLEEP_SECONDS = (0.01, 0.1)  # after news; at most
STATS_BACKOFF_FACTOR = 2.0
EVENTS_TIMEOUT_SECONDS = 0.0
EVENTS_SLEEP_SECONDS = (0.005, 0.02)
EVENTS_BACKOFF_FACTOR = 1.5
ERROR_SLEEP_SECONDS = (0.1, 5.0)  # after one error; at most, doubled for each that follows
ANSWER_SECONDS = 30.0  # a question that takes longer is an error
BATCH_EVENTS = 256  # the engine's, in one message of ours
QUESTIONS = ("events", "stats")
_PUBLISH_ERRORS = (zmq.ZMQError, RuntimeError, ValueError)


class Engine(Protocol):
    """What is asked of ``tensorrt_llm.LLM``."""

    def get_kv_cache_events_async(self, timeout: float | None) -> AsyncIterable[Any]:
        """What happened since the last question: dicts, oldest first."""

    def get_stats_async(self, timeout: float | None) -> AsyncIterable[Any]:
        """One dict, or its JSON, for each iteration since the last question."""


@dataclass(slots=True)
class PollerStats:
    """What asking came to."""

    answers: Counter[str] = field(default_factory=Counter)  # with news, by QUESTIONS
    errors: Counter[str] = field(default_factory=Counter)  # by QUESTIONS
    failing: set[str] = field(default_factory=set)  # QUESTIONS whose last answer was an error
    used_blocks: dict[int, int] = field(default_factory=dict)  # by attention-DP rank, once known
    max_blocks: dict[int, int] = field(default_factory=dict)


class Poller:
    """Asks one engine. Owns its publishers: `run` makes them as ranks turn up, and closes them.

    Publishing is done on the loop: it does not wait for the network.
    """

    def __init__(
        self,
        engine: Engine,
        publisher: Callable[[int], ZmqKvEventPublisher],
        translator: Translator,
        *,
        ranks: int = 1,
    ) -> None:
        """``publisher`` makes the one of a rank; it is called once for each.

        ``ranks`` are made at the start, so that their readers find someone; an attention-DP rank
        beyond them, when its first event comes.
        """
        self.translator = translator
        self.stats = PollerStats()
        self._engine = engine
        self._make_publisher = publisher
        self._ranks = ranks
        self._publishers: dict[int, ZmqKvEventPublisher] = {}
        self._owed: set[int] = set()  # ranks whose readers missed something

    async def run(self) -> None:
        """Ask until cancelled. What was taken from the engine until then is published."""
        try:
            for rank in range(self._ranks):
                self._publisher(rank)
            async with asyncio.TaskGroup() as group:
                group.create_task(
                    self._repeat(
                        "events", self._ask_events, EVENTS_SLEEP_SECONDS, EVENTS_BACKOFF_FACTOR
                    ),
                    name="trtllm-events",
                )
                group.create_task(
                    self._repeat(
                        "stats", self._ask_stats, STATS_SLEEP_SECONDS, STATS_BACKOFF_FACTOR
                    ),
                    name="trtllm-stats",
                )
        finally:
            for publisher in self._publishers.values():
                publisher.shutdown()

    async def _repeat(
        self,
        question: str,
        ask: Callable[[], Awaitable[int]],
        sleep_seconds: tuple[float, float],
        factor: float,
    ) -> None:
        shortest, longest = sleep_seconds
        sleep, error_sleep = shortest, ERROR_SLEEP_SECONDS[0]
        while True:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    news = await ask()
            except Exception as error:  # the engine is others' code, and may raise anything
                self._note(question, error)
                await asyncio.sleep(error_sleep * random.uniform(0.5, 1))  # noqa: S311
                error_sleep = min(2 * error_sleep, ERROR_SLEEP_SECONDS[1])
                continue
            error_sleep = ERROR_SLEEP_SECONDS[0]
            self.stats.failing.discard(question)
            if news:
                self.stats.answers[question] += 1
                sleep = shortest
            await asyncio.sleep(sleep)
            sleep = min(sleep * factor, longest)

    def _note(self, question: str, error: Exception) -> None:
        """Count it; in the log, only that it began."""
        self.stats.errors[question] += 1
        if question not in self.stats.failing:
            log.warning(
                "TensorRT-LLM does not answer about its %s, and is asked again: %s: %s",
                question,
                type(error).__name__,
                error,
                extra={"question": question},
            )
        self.stats.failing.add(question)

    async def _ask_events(self) -> int:
        taken: list[Any] = []
        count = 0
        try:
            async for event in self._engine.get_kv_cache_events_async(EVENTS_TIMEOUT_SECONDS):
                if event:
                    taken.append(event)
                    count += 1
                if len(taken) >= BATCH_EVENTS:
                    batch, taken = taken, []
                    self._publish(batch)
        except BaseException:
            # The engine does not give them again. An error here must not hide the cancellation.
            with suppress(*_PUBLISH_ERRORS):
                self._publish(taken)
            raise
        self._publish(taken)
        return count

    def _publish(self, taken: list[Any]) -> None:
        """Publish what the events say; a rank that fails costs no other rank.

        Raises:
            ZMQError, RuntimeError, ValueError: one failed. Its readers learn when it works again.
        """
        failure: Exception | None = None
        for told in self.translator.translate(taken):
            try:
                publisher = self._publisher(told.rank)
                if told.lost or told.rank in self._owed:
                    publisher.publish_lost()
                    self._owed.discard(told.rank)
                publish(publisher, told)
            except _PUBLISH_ERRORS as error:
                self._owed.add(told.rank)
                failure = error
        if failure is not None:
            raise failure

    def _publisher(self, rank: int) -> ZmqKvEventPublisher:
        publisher = self._publishers.get(rank)
        if publisher is None:
            publisher = self._publishers[rank] = self._make_publisher(rank)
        return publisher

    async def _ask_stats(self) -> int:
        count = 0
        async for answer in self._engine.get_stats_async(STATS_TIMEOUT_SECONDS):
            stats = json.loads(answer) if isinstance(answer, str) else answer
            if not isinstance(stats, Mapping):
                continue
            count += 1
            cache = stats.get("kvCacheStats")
            if not isinstance(cache, Mapping):  # an iteration without
                continue
            rank = stats.get("attentionDpRank")
            rank = rank if isinstance(rank, int) else 0
            for known, name in (
                (self.stats.used_blocks, "usedNumBlocks"),
                (self.stats.max_blocks, "maxNumBlocks"),
            ):
                if type(cache.get(name)) is int:
                    known[rank] = cache[name]
        return count


def publish(publisher: ZmqKvEventPublisher, told: Told) -> None:
    """Send what there is to tell of a rank as one message."""
    with publisher.batch():
        for event in told.events:
            if isinstance(event, BlockStored):
                publisher.publish_stored(
                    None,
                    event.token_ids or (),
                    [event.block_size] * len(event.hashes),
                    event.hashes,
                    None,
                    event.parent,
                    lora_name=event.adapter,
                    extra_keys=event.extra_keys,
                    medium=event.medium and event.medium.upper(),
                    attention_dp_rank=told.rank,
                )
            elif isinstance(event, BlockRemoved):
                publisher.publish_removed(
                    None,
                    event.hashes,
                    medium=event.medium and event.medium.upper(),
                    attention_dp_rank=told.rank,
                )
            else:
                publisher.publish_all_cleared(attention_dp_rank=told.rank)


def registry(poller: Poller, model_name: str) -> CollectorRegistry:
    """The poller's metrics, for ``Exposition.register("trtllm", …, add_prefix="trtllm_")``."""
    own = CollectorRegistry()
    own.register(_Metrics(poller, model_name))
    return own


class _Metrics:
    """Families of the numbers; what the engine has not said yet is absent, not zero."""

    def __init__(self, poller: Poller, model_name: str) -> None:
        self._poller = poller
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        """None: names are not checked against other collectors', of which there are none."""
        return []

    def collect(self) -> Iterator[Metric]:
        poller, stats = self._poller, self._poller.stats
        counts = poller.translator.stats
        for name, text, blocks in (
            ("kv_used_blocks", "KV-cache blocks in use, as TensorRT-LLM says.", stats.used_blocks),
            ("kv_max_blocks", "KV-cache blocks there are, as TensorRT-LLM says.", stats.max_blocks),
            (
                "kv_told_blocks",
                "KV-cache blocks that were published as reusable and not as gone.",
                poller.translator.known_blocks(),
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model_name", "engine"])
            for rank, count in sorted(blocks.items()):
                gauge.add_metric([self._model_name, str(rank)], count)
            yield gauge
        yield self._count(
            "kv_events", "KV events that TensorRT-LLM gave.", "type", EVENT_TYPES, counts.events
        )
        yield self._count(
            "kv_filtered_blocks",
            "Blocks in KV events that were not published on purpose: of a shorter attention window"
            " (window), not full (partial), told already (known), larger than the block size"
            " (oversized), never told of (untold).",
            "reason",
            FILTER_REASONS,
            counts.filtered_blocks,
        )
        yield self._count(
            "kv_losses",
            "Times after which it was unknown what the engine holds: readers were told to forget a"
            " rank's blocks, and that something is missing.",
            "reason",
            LOSS_REASONS,
            counts.losses,
        )
        yield self._count(
            "poll_answers", "Answers with news.", "question", QUESTIONS, stats.answers
        )
        yield self._count(
            "poll_errors",
            "Questions that TensorRT-LLM did not answer. It is asked again.",
            "question",
            QUESTIONS,
            stats.errors,
        )
        for name, text, number in (
            ("kv_event_id_gaps", "Holes in the ids of TensorRT-LLM's KV events.", counts.gaps),
            ("kv_event_ids_missed", "KV events in those holes.", counts.missed_events),
            ("kv_filtered_events", "KV events of other windows.", counts.filtered_events),
            ("engine_restarts", "Times that event ids began again.", counts.restarts),
        ):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model_name], number)
            yield counter

    def _count(
        self, name: str, text: str, label: str, values: tuple[str, ...], counts: Counter[str]
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=["model_name", label])
        for value in values:
            family.add_metric([self._model_name, value], counts[value])
        return family
