"""What a new recording changes in the recorded pages."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.places import FIXTURES, ROOT

PAGES = sorted(FIXTURES.glob("*/01.prom"))
NEW_GAUGE = "# HELP a_new_gauge New.\n# TYPE a_new_gauge gauge\na_new_gauge 3.0\n"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "record_fixtures"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_another_recording_of_the_same_engine_changes_nothing(
    script: dict[str, Any], path: Path
) -> None:
    """All numbers differ, and build, place and time; the families and labels are the same."""
    old = path.read_text(encoding="utf-8")
    again = re.sub(r"^([^#\n].*) \S+$", r"\1 123456.0", old, flags=re.M)
    again = re.sub(r'^(\w+_info\{.*?=")', r"\1another ", again, flags=re.M)
    assert again != old
    assert script["merged"](old, again) == old


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_what_was_added_and_what_is_gone_is_all_that_changes(
    script: dict[str, Any], path: Path
) -> None:
    """A new gauge, a family less, another help text: no number beside them."""
    old = path.read_text(encoding="utf-8")
    gone, *_, retold = script["families"](old)
    help_text = f"# HELP {retold} "
    new = re.sub(r"^([^#\n].*) \S+$", r"\1 123456.0", old, flags=re.M)
    new = "".join(
        line
        for line in new.splitlines(keepends=True)
        if not re.match(rf"(# \w+ )?{gone}(_bucket|_sum|_count|_total|_created)?[ {{]", line)
    )
    new = new.replace(help_text, help_text + "Newly said. ") + NEW_GAUGE
    page = script["merged"](old, new)

    before, after = set(old.splitlines()), set(page.splitlines())
    assert {line for line in before - after if gone not in line} == {
        line for line in before if line.startswith(help_text)
    }
    assert after - before == {
        *NEW_GAUGE.splitlines(),
        *(line for line in page.splitlines() if line.startswith(help_text)),
    }
    assert list(text_string_to_metric_families(page)), "a valid page"


def test_a_series_more_or_less_leaves_the_others_as_they_were(script: dict[str, Any]) -> None:
    """A new reason of a counter is a line, not a family of new numbers."""
    head = "# HELP ends Ends.\n# TYPE ends counter\n"
    old = head + 'ends_total{reason="a b"} 5.0\nends_total{reason="b"} 6.0\n'
    new = head + 'ends_total{reason="a b"} 50.0\nends_total{reason="c"} 70.0\n'
    assert script["merged"](old, new) == (
        head + 'ends_total{reason="a b"} 5.0\nends_total{reason="c"} 70.0\n'
    )
    relabelled = head + 'ends_total{why="b"} 9.0\n'
    assert script["merged"](old, relabelled) == relabelled


def test_all_records_every_number_anew(script: dict[str, Any], tmp_path: Path) -> None:
    """And a page that nobody records any more is deleted, either way."""
    head = "# HELP a A.\n# TYPE a gauge\n"
    script["write"](tmp_path, [f"{head}a 1.0\n", f"{head}a 2.0\n"], False)
    script["write"](tmp_path, [f"{head}a 7.0\n"], False)
    assert [path.name for path in tmp_path.iterdir()] == ["00.prom"]
    assert (tmp_path / "00.prom").read_text() == f"{head}a 1.0\n"
    script["write"](tmp_path, [f"{head}a 7.0\n"], True)
    assert (tmp_path / "00.prom").read_text() == f"{head}a 7.0\n"
