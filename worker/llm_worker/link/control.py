"""Calls from the observer to serving, each with a deadline.

The supervisor makes one socket pair, the broker, that both inherit for life. An observer that
starts makes a connection of its own and sends one end through the broker, so what a crashed
predecessor left half-written is in nobody's way, and there is no name that anybody else could
connect to. On a connection: frames of four bytes length and msgpack; ``[id, method, arguments]``
one way, ``[id, error, result]`` back, in any order.

Serving answers on its own loop: a loop that is stuck costs the caller its deadline, nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any

import msgspec

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 256 << 20  # the hashes of 16 million blocks
MAX_CALLS = 32  # under way on one connection; more are refused
_LENGTH = struct.Struct("<I")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

# method → what it does with its arguments. A ValueError's text goes to who asked.
Methods = Mapping[str, Callable[..., Awaitable[Any]]]


class ControlError(RuntimeError):
    """Serving did not answer: it is gone, late, or what was asked failed. Handled by who asked."""

    def __init__(self, method: str, cause: str) -> None:
        super().__init__(f"{method}: {cause}")
        self.method = method
        self.cause = cause


class Control:
    """The observer's end. Every method may be called from any thread."""

    def __init__(self, broker: socket.socket) -> None:
        """Connect through ``broker``. Serving need not have started."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(broker, [b"c"], [theirs.fileno()])
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[Any]] = {}
        # A thread of its own sends: a frame that was begun is finished, whoever waits for it.
        self._outgoing: queue.Queue[bytes | None] = queue.Queue(MAX_CALLS)
        self._gone = False
        for work, name in ((self._read, "control-read"), (self._write, "control-write")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """What ``method`` returns in serving; waits ``seconds`` at most.

        Raises:
            ValueError: serving found the arguments wrong.
            ControlError: there is no answer.
        """
        number = next(self._numbers)
        answer: Future[Any] = Future()
        frame = _encode((number, method, arguments))
        self._waiting[number] = answer
        try:
            if self._gone:
                raise ControlError(method, "serving is gone")
            self._outgoing.put_nowait(_LENGTH.pack(len(frame)) + frame)
            return answer.result(seconds)
        except queue.Full:
            raise ControlError(method, "serving is busy with other calls") from None
        except TimeoutError:
            raise ControlError(method, f"serving did not answer in {seconds:g} s") from None
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        """Call no more."""
        self._end()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        while (frame := self._outgoing.get()) is not None:
            try:
                self._socket.sendall(frame)
            except OSError:
                self._end()
                return

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as stream:
                while head := stream.read(_LENGTH.size):
                    number, error, result = _decode(stream.read(*_LENGTH.unpack(head)))
                    answer = self._waiting.pop(number, None)
                    if answer is None:
                        continue  # who asked does not wait any more
                    if error is None:
                        answer.set_result(result)
                    elif error[0] == "ValueError":
                        answer.set_exception(ValueError(error[1]))
                    else:
                        answer.set_exception(ControlError(f"call {number}", ": ".join(error)))
        except (OSError, ValueError, msgspec.MsgspecError, struct.error) as error:
            if not self._gone:
                log.warning("the control connection broke: %r", error)
        self._end()

    def _end(self) -> None:
        self._gone = True
        with contextlib.suppress(queue.Full):
            self._outgoing.put_nowait(None)
        for number in list(self._waiting):
            answer = self._waiting.pop(number, None)
            if answer is not None:
                answer.set_exception(ControlError(f"call {number}", "serving is gone"))


class ControlServer:
    """Serving's end: answers on the running loop until it is closed."""

    def __init__(self, broker: socket.socket, methods: Methods) -> None:
        self._broker = broker
        self._methods = methods
        self._connections: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Take connections from now on; on the loop."""
        self._broker.setblocking(False)
        asyncio.get_running_loop().add_reader(self._broker, self._accept)

    async def close(self) -> None:
        """Answer no more."""
        asyncio.get_running_loop().remove_reader(self._broker)
        tasks = [*self._connections, *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._broker, 1, 1)
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("no control connection could be taken: %s", error)
            return
        if not message:  # the supervisor is gone, and so is this process in a moment
            asyncio.get_running_loop().remove_reader(self._broker)
        for descriptor in descriptors:
            connection = socket.socket(fileno=descriptor)
            task = asyncio.get_running_loop().create_task(self._serve(connection), name="control")
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 20)
        try:
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if length > MAX_FRAME_BYTES:
                    log.warning("a control frame of %d bytes: connection closed", length)
                    return
                number, method, arguments = _decode(await reader.readexactly(length))
                if len(self._calls) >= MAX_CALLS:
                    _answer(writer, number, ("busy", f"{MAX_CALLS} calls are under way"), None)
                    continue
                call = asyncio.create_task(self._call(writer, number, method, arguments))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the observer ended
        finally:
            writer.close()

    async def _call(
        self, writer: asyncio.StreamWriter, number: int, method: str, arguments: list[Any]
    ) -> None:
        error: tuple[str, str] | None = None
        result: Any = None
        work = self._methods.get(method)
        if work is None:
            error = ("unknown", f"no method {method!r}")
        else:
            try:
                result = await work(*arguments)
            except Exception as raised:  # the boundary: whoever asked is told
                error = (type(raised).__name__, str(raised))
        if not writer.is_closing():
            _answer(writer, number, error, result)


def _answer(
    writer: asyncio.StreamWriter, number: int, error: tuple[str, str] | None, result: Any
) -> None:
    frame = _encode((number, error, result))
    writer.write(_LENGTH.pack(len(frame)) + frame)
