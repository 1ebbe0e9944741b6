"""scripts/targets: what it accepts, what it refuses and how, and what it leaves alone."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from support.places import ROOT

COMMAND = ROOT / "scripts" / "targets"
PROMETHEUS = ROOT / "prometheus"

VLLM_PAGE = b"""# HELP vllm:num_requests_running Requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 0.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 5.0
"""


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, on another directory; isolated from this environment."""
    return subprocess.run(
        [sys.executable, "-I", str(COMMAND), "--directory", str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def managed(directory: Path) -> object:
    """What Prometheus reads from the command's own file."""
    return yaml.safe_load((directory / "managed.yml").read_text(encoding="utf-8"))


@dataclass
class Page:
    """What a small HTTP server answers to every request, and where it listens."""

    address: str
    body: bytes = VLLM_PAGE
    status: int = 200


@pytest.fixture
def page() -> Iterator[Page]:
    """A server for ``--check`` to scrape; a test sets the answer."""
    answer = Page("")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer.status)
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    answer.address = f"127.0.0.1:{server.server_port}"
    yield answer
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_first_target_makes_the_file_and_prometheus_can_read_it(tmp_path: Path) -> None:
    """A directory without our file is the normal start; labels land in file_sd's form."""
    done = run(
        tmp_path / "new",
        *("add", "GPU-1.Example.com:8000", "--environment", "prod", "--role", "chat"),
        *("--team", "search", "--https", "--name", "edge", "--label", "zone=eu 1: 'a'"),
    )
    assert done.returncode == 0, done.stderr
    assert managed(tmp_path / "new") == [
        {
            "targets": ["gpu-1.example.com:8000"],
            "labels": {
                "__scheme__": "https",
                "instance": "edge",
                "environment": "prod",
                "role": "chat",
                "team": "search",
                "zone": "eu 1: 'a'",
            },
        }
    ]


@pytest.mark.slow
def test_what_was_added_is_listed_and_can_be_removed_by_address_or_name(tmp_path: Path) -> None:
    """Both handles work, the others stay, and an emptied file is still valid."""
    for arguments in (["a:1"], ["b:2", "--name", "bee"], ["[::1]:3", "--role", "日本"]):
        assert run(tmp_path, "add", *arguments).returncode == 0
    listed = run(tmp_path, "list")
    assert listed.returncode == 0
    assert listed.stdout.splitlines() == [
        "a:1  (managed.yml)",
        "b:2  instance=bee  (managed.yml)",
        "[::1]:3  role=日本  (managed.yml)",
    ]
    assert run(tmp_path, "remove", "bee").stdout == "removed b:2\n"
    assert managed(tmp_path) == [
        {"targets": ["a:1"]},
        {"targets": ["[::1]:3"], "labels": {"role": "日本"}},
    ]
    assert run(tmp_path, "remove", "A:1").returncode == 0
    assert run(tmp_path, "remove", "[::1]:3").returncode == 0
    assert managed(tmp_path) == []
    assert "no targets" in run(tmp_path, "list").stdout


def alert(name: str) -> str:
    """The expression of an alert of the shipped rules."""
    rules = yaml.safe_load((PROMETHEUS / "rules" / "availability.yml").read_text(encoding="utf-8"))
    (expr,) = (r["expr"] for g in rules["groups"] for r in g["rules"] if r.get("alert") == name)
    return str(expr)


def test_removing_one_of_several_targets_names_the_alert_that_follows(tmp_path: Path) -> None:
    """A target that somebody wrote by hand counts, too: the job is not gone."""
    (tmp_path / "mine.yml").write_text("- targets: [a:1]\n", encoding="utf-8")
    for address in ("b:2", "c:3"):
        assert run(tmp_path, "add", address).returncode == 0
    for address in ("b:2", "c:3"):
        done = run(tmp_path, "remove", address)
        assert done.returncode == 0
        assert done.stderr.splitlines() == [
            "note: alert TargetsMissing (warning) fires for up to 30 minutes"
        ]
    assert "[30m]" in alert("TargetsMissing")


def test_removing_the_last_target_names_the_page_that_follows_and_how_to_silence_it(
    tmp_path: Path,
) -> None:
    """As its runbook does. A commented example is no target."""
    (tmp_path / "example.yml").write_text("# - targets: [a:1]\n", encoding="utf-8")
    assert run(tmp_path, "add", "b:2", "--name", "bee").returncode == 0
    done = run(tmp_path, "remove", "bee")
    assert (done.returncode, done.stdout) == (0, "removed b:2\n")
    first, second = done.stderr.splitlines()
    assert "TargetGone (critical) fires for up to an hour" in first
    assert "[1h]" in alert("TargetGone")
    place, silence = second.split(" or by: ")
    runbook = (PROMETHEUS / "runbooks" / "TargetGone.md").read_text(encoding="utf-8")
    assert f"<{place}>" in runbook
    assert f"`{silence}`" in runbook
    assert silence.endswith("alertname=TargetGone job=vllm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://gpu:8000/metrics"], "give HOST:PORT: gpu:8000"),
        (["https://gpu:443"], "give HOST:PORT: gpu:443 --https"),
        (["gpu"], "no port; `vllm serve` listens on 8000: gpu:8000"),
        (["::1"], "listens on 8000: [::1]:8000"),
        (["[::1]"], "listens on 8000: [::1]:8000"),
        (["gpu:8000/metrics"], "by --path"),
        (["gpu:0"], "from 1 to 65535"),
        (["gpu:65536"], "from 1 to 65535"),
        (["gpu:http"], "from 1 to 65535"),
        (["gp u:8000"], "not a host name"),
        (["gpu-:8000"], "not a host name"),
        (["gpu..lan:8000"], "not a host name"),
        (["10.0.0.256:8000"], "256"),
        (["[::zz]:8000"], "zz"),
        (["gpu:8000", "--environment", ""], "1 to 200 printable characters"),
        (["gpu:8000", "--role", "a\nb"], "1 to 200 printable characters"),
        (["gpu:8000", "--label", "zone"], "give NAME=VALUE"),
        (["gpu:8000", "--label", "1zone=a"], "no digit first"),
        (["gpu:8000", "--label", "zo-ne=a"], "letters, digits and _ only"),
        (["gpu:8000", "--label", "__param_x=a"], "belong to Prometheus"),
        (["gpu:8000", "--label", "instance=a"], "use --name"),
        (["gpu:8000", "--label", "model_name=a"], "is set by Prometheus, vLLM or the rules"),
        (["gpu:8000", "--role", "a", "--label", "role=b"], "given twice"),
        (["gpu:8000", "--path", "metrics"], "must start with /"),
    ],
)
def test_a_wrong_target_is_refused_with_the_way_to_fix_it(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    """Nothing is written, the exit code is not 0, and the message says what to type."""
    done = run(tmp_path, "add", *arguments)
    assert done.returncode in {1, 2}
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_duplicate_address_or_name_is_refused_and_names_the_fix(tmp_path: Path) -> None:
    """Twice the same target would count every request twice."""
    assert run(tmp_path, "add", "gpu:8000", "--name", "one").returncode == 0
    before = (tmp_path / "managed.yml").read_bytes()
    again = run(tmp_path, "add", "GPU:08000")
    assert again.returncode == 1
    assert "scripts/targets remove gpu:8000" in again.stderr
    named = run(tmp_path, "add", "other:8000", "--name", "one")
    assert named.returncode == 1
    assert "give another --name" in named.stderr
    assert (tmp_path / "managed.yml").read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "- targets:\n    - gpu:8000   # the box\n  labels: {role: chat}\n",
        "- targets: [other:1, 'gpu:8000']\n",
        '- labels: {a: b}\n  targets: ["gpu:8000"]\n',
        '[{"targets": ["gpu:8000"]}]\n',
        "- targets:\n  - other:1\n\n  - 'gpu:8000'\n",
    ],
)
def test_hand_written_files_are_seen_and_never_changed(tmp_path: Path, text: str) -> None:
    """A duplicate of a hand-written target is refused; that file's bytes stay as they are."""
    hand = tmp_path / "mine.yml"
    hand.write_text(text, encoding="utf-8")
    refused = run(tmp_path, "add", "gpu:8000")
    assert refused.returncode == 1
    assert "mine.yml" in refused.stderr
    removed = run(tmp_path, "remove", "gpu:8000")
    assert removed.returncode == 1
    assert "edit that file" in removed.stderr
    assert "gpu:8000  (mine.yml)" in run(tmp_path, "list").stdout
    assert run(tmp_path, "add", "new:1").returncode == 0
    assert hand.read_text(encoding="utf-8") == text


def test_an_address_in_a_comment_or_a_label_is_not_a_target(tmp_path: Path) -> None:
    """The shipped example is all comments; it must not stand in the way of what it shows."""
    example = PROMETHEUS / "targets" / "example.yml"
    (tmp_path / "example.yml").write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "mine.yml").write_text(
        "- targets: [a:1]\n  labels:\n    team: gpu-box-2.example.com:8000\n", encoding="utf-8"
    )
    assert run(tmp_path, "list").stdout == "a:1  (mine.yml)\n"
    assert run(tmp_path, "add", "gpu-box-1.example.com:8000").returncode == 0
    assert run(tmp_path, "add", "gpu-box-2.example.com:8000").returncode == 0


def test_our_file_edited_by_hand_is_refused_and_not_overwritten(tmp_path: Path) -> None:
    """What the command cannot read back it must not destroy."""
    text = "- targets:\n    - gpu:8000\n"
    (tmp_path / "managed.yml").write_text(text, encoding="utf-8")
    for arguments in (["add", "new:1"], ["remove", "gpu:8000"], ["list"]):
        done = run(tmp_path, *arguments)
        assert done.returncode == 1
        assert "line 1, was edited by hand" in done.stderr
    assert (tmp_path / "managed.yml").read_text(encoding="utf-8") == text


def test_the_file_is_replaced_in_one_step_and_readable_by_prometheus(tmp_path: Path) -> None:
    """A new inode (never a half-written file), mode 0644 whatever the umask, nothing left over."""
    old = os.umask(0o077)
    try:
        assert run(tmp_path, "add", "a:1").returncode == 0
        first = (tmp_path / "managed.yml").stat()
        with (tmp_path / "managed.yml").open(encoding="utf-8") as held:
            assert run(tmp_path, "add", "b:2").returncode == 0
            assert "b:2" not in held.read()
    finally:
        os.umask(old)
    second = (tmp_path / "managed.yml").stat()
    assert second.st_mode & 0o777 == 0o644
    assert first.st_ino != second.st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["managed.yml"]


def test_removing_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    """A typo is answered with the names that exist."""
    assert run(tmp_path, "add", "a:1", "--name", "bee").returncode == 0
    done = run(tmp_path, "remove", "be")
    assert done.returncode == 1
    assert "known: bee" in done.stderr


def test_a_loopback_target_comes_with_the_note_about_containers(tmp_path: Path) -> None:
    """The commonest mistake with Docker: localhost is the Prometheus container itself."""
    done = run(tmp_path, "add", "localhost:8000")
    assert done.returncode == 0
    assert "host.docker.internal:8000" in done.stderr


def test_check_adds_a_server_that_speaks_vllm(tmp_path: Path, page: Page) -> None:
    """The answer names the model, so that the wrong box is noticed."""
    done = run(tmp_path, "add", page.address, "--check")
    assert done.returncode == 0, done.stderr
    assert "speaks vLLM: 2 families, models: tiny" in done.stdout


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"# TYPE go_goroutines gauge\ngo_goroutines 7\n", "exposes no vllm: metrics"),
        (200, b"<html>", "exposes no vllm: metrics"),
        (404, b"", "answers 404"),
    ],
)
def test_check_refuses_a_server_that_is_not_vllm(
    tmp_path: Path, page: Page, status: int, body: bytes, message: str
) -> None:
    """Exit code 1, the reason, and nothing added."""
    page.status, page.body = status, body
    done = run(tmp_path, "add", page.address, "--check")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "managed.yml").exists()


def test_list_check_fails_when_one_target_does_not_answer(tmp_path: Path, page: Page) -> None:
    """The exit code is for scripts, the lines are for people."""
    assert run(tmp_path, "add", page.address).returncode == 0
    assert run(tmp_path, "list", "--check").returncode == 0
    page.status = 503
    done = run(tmp_path, "list", "--check")
    assert done.returncode == 1
    assert "answers 503" in done.stdout


def test_wrong_usage_exits_with_2(tmp_path: Path) -> None:
    """As every command line does, and apart from a refusal."""
    assert run(tmp_path).returncode == 2
    assert run(tmp_path, "add").returncode == 2
