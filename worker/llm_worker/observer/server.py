"""The system server: the worker's state and metrics on a port, a thread and a loop of its own.

Owns its routes and what status each answer gets. A busy, stuck or dead serving loop never hides
what it has to say. It only calls what it was handed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import json
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from llm_worker.errors import ConfigError
from llm_worker.exposition.exposition import Exposition
from llm_worker.kv import routes as kv_routes
from llm_worker.observer.health import Health, Verdict

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

_JSON = (b"content-type", b"application/json")


@dataclass(frozen=True, slots=True)
class Handlers:
    """What the routes call; every one may be called from the system server's thread."""

    health: Health
    exposition: Exposition
    version: Callable[[], dict[str, Any]]
    engine_info: Callable[[], dict[str, Any] | None]  # None before the engine is up
    drain: Callable[[], None]  # stop as SIGTERM does
    kv: kv_routes.KvHandlers | None = None  # None: no KV events are asked for


def create_app(handlers: Handlers, *, token: str | None, open_to_others: bool) -> ASGIApp:
    """The system server's application.

    Writing routes need no token on loopback. Beyond it they need the bearer token, and without one
    configured they are refused.
    """
    routes = _routes(handlers, token=token, open_to_others=open_to_others)
    return Probes(routes, handlers.health, handlers.exposition)


class Probed(Protocol):
    """Who knows whether a program is well; see `health.Health`."""

    def live(self) -> Verdict:
        """Does it breathe?"""

    def ready(self) -> Verdict:
        """Would it answer now?"""


class Probes:
    """Answers ``/live``, ``/ready`` and ``/metrics`` itself and leaves the rest to an application.

    These are asked all day, and every microsecond they take under the interpreter lock is one that
    the serving loop waits. FastAPI's way to a handler takes most of what such an answer costs.
    """

    def __init__(self, app: ASGIApp, health: Probed, exposition: Exposition) -> None:
        self._app = app
        self._health = health
        self._exposition = exposition

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; ASGI 3."""
        if scope["type"] == "http" and scope["method"] == "GET":
            path = scope["path"]
            if path in {"/live", "/ready"}:
                verdict = self._health.live() if path == "/live" else self._health.ready()
                body = _OK if verdict.ok else json.dumps(_verdict(verdict)).encode()
                await _send(send, 200 if verdict.ok else 503, body, [_JSON])
                return
            if path == "/metrics":
                await self._metrics(scope, send)
                return
        await self._app(scope, receive, send)

    async def _metrics(self, scope: Scope, send: Send) -> None:
        headers = dict(scope["headers"])
        asked = (
            headers.get(b"accept", b"").decode("latin-1"),
            headers.get(b"accept-encoding", b"").decode("latin-1"),
            parse_qs(scope["query_string"].decode("latin-1")).get("name[]", []),
        )
        # In a thread of its own: a page takes milliseconds, and no probe shall wait for it.
        rendered = await asyncio.to_thread(self._exposition.render, *asked)
        answer = [(b"content-type", rendered.content_type.encode())]
        if rendered.content_encoding:
            answer.append((b"content-encoding", rendered.content_encoding.encode()))
        await _send(send, 200, rendered.body, answer)


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _routes(handlers: Handlers, *, token: str | None, open_to_others: bool) -> FastAPI:
    app = FastAPI(title="llm-worker system server", docs_url=None, redoc_url=None)
    health = handlers.health

    def authorise(request: Request) -> None:
        if open_to_others or token:
            _check_token(request.headers.get("authorization", ""), token)

    writing = APIRouter(dependencies=[Depends(authorise)])

    @app.get("/health")
    async def report() -> Response:
        body = health.report()
        return JSONResponse(body, 200 if body["live"] and body["ready"] else 503)

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return handlers.version()

    @app.get("/engine/info")
    async def engine_info() -> Response:
        info = handlers.engine_info()
        if info is None:
            return JSONResponse(_error("the engine is not up yet; see /health"), 503)
        return JSONResponse(info)

    @writing.post("/engine/drain")
    async def drain() -> Response:
        handlers.drain()
        return JSONResponse({"state": "draining"}, 202)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return JSONResponse(_error(str(error.detail)), error.status_code, error.headers)

    name_unknown_routes(app)
    if handlers.kv is not None:
        app.include_router(kv_routes.reading(handlers.kv))
        writing.include_router(kv_routes.writing(handlers.kv))
    app.include_router(writing)
    return app


def name_unknown_routes(app: FastAPI) -> None:
    """Have a 404 say which route there is none of."""

    @app.exception_handler(404)
    async def unknown(request: Request, _: Exception) -> Response:
        return JSONResponse(_error(f"no route {request.url.path}; {_ROUTES}"), 404)


_ROUTES = "there are /live, /ready, /metrics and those of /openapi.json"
_OK = json.dumps({"ok": True, "reasons": []}).encode()


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {"ok": verdict.ok, "reasons": list(verdict.reasons)}


def _check_token(given: str, token: str | None) -> None:
    if token is None:
        fix = "set --worker-system-token-file, or bind the system server to 127.0.0.1"
        raise HTTPException(403, f"writing routes are off without a token: {fix}")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise HTTPException(401, "a bearer token is needed", {"www-authenticate": "Bearer"})


def _error(message: str) -> dict[str, Any]:
    return {"error": message}


class SystemServer:
    """Serves ``app`` from its own thread until it is closed."""

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        """Bind the port, so that a busy one is an error here and not in the background.

        Raises:
            ConfigError: the address cannot be bound.
        """
        self._socket = _bind(host, port)
        self.host = host
        self.port: int = self._socket.getsockname()[1]
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
        log.info("system server on http://%s:%d", self.host, self.port)

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


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # From here on a probe waits for its answer instead of being refused while the thread
        # starts, and a second worker cannot bind the same port.
        listener.listen()
    except OSError as error:
        raise ConfigError(
            [
                f"the system server cannot listen on {host}:{port} ({error.strerror or error}): "
                "choose another --worker-system-port, or stop what holds it"
            ]
        ) from error
    return listener
