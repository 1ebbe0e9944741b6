"""The stack as local processes: worker, load, Prometheus and Alertmanager without Docker.

Reads docker-compose.yml, so both ways run the same commands with the same configuration; only paths
and addresses differ. One supervisor process starts the parts, restarts a part that ends (as
``restart: unless-stopped`` does), rotates their logs and stops them in order. Everything it writes
lies under ``.local/``. Called by scripts/up and scripts/down; Grafana is not part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import logging.handlers
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LOCAL = ROOT / ".local"
SUPERVISOR_PID = LOCAL / "run" / "stack.pid"
PROC = Path("/proc")

EXIT_UNHEALTHY, EXIT_PORT_TAKEN = 1, 5
LOG_BYTES, LOG_FILES = 10_000_000, 3
RESTART_FIRST_SECONDS, RESTART_MOST_SECONDS = 1.0, 30.0
# Alive for so long, a part has recovered: its next restart is immediate again.
RECOVERED_SECONDS = 60.0
POLL_SECONDS = 0.5

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the stack."""

    name: str
    command: tuple[str, ...]
    health: str | None  # URL that answers 200 when the part is healthy
    stop_seconds: float  # from SIGTERM to SIGKILL
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Port:
    """A port that the stack listens on, and the setting that moves it."""

    number: int
    setting: str
    use: str


class Settings:
    """The environment over ``.env``, as Docker Compose reads them."""

    def __init__(self, environment: Mapping[str, str], dotenv: str) -> None:
        self._values = dict(_assignments(dotenv)) | dict(environment)

    def expand(self, text: str) -> str:
        """Replace ``${NAME}`` and ``${NAME:-default}``."""
        return _VARIABLE.sub(lambda m: self._values.get(m[1]) or m[2] or "", text)

    def port(self, setting: str, default: int, use: str) -> Port:
        """One of the published ports; the first of a range."""
        text = self._values.get(setting) or str(default)
        return Port(int(text.partition("-")[0]), setting, use)


def _assignments(dotenv: str) -> Iterator[tuple[str, str]]:
    for line in dotenv.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            yield name.strip(), value.strip().strip("'\"")


@dataclass(frozen=True, slots=True)
class Stack:
    """The parts in starting order, and the ports they take."""

    parts: tuple[Part, ...]
    api: Port
    system: Port
    prometheus: Port
    alertmanager: Port

    @property
    def ports(self) -> tuple[Port, ...]:
        """All four."""
        return (self.api, self.system, self.prometheus, self.alertmanager)


def describe(
    compose: Mapping[str, Any], settings: Settings, worker_arguments: Sequence[str], *, load: bool
) -> Stack:
    """Return the stack that the compose file describes, on loopback and under ``.local/``.

    ``worker_arguments`` replace the compose file's when there are any.
    """
    services = compose["services"]
    api = settings.port("WORKER_API_PORT", 8000, "the worker's API")
    system = settings.port("WORKER_SYSTEM_PORT", 8081, "the worker's system server")
    prometheus = settings.port("PROMETHEUS_PORT", 9090, "Prometheus")
    alertmanager = settings.port("ALERTMANAGER_PORT", 9093, "Alertmanager")

    def command(service: str) -> list[str]:
        return [settings.expand(str(word)) for word in services[service]["command"]]

    arguments = [*(worker_arguments or command("worker-cpu"))]
    arguments += ["--host=127.0.0.1", f"--port={api.number}"]
    worker_environment = {
        name: settings.expand(str(value))
        for name, value in _merged(services["worker-cpu"]["environment"]).items()
        # vLLM publishes KV events, and with them every prompt's tokens, on all addresses or not at
        # all. In a container that is nobody's network; here it is this machine's.
        if not name.startswith("LLM_WORKER_KV_")
    } | {
        "LLM_WORKER_SYSTEM_HOST": "127.0.0.1",
        "LLM_WORKER_SYSTEM_PORT": str(system.number),
        "LLM_WORKER_STATE_DIR": str(LOCAL / "state"),
        "LLM_WORKER_LOG_FORMAT": "text",
        "PYTHONPATH": str(ROOT / "worker"),
    }
    parts = [
        Part(
            "alertmanager",
            (
                "sh",
                str(ROOT / "alertmanager" / "render"),
                str(LOCAL / "alertmanager" / "alertmanager.yml"),
                *_with_flags(
                    command("alertmanager"),
                    {
                        "--storage.path": str(LOCAL / "data" / "alertmanager"),
                        "--web.listen-address": f"127.0.0.1:{alertmanager.number}",
                    },
                ),
            ),
            f"http://127.0.0.1:{alertmanager.number}/-/ready",
            10.0,
        ),
        Part(
            "prometheus",
            (
                "prometheus",
                *_with_flags(
                    command("prometheus"),
                    {
                        "--config.file": str(ROOT / "prometheus" / "prometheus.yml"),
                        "--storage.tsdb.path": str(LOCAL / "data" / "prometheus"),
                        "--web.listen-address": f"127.0.0.1:{prometheus.number}",
                    },
                ),
            ),
            f"http://127.0.0.1:{prometheus.number}/-/ready",
            30.0,
        ),
        Part(
            "worker",
            (sys.executable, "-m", "llm_worker", *arguments),
            f"http://127.0.0.1:{system.number}/ready",
            60.0,
            worker_environment,
        ),
    ]
    if load and not worker_arguments:
        flags = {
            "--api": f"http://127.0.0.1:{api.number}",
            "--system": f"http://127.0.0.1:{system.number}",
            "--heartbeat": str(LOCAL / "run" / "loadgen.heartbeat"),
        }
        parts.append(
            Part(
                "loadgen",
                (sys.executable, "-m", "loadgen", *_with_flags(command("loadgen"), flags)),
                None,
                10.0,
                {"PYTHONPATH": str(ROOT / "worker"), "VLLM_LOGGING_LEVEL": "ERROR"},
            )
        )
    return Stack(tuple(parts), api, system, prometheus, alertmanager)


def _merged(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if value is not None}


def _with_flags(command: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """Return ``command`` with these ``--flag=value`` set, replaced where they were given."""
    kept = [word for word in command if word.partition("=")[0] not in flags]
    return [*kept, *(f"{flag}={value}" for flag, value in flags.items())]


def write_targets(stack: Stack) -> None:
    """Tell Prometheus where the parts listen: the file_sd files that prometheus.yml names."""
    directory = LOCAL / "prometheus"
    directory.mkdir(parents=True, exist_ok=True)
    for job, port in (
        ("worker", stack.system),
        ("prometheus", stack.prometheus),
        ("alertmanager", stack.alertmanager),
    ):
        targets = [{"targets": [f"127.0.0.1:{port.number}"]}]
        _write(directory / f"{job}.yml", json.dumps(targets) + "\n")  # JSON is YAML


# --- the supervisor -------------------------------------------------------------------------------


class Supervisor:
    """Keeps the parts running until it is told to stop."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._log = logging.getLogger("stack")

    async def run(self) -> None:
        """Start all parts; on SIGTERM stop them, the last one first."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        tasks = [
            asyncio.create_task(self._keep(part), name=part.name) for part in self._stack.parts
        ]
        await stop.wait()
        self._log.info("stopping")
        for task in reversed(tasks):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep(self, part: Part) -> None:
        pause = RESTART_FIRST_SECONDS
        while True:
            started = time.monotonic()
            try:
                code: int | OSError = await self._run_once(part)
            except OSError as error:  # its program is gone
                code = error
            if time.monotonic() - started > RECOVERED_SECONDS:
                pause = RESTART_FIRST_SECONDS
            self._log.warning("%s ended (%s); again in %.0f s", part.name, code, pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, RESTART_MOST_SECONDS)

    async def _run_once(self, part: Part) -> int:
        # A pipe of our own: asyncio's would make wait() wait for every child that inherited it.
        reading, writing = os.pipe()
        copier = asyncio.create_task(_copy_log(part.name, reading), name=f"{part.name}-log")
        try:
            process = await asyncio.create_subprocess_exec(
                *part.command,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(part.environment),
                cwd=ROOT,
                # A group of its own, and no session: see docs/adr/0011-three-processes.md.
                process_group=0,
            )
        finally:
            os.close(writing)
        pid_file = _pid_file(part.name)
        try:
            _note_pid(pid_file, process.pid)
            self._log.info("%s started, pid %s", part.name, process.pid)
            code = await process.wait()
        except asyncio.CancelledError:
            await self._stop(part, process)
            raise
        finally:
            # What the part started and left behind goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await copier
            _remove(pid_file)
        return code

    async def _stop(self, part: Part, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(part.stop_seconds):
                code = await process.wait()
            self._log.info("%s stopped, exit code %s", part.name, code)
        except TimeoutError:
            self._log.warning("%s did not stop in %.0f s", part.name, part.stop_seconds)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _copy_log(name: str, reading: int) -> None:
    """Copy a part's output into its rotating log file until nobody writes any more."""
    handler = logging.handlers.RotatingFileHandler(
        _log_file(name), maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb")
    )
    try:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the stream's limit: dropped
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip("\n")
            handler.emit(logging.LogRecord(name, logging.INFO, "", 0, text, None, None))
    finally:
        transport.close()
        handler.close()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _pid_file(name: str) -> Path:
    return LOCAL / "run" / f"{name}.pid"


def _log_file(name: str) -> Path:
    return LOCAL / "log" / f"{name}.log"


# --- up and down ----------------------------------------------------------------------------------


def _note_pid(pid_file: Path, pid: int) -> None:
    """Write down a process so that no later one under the same number is taken for it."""
    _write(pid_file, f"{pid} {_started(pid)}\n")


def _started(pid: int) -> str:
    """When a process started, in this system's own words; empty when there is none.

    From /proc where there is one: small images have no ps.
    """
    if (PROC / "self").exists():
        try:
            stat = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        # Behind the name, which may hold anything: the state, and 19 fields on, clock ticks.
        state, *rest = stat.rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _alive(pid_file: Path) -> int | None:
    """Return the noted process if it still runs."""
    try:
        pid, _, started = pid_file.read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        return None
    return int(pid) if started and _started(int(pid)) == started else None


def _supervisor() -> int | None:
    return _alive(SUPERVISOR_PID)


def _taken(port: Port) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port.number))
        except OSError:
            return True
    return False


def up(stack: Stack, arguments: Sequence[str], timeout_seconds: float) -> int:
    """Start the supervisor unless it runs, and wait until every part is healthy."""
    if (pid := _supervisor()) is not None:
        print(f"already running (pid {pid}); rules and notification channels are read again")
        if (prometheus := _alive(_pid_file("prometheus"))) is not None:
            os.kill(prometheus, signal.SIGHUP)
        if (alertmanager := _alive(_pid_file("alertmanager"))) is not None:
            os.kill(alertmanager, signal.SIGTERM)  # the supervisor starts it again
            time.sleep(POLL_SECONDS)
    else:
        taken = [port for port in stack.ports if _taken(port)]
        for port in taken:
            print(
                f"port {port.number} is taken, {port.use} needs it: stop what holds it, "
                f"or set {port.setting} in .env",
                file=sys.stderr,
            )
        if taken:
            return EXIT_PORT_TAKEN
        for directory in ("run", "log", "state", "alertmanager", "data/prometheus"):
            (LOCAL / directory).mkdir(parents=True, exist_ok=True)
        write_targets(stack)
        with _log_file("stack").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, "run", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        _note_pid(SUPERVISOR_PID, process.pid)
    return _wait_until_healthy(stack, timeout_seconds)


def _wait_until_healthy(stack: Stack, timeout_seconds: float) -> int:
    started = time.monotonic()
    waiting = [part for part in stack.parts if part.health is not None]
    while True:
        for part in [part for part in waiting if _healthy(str(part.health))]:
            waiting.remove(part)
            print(f"{part.name}: healthy after {time.monotonic() - started:.0f} s", flush=True)
        if not waiting:
            return 0
        if _supervisor() is None or time.monotonic() - started > timeout_seconds:
            break
        time.sleep(POLL_SECONDS)
    for part in waiting:
        print(f"{part.name}: not healthy; the end of {_log_file(part.name)}:", file=sys.stderr)
        with contextlib.suppress(OSError):
            lines = _log_file(part.name).read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(f"    {line}" for line in lines[-15:]), file=sys.stderr)
    return EXIT_UNHEALTHY


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def down(timeout_seconds: float = 120.0) -> int:
    """Stop the supervisor and with it every part; clean up even where it was killed."""
    pid = _supervisor()
    if pid is not None:
        print("stopping the local processes (requests in flight may finish)", flush=True)
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_seconds
        while _supervisor() is not None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 2)
        if _supervisor() is not None:
            os.kill(pid, signal.SIGKILL)
    left = 0
    for pid_file in sorted((LOCAL / "run").glob("*.pid")):
        # Left over from a supervisor that was killed: the parts are leaders of their own groups.
        part = _alive(pid_file) if pid_file != SUPERVISOR_PID else None
        if part is not None:
            left += 1
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part, signal.SIGKILL)
        pid_file.unlink(missing_ok=True)
    shutil.rmtree(LOCAL / "prometheus", ignore_errors=True)
    if left:
        print(f"killed {left} leftover processes")
    print("stopped" if pid is not None or left else "no local processes were running")
    return 0


def main() -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="local_stack")
    parser.add_argument("command", choices=("up", "down", "run", "show"))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until healthy")
    parser.add_argument("--no-load", action="store_true")
    parser.epilog = "Arguments after -- go to the worker instead of the demo's."
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args, worker_arguments = parser.parse_args(words[:split]), words[split + 1 :]
    if args.command == "down":
        return down()
    import yaml  # not needed to stop the stack

    dotenv = ROOT / ".env"
    settings = Settings(os.environ, dotenv.read_text(encoding="utf-8") if dotenv.exists() else "")
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    stack = describe(compose, settings, worker_arguments, load=not args.no_load)
    if args.command == "show":
        for part in stack.parts:
            print(json.dumps({"name": part.name, "command": part.command, "health": part.health}))
        return 0
    if args.command == "run":
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        asyncio.run(Supervisor(stack).run())
        return 0
    passed = (["--no-load"] if args.no_load else []) + ["--", *worker_arguments]
    return up(stack, passed, args.timeout)


if __name__ == "__main__":
    sys.exit(main())
