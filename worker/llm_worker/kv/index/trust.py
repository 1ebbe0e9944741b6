"""May what is held of a rank be believed? Facts in, reasons for doubt out.

Each publisher that the index follows has one `Trust`. Whoever finds out something tells it as a
fact: the account of its batches (`follow.stream`), the index where it has no room, the auditor,
the fleet. The reasons that `/kv/status` and the metrics show (`stale`) are never set or taken back
by anybody: they follow from the facts, by the table REASONS. An index that was marked wrongly
costs a look-up, one that is trusted wrongly costs requests sent to the wrong worker; so a fact
ends only with what makes it untrue.

Written by the thread that writes the index. `stale` may be read by any. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Trust:
    """The facts about one publisher's blocks here, or about those of several: see `part`.

    Every method is something that somebody found out.
    """

    __slots__ = (
        "_away", "_drifted", "_duplicated", "_elsewhere", "_lost", "_missed", "_missed_first",
        "_other_media", "_parts", "_refused", "_synchronised", "_torn", "_undecodable", "_upstream",
        "_waits", "_whole", "stale",
    )  # fmt: skip

    def __init__(self, whole: Trust | None = None) -> None:
        self._whole = whole
        self._parts: tuple[Trust, ...] = ()
        self._synchronised = False  # what the publisher holds was told, up to some batch
        self._torn = False  # a snapshot began and did not come to its end
        self._away = False  # the connection is gone
        self._missed = False  # it was gone, and the publisher has not been heard since
        self._elsewhere = False  # the address says nothing of this rank any more
        self._missed_first = False  # batches before the first one seen are not to be had
        self._lost = False  # nor are some in between, or whose they were
        self._waits = False  # batches are missing, and asking for them failed
        self._undecodable = False
        self._duplicated = False
        self._drifted = False
        self._other_media = False
        self._refused = False  # blocks, for want of room in the index
        self._upstream = False
        self.stale: frozenset[str] = frozenset()
        self._derive()

    def part(self) -> Trust:
        """Return the trust in one of several publishers; the whole is doubted with any of them."""
        part = Trust(self)
        self._parts += (part,)
        self._set(synchronised=True)  # from now on that is for the parts to say
        return part

    @property
    def curable(self) -> bool:
        """Whether another complete state of the publisher would end some doubt."""
        return not self.stale.isdisjoint(CURABLE)

    @property
    def has_refused(self) -> bool:
        """Whether blocks are missing because the index had no room for them."""
        return self._refused

    # The account of the publisher's batches.

    def following(self) -> None:
        """Somebody begins to listen, and has heard nothing."""
        self._set(synchronised=False, elsewhere=False)

    def connected(self) -> None:
        """There is a publisher; who it is and what was missed meanwhile is another question."""
        self._set(away=False)

    def disconnected(self) -> None:
        """The connection is gone."""
        self._set(away=True, missed=True)

    def reached(self) -> None:
        """The publisher was heard. What was still queued when its connection broke is no sign."""
        self._set(missed=self._away)

    def synchronised(self) -> None:
        """What it holds is known up to some batch, except for what was marked."""
        self._set(synchronised=True, missed=self._away)

    def caught_up(self) -> None:
        """It has nothing more to tell, and what was missing came."""
        self._set(synchronised=True, missed=self._away, waits=False)

    def gap_opened(self) -> None:
        """Batches are missing, and asking for them failed."""
        self._set(waits=True)

    def gap_closed(self) -> None:
        """They came by themselves."""
        self._set(waits=False)

    def missed_first(self) -> None:
        """The batches before the first one that was seen are not to be had."""
        self._set(missed_first=True)

    def lost(self) -> None:
        """Batches are not to be had, or whose they are: no later one makes up for that."""
        self._set(lost=True)

    def not_understood(self) -> None:
        """A batch or an event was dropped that may have changed blocks."""
        self._set(undecodable=True)

    def name_shared(self) -> None:
        """Two publishers say that they are this worker, or one that says it is another rank."""
        self._set(duplicated=True)

    def cleared_in_part(self) -> None:
        """A clear did not say whether it meant more than the GPU's blocks."""
        self._set(other_media=True)

    def emptied(self) -> None:
        """The publisher says that it holds nothing any more, so nothing that was missed matters."""
        self._set(synchronised=True, **_COMPLETE)

    def restarted(self, *, from_its_first: bool) -> None:
        """Another process publishes, and nothing of its predecessor's is held any more.

        ``from_its_first``: its first batch is the next one; without, it is not known what it holds.
        """
        self._set(synchronised=from_its_first, missed=self._away, **_COMPLETE)

    def snapshot_began(self) -> None:
        """The blocks were forgotten for those of a snapshot, of which a piece is here."""
        self._set(torn=True)

    def snapshot_ended(self, *, understood: bool) -> None:
        """All of the snapshot is here; ``understood``: and none of its pieces was dropped."""
        self._set(
            synchronised=True, missed=self._away, **{**_COMPLETE, "undecodable": not understood}
        )

    # The index.

    def refused(self) -> None:
        """The index had no room for a block."""
        if not self._refused:
            self._set(refused=True)

    def forgot_all(self) -> None:
        """All blocks were forgotten on purpose, also those for which there was no room."""
        if self._refused:
            self._set(refused=False)

    # The auditor.

    def drifted(self) -> None:
        """The engine holds other blocks than the index."""
        self._set(drifted=True)

    def audited_equal(self, *, everything: bool) -> None:
        """The engine holds exactly what is held here of its GPU.

        ``everything``: and that is all that is held here. A connector's blocks cannot be compared.
        """
        if everything:
            self._set(synchronised=True, refused=False, **_COMPLETE)
        else:
            self._set(drifted=False)

    # The fleet.

    def doubted_upstream(self, doubted: bool) -> None:
        """Whether the plane says that the worker's own index is not to be trusted."""
        if doubted != self._upstream:
            self._set(upstream=doubted)

    def elsewhere(self, elsewhere: bool) -> None:
        """Whether somebody else lives at the publisher's address now."""
        if elsewhere != self._elsewhere:
            self._set(elsewhere=elsewhere)

    # From facts to reasons.

    def _set(self, **facts: bool) -> None:
        for name, value in facts.items():
            setattr(self, f"_{name}", value)
        self._derive()

    def _derive(self) -> None:
        own = (reason.name for reason in REASONS if reason.follows(self))
        stale = frozenset(own).union(*(part.stale for part in self._parts))
        if stale != self.stale:
            self.stale = stale
            if self._whole is not None:
                self._whole._derive()


# What a complete state of the publisher makes untrue.
_COMPLETE = dict.fromkeys(
    (
        "torn", "missed_first", "lost", "waits", "undecodable", "duplicated", "drifted",
        "other_media",
    ),
    False,
)  # fmt: skip
_COMPLETED_BY = ("emptied", "restarted", "snapshot_ended", "audited_equal")


class Reason(NamedTuple):
    """One reason for doubt: from which facts it follows, and which of them begin and end it."""

    name: str  # of stats.STALE_REASONS
    follows: Callable[[Trust], bool]
    begins: tuple[str, ...]  # methods of Trust; no other one brings it about
    ends: tuple[str, ...]  # likewise
    told_by: str
    curable: bool = True  # by another complete state of the publisher


REASONS = (
    Reason(
        "unsynchronised",
        lambda facts: not facts._synchronised or facts._torn,
        ("following", "restarted", "snapshot_began"),
        ("synchronised", "caught_up", *_COMPLETED_BY),
        "stream",
    ),
    Reason(
        "missed_first",
        lambda facts: facts._missed_first,
        ("missed_first",),
        _COMPLETED_BY,
        "stream",
    ),
    Reason(
        "gap",
        lambda facts: facts._lost or facts._waits,
        ("lost", "gap_opened"),
        ("gap_closed", "caught_up", *_COMPLETED_BY),
        "stream, NATS reader",
    ),
    Reason(
        "undecodable",
        lambda facts: facts._undecodable,
        ("not_understood", "snapshot_ended"),
        _COMPLETED_BY,
        "stream, NATS reader",
    ),
    Reason(
        "index_full",
        lambda facts: facts._refused,
        ("refused",),
        ("forgot_all", "audited_equal"),
        "index, merge",
        curable=False,  # unless there is room by now
    ),
    Reason(
        "duplicate_worker",
        lambda facts: facts._duplicated,
        ("name_shared",),
        _COMPLETED_BY,
        "stream, fleet, NATS reader",
    ),
    Reason(
        "disconnected",
        lambda facts: facts._away or facts._missed or facts._elsewhere,
        ("disconnected", "elsewhere"),
        (
            "following", "reached", "synchronised", "caught_up", "restarted", "snapshot_ended",
            "elsewhere",
        ),
        "stream, fleet, NATS reader",
        curable=False,
    ),
    Reason("audit", lambda facts: facts._drifted, ("drifted",), _COMPLETED_BY, "auditor"),
    Reason(
        "other_media",
        lambda facts: facts._other_media,
        ("cleared_in_part",),
        _COMPLETED_BY,
        "stream",
    ),
    Reason(
        "upstream",
        lambda facts: facts._upstream,
        ("doubted_upstream",),
        ("doubted_upstream",),
        "fleet, NATS reader",
        curable=False,
    ),
)  # fmt: skip
CURABLE = frozenset(reason.name for reason in REASONS if reason.curable)
