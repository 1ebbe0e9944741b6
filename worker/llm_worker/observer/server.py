"""One HTTP server on a thread and a loop of its own, on a socket that listens already."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import socket
import threading
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from starlette.types import ASGIApp

log = logging.getLogger(__name__)


class SystemServer:
    """Serves ``app`` from its own thread until it is closed."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self._socket = listener
        self.host: str = listener.getsockname()[0]
        self.port: int = listener.getsockname()[1]
        # Done when the thread ends; carries its exception.
        self.ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=1,
                lifespan="off",
            )
        )
        self._thread = threading.Thread(target=self._run, name="system-server", daemon=True)

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop serving and end the thread."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            # uvicorn's own choice of loop: uvloop where it is installed. asyncio's gives the
            # interpreter away at every socket call, and waits for it again each time.
            with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
                runner.run(self._server.serve(sockets=[self._socket]))
        except BaseException as error:
            self.ended.set_exception(error)
            raise
        self.ended.set_result(None)
