"""What serving puts on the board: its metrics, its state, its pulse."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter

from llm_worker.exposition.exposition import Exposition, Published
from llm_worker.lifecycle import Lifecycle, State
from llm_worker.link.board import Board
from llm_worker.link.status import Status
from llm_worker.metrics import ExporterMetrics, ServingMetrics
from llm_worker.serving import publisher as module
from llm_worker.serving.publisher import Publisher
from support.waiting import until


class Served:
    def __init__(self) -> None:
        self.board = Board.create()
        self.registry = CollectorRegistry()
        self.metrics = ServingMetrics(self.registry)
        self.publisher = Publisher(self.board, os.getpid(), self.metrics)
        self.requests = Counter("requests", "Requests.", registry=self.registry)
        self.exposition = Exposition(ExporterMetrics(CollectorRegistry()), {"llm_namespace": "n"})
        self.exposition.register("ours", self.registry)

    def page(self) -> Published | None:
        written = self.board["page"].read()
        if written is None:
            return None
        return msgspec.msgpack.decode(written.payload, type=Published)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.publisher.close()


def test_families_are_on_the_board_in_both_formats_with_their_labels(served: Served) -> None:
    """Ready to be put on a page as they are."""
    served.publisher.start(served.exposition)
    served.requests.inc(3)
    served.publisher.publish()
    page = served.page()
    assert page is not None
    for blocks in (page.text, page.openmetrics):
        (block,) = [block for block in blocks if block.name == "requests"]
        assert 'requests_total{llm_namespace="n"} 3.0' in block.body
    assert ("llm_worker_exporter_source_up", {"source": "ours"}, 1.0) in [
        total[1:] for total in page.exporter
    ]


def test_it_publishes_by_itself_and_beats(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to ask, and the thread's pulse says that the interpreter runs."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(module, "PAGE_SECONDS", 0.01)
    served.publisher.start(served.exposition)
    until("a page", lambda: served.page() is not None, 20)
    served.requests.inc()
    until("the next one", lambda: 'requests_total{llm_namespace="n"} 1.0' in str(served.page()), 20)
    assert (served.board.thread_age_seconds or 99) < 20
    assert served.board.loop_age_seconds is None, "that is the loop's to say"


def test_what_was_counted_to_the_end_is_published(served: Served) -> None:
    """A drain's last requests are on the last page."""
    served.publisher.start(served.exposition)
    served.requests.inc(5)
    served.publisher.close()
    assert 'requests_total{llm_namespace="n"} 5.0' in str(served.page())


def test_a_page_that_cannot_be_published_is_counted_and_the_last_one_stays(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serving goes on, and the observer sees how old the page is."""
    served.publisher.start(served.exposition)
    served.publisher.publish()
    before = served.page()
    monkeypatch.setattr(served.board["page"], "_room", 10)
    served.publisher.publish()
    assert (served.value("llm_worker_page_publish_errors_total") or 0) >= 1
    assert served.page() is not None
    assert [b.name for b in (before or Published((), (), ())).text] == [
        b.name for b in (served.page() or Published((), (), ())).text
    ]


def test_states_are_told_and_counted_and_phases_are_no_states(served: Served) -> None:
    """The first one, too."""
    lifecycle = Lifecycle(served.publisher.note)
    lifecycle.enter_phase("engine")
    lifecycle.to(State.WARMING)
    served.publisher.say(engine_pids=[7], model_name="m")
    lifecycle.enter_phase("")
    lifecycle.to(State.READY, "up")
    status = Status.read(served.board["serving"])
    assert status is not None
    assert (status.state, status.phase, status.reason) == ("ready", "", "up")
    assert (status.engine_pids, status.model_name, status.pid) == ([7], "m", os.getpid())
    assert abs(status.since - time.time()) < 60
    entered = "llm_worker_state_entered_total"
    for state in ("starting", "warming", "ready"):
        assert served.value(entered, state=state) == 1, state
