"""Reasons for doubt follow from facts, and a fact ends only with what makes it untrue."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from llm_worker.kv.index.trust import REASONS, Trust
from llm_worker.kv.stats import STALE_REASONS

FACTS: dict[str, list[Callable[[Trust], None]]] = {
    "following": [Trust.following],
    "connected": [Trust.connected],
    "disconnected": [Trust.disconnected],
    "reached": [Trust.reached],
    "synchronised": [Trust.synchronised],
    "caught_up": [Trust.caught_up],
    "gap_opened": [Trust.gap_opened],
    "gap_closed": [Trust.gap_closed],
    "missed_first": [Trust.missed_first],
    "lost": [Trust.lost],
    "not_understood": [Trust.not_understood],
    "name_shared": [Trust.name_shared],
    "cleared_in_part": [Trust.cleared_in_part],
    "emptied": [Trust.emptied],
    "restarted": [
        lambda trust: trust.restarted(from_its_first=True),
        lambda trust: trust.restarted(from_its_first=False),
    ],
    "snapshot_began": [Trust.snapshot_began],
    "snapshot_ended": [
        lambda trust: trust.snapshot_ended(understood=True),
        lambda trust: trust.snapshot_ended(understood=False),
    ],
    "refused": [Trust.refused],
    "forgot_all": [Trust.forgot_all],
    "drifted": [Trust.drifted],
    "audited_equal": [
        lambda trust: trust.audited_equal(everything=True),
        lambda trust: trust.audited_equal(everything=False),
    ],
    "doubted_upstream": [
        lambda trust: trust.doubted_upstream(True),
        lambda trust: trust.doubted_upstream(False),
    ],
    "elsewhere": [lambda trust: trust.elsewhere(True), lambda trust: trust.elsewhere(False)],
}
ANY = [(name, tell) for name, tells in FACTS.items() for tell in tells]


def test_the_table_has_every_reason_and_the_test_every_fact() -> None:
    """A new fact or reason has to be written down where the others are."""
    assert tuple(reason.name for reason in REASONS) == STALE_REASONS
    told = {
        name
        for name, member in vars(Trust).items()
        if callable(member) and not name.startswith("_") and name != "part"
    }
    assert told == set(FACTS)


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "as a part"])
def test_a_reason_begins_and_ends_only_with_the_facts_of_its_row(whole: bool) -> None:
    """And with each of them: what the table says is all that there is."""
    dice = random.Random(1)
    begun: set[tuple[str, str]] = set()
    ended: set[tuple[str, str]] = set()
    for _ in range(300):
        above = Trust()
        trust = above.part() if whole else above
        for _ in range(60):
            name, tell = dice.choice(ANY)
            before = trust.stale
            tell(trust)
            begun |= {(reason, name) for reason in trust.stale - before}
            ended |= {(reason, name) for reason in before - trust.stale}
            assert above.stale == trust.stale
    assert begun == {(reason.name, fact) for reason in REASONS for fact in reason.begins}
    assert ended == {(reason.name, fact) for reason in REASONS for fact in reason.ends}


def test_who_has_heard_nothing_is_not_trusted() -> None:
    """Neither at first nor when somebody else listens anew."""
    trust = Trust()
    assert trust.stale == {"unsynchronised"}
    trust.synchronised()
    assert not trust.stale
    trust.following()
    assert trust.stale == {"unsynchronised"}


def test_what_is_heard_while_nobody_is_connected_ends_no_doubt_about_the_connection() -> None:
    """Messages may be queued when it breaks; and a new one proves nothing before it was used."""
    trust = Trust()
    trust.connected()
    trust.synchronised()
    trust.disconnected()
    for tell in (trust.reached, trust.synchronised, trust.caught_up):
        tell()
        assert trust.stale == {"disconnected"}
    trust.restarted(from_its_first=True)
    trust.snapshot_ended(understood=True)
    assert trust.stale == {"disconnected"}
    trust.connected()
    assert trust.stale == {"disconnected"}
    trust.reached()
    assert not trust.stale


def test_a_snapshot_that_has_begun_is_no_state_until_it_ends() -> None:
    """However much else the publisher says; a piece that was dropped is missing."""
    trust = Trust()
    trust.synchronised()
    trust.snapshot_began()
    for tell in (trust.synchronised, trust.caught_up, trust.gap_closed):
        tell()
        assert trust.stale == {"unsynchronised"}
    trust.snapshot_ended(understood=False)
    assert trust.stale == {"undecodable"}
    trust.snapshot_began()
    trust.snapshot_ended(understood=True)
    assert not trust.stale


def test_what_was_lost_is_not_made_up_for_by_a_gap_that_heals() -> None:
    """Both show as a gap; only the one that was asked for in vain may end by itself."""
    trust = Trust()
    trust.synchronised()
    trust.gap_opened()
    assert trust.stale == {"gap"}
    trust.gap_closed()
    assert not trust.stale
    trust.lost()
    trust.gap_opened()
    trust.caught_up()
    assert trust.stale == {"gap"}
    trust.emptied()
    assert not trust.stale


def test_an_audit_of_the_gpu_proves_the_gpus_blocks_only() -> None:
    """A connector's cannot be compared, so its doubts stay."""
    trust = Trust()
    trust.synchronised()
    trust.drifted()
    trust.lost()
    trust.audited_equal(everything=False)
    assert trust.stale == {"gap"}
    trust.audited_equal(everything=True)
    assert not trust.stale
