"""What a batch's number says of the process that gave it. Two kinds of publishers, two policies.

An engine's numbers start at 0 with each process, and nothing in them says which process. What tells
are the timestamps: vLLM stamps a batch when it makes it, so a batch with a number that was seen
before is another process's if it was made *later* than the last one applied, and a late duplicate
otherwise. A plane's numbers have the second in which its process started in their high half (the
epoch) and a counter from 0 in the low one; see `plane.topics`. Pure.
"""

from __future__ import annotations

from typing import TypeAlias

from llm_worker.kv.plane.topics import COUNTER_MASK, EPOCH_BITS


class EngineNumbers:
    """vLLM's own numbers. ``replayable``: there is somebody to ask whose a batch is."""

    first: int | None = 0  # of a process of which nothing is known
    tell_process = False
    clear_is_of_all = False  # a clear that names no medium may be of the GPU's blocks only
    has_snapshots = False

    def __init__(self, *, replayable: bool) -> None:
        # Whether a batch that is older than its predecessor is taken for another process's. It
        # was still queued here when its process went, or the clock was set back: asking tells.
        self.verifies = replayable

    def is_possible(self, sequence: int) -> bool:
        """Whether a publisher can get that far: any later batch would look like a restart."""
        return not sequence >> 63

    def first_of(self, sequence: int) -> int:
        """The first number of the process that gave this one."""
        return 0

    def may_be_one_process(self, one: int, other: int) -> bool:
        """Whether one process can have given both."""
        return True

    def is_restart(self, sequence: int, expected: int, *, newer: bool, doubtful: bool) -> bool:
        """Whether a number that was there before is another process's, and no late duplicate.

        ``newer``: its batch was made later than the last one applied. ``doubtful``: there was
        another connection since, and nobody could be asked whose it is.
        """
        return newer or doubtful


class EpochNumbers:
    """Our planes' numbers."""

    first: int | None = None
    tell_process = True
    clear_is_of_all = True
    has_snapshots = True
    verifies = False

    def is_possible(self, sequence: int) -> bool:
        """As `EngineNumbers`; an epoch of all ones is no second of any clock."""
        return sequence >> EPOCH_BITS != COUNTER_MASK

    def first_of(self, sequence: int) -> int:
        """As `EngineNumbers`."""
        return sequence & ~COUNTER_MASK

    def may_be_one_process(self, one: int, other: int) -> bool:
        """As `EngineNumbers`."""
        return one >> EPOCH_BITS == other >> EPOCH_BITS

    def is_restart(self, sequence: int, expected: int, *, newer: bool, doubtful: bool) -> bool:
        """As `EngineNumbers`: a later epoch, or any other one when the publisher may be another."""
        if self.may_be_one_process(sequence, expected):
            return False
        return doubtful or sequence > expected


Numbering: TypeAlias = EngineNumbers | EpochNumbers
