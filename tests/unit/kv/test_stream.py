"""The account of a stream: whatever happens on the way, the index is right or says it is not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_worker.kv.follow.recovery import ATTEMPTS
from llm_worker.kv.follow.stream import Stream
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import BlockSink, Source
from llm_worker.kv.plane.topics import EPOCH_BITS
from llm_worker.kv.records import AllBlocksCleared, BlockRemoved, BlockStored, Event
from llm_worker.kv.stats import ListenerStats
from llm_worker.kv.wire import encode

UNKNOWN = b"\x93\xcb\x40\x59\x00\x00\x00\x00\x00\x00\x91\x81\xa4type\xa4Nope\xc0"


def stored(*hashes: int, medium: str = "gpu") -> BlockStored:
    return BlockStored(hashes=list(hashes), parent=None, block_size=16, medium=medium)


def removed(*hashes: int) -> BlockRemoved:
    return BlockRemoved(hashes=list(hashes))


class Publisher:
    """A process that publishes as vLLM does: it numbers, remembers the last batches, and restarts.

    ``blocks`` is the truth: how often it holds each block.
    """

    def __init__(self, memory: int = 10_000, epoch: int | None = None) -> None:
        self.first = 0 if epoch is None else epoch << EPOCH_BITS
        self.memory = memory
        self.sent: list[tuple[int, bytes]] = []
        self.blocks: Counter[int] = Counter()
        self.clock = 100.0

    def publish(self, *events: Event) -> tuple[int, bytes]:
        self.clock += 1.0
        for event in events:
            if isinstance(event, BlockStored):
                self.blocks.update(event.hashes)  # type: ignore[arg-type]
            elif isinstance(event, BlockRemoved):
                self.blocks.subtract(event.hashes)  # type: ignore[arg-type]
            else:
                self.blocks.clear()
        message = (self.first + len(self.sent), encode(self.clock, events, 0))
        self.sent.append(message)
        return message

    def restart(self) -> None:
        self.sent.clear()
        self.blocks.clear()
        if self.first:
            self.first += 1 << EPOCH_BITS

    def kept(self, start: int) -> list[tuple[int, bytes]]:
        kept = self.sent[max(0, len(self.sent) - self.memory) :]
        return [message for message in kept if message[0] >= start]

    def held(self) -> set[int]:
        return {value for value, count in self.blocks.items() if count > 0}


class Outlet:
    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def publish(
        self, source: BlockSink, payload: bytes, events: Sequence[Event], timestamp: float
    ) -> None:
        self.payloads.append(payload)


class Ear:
    """A stream with its index, and a publisher that answers it when told to."""

    def __init__(
        self, publisher: Publisher | None = None, index: Index | None = None, **options: object
    ) -> None:
        self.publisher = publisher or Publisher()
        self.outlet = Outlet()
        self.source = (index or Index()).source("w", 0)
        self.stats = ListenerStats("w", 0)
        self.replayable = bool(options.get("replayable", True))
        self.stream = Stream(
            self.source,
            self.stats,
            epochs=bool(self.publisher.first),
            outlets=[self.outlet],
            **options,  # type: ignore[arg-type]
        )

    def connect(self) -> Ear:
        self.stream.connected()
        self.answer()
        return self

    def hear(self, *messages: tuple[int, bytes]) -> None:
        self.stream.live([(number.to_bytes(8, "big"), payload) for number, payload in messages], 0)

    def answer(self, *, most: int | None = None, leave_out: Sequence[int] = ()) -> int:
        """Answer all questions, the first one with ``most`` batches and no end."""
        questions = 0
        while (ask := self.stream.request) is not None:
            questions += 1
            assert questions < 100, "it asks for ever"
            if not self.replayable:
                self.stream.replay_failed("unavailable")
                continue
            if ask.start is None:
                self.snapshot()
                continue
            for number, payload in self.publisher.kept(ask.start)[:most]:
                if number not in leave_out:
                    self.stream.replayed(number, payload)
                if self.stream.request is not ask:
                    break
            if self.stream.request is ask:
                if most is None:
                    self.stream.replay_ended()
                else:
                    self.stream.replay_failed("timeout")
            most, leave_out = None, ()
        return questions

    def snapshot(self) -> None:
        last = self.publisher.first + len(self.publisher.sent) - 1
        for events in ([AllBlocksCleared()], [stored(*self.publisher.blocks.elements())]):
            self.stream.replayed(last, encode(self.publisher.clock, events, 0))
        self.stream.replay_ended()

    def fail(self, outcome: str = "timeout") -> None:
        assert self.stream.request is not None
        self.stream.replay_failed(outcome)

    def held(self) -> set[object]:
        return set(self.source.hashes())

    def is_true(self) -> bool:
        return not self.source.stale and self.held() == self.publisher.held()


def test_batches_in_order_are_applied_and_handed_on_verbatim() -> None:
    """The usual case: no copy, no re-encoding, no question."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(5)]
    ear.hear(*messages)
    assert ear.is_true()
    assert ear.stats.batches_applied == 5
    assert ear.stats.sequence == 4
    assert ear.outlet.payloads == [payload for _, payload in messages]
    assert ear.stream.request is None


def test_before_the_publisher_answered_the_source_is_unsynchronised() -> None:
    """An index that has heard nothing says so instead of answering that nothing is held."""
    ear = Ear()
    ear.stream.connected()
    assert ear.source.stale == {"unsynchronised"}
    assert ear.stream.request is not None
    assert ear.stream.request.start == 0


def test_a_publisher_that_published_nothing_yet_is_synchronised_and_empty() -> None:
    """It answers with the end only."""
    ear = Ear().connect()
    assert ear.is_true()
    ear.hear(ear.publisher.publish(stored(1)))
    assert ear.is_true()


def test_a_late_listener_replays_from_the_start_and_counts_it() -> None:
    """What was published before it connected, and what arrives while the answer is on its way."""
    publisher = Publisher()
    for number in range(10):
        publisher.publish(stored(number))
    ear = Ear(publisher)
    ear.stream.connected()
    ear.hear(publisher.publish(removed(3)), publisher.publish(stored(11)))
    ear.answer()
    assert ear.is_true()
    assert ear.stats.batches_replayed + ear.stats.batches_late == 12
    assert ear.stats.batches_lost == 0


def test_a_start_that_the_publisher_forgot_marks_missed_first_until_all_is_cleared() -> None:
    """The blocks from before are unknown; a clear makes that irrelevant."""
    publisher = Publisher(memory=5)
    for number in range(20):
        publisher.publish(stored(number))
    ear = Ear(publisher).connect()
    assert ear.source.stale == {"missed_first"}
    assert ear.stats.gaps == {"initial": 1}
    assert ear.stats.batches_lost == 15
    assert ear.held() == set(range(15, 20))
    ear.hear(publisher.publish(AllBlocksCleared(), stored(7)))
    assert ear.is_true()


def test_without_a_replay_endpoint_a_first_batch_that_is_not_the_first_marks_missed_first() -> None:
    """And one that is, does not; until there is one nothing is known of what the engine holds."""
    publisher = Publisher()
    publisher.publish(stored(1))
    for late, stale in ((True, {"missed_first"}), (False, set())):
        ear = Ear(publisher, replayable=False)
        ear.stream.connected()
        ear.fail("unavailable")
        assert ear.source.stale == {"unsynchronised"}
        ear.stream.check_tail()
        assert ear.stream.request is None
        ear.hear(
            *(publisher.sent[1:] or [publisher.publish(stored(2))] if late else publisher.sent)
        )
        assert ear.source.stale == stale
        assert (ear.held() == publisher.held()) is not late


def test_a_gap_is_replayed_and_what_came_behind_it_waits() -> None:
    """In order, once each, and trusted all along."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(10)]
    ear.hear(*messages[:3])
    ear.hear(*messages[6:8])
    assert ear.held() == {0, 1, 2}
    assert ear.stats.queue_batches == 2
    assert ear.stream.request is not None
    assert ear.stream.request.start == 2  # the last one applied shows who answers
    ear.hear(*messages[8:])
    ear.answer()
    assert ear.is_true()
    assert ear.stats.gaps == {"gap": 1}
    assert ear.stats.replays == {"complete": 1}
    assert ear.stats.queue_batches == 0
    assert ear.outlet.payloads == [payload for _, payload in messages]


def test_a_replay_without_its_middle_and_its_end_is_asked_for_again() -> None:
    """vLLM 0.32 leaves out what its ROUTER's queue has no room for, without a word."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(50)]
    ear.hear(messages[0], messages[49])
    ear.answer(most=30, leave_out=range(10, 20))
    assert ear.is_true()
    assert ear.stats.replays["truncated"] >= 1
    assert ear.stats.batches_lost == 0


def test_a_gap_longer_than_the_replay_buffer_marks_the_index_stale() -> None:
    """What was lost is counted, and the rest goes on."""
    publisher = Publisher(memory=5)
    ear = Ear(publisher).connect()
    messages = [publisher.publish(stored(number)) for number in range(30)]
    ear.hear(messages[0], messages[29])
    ear.answer()
    assert ear.source.stale == {"gap"}
    assert ear.stats.batches_lost == 24
    assert ear.stats.replays["aged_out"] == 1
    ear.hear(publisher.publish(AllBlocksCleared()))
    assert ear.is_true()


def test_a_publisher_without_a_memory_is_not_taken_for_one_that_published_nothing() -> None:
    """vLLM with ``buffer_steps`` 0, or another process at the replay port: the end, only that."""
    publisher = Publisher(memory=0)
    for number in range(20):
        publisher.publish(stored(number))
    ear = Ear(publisher).connect()
    ear.hear(publisher.publish(stored(20)))
    ear.answer()
    assert ear.source.stale == {"missed_first", "gap"}
    assert ear.stats.batches_lost == 20
    ear.hear(*[publisher.publish(stored(number)) for number in (21, 22)])
    assert ear.held() == {20, 21, 22}
    publisher.publish(stored(23))
    ear.hear(publisher.publish(stored(24)))
    ear.answer()
    assert ear.held() == {20, 21, 22, 24}
    assert ear.stats.batches_lost == 21
    assert ear.stats.batches_duplicate == 0


def test_a_second_time_the_end_is_denied_it_is_not_believed() -> None:
    """The first time what is held may be left over from before the connection, the second not."""
    publisher = Publisher(memory=0)
    ear = Ear(publisher).connect()
    ear.stream.disconnected()
    for number in range(5):
        publisher.publish(stored(number))
    ear.stream.connected()
    ear.answer()
    ear.hear(publisher.publish(stored(5)))
    ear.answer()
    assert ear.held() == set()
    assert ear.stats.batches_duplicate == 1
    ear.hear(publisher.publish(stored(6)))
    ear.answer()
    assert ear.held() == {6}
    assert ear.source.stale == {"missed_first", "gap"}


def test_a_publisher_that_does_not_answer_is_given_up_with_the_index_stale() -> None:
    """The stream goes on; while it waits, the index is marked already."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(5)]
    ear.hear(messages[0], messages[2])
    ear.fail()
    assert ear.source.stale == {"gap"}
    for _ in range(ATTEMPTS - 1):
        ear.fail()
    assert ear.stream.request is None
    assert ear.held() == {0, 2}
    assert ear.source.stale == {"gap"}
    assert ear.stats.replays["timeout"] == ATTEMPTS
    assert ear.stats.batches_lost == 1
    ear.hear(*messages[3:])
    assert ear.held() == {0, 2, 3, 4}


def test_an_answer_after_a_failed_attempt_makes_the_index_true_again() -> None:
    """Mistrust ends with its cause."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(5)]
    ear.hear(messages[0], messages[4])
    ear.fail()
    assert ear.source.stale
    ear.answer()
    assert ear.is_true()


def test_a_gap_that_was_a_reorder_heals_by_itself() -> None:
    """Without anybody's answer."""
    ear = Ear(replayable=False)
    ear.stream.connected()
    ear.fail("unavailable")
    messages = [ear.publisher.publish(stored(number)) for number in range(4)]
    ear.hear(messages[0], messages[2], messages[3])
    ear.hear(messages[1])
    assert ear.is_true()
    assert ear.stats.batches_late == 2
    assert ear.stream.request is None


def test_a_duplicate_is_counted_and_changes_nothing() -> None:
    """A store that is applied twice would outlive its removal."""
    ear = Ear().connect()
    first = ear.publisher.publish(stored(1))
    ear.hear(first, first)
    ear.hear(ear.publisher.publish(removed(1)), first)
    assert ear.is_true()
    assert ear.held() == set()
    assert ear.stats.batches_duplicate == 2
    assert ear.stats.gaps == {}


def test_a_restart_is_told_from_a_duplicate_by_its_time_and_clears_the_index() -> None:
    """Number 0 again, but made later than the last batch applied."""
    ear = Ear().connect()
    ear.hear(*[ear.publisher.publish(stored(number)) for number in range(5)])
    ear.publisher.restart()
    ear.hear(ear.publisher.publish(stored(100)))
    assert ear.held() == {100}
    assert ear.is_true()
    assert ear.stats.gaps == {"restart": 1}
    assert ear.outlet.payloads[-2] == encode(105.0, [AllBlocksCleared()], 0)


def test_a_restart_whose_first_batches_were_missed_is_replayed_from_its_start() -> None:
    """Not from where the old process was."""
    ear = Ear().connect()
    ear.hear(*[ear.publisher.publish(stored(number)) for number in range(5)])
    ear.publisher.restart()
    ear.publisher.publish(stored(100))
    ear.hear(ear.publisher.publish(stored(101)))
    assert ear.source.stale == {"unsynchronised"}
    ear.answer()
    assert ear.held() == {100, 101}
    assert ear.is_true()


@pytest.mark.parametrize("published", [0, 1, 4, 5, 6, 20])
def test_after_a_reconnect_another_process_is_noticed_however_far_it_got(published: int) -> None:
    """Its numbers may be below, at or beyond the old one's: its last batch is asked for."""
    ear = Ear().connect()
    ear.hear(*[ear.publisher.publish(stored(number)) for number in range(5)])
    ear.stream.disconnected()
    assert ear.source.stale == {"disconnected"}
    ear.publisher.restart()
    messages = [ear.publisher.publish(stored(100 + number)) for number in range(published)]
    ear.stream.connected()
    ear.hear(*messages[-1:])
    ear.answer()
    assert ear.is_true()
    assert ear.stats.gaps["restart"] == 1


def test_after_a_reconnect_the_same_process_goes_on_with_what_was_missed() -> None:
    """No clear, no restart, no loss."""
    ear = Ear().connect()
    ear.hear(*[ear.publisher.publish(stored(number)) for number in range(5)])
    ear.stream.disconnected()
    ear.publisher.publish(stored(5))
    ear.publisher.publish(removed(0))
    ear.stream.connected()
    ear.hear(ear.publisher.publish(stored(7)))
    ear.answer()
    assert ear.is_true()
    assert ear.stats.gaps["restart"] == 0
    assert ear.stats.batches_lost == 0


def restarted(read: int, published: int) -> tuple[Ear, list[tuple[int, bytes]]]:
    """An ear that read some of ten batches before another process took over, and the rest."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(10)]
    ear.hear(*messages[:read])
    ear.stream.disconnected()
    ear.publisher.restart()
    for number in range(published):
        ear.publisher.publish(stored(100 + number))
    ear.stream.connected()
    return ear, messages[read:]


def test_a_left_over_with_the_very_next_number_is_not_taken_for_the_new_processs() -> None:
    """What was queued and not read survives the connection; its time gives it away."""
    ear, left = restarted(read=5, published=5)
    ear.answer()
    assert ear.stream.next == 5
    ear.hear(*left)
    assert ear.held() == set(range(100, 105))
    ear.hear(ear.publisher.publish(stored(105)))
    ear.answer()
    assert ear.is_true()
    assert ear.held() == set(range(100, 106))


def test_a_left_over_that_was_held_back_is_not_applied_when_its_number_comes() -> None:
    """It was read while the new process was asked for its first batches."""
    ear, left = restarted(read=5, published=7)
    ask = ear.stream.request
    ear.stream.replayed(*ear.publisher.sent[4])  # the number that was last, another batch
    assert ear.stream.request is not ask
    ear.hear(left[2])  # number 7
    ear.answer()
    assert ear.held() == set(range(100, 107))
    ear.hear(ear.publisher.publish(stored(107)))
    ear.answer()
    assert ear.is_true()
    assert ear.held() == set(range(100, 108))


def test_a_left_over_beyond_all_that_the_new_process_published_is_dropped() -> None:
    """Nobody will ever fill the gap before it."""
    ear, left = restarted(read=5, published=2)
    ear.answer()
    ear.hear(left[-1])
    ear.answer()
    assert ear.is_true()
    assert ear.stats.queue_batches == 0
    assert ear.stats.batches_lost == 0


def test_a_left_over_is_not_the_first_batch_of_a_process_that_published_nothing() -> None:
    """The first connection broke before its publisher could be asked."""
    ear = Ear()
    ear.stream.connected()
    left = ear.publisher.publish(stored(1))
    ear.stream.disconnected()
    ear.publisher.restart()
    ear.stream.connected()
    ear.hear(left)
    ear.answer()
    assert ear.is_true()


def test_a_left_over_that_comes_after_the_answer_is_not_the_first_batch_either() -> None:
    """The new process published nothing, so there is no time to compare with: it is asked again."""
    ear = Ear().connect()
    left = ear.publisher.publish(stored(1))
    ear.stream.disconnected()
    ear.publisher.restart()
    ear.stream.connected()
    ear.answer()
    ear.hear(left)
    ear.answer()
    assert ear.is_true()
    assert ear.held() == set()
    ear.hear(ear.publisher.publish(stored(2)), ear.publisher.publish(stored(3)))
    ear.answer()
    assert ear.is_true()
    assert ear.held() == {2, 3}
    assert ear.stats.batches_lost == 0


def test_a_left_over_that_was_held_back_is_not_applied_when_its_predecessors_are_given_up() -> None:
    """The publisher's memory begins behind its number, so nobody says what that was."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(10)]
    ear.hear(*messages[:4])
    ear.stream.disconnected()
    ear.publisher.restart()
    ear.stream.connected()
    ear.answer()
    ear.publisher.memory = 3
    new = [ear.publisher.publish(stored(100 + number)) for number in range(8)]
    ear.hear(messages[4], *new[:4])
    ear.answer()
    assert ear.held() == {100, 101, 102, 103, 105, 106, 107}
    assert ear.stats.batches_lost == 1
    assert ear.source.stale == {"gap"}


def test_a_restart_forgets_what_was_held_back_for_the_old_process() -> None:
    """Its gap will never be filled."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(10)]
    ear.hear(messages[0], messages[7])
    ear.publisher.restart()
    ear.hear(ear.publisher.publish(stored(100)))
    assert ear.stats.queue_batches == 0
    assert ear.stream.request is None
    assert ear.is_true()


def test_after_a_reconnect_with_nobody_to_ask_a_number_that_went_back_is_a_restart() -> None:
    """Even when the clock was set back meanwhile. One that goes on may be the same process or not.

    Only our planes' numbers tell.
    """
    for goes_on, epoch in ((True, None), (True, 1000), (False, None), (False, 1000)):
        ear = Ear(Publisher(epoch=epoch), replayable=False)
        ear.stream.connected()
        ear.fail("unavailable")
        ear.hear(*[ear.publisher.publish(stored(number)) for number in range(5)])
        ear.stream.disconnected()
        ear.stream.connected()
        ear.fail("unavailable")
        assert ear.source.stale == {"disconnected"}
        if not goes_on:
            ear.publisher.restart()
            ear.publisher.clock = 1.0
        ear.hear(ear.publisher.publish(stored(50)))
        assert ear.held() == ear.publisher.held()
        assert ear.source.stale == ({"gap"} if goes_on and epoch is None else set())
        assert ear.stats.gaps["restart"] == (0 if goes_on else 1)


def test_after_a_reconnect_a_memory_that_begins_behind_the_last_batch_proves_nothing() -> None:
    """Another process may have got just that far: its blocks and the old one's would be mixed."""
    for restarts in (True, False):
        ear = Ear().connect()
        ear.hear(*[ear.publisher.publish(stored(number)) for number in range(3)])
        ear.stream.disconnected()
        if restarts:
            ear.publisher.restart()
        ear.publisher.memory = 2
        while len(ear.publisher.sent) < 5:
            ear.publisher.publish(stored(100 + len(ear.publisher.sent)))
        ear.stream.connected()
        ear.answer()
        assert ear.source.stale == {"gap"}
        assert ear.stats.replays["aged_out"] == 1
        ear.hear(ear.publisher.publish(AllBlocksCleared()))
        assert ear.is_true()


def test_what_waits_for_a_gap_does_not_outlive_its_connection() -> None:
    """It is asked for anew, or lost; and it is never applied in another process's place."""
    ear = Ear(replayable=False).connect()
    ear.hear(*[ear.publisher.publish(stored(number)) for number in (1, 2)])
    ear.stream.disconnected()
    ear.publisher.restart()
    ear.publisher.publish(stored(3))
    message = ear.publisher.publish(stored(4))
    ear.stream.connected()
    ear.answer()
    ear.hear(message)  # a restart, and a gap behind it
    assert ear.stats.queue_batches == 1
    ear.stream.disconnected()
    ear.stream.connected()
    ear.answer()
    assert ear.stats.batches_dropped == 1
    assert ear.source.stale == {"unsynchronised"}
    ear.hear(ear.publisher.publish(stored(5)))
    assert ear.held() == {5}
    assert ear.source.stale == {"missed_first"}
    assert ear.stats.queue_batches == 0


def test_batches_that_were_lost_at_the_end_are_found_when_it_is_quiet() -> None:
    """A gap shows with the next batch only, and an idle engine sends none."""
    ear = Ear().connect()
    ear.hear(ear.publisher.publish(stored(1)))
    ear.stream.check_tail()
    ear.answer()
    assert ear.stats.gaps == {}
    ear.publisher.publish(stored(2))
    ear.stream.check_tail()
    ear.answer()
    assert ear.is_true()
    assert ear.stats.gaps == {"gap": 1}
    assert ear.stats.batches_replayed == 1


def test_the_first_batch_of_a_plane_that_was_silent_is_found_when_it_is_quiet() -> None:
    """It had published nothing when it was asked, so not even its epoch is known."""
    ear = Ear(Publisher(epoch=1000)).connect()
    assert ear.is_true()
    ear.publisher.publish(stored(1))
    ear.stream.check_tail()
    ear.answer()
    assert ear.is_true()
    assert ear.held() == {1}
    assert ear.stats.batches_lost == 0


def test_a_gap_that_shows_while_the_end_is_checked_is_one_gap() -> None:
    """However many batches wait behind it."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(5)]
    ear.hear(messages[0])
    ear.stream.check_tail()
    ear.hear(*messages[2:])
    assert ear.stats.gaps == {"gap": 1}
    ear.fail()
    assert ear.source.stale == {"gap"}
    ear.answer()
    assert ear.is_true()
    assert ear.stats.gaps == {"gap": 1}


def test_the_queue_behind_a_gap_is_bounded_and_what_it_drops_is_replayed() -> None:
    """Memory stays bounded; nothing is lost."""
    ear = Ear(capacity_batches=4).connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(20)]
    ear.hear(*messages[1:])
    assert ear.stats.queue_batches == 4
    assert ear.stats.batches_dropped == 15
    ear.answer()
    ear.stream.check_tail()
    ear.answer()
    assert ear.is_true()


@pytest.mark.parametrize("heals", [True, False])
def test_what_the_queue_had_no_room_for_is_not_forgotten_where_nobody_can_be_asked(
    heals: bool,
) -> None:
    """Whether the gap before it heals by itself or is given up: it is known to be missing."""
    ear = Ear(replayable=False, capacity_batches=2).connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(5)]
    ear.publisher.publish(AllBlocksCleared())
    ear.hear(messages[0], *messages[2:])
    assert ear.stats.batches_dropped == 1
    if heals:
        ear.hear(messages[1])
        assert ear.held() == {0, 1, 2, 3}
    ear.answer()
    assert ear.source.stale == {"gap"}
    assert ear.stream.request is None


def test_what_waits_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts make batches of many kilobytes; as many places would be taken by gigabytes."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(20)]
    monkeypatch.setattr("llm_worker.kv.follow.holdback.CAPACITY_BYTES", 4 * len(messages[0][1]))
    for _ in range(2):  # whatever was held is given back
        ear.hear(*messages[1:])
        assert ear.stats.queue_batches == 4
        ear.answer()
        ear.stream.check_tail()
        ear.answer()
        assert ear.is_true()
        ear.publisher.restart()
        messages = [ear.publisher.publish(stored(number)) for number in range(20)]
    assert ear.stats.batches_dropped == 30
    ear.stream.disconnected()
    ear.stream.connected()
    ear.hear(*messages)
    assert ear.stats.queue_batches == 4
    ear.answer()
    assert ear.is_true()


def test_an_undecodable_batch_costs_itself_and_marks_the_index() -> None:
    """The number is used up: no replay would bring another payload."""
    ear = Ear().connect()
    ear.hear(ear.publisher.publish(stored(1)))
    number, _ = ear.publisher.publish(stored(2))
    ear.hear((number, b"\xc1"))
    ear.hear(ear.publisher.publish(stored(3)))
    assert ear.held() == {1, 3}
    assert ear.source.stale == {"undecodable"}
    assert ear.stats.undecodable == {"msgpack": 1}
    assert ear.stats.batches_lost == 1
    assert ear.stream.request is None


def test_events_of_an_unknown_type_are_counted_and_do_not_mark_the_index() -> None:
    """What a newer engine says beside stores and removals changes no block that we know of."""
    ear = Ear().connect()
    ear.hear((0, UNKNOWN))
    assert ear.stats.unknown_events == 1
    assert not ear.source.stale


def test_a_number_that_no_publisher_reaches_is_malformed() -> None:
    """It would make every later batch look like a restart."""
    ear = Ear().connect()
    _, payload = ear.publisher.publish(stored(1))
    ear.hear((2**64 - 1, payload))
    assert ear.stats.undecodable == {"frames": 1}
    ear.hear((0, payload))
    assert ear.is_true()


def test_a_batch_that_breaks_the_index_is_skipped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bug on one payload neither ends the listener nor makes it try that payload for ever."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(3)]
    ear.hear(messages[0])
    apply = ear.source.apply

    def broken(events: Sequence[Event]) -> None:
        if events[0].hashes == [1]:  # type: ignore[union-attr]
            raise RuntimeError("a bug")
        apply(events)

    monkeypatch.setattr(Source, "apply", lambda _, events: broken(events))
    with pytest.raises(RuntimeError):
        ear.hear(messages[1])
    assert ear.stream.skip()
    ear.hear(messages[2])
    assert ear.held() == {0, 2}
    assert ear.source.stale == {"undecodable"}
    assert not ear.stream.skip()


def test_a_clear_that_was_made_before_the_engine_said_so_is_handed_on_and_idempotent() -> None:
    """Its own message comes later and changes nothing."""
    ear = Ear().connect()
    ear.hear(ear.publisher.publish(stored(1, 2)))
    ear.stream.clear(5.0)
    assert ear.held() == set()
    assert ear.outlet.payloads[-1] == encode(5.0, [AllBlocksCleared()], 0)
    ear.hear(ear.publisher.publish(AllBlocksCleared()))
    assert ear.is_true()


def test_a_clear_that_may_be_of_the_gpus_blocks_only_marks_the_index() -> None:
    """vLLM says the same when a connector was reset, and when it was not.

    Nothing it kept is claimed from there on, and another clear like that proves nothing.
    """
    ear = Ear().connect()
    ear.hear(ear.publisher.publish(stored(1), stored(1, 2, medium="cpu")))
    ear.hear(ear.publisher.publish(AllBlocksCleared(), stored(3)))
    assert ear.held() == {3}
    assert ear.source.stale == {"other_media"}
    ear.hear(ear.publisher.publish(AllBlocksCleared()))
    ear.stream.audited_equal()
    assert ear.source.stale == {"other_media"}
    ear.hear(ear.publisher.publish(AllBlocksCleared(medium="all"), stored(4)))
    assert ear.is_true()


def test_a_clear_of_one_medium_leaves_the_others_and_every_doubt() -> None:
    """Our plug-in says which blocks a reset was of."""
    ear = Ear().connect()
    ear.hear(ear.publisher.publish(stored(1, 2), stored(2, 3, medium="cpu")))
    ear.source.trust.lost()
    ear.hear(ear.publisher.publish(AllBlocksCleared(medium="gpu")))
    assert ear.source.blocks() == {"cpu": 2}
    assert ear.source.stale == {"gap"}
    ear.hear(ear.publisher.publish(AllBlocksCleared(medium="all")))
    assert ear.held() == set()
    assert not ear.source.stale


def test_a_planes_clear_is_of_all_blocks() -> None:
    """It has a worker's whole index behind it, and says by itself when that is not trusted."""
    ear = Ear(Publisher(epoch=1000)).connect()
    ear.hear(ear.publisher.publish(stored(1), stored(1, 2, medium="cpu")))
    ear.source.trust.lost()
    ear.hear(ear.publisher.publish(AllBlocksCleared()))
    assert ear.is_true()


def test_proof_of_the_gpus_blocks_takes_nothing_back_that_others_may_be_the_reason_of() -> None:
    """What an engine tells is its own pool; a connector's blocks cannot be compared."""
    ear = Ear(index=Index(max_blocks=3)).connect()
    ear.hear(ear.publisher.publish(stored(1), stored(9, medium="cpu")))
    ear.source.trust.lost()
    ear.source.trust.drifted()
    ear.stream.audited_equal()
    assert ear.source.stale == {"gap"}
    ear.hear(ear.publisher.publish(BlockRemoved(hashes=[9], medium="cpu")))
    ear.hear(ear.publisher.publish(stored(2, 3, 4), removed(4)))
    assert ear.source.stale == {"gap", "index_full"}
    ear.stream.audited_equal()
    assert not ear.source.stale


def test_an_index_that_was_full_is_filled_again_once_there_is_room() -> None:
    """From a plane's snapshot; while there is none, asking would only empty it."""
    index = Index(max_blocks=4)
    index.source("other", 0).apply([stored(90, 91)])
    ear = Ear(Publisher(epoch=1000), index).connect()
    ear.hear(ear.publisher.publish(stored(1, 2, 3)))
    assert ear.held() == {1, 2}
    ear.stream.check_stale()
    assert ear.stream.request is None
    index.remove_worker("other")
    ear.stream.check_stale()
    ear.answer()
    assert ear.is_true()
    assert ear.held() == {1, 2, 3}


def test_a_plane_whose_replay_is_too_short_is_asked_for_a_snapshot() -> None:
    """Our planes can always tell all of it."""
    publisher = Publisher(memory=5, epoch=1000)
    for number in range(20):
        publisher.publish(stored(number))
    ear = Ear(publisher).connect()
    assert ear.is_true()
    messages = [publisher.publish(stored(100 + number)) for number in range(20)]
    ear.hear(messages[0], messages[-1])
    ear.answer()
    assert ear.is_true()


def test_what_arrives_during_a_snapshot_is_applied_once_behind_it() -> None:
    """Batches that are in it are not applied again."""
    publisher = Publisher(memory=1, epoch=1000)
    publisher.publish(stored(1))
    ear = Ear(publisher)
    ear.stream.connected()
    publisher.publish(stored(2))
    ask = ear.stream.request
    assert ask is not None
    ear.stream.replayed(*publisher.sent[-1])
    ear.stream.replay_ended()
    assert ear.stream.request is not None
    assert ear.stream.request.start is None
    inside = publisher.publish(removed(1))
    ear.hear(inside)
    snapshot = [
        (inside[0], encode(1.0, [AllBlocksCleared()], 0)),
        (inside[0], encode(1.0, [stored(2)], 0)),
    ]
    behind = publisher.publish(stored(3))
    ear.stream.replayed(*snapshot[0])
    ear.hear(behind)
    ear.stream.replayed(*snapshot[1])
    ear.stream.replay_ended()
    assert ear.is_true()
    assert ear.held() == {2, 3}


def test_a_snapshot_that_breaks_off_is_asked_for_again_and_starts_anew() -> None:
    """What the first one brought may be gone by the second."""
    publisher = Publisher(memory=1, epoch=1000)
    publisher.publish(stored(1))
    publisher.publish(stored(2))
    ear = Ear(publisher)
    ear.stream.connected()
    ear.stream.replayed(*publisher.sent[-1])
    ear.stream.replay_ended()
    ear.stream.replayed(publisher.sent[-1][0], encode(1.0, [AllBlocksCleared()], 0))
    ear.stream.replayed(publisher.sent[-1][0], encode(1.0, [stored(1)], 0))
    ear.fail()
    assert ear.source.stale == {"missed_first", "unsynchronised"}
    publisher.publish(removed(1))
    ear.answer()
    assert ear.is_true()
    assert ear.held() == {2}


def test_a_snapshot_that_is_given_up_leaves_the_index_marked() -> None:
    """A part of it is held, and neither news nor a quiet publisher make up for the rest."""
    publisher = Publisher(epoch=1000)
    ear = Ear(publisher).connect()
    ear.hear(*[publisher.publish(stored(number)) for number in range(3)])
    ear.source.trust.lost()
    ear.stream.check_stale()
    pieces = ([AllBlocksCleared()], [stored(1)], [stored(2)])
    for _ in range(ATTEMPTS):
        for events in pieces[:2]:
            ear.stream.replayed(publisher.sent[-1][0], encode(1.0, events, 0))
        assert "unsynchronised" in ear.source.stale
        ear.fail()
    assert ear.stream.request is None
    ear.hear(publisher.publish(stored(10)))
    ear.stream.check_tail()
    ear.answer()
    assert ear.source.stale == {"unsynchronised", "gap"}
    assert ear.held() == {1, 10}
    ear.stream.check_stale()
    ear.answer()
    assert ear.is_true()


def test_a_snapshot_of_pieces_that_cannot_be_read_is_none() -> None:
    """It is asked for again, and what is held stays until there is a better one."""
    publisher = Publisher(epoch=1000)
    ear = Ear(publisher).connect()
    ear.hear(publisher.publish(stored(1)))
    ear.source.trust.lost()
    ear.stream.check_stale()
    ear.stream.replayed(publisher.sent[-1][0], b"\xc1")
    ear.stream.replay_ended()
    assert ear.held() == {1}
    assert ear.source.stale == {"gap"}
    ear.answer()
    assert ear.is_true()


def test_a_snapshot_is_not_asked_for_when_the_doubt_ended_meanwhile() -> None:
    """It would empty an index that is true."""
    publisher = Publisher(memory=5, epoch=1000)
    for number in range(9):
        publisher.publish(stored(number))
    ear = Ear(publisher)
    ear.stream.connected()
    number, payload = publisher.publish(stored(20))
    ear.hear((number, payload), (number - 20, b"\xc1"))
    ear.answer()
    assert ear.is_true()
    ear.hear((publisher.sent[-1][0] - 1, b"\xc1"))  # a duplicate that cannot be read
    assert ear.source.stale == {"undecodable"}
    ear.answer()
    assert ear.is_true()
    for _ in range(3):
        ear.hear(publisher.publish(stored(30)))
        assert ear.stream.request is None


def test_what_is_read_after_the_connection_broke_does_not_end_the_doubt_about_it() -> None:
    """It was queued here. Nor is anybody asked: who answers may be another process."""
    for epoch in (None, 1000):
        ear = Ear(Publisher(epoch=epoch)).connect()
        messages = [ear.publisher.publish(stored(number)) for number in range(4)]
        ear.hear(messages[0])
        ear.stream.disconnected()
        ear.hear(messages[2], messages[3])
        assert ear.stream.request is None
        ear.hear(messages[1])
        assert ear.held() == {0, 1, 2, 3}
        assert ear.source.stale == {"disconnected"}
        ear.hear(ear.publisher.publish(AllBlocksCleared()))
        assert ear.source.stale == {"disconnected"}
        ear.stream.connected()
        assert ear.source.stale == {"disconnected"}
        ear.answer()
        assert ear.is_true()


def test_what_is_given_up_is_one_failure_and_what_waits_behind_it_goes_on() -> None:
    """For who knows that nobody has it, as the reader of a NATS stream does."""
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(6)]
    ear.hear(messages[0], messages[2], messages[5])
    ear.stream.give_up("aged_out")
    assert ear.held() == {0, 2}
    assert ear.stats.replays == {"aged_out": 1}
    assert ear.stream.request is not None  # another hole behind the first
    ear.stream.give_up("aged_out")
    assert ear.held() == {0, 2, 5}
    assert ear.stats.replays == {"aged_out": 2}
    assert ear.stats.batches_lost == 3
    assert ear.source.stale == {"gap"}
    ear.stream.give_up("aged_out")  # nothing is asked for
    assert ear.stats.replays == {"aged_out": 2}


def test_a_hole_behind_a_reconnect_that_nobody_explained_tells_who_it_is() -> None:
    """The answer about the hole is the first word of another process."""
    ear = Ear().connect()
    ear.hear(*[ear.publisher.publish(stored(number)) for number in range(3)])
    ear.stream.disconnected()
    ear.publisher.restart()
    new = [ear.publisher.publish(stored(100 + number)) for number in range(6)]
    ear.stream.connected()
    ear.hear(new[5])
    for _ in range(ATTEMPTS):
        ear.fail()
    assert ear.source.stale == {"gap"}
    ear.answer()
    assert ear.stats.gaps["restart"] == 1
    assert ear.is_true()


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("published", [0, 2, 3, 9])
def test_an_answer_of_another_process_is_known_as_such_before_the_connection_breaks(
    quiet: bool, published: int
) -> None:
    """Behind one address another machine may have taken over, and the old connection be half open.
    The last batch comes again with each answer.
    """
    ear = Ear().connect()
    messages = [ear.publisher.publish(stored(number)) for number in range(4)]
    ear.hear(*messages[:3])
    if quiet:
        ear.stream.check_tail()
    else:
        ear.hear(messages[3])
        ear.publisher.publish(stored(4))
        ear.hear(ear.publisher.publish(stored(5)))
    ear.publisher.restart()
    for number in range(published):
        ear.publisher.publish(stored(100 + number))
    ear.answer()
    ear.stream.disconnected()
    ear.stream.connected()
    ear.answer()
    assert ear.is_true()
    assert ear.held() == set(range(100, 100 + published))


def test_a_left_over_of_a_dead_plane_is_not_the_first_batch_of_its_successor() -> None:
    """Which has published nothing when it is asked, so not even its epoch is known."""
    ear = Ear(Publisher(epoch=1000)).connect()
    ear.hear(ear.publisher.publish(stored(1)))
    left = ear.publisher.publish(stored(2))
    ear.stream.disconnected()
    ear.publisher.restart()
    ear.stream.connected()
    ear.answer()
    assert ear.is_true()
    ear.hear(left)
    ear.answer()
    assert ear.is_true()
    assert ear.held() == set()
    ear.hear(ear.publisher.publish(stored(3)))
    ear.answer()
    assert ear.is_true()
    assert ear.held() == {3}


def test_a_plane_that_started_after_2038_is_followed() -> None:
    """Its epoch takes the sign bit of the number. One of all ones is no time."""
    ear = Ear(Publisher(epoch=(1 << 31) + 5)).connect()
    ear.hear(ear.publisher.publish(stored(1)))
    ear.hear(((1 << 64) - 2, ear.publisher.sent[0][1]))
    assert ear.is_true()
    assert ear.held() == {1}
    assert ear.stats.undecodable == {"frames": 1}


@pytest.mark.parametrize("timestamp", [float("-inf"), -1e308, float("nan"), float("inf")])
def test_a_time_that_is_none_does_not_ruin_the_sum_of_lags(timestamp: float) -> None:
    """A counter that became infinite stays so for ever."""
    for before in (0, 1):  # in order, and one by one
        ear = Ear()
        ear.stream.connected()
        if not before:
            ear.answer()
        payload = encode(timestamp, [stored(1)], 0)
        ear.stream.live([(bytes(8), payload)], 1000.0)
        ear.answer()
        assert 0.0 <= ear.stats.lag.total <= 86_400.0


def test_a_publisher_without_a_clock_is_not_taken_for_another_one_each_time() -> None:
    """A time that is none differs from itself."""
    ear = Ear().connect()
    message = (0, encode(float("nan"), [stored(1)], 0))
    ear.publisher.sent.append(message)
    ear.hear(message)
    ear.stream.check_tail()
    ear.answer()
    assert ear.held() == {1}
    assert ear.stats.gaps == {}


def test_a_planes_restart_is_a_jump_of_its_epoch() -> None:
    """Forward, with numbers that look like a gap of four thousand million."""
    ear = Ear(Publisher(epoch=1000)).connect()
    ear.hear(*[ear.publisher.publish(stored(number)) for number in range(5)])
    ear.publisher.restart()
    ear.hear(ear.publisher.publish(stored(100)))
    assert ear.held() == {100}
    assert ear.is_true()
    assert ear.stats.batches_lost == 0


@pytest.mark.parametrize("checks_rank", [True, False])
def test_batches_of_another_rank_mark_the_index(checks_rank: bool) -> None:
    """A wrong port would give this rank another one's blocks. Not all publishers say a rank."""
    ear = Ear(checks_rank=checks_rank).connect()
    ear.hear((0, encode(1.0, [stored(1)], None)), (1, encode(2.0, [stored(2)], 0)))
    assert not ear.source.stale
    ear.hear((2, encode(3.0, [stored(3)], 7)))
    assert ear.source.stale == ({"duplicate_worker"} if checks_rank else set())


def test_two_publishers_with_one_workers_name_mark_it() -> None:
    """The older one still speaks after the younger was heard on the same connection."""
    older, younger = Publisher(epoch=1000), Publisher(epoch=2000)
    ear = Ear(older).connect()
    ear.hear(older.publish(stored(1)))
    left_over = older.publish(stored(4))
    younger.clock = older.clock
    ear.hear(younger.publish(stored(2)))
    ear.hear(left_over)
    assert not ear.source.stale
    older.clock = younger.clock
    ear.hear(older.publish(stored(3)))
    assert ear.held() == {2}
    assert "duplicate_worker" in ear.source.stale


blocks = st.lists(st.integers(0, 20), min_size=1, max_size=4)
change: st.SearchStrategy[tuple[str, list[int]]] = st.one_of(
    st.tuples(st.sampled_from(["store", "remove"]), blocks),
    st.tuples(st.sampled_from(["store", "remove"]), blocks),
    st.tuples(st.just("clear"), st.just([])),
)
# Long ones as often as short ones, which alone leave little to go wrong.
changes = st.integers(0, 30).flatmap(
    lambda length: st.lists(change, min_size=length, max_size=length)
)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(
    steps=changes,
    chance=st.randoms(use_true_random=True),
    epochs=st.booleans(),
    replayable=st.sampled_from([True, True, False]),
    breaks=st.sampled_from([0.0, 0.05, 0.3]),
    memory=st.sampled_from([10_000, 10_000, 10_000, 3]),
    before=st.integers(0, 3),
)
def test_any_split_duplication_loss_and_reorder_gives_the_index_of_the_stream(
    steps: list[tuple[str, list[int]]],
    chance: random.Random,
    epochs: bool,
    replayable: bool,
    breaks: float,
    memory: int,
    before: int,
) -> None:
    """Whatever the network does, once it is quiet the index is the publisher's or is marked.

    It is never marked when the publisher could still tell everything. ``breaks``: how likely the
    connection does before each step, half of the times because the publisher starts anew. Where
    nobody can be asked, what was lost at the end cannot be known before there is another batch.
    """
    publisher = Publisher(memory=memory, epoch=1000 if epochs else None)
    for number in range(before):
        publisher.publish(stored(30 + number))
    ear = Ear(publisher, capacity_batches=chance.choice([2, 100]), replayable=replayable)
    ear.stream.connected()
    on_the_way: list[tuple[int, bytes]] = []
    shuffles = True  # of two processes' batches, only what the older left comes first
    for kind, hashes in steps:
        if chance.random() < breaks:
            left = [message for message in on_the_way if chance.random() < 0.7]
            read = chance.randrange(len(left) + 1)
            ear.hear(*left[:read])
            ear.stream.disconnected()
            if chance.random() < 0.5:
                publisher.restart()
                shuffles = False
            ear.stream.connected()
            # What was queued and not read survives the connection, and comes before the new. Where
            # nobody can be asked it cannot be told from the new.
            on_the_way = left[read:] if replayable else []
            if chance.random() < 0.5:
                ear.hear(*on_the_way)
                on_the_way = []
            if chance.random() < 0.5:
                ear.answer()
        if kind == "store":
            on_the_way.append(publisher.publish(stored(*hashes)))
        elif kind == "remove":
            there = [value for value in hashes if publisher.blocks[value] > 0]
            on_the_way.append(publisher.publish(removed(*set(there))))
        else:
            on_the_way.append(publisher.publish(AllBlocksCleared()))
        if chance.random() < 0.4:
            if shuffles:
                chance.shuffle(on_the_way)
            arriving = [message for message in on_the_way if chance.random() < 0.8]
            arriving += [message for message in arriving if chance.random() < 0.2]
            ear.hear(*arriving)
            on_the_way = []
        if chance.random() < 0.3 and ear.stream.request is not None:
            ear.answer(most=chance.choice([None, 1, 3]))
    ear.answer()
    if not replayable:
        ear.hear(publisher.publish(stored(40)))
        ear.answer()
    ear.stream.check_tail()
    ear.answer()
    ear.stream.check_stale()
    ear.answer()
    assert ear.is_true() or ear.source.stale, (ear.held(), publisher.held())
    if replayable and (epochs or memory > len(steps) + before):
        assert ear.is_true(), (ear.source.stale, ear.held(), publisher.held())
    assert ear.stats.queue_batches == 0
