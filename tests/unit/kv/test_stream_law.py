"""The law of the account of a stream, on many histories that go wrong in every way at once.

The model knows nothing of streams: it is a process that numbers its batches and remembers what it
held after each. After every step, an index that is trusted holds exactly what the living process
held after the batches that the account has counted. Once it is quiet it is right or marked.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from llm_worker.kv.follow.recovery import ALWAYS, TRANSITIONS, Recovery, State
from llm_worker.kv.follow.recovery import Event as RecoveryEvent
from llm_worker.kv.follow.stream import Stream
from llm_worker.kv.index.index import Index
from llm_worker.kv.plane.topics import EPOCH_BITS
from llm_worker.kv.records import AllBlocksCleared, BlockRemoved, BlockStored, Event
from llm_worker.kv.stats import ListenerStats
from llm_worker.kv.wire import encode

SEEDS = 1500  # of each kind: about a second
Message = tuple[int, bytes]


class Process:
    """One process that publishes: what it sent, and what it held after each batch."""

    def __init__(self, first: int, memory: int, clock: float) -> None:
        self.first = first
        self.memory = memory
        self.clock = clock
        self.sent: list[Message] = []
        self.states: list[Counter[int]] = [Counter()]

    def publish(self, *events: Event) -> Message:
        self.clock += 1.0
        state = self.states[-1].copy()
        for event in events:
            if isinstance(event, BlockStored):
                state.update(event.hashes)  # type: ignore[arg-type]
            elif isinstance(event, BlockRemoved):
                state.subtract(event.hashes)  # type: ignore[arg-type]
            else:
                state.clear()
        self.states.append(+state)
        message = (self.first + len(self.sent), encode(self.clock, events, 0))
        self.sent.append(message)
        return message

    def kept(self, start: int) -> list[Message]:
        kept = self.sent[max(0, len(self.sent) - self.memory) :]
        return [message for message in kept if message[0] >= start]

    def snapshot(self) -> list[Message]:
        last = self.first + len(self.sent) - 1
        blocks = list(self.states[-1].elements())
        events = (AllBlocksCleared(), stored(*blocks[::2]), stored(*blocks[1::2]))
        return [(last, encode(self.clock, [event], 0)) for event in events]


def stored(*hashes: int) -> BlockStored:
    return BlockStored(hashes=list(hashes), parent=None, block_size=16)


class History:
    """One stream and the processes that it follows one after the other."""

    def __init__(self, dice: random.Random, kind: str) -> None:
        self.dice = dice
        self.planes = kind == "planes"
        self.replayable = kind != "nobody to ask"
        self.memory = dice.choice([3, 10, 1000, 1000])
        self.process = Process(1000 << EPOCH_BITS if self.planes else 0, self.memory, 100.0)
        self.bound = dice.choice([None, None, None, 5]) if self.planes else None
        self.source = Index(max_blocks=self.bound).source("w", 0)
        self.stats = ListenerStats("w", 0)
        self.stream = Stream(
            self.source,
            self.stats,
            replayable=self.replayable,
            epochs=self.planes,
            capacity_batches=dice.choice([3, 100]),
        )
        self.on_the_way: list[Message] = []
        self.shuffles = True
        self.steps: list[str] = []

    def run(self, length: int) -> None:
        for _ in range(self.dice.randrange(4)):
            self.publish()
        self.stream.connected()
        weights = {
            self.publish: 10, self.deliver: 6, self.answer: 5, self.check: 2,
            self.bounce: self.dice.choice([0, 1, 2]), self.lose_all: 1, self.give_up: 1,
        }  # fmt: skip
        steps, chances = list(weights), list(weights.values())
        for step in self.dice.choices(steps, chances, k=length):
            self.steps.append(step.__name__)
            step()
            self.obey_the_law()
        self.settle()

    # What happens.

    def publish(self) -> None:
        held = list(self.process.states[-1])
        kind = self.dice.random()
        event: Event
        if kind < 0.6 or not held:
            event = stored(*self.dice.sample(range(20), self.dice.randrange(1, 4)))
        elif kind < 0.93:
            event = BlockRemoved(hashes=self.dice.sample(held, 1))
        else:
            event = AllBlocksCleared()
        self.on_the_way.append(self.process.publish(event))

    def deliver(self) -> None:
        """Some get lost, some come twice, some come late, some are broken."""
        dice, arriving = self.dice, []
        for message in self.on_the_way:
            if dice.random() < 0.8:
                broken = dice.random() < 0.02
                arriving.append((message[0], b"\xc1") if broken else message)
                if dice.random() < 0.15:
                    arriving.append(message)
        if self.shuffles and dice.random() < 0.5:
            dice.shuffle(arriving)
        self.on_the_way = []
        self.hear(arriving)

    def lose_all(self) -> None:
        self.on_the_way = []

    def hear(self, messages: list[Message]) -> None:
        self.stream.live([(number.to_bytes(8, "big"), data) for number, data in messages], 0.0)

    def answer(self) -> None:
        """The living process answers the present question, more or less."""
        request, dice = self.stream.request, self.dice
        if request is None:
            return
        how = dice.choice(["whole", "whole", "failed", "cut", "holed"])
        if not self.replayable or how == "failed":
            self.stream.replay_failed(dice.choice(["timeout", "unavailable"]))
            return
        if request.start is None:
            self.tell(self.process.snapshot(), how, request)
        else:
            self.tell(self.process.kept(request.start), how, request)

    def tell(self, messages: list[Message], how: str, request: object) -> None:
        most = self.dice.randrange(len(messages) + 1) if how == "cut" else len(messages)
        # Pieces of a snapshot have no numbers of their own, and over TCP none gets lost.
        is_snapshot = len({number for number, _ in messages}) < len(messages)
        for number, payload in messages[:most]:
            if how == "holed" and not is_snapshot and self.dice.random() < 0.3:
                continue
            self.stream.replayed(number, payload)
            if self.stream.request is not request:
                return
            if self.dice.random() < 0.1:  # news come between two replies
                news, self.on_the_way = self.on_the_way, []
                self.hear(news)
                if self.stream.request is not request:
                    return
        if how == "cut":
            self.stream.replay_failed("timeout")
        else:
            self.stream.replay_ended()

    def check(self) -> None:
        if self.dice.random() < 0.5:
            self.stream.check_tail()
        else:
            self.stream.check_stale()

    def give_up(self) -> None:
        if self.stream.request is not None and self.dice.random() < 0.3:
            self.stream.give_up("aged_out")

    def bounce(self) -> None:
        """The connection breaks, often with its process; what was queued may be read at any time.

        Where nobody can be asked, what is left over of another process cannot be told from its
        successor's.
        """
        dice = self.dice
        left = [message for message in self.on_the_way if dice.random() < 0.7]
        read = dice.randrange(len(left) + 1)
        restarts = dice.random() < 0.5
        self.hear(left[:read])
        self.stream.disconnected()
        self.obey_the_law()
        left = left[read:]
        read = dice.randrange(len(left) + 1)
        self.hear(left[:read])
        self.obey_the_law()
        for _ in range(dice.choice([0, 3])):  # nobody is there to answer
            if self.stream.request is not None:
                self.stream.replay_failed("timeout")
                self.obey_the_law()
        if restarts:
            self.shuffles = False
            first = self.process.first + (1 << EPOCH_BITS) if self.planes else 0
            self.process = Process(first, self.memory, self.process.clock)
            for _ in range(dice.choice([0, 0, 1, 5, len(self.steps)])):
                self.publish()
        self.on_the_way = left[read:] if self.replayable and dice.random() < 0.5 else []
        self.stream.connected()

    def settle(self) -> None:
        """Nothing goes wrong any more, and there is time."""
        self.on_the_way = []
        if not self.replayable:
            self.hear([self.process.publish(stored(1))])
        for _ in range(3):
            self.answer_all()
            self.stream.check_tail()
            self.answer_all()
            self.stream.check_stale()
        self.answer_all()
        self.obey_the_law()
        if not self.source.stale:
            assert self.held() == self.process.states[-1]
        elif self.planes and self.bound is None:
            raise AssertionError(f"a plane can tell all: {set(self.source.stale)}")
        assert self.stats.queue_batches == 0

    def answer_all(self) -> None:
        for _ in range(200):
            request = self.stream.request
            if request is None:
                return
            if not self.replayable:
                self.stream.replay_failed("unavailable")
            elif request.start is None:
                self.tell(self.process.snapshot(), "whole", request)
            else:
                self.tell(self.process.kept(request.start), "whole", request)
        raise AssertionError("it asks for ever")

    # The law.

    def held(self) -> Counter[int]:
        found: Counter[int] = Counter()
        for lane in self.source.lanes():
            found.update(list(lane.parents))  # type: ignore[arg-type]
            found.update(lane.copies)  # type: ignore[arg-type]
        return found

    def obey_the_law(self) -> None:
        if self.source.stale:
            return
        assert self.stats.connected
        expected = self.stream.next
        batches = 0 if expected is None else expected - self.process.first
        assert 0 <= batches < len(self.process.states), f"another process's numbers: {batches}"
        assert self.held() == self.process.states[batches]


@pytest.mark.parametrize("kind", ["engine", "planes", "nobody to ask"])
def test_an_index_that_is_trusted_is_exactly_what_the_living_process_held(kind: str) -> None:
    """Through loss, duplicates, reorder, broken payloads, restarts, lost connections, answers that
    are cut, holed or missing, and snapshots that break off.
    """
    for seed in range(SEEDS):
        live(seed, kind)


def live(seed: int, kind: str) -> None:
    history = History(random.Random(seed), kind)
    try:
        history.run(history.dice.randrange(5, 60))
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}; after {history.steps}") from error


def test_every_arrow_of_the_table_is_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that nothing leads to, or away from, is one too many. What may happen in any state
    happens in some.
    """
    walked: set[tuple[State, RecoveryEvent]] = set()
    on = Recovery.on

    def walk(recovery: Recovery, event: RecoveryEvent) -> None:
        walked.add((recovery.state, event))
        on(recovery, event)

    monkeypatch.setattr(Recovery, "on", walk)
    for seed in range(300):
        for kind in ("engine", "planes"):
            live(seed, kind)
    assert {arrow for arrow in TRANSITIONS if arrow[1] not in ALWAYS} <= walked
    assert {event for _, event in walked} == set(RecoveryEvent)
