"""Batches that were received and cannot be applied yet, within a bound.

Some wait behind a gap, by number (*held*); some until it is known whose they are, in the order of
their arrival (*unverified*). When there is no room the newest is dropped and counted: it is in the
publisher's next answer. Pure: no I/O, no clock, no decoding.
"""

from __future__ import annotations

from llm_worker.kv.stats import ListenerStats

CAPACITY_BATCHES = 8192  # held back: about 10 MB of an engine's usual batches
CAPACITY_BYTES = 64 << 20  # of their payloads: a step that computes a long prompt makes 25 kB


class Holdback:
    """What waits for one stream.

    Args:
        capacity_batches: How many are held behind a gap, and as many while it is not known whose
            they are; CAPACITY_BYTES in all.
    """

    def __init__(self, stats: ListenerStats, capacity_batches: int) -> None:
        self.held: dict[int, bytes] = {}
        self._unverified: list[tuple[int, bytes]] = []
        self._bytes = 0  # of both
        self._dropped: int | None = None  # the greatest number for which there was no room
        self._capacity = capacity_batches
        self._stats = stats
        stats.queue_capacity_batches = capacity_batches

    def __len__(self) -> int:
        return len(self.held) + len(self._unverified)

    def hold(self, sequence: int, payload: bytes) -> None:
        """Keep a batch until its predecessors are there."""
        if sequence in self.held:
            self._stats.batches_duplicate += 1
        elif self._has_room(len(self.held), payload):
            self.held[sequence] = payload
            self._bytes += len(payload)
        else:
            self._drop(sequence)

    def set_aside(self, sequence: int, payload: bytes) -> None:
        """Keep a batch until it is known whose it is."""
        if self._has_room(len(self._unverified), payload):
            self._unverified.append((sequence, payload))
            self._bytes += len(payload)
        else:
            self._drop(sequence)

    def take(self, sequence: int) -> bytes | None:
        """Let go of a batch that is held."""
        payload = self.held.pop(sequence, None)
        if payload is not None:
            self._bytes -= len(payload)
        return payload

    def take_unverified(self) -> list[tuple[int, bytes]]:
        """Let go of all whose sender was not known."""
        unverified, self._unverified = self._unverified, []
        self._bytes -= sum(len(payload) for _, payload in unverified)
        return unverified

    def take_dropped(self) -> int | None:
        """Return the greatest number that was dropped since the last time, and forget it."""
        dropped, self._dropped = self._dropped, None
        return dropped

    def clear(self) -> None:
        """Drop all."""
        self._stats.batches_dropped += len(self)
        self.held.clear()
        self._unverified.clear()
        self._bytes = 0

    def count(self) -> None:
        """Say how many there are."""
        self._stats.queue_batches = len(self)

    def _has_room(self, batches: int, payload: bytes) -> bool:
        return batches < self._capacity and self._bytes + len(payload) <= CAPACITY_BYTES

    def _drop(self, sequence: int) -> None:
        self._stats.batches_dropped += 1
        self._dropped = sequence if self._dropped is None else max(self._dropped, sequence)
