"""A real nats-server with JetStream as a subprocess: on a free port, killed and started again.

And a proxy before one, which can say things in its name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import threading
from pathlib import Path

from support.waiting import until


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
        log_path = self._directory / "log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-c", str(self._config)], stdout=log, stderr=log
            )
        until("nats-server's greeting", self._greets, process=self._process, log=log_path)

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


class Proxy:
    """Passes on what a server and its clients say to each other."""

    def __init__(self, server: NatsServer) -> None:
        self._server = ("127.0.0.1", server.port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"nats://127.0.0.1:{self._listening.getsockname()[1]}"
        self.connections = 0  # so far
        self._open: list[_Pair] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def report(self, error: str) -> None:
        """Tell every client of an error as the server does, and hang up as it does."""
        pairs, self._open = self._open, []
        for pair in pairs:
            pair.end(f"-ERR '{error}'\r\n".encode())

    def close(self) -> None:
        """Take no more clients, and hang up."""
        self._listening.close()
        for pair in self._open:
            pair.end()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                try:
                    server = socket.create_connection(self._server)
                except OSError:
                    client.close()
                    continue
                self._open.append(_Pair(client, server))
                self.connections += 1


class _Pair:
    """One client's connection."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client, self._server = client, server
        self._between = threading.Condition()  # two messages to the client
        self._whole = True
        self._over = False
        threading.Thread(target=self._up, daemon=True).start()
        threading.Thread(target=self._down, daemon=True).start()

    def end(self, last_words: bytes = b"") -> None:
        """Hang up on both, between two messages."""
        with self._between:
            self._between.wait_for(lambda: self._whole, timeout=5)
            self._over = True
            with contextlib.suppress(OSError):
                self._client.sendall(last_words)
                self._client.shutdown(socket.SHUT_WR)
                self._server.shutdown(socket.SHUT_RDWR)

    def _hang_up(self) -> None:
        for each in (self._client, self._server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _up(self) -> None:
        with contextlib.suppress(OSError):
            while part := self._client.recv(1 << 16):
                if not self._over:  # else what it says is lost, and the last words are not
                    self._server.sendall(part)
        self._hang_up()

    def _down(self) -> None:
        with contextlib.suppress(OSError):
            while part := self._server.recv(1 << 16):
                with self._between:
                    self._client.sendall(part)
                    self._whole = part.endswith(b"\r\n")
                    self._between.notify_all()
        if not self._over:
            self._hang_up()
