"""The board: one piece of shared memory on which each process says how it is doing.

An anonymous file that the supervisor makes and both others inherit, so it outlives either of them
and leaves nothing behind. Writing never waits for a reader and reading never waits for a writer:
a process that is stopped, stuck or killed in the middle of a write is still readable.

* Two pulses: when the serving loop, and a plain thread beside it, last ran. Both are
  ``time.monotonic()``, which all processes of one machine share.
* Sections, each with one writer: two slots that are written in turn, with a number, a time, a
  length and a checksum. The reader takes the newest slot that is whole. Nothing relies on the order
  in which another core sees the bytes arrive.

Owns the layout. Never interprets what is written. Standard library only.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
import zlib
from dataclasses import dataclass

_MAGIC = b"llmwbrd1"
_PULSE = struct.Struct("<d")
_LOOP_AT, _THREAD_AT = 8, 16
_SLOT = struct.Struct("<QdII")  # number from 1, time.monotonic(), bytes, crc32
_HEAD_BYTES = 4096
# section → bytes of one slot. The file has holes: only what is written takes memory.
_SLOT_BYTES = {
    "supervisor": 64 << 10,  # JSON of the supervisor: restarts, how the last run ended
    "serving": 1 << 20,  # JSON of serving: state, phase, processes, facts of its engine
    "page": 64 << 20,  # serving's metric families
    "counters": 32 << 20,  # what the observer has shown, to go on from
}
SIZE = _HEAD_BYTES + sum(2 * size for size in _SLOT_BYTES.values())


@dataclass(frozen=True, slots=True)
class Written:
    """What was last written to a section."""

    number: int  # from 1; another number is another content
    payload: bytes
    moment: float  # time.monotonic() of the writing

    @property
    def age_seconds(self) -> float:
        """How long ago it was written."""
        return max(0.0, time.monotonic() - self.moment)


class Section:
    """One writer's place on the board."""

    def __init__(self, memory: mmap.mmap, offset: int, slot_bytes: int) -> None:
        self._memory = memory
        self._offsets = (offset, offset + slot_bytes)
        self._room = slot_bytes - _SLOT.size
        self._number = max(self._slot(at)[0] for at in self._offsets)
        self._last: Written | None = None

    def write(self, payload: bytes) -> None:
        """Put ``payload`` in the place of what was there. One thread at a time.

        Raises:
            ValueError: it is larger than the section. What was there stays.
        """
        if len(payload) > self._room:
            raise ValueError(f"{len(payload)} bytes do not fit into {self._room}")
        self._number += 1
        at = self._offsets[self._number % 2]
        start = at + _SLOT.size
        self._memory[start : start + len(payload)] = payload
        _SLOT.pack_into(
            self._memory, at, self._number, time.monotonic(), len(payload), zlib.crc32(payload)
        )

    def read(self) -> Written | None:
        """The newest content that is whole; None before the first. Any thread."""
        slots = sorted(((self._slot(at), at) for at in self._offsets), reverse=True)
        for (number, moment, length, checksum), at in slots:
            last = self._last
            if number and last is not None and last.number == number and last.moment == moment:
                return last
            if not number or length > self._room:
                continue
            start = at + _SLOT.size
            payload = self._memory[start : start + length]
            if zlib.crc32(payload) == checksum:
                self._last = written = Written(number, payload, moment)
                return written
        return None

    def _slot(self, at: int) -> tuple[int, float, int, int]:
        number, moment, length, checksum = _SLOT.unpack_from(self._memory, at)
        return number, moment, length, checksum


class Board:
    """The whole board, mapped into this process."""

    def __init__(self, descriptor: int) -> None:
        """Map the board behind ``descriptor``, which stays open and is not handed to children."""
        os.set_inheritable(descriptor, False)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, SIZE)
        if self._memory[: len(_MAGIC)] != _MAGIC:
            raise ValueError("the descriptor is no board of this version")
        offset = _HEAD_BYTES
        self._sections: dict[str, Section] = {}
        for name, size in _SLOT_BYTES.items():
            self._sections[name] = Section(self._memory, offset, size)
            offset += 2 * size

    @classmethod
    def create(cls) -> Board:
        """A new, empty board."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("llm-worker-board")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.truncate(descriptor, SIZE)
        os.pwrite(descriptor, _MAGIC, 0)
        return cls(descriptor)

    def __getitem__(self, section: str) -> Section:
        return self._sections[section]

    def beat_loop(self) -> None:
        """The serving loop runs."""
        _PULSE.pack_into(self._memory, _LOOP_AT, time.monotonic())

    def beat_thread(self) -> None:
        """A thread beside the serving loop gets the interpreter."""
        _PULSE.pack_into(self._memory, _THREAD_AT, time.monotonic())

    def still(self) -> None:
        """Forget the pulses: another process begins to serve."""
        for at in (_LOOP_AT, _THREAD_AT):
            _PULSE.pack_into(self._memory, at, 0.0)

    @property
    def loop_age_seconds(self) -> float | None:
        """Since the serving loop last ran; None before its first beat."""
        return self._age(_LOOP_AT)

    @property
    def thread_age_seconds(self) -> float | None:
        """Since a thread of serving last had the interpreter; None before."""
        return self._age(_THREAD_AT)

    def _age(self, at: int) -> float | None:
        (moment,) = _PULSE.unpack_from(self._memory, at)
        return max(0.0, time.monotonic() - moment) if moment else None
