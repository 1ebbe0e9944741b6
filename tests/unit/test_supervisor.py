"""The supervisor with children that are a line of Python each: who ends how, and what follows.

The real ones are in tests/integration/worker/test_processes.py; these stand in for what a start of
the engine is too long for.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from llm_worker.processes import is_running
from support.waiting import until

PROGRAM = """
import subprocess, sys
from llm_worker import supervisor
from llm_worker.logs import configure_logging
from llm_worker.settings.worker import load

CHILDREN = {children!r}
READY = "import os, sys, time; from llm_worker.link.board import Board; " \\
    "from llm_worker.link.status import Status; board = Board(int(sys.argv[1])); " \\
    "say = lambda state: Status(os.getpid(), state, time.time()).write(board['serving']); "


class Small(supervisor.Supervisor):
    def _start(self, program, descriptors):
        return subprocess.Popen(
            [sys.executable, "-c", READY + CHILDREN[program], *map(str, descriptors)],
            pass_fds=descriptors, process_group=0,
        )


configure_logging("text", "info")
arguments = sys.argv[1:]
supervisor.GRACE_SECONDS = 0.5
raise SystemExit(Small(load(arguments).config, arguments).run())
"""
SLEEP = "time.sleep(60)"
OBSERVER = "os.read(int(sys.argv[3]), 1)"  # until the supervisor lets go of the lifeline


@dataclass
class Supervised:
    process: subprocess.Popen[str]
    state: Path

    def ended(self, seconds: float = 30.0) -> tuple[int, str]:
        """Exit code and what it logged."""
        _, log = self.process.communicate(timeout=seconds)
        return self.process.returncode, log

    def record(self) -> str:
        """Why this run ended, as the next one will read it."""
        (file,) = self.state.glob("*.exit.json")
        return str(json.loads(file.read_text(encoding="utf-8"))["reason"])


def start(tmp_path: Path, serving: str, observer: str = OBSERVER, *more: str) -> Supervised:
    program = PROGRAM.format(children={"serving": serving, "observer": observer})
    process = subprocess.Popen(
        [
            sys.executable, "-c", program, "--model", "m", "--worker-system-port", "0",
            "--worker-state-dir", str(tmp_path), *more,
        ],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )  # fmt: skip
    return Supervised(process, tmp_path)


@pytest.mark.parametrize(
    ("serving", "code", "reason"),
    [
        ("say('ready')", 0, "stopped"),
        ("sys.exit(69)", 69, "start_failed"),
        ("say('ready'); sys.exit(70)", 70, "engine_dead"),
        ("sys.exit(78)", 78, "start_failed"),
        ("sys.exit(1)", 1, "internal"),
        ("say('ready'); os.kill(os.getpid(), 9)", 70, "serving_died"),
        ("say('warming'); os.kill(os.getpid(), 9)", 69, "start_failed"),
    ],
)
def test_the_end_of_serving_is_the_workers_end_and_is_remembered(
    tmp_path: Path, serving: str, code: int, reason: str
) -> None:
    """Its exit code is handed on; what a signal ended has one that says so."""
    worker = start(tmp_path, serving)
    assert worker.ended()[0] == code
    assert worker.record() == reason


def test_an_observer_that_ends_starts_again_and_serving_is_left_alone(tmp_path: Path) -> None:
    """At once the first time, later when it happens again and again; for ever."""
    told = tmp_path / "told"
    observer = f"open({str(told)!r}, 'a').write('x'); sys.exit(1)"
    worker = start(tmp_path, f"say('ready'); {SLEEP}", observer)
    until("three lives of the observer", lambda: told.exists() and len(told.read_text()) >= 3, 20)
    assert worker.process.poll() is None
    worker.process.terminate()
    assert worker.ended()[0] == 0


def test_an_observer_that_finds_the_settings_wrong_ends_the_start(tmp_path: Path) -> None:
    """A port of the KV plane that is taken is told by exit code 78, as any other."""
    worker = start(tmp_path, SLEEP, "sys.exit(78)")
    assert worker.ended()[0] == 78
    assert worker.record() == "start_failed"


def test_asked_to_stop_during_the_start_it_goes_at_once(tmp_path: Path) -> None:
    """Nothing is in flight: nobody waits for a model to load, nor for who ignores a signal."""
    ready = tmp_path / "up"
    serving = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); say('starting'); "
        f"open({str(ready)!r}, 'w'); {SLEEP}"
    )
    worker = start(tmp_path, serving)
    until("serving", ready.exists, 20)
    worker.process.terminate()
    code, log = worker.ended(10)
    assert (code, worker.record()) == (0, "stopped")
    assert "exit 0: stopped" in log


def test_asked_to_stop_it_hands_the_signal_on_and_asked_again_it_hurries(tmp_path: Path) -> None:
    """SIGTERM first, SIGUSR2 then; and what serving says with its exit code holds."""
    told = tmp_path / "told"
    serving = (
        f"import signal; told = {str(told)!r}; "
        "note = lambda number, _: open(told, 'a').write(str(number) + ' '); "
        "[signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR2)]; "
        "say('ready'); open(told, 'w').close(); "
        "[time.sleep(0.05) for _ in iter(lambda: len(open(told).read().split()) < 2, False)]"
    )
    worker = start(tmp_path, serving)
    until("serving", told.exists, 20)
    worker.process.terminate()
    until("the first signal", lambda: told.read_text().split() == [str(int(signal.SIGTERM))], 20)
    worker.process.send_signal(signal.SIGINT)
    assert worker.ended()[0] == 0
    assert told.read_text().split() == [str(int(signal.SIGTERM)), str(int(signal.SIGUSR2))]


def test_a_killed_supervisor_takes_its_children_along(tmp_path: Path) -> None:
    """The kernel sees to it, where they asked for that as ours do."""
    pids = tmp_path / "pids"
    child = (
        "from llm_worker.processes import end_with_parent; end_with_parent(os.getppid()); "
        f"open({str(pids)!r}, 'a').write(str(os.getpid()) + ' '); {SLEEP}"
    )
    worker = start(tmp_path, child, child)
    until("both", lambda: pids.exists() and len(pids.read_text().split()) == 2, 20)
    worker.process.kill()
    worker.ended()

    def gone() -> bool:
        return not any(is_running(int(pid)) for pid in pids.read_text().split())

    until("neither is left", gone, 10)


def test_what_serving_left_behind_goes_with_it(tmp_path: Path) -> None:
    """Orphans are adopted, and ended: also one that ignores to be asked."""
    left = tmp_path / "left"
    orphan = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    serving = (
        f"import subprocess; open({str(left)!r}, 'w').write(str("
        f"subprocess.Popen([sys.executable, '-c', {orphan!r}], process_group=0).pid)); "
        "time.sleep(0.5); say('ready')"
    )
    worker = start(tmp_path, serving)
    assert worker.ended()[0] == 0
    assert not is_running(int(left.read_text()))


def test_clients_wait_while_the_observer_starts_again(tmp_path: Path) -> None:
    """The port is the supervisor's: nobody is refused in between."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    once = tmp_path / "once"
    observer = (
        f"import socket; again = os.path.exists({str(once)!r}); open({str(once)!r}, 'w').close(); "
        "again or sys.exit(1); time.sleep(0.5); "
        "listener = socket.socket(fileno=int(sys.argv[4])); "
        "connection, _ = listener.accept(); connection.sendall(b'here'); " + OBSERVER
    )
    worker = start(tmp_path, f"say('ready'); {SLEEP}", observer, "--worker-system-port", str(port))
    until("the first life", once.exists, 20)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        assert client.recv(4) == b"here"
    worker.process.terminate()
    assert worker.ended()[0] == 0


def test_a_busy_port_is_told_before_anything_is_started(tmp_path: Path) -> None:
    """Exit code 78 and the fix are `__main__`'s to say; here it is the error."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        began = time.monotonic()
        code, log = start(tmp_path, SLEEP, OBSERVER, "--worker-system-port", port).ended()
    assert code == 1  # an error of this little program, which handles none
    assert "choose another --worker-system-port" in log
    assert time.monotonic() - began < 20


def test_the_way_out_fits_into_composes_grace_period(repository: Path) -> None:
    """Docker kills what is left then: the engine's memory, and why it ended, would be lost."""
    from llm_worker import supervisor
    from llm_worker.settings.worker import SETTINGS

    compose = (repository / "docker-compose.yml").read_text(encoding="utf-8")
    grace = float(re.findall(r"^  stop_grace_period: (\d+)s", compose, re.M)[0])
    defaults = {
        setting.name: float(setting.default) for setting in SETTINGS if "seconds" in setting.name
    }
    app = (repository / "worker/llm_worker/serving/app.py").read_text(encoding="utf-8")
    parts = re.findall(r"^(?:ERROR_FLUSH|ENGINE_STOP|EXIT_MARGIN)_SECONDS = ([\d.]+)", app, re.M)
    assert len(parts) == 3
    assert sum(map(float, parts)) <= supervisor.WAY_OUT_SECONDS
    whole = (
        defaults["drain-seconds"]
        + defaults["lame-duck-seconds"]
        + supervisor.WAY_OUT_SECONDS
        + 2 * supervisor.GRACE_SECONDS
        + supervisor.OBSERVER_CLOSE_SECONDS
    )
    assert whole < grace
