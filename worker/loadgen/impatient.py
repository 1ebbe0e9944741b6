"""The clients that `vllm bench serve` does not play: those who leave, and those who ask too much.

Small HTTP requests on plain asyncio streams; what comes back is read only as far as the part needs.
"""

from __future__ import annotations

import asyncio
import json
import random
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 30.0
# More words than any context of the demo worker holds.
TOO_LONG_WORDS = 20_000


async def leave_midway(api: str, model: str, chance: random.Random) -> None:
    """Start a stream, read a few tokens of it and close the connection."""
    body = {
        "model": model,
        "prompt": f"tell me story {chance.randrange(1_000_000)} and make it long " * 8,
        "max_tokens": 512,
        "ignore_eos": True,
        "stream": True,
    }
    async with asyncio.timeout(TIMEOUT_SECONDS):
        reader, writer = await _post(api, "/v1/completions", body)
        try:
            wanted = chance.randint(2, 40)
            async for line in reader:
                if line.startswith(b"data: "):
                    wanted -= 1
                if wanted <= 0:
                    break
        finally:
            # Not closed politely: the peer sees the connection go, as with a browser tab.
            writer.transport.abort()


async def ask_too_much(api: str, model: str) -> int:
    """Send a prompt longer than the context; return the status, 400 from a right-minded server."""
    body = {"model": model, "prompt": "more " * TOO_LONG_WORDS, "max_tokens": 8}
    async with asyncio.timeout(TIMEOUT_SECONDS):
        reader, writer = await _post(api, "/v1/completions", body)
        try:
            return _status(await reader.readline())
        finally:
            writer.transport.abort()


async def status_of(url: str) -> int:
    """Return the status of a GET.

    Raises:
        OSError: nobody listens there.
        TimeoutError: no answer within five seconds.
        ValueError: the answer is not HTTP.
    """
    parts = urlsplit(url)
    async with asyncio.timeout(5.0):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            request = (
                f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n"
            )
            writer.write(request.encode())
            return _status(await reader.readline())
        finally:
            writer.transport.abort()


async def _post(
    api: str, path: str, body: dict[str, object]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(api)
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    await writer.drain()
    return reader, writer


def _status(line: bytes) -> int:
    fields = line.split()
    if len(fields) < 2 or not fields[1].isdigit():
        raise ValueError(f"not an HTTP status line: {line[:80]!r}")
    return int(fields[1])
