"""``/live``, ``/ready`` and ``/metrics``, answered without a framework's way to a handler.

These are asked all day. Owns their answers; leaves every other request to an application.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from llm_worker.exposition.exposition import Exposition
    from llm_worker.observer.health import Verdict

_JSON = (b"content-type", b"application/json")
PATHS = ("/live", "/ready", "/metrics")


class Probed(Protocol):
    """Who knows whether a program is well; see `health.Health`."""

    def live(self) -> Verdict:
        """Does it breathe?"""

    def ready(self) -> Verdict:
        """Would it answer now?"""


class Probes:
    """ASGI: answers GET and HEAD of `PATHS` itself."""

    def __init__(self, app: ASGIApp, health: Probed, exposition: Exposition) -> None:
        self._app = app
        self._health = health
        self._exposition = exposition
        # A page takes milliseconds, and no probe shall wait for it; nor it for any other thread.
        self._renderer = ThreadPoolExecutor(1, "metrics")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; ASGI 3."""
        if (
            scope["type"] != "http"
            or scope["path"] not in PATHS
            or scope["method"] not in ("GET", "HEAD")
        ):
            await self._app(scope, receive, send)
            return
        if scope["path"] == "/metrics":
            status, body, headers = 200, *await self._metrics(scope)
        else:
            verdict = self._health.live() if scope["path"] == "/live" else self._health.ready()
            status, headers = 200 if verdict.ok else 503, [_JSON]
            body = _OK if verdict.ok else json.dumps(_said(verdict)).encode()
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        body = b"" if scope["method"] == "HEAD" else body
        await send({"type": "http.response.body", "body": body})

    async def _metrics(self, scope: Scope) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        headers = dict(scope["headers"])
        rendered = await asyncio.get_running_loop().run_in_executor(
            self._renderer,
            self._exposition.render,
            headers.get(b"accept", b"").decode("latin-1"),
            headers.get(b"accept-encoding", b"").decode("latin-1"),
            parse_qs(scope["query_string"].decode("latin-1")).get("name[]", []),
        )
        answer = [
            (b"content-type", rendered.content_type.encode()),
            (b"vary", b"accept, accept-encoding"),
        ]
        if rendered.content_encoding:
            answer.append((b"content-encoding", rendered.content_encoding.encode()))
        return rendered.body, answer


def _said(verdict: Verdict) -> dict[str, Any]:
    return {"ok": verdict.ok, "reasons": list(verdict.reasons)}


_OK = json.dumps({"ok": True, "reasons": []}).encode()
