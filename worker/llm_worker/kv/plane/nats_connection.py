"""A NATS client that is always there: connected, or trying to be.

Owns one connection after another, and what ends one. Knows nothing of KV events.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, NoReturn

import nats.errors
from nats.aio.client import Client

RETRY_SECONDS = (0.1, 5.0)  # first, longest
_LOOK_SECONDS = 1.0  # between two looks at a connection that did not say that it ended
TROUBLE = (nats.errors.Error, OSError, TimeoutError)  # of the network and the server


async def stay_connected(
    url: str,
    name: str,
    live: Callable[[Client], Coroutine[Any, Any, None]],
    *,
    failed: Callable[[Exception], None],
    ended: Callable[[Exception], Awaitable[None]],
) -> NoReturn:
    """Run ``live`` with a client for as long as that is connected, then with another, for ever.

    A client serves one connection only: nats-py's own reconnecting ends for good when the server
    reports an error (``-ERR``). ``failed`` is told of trouble that need not be the end, ``ended``
    why ``live`` ended, before the next try.
    """
    shortest, longest = RETRY_SECONDS
    pause = shortest
    while True:
        began = time.monotonic()
        try:
            await _connect_and(live, url, name, failed)
        except Exception as error:  # whatever it was, somebody still waits for us
            await ended(error)
        if time.monotonic() - began > 2 * longest:
            pause = shortest
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
        pause = min(pause * 2, longest)


async def _connect_and(
    live: Callable[[Client], Coroutine[Any, Any, None]],
    url: str,
    name: str,
    failed: Callable[[Exception], None],
) -> NoReturn:
    """Connect, now or whenever the server comes, and ``live`` until the connection is lost.

    Raises:
        nats.errors.Error, OSError: it is lost, or was refused.
        Exception: what ``live`` raises.
    """
    closed = asyncio.Event()
    client = Client()

    async def note(error: Exception) -> None:
        failed(error)

    async def close() -> None:
        closed.set()

    try:
        await client.connect(
            url,
            name=name,
            error_cb=note,
            closed_cb=close,
            allow_reconnect=False,
            max_reconnect_attempts=-1,  # before the first connection
            reconnect_time_wait=random.uniform(0.5, 1.5),  # type: ignore[arg-type]  # noqa: S311
            connect_timeout=2,
            ping_interval=10,
            max_outstanding_pings=2,
        )
        living = asyncio.create_task(live(client), name=name)
        living.add_done_callback(lambda _: closed.set())
        try:
            # A client whose closing breaks does not call back.
            while not (client.is_closed or living.done()):
                await wait(closed, _LOOK_SECONDS)
        finally:
            await cancelled([living])
        error = None if living.cancelled() else living.exception()
        if error is None or (client.is_closed and isinstance(error, TROUBLE)):
            error = client.last_error or nats.errors.ConnectionClosedError()
        raise error
    finally:
        await quietly(client.close())


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """End them: cancelled until they have ended, as the client swallows some cancellations."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=1)


async def quietly(end: Coroutine[Any, Any, None]) -> None:
    """Close within a second; there is nothing to be done if that fails."""
    with contextlib.suppress(*TROUBLE):
        await asyncio.wait_for(end, 1)


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Until it is set, or for so long."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
