"""A real nats-server with JetStream as a subprocess: on a free port, killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

START_SECONDS = 10.0


def find() -> str | None:
    """The program: of this Python's environment, where a wheel puts it, or on PATH."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    return shutil.which("nats-server", path=path)


class NatsServer:
    """One server; its data survive `kill` and `start`."""

    def __init__(self, directory: Path, port: int, *, max_file_store: str = "256MB") -> None:
        self.port = port
        self.url = f"nats://127.0.0.1:{port}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self._config = directory / "nats.conf"
        self.configure(max_file_store)

    def configure(self, max_file_store: str) -> None:
        """What the next `start` may store."""
        self._config.write_text(
            f"listen: 127.0.0.1:{self.port}\n"
            f'jetstream {{ store_dir: "{self._directory}", max_file_store: {max_file_store} }}\n',
            encoding="utf-8",
        )

    def start(self) -> None:
        """Start it and wait until it greets."""
        program = find()
        assert program is not None
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-c", str(self._config)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._greets():
            assert self._process.poll() is None, (self._directory / "log").read_text()
            assert time.monotonic() < deadline, "nats-server does not answer"
            time.sleep(0.02)

    def forget(self) -> None:
        """Delete what it stored."""
        shutil.rmtree(self._directory / "jetstream", ignore_errors=True)

    def _greets(self) -> bool:
        address = ("127.0.0.1", self.port)
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1) as there:
            return there.recv(4) == b"INFO"
        return False

    def kill(self) -> None:
        """SIGKILL: no goodbye, no flush."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it properly."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(timeout=10)
