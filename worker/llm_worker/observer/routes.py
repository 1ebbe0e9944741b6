"""The system server's routes: what each answers, with which status, and to whom.

It only calls what it was handed. Writing routes ask for the bearer token beyond loopback, and
everywhere once there is one; a web page that a browser shows can use none of them.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llm_worker.kv import routes as kv_routes
from llm_worker.observer.probes import PATHS, Probes

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from llm_worker.exposition.exposition import Exposition
    from llm_worker.observer.health import Health

_Endpoint = Callable[[Request], Awaitable[Response]]


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
    needs_token = open_to_others or token is not None

    async def report(_: Request) -> Response:
        body = handlers.health.report()
        return JSONResponse(body, 200 if body["live"] and body["ready"] else 503)

    async def version(_: Request) -> Response:
        return JSONResponse(handlers.version())

    async def engine_info(_: Request) -> Response:
        info = handlers.engine_info()
        if info is None:
            return JSONResponse(_error("the engine is not up yet; see /health"), 503)
        return JSONResponse(info)

    async def drain(_: Request) -> Response:
        handlers.drain()
        return JSONResponse({"state": "draining"}, 202)

    writing = [Route("/engine/drain", drain, methods=["POST"])]
    routes = [
        Route("/health", report),
        Route("/version", version),
        Route("/engine/info", engine_info),
    ]
    if handlers.kv is not None:
        routes += kv_routes.reading(handlers.kv)
        writing += kv_routes.writing(handlers.kv)
    routes += [_guarded(route, needs_token=needs_token, token=token) for route in writing]
    app = application(routes)
    if not open_to_others:
        app = _OnlyAddresses(app)
    return Probes(app, handlers.health, handlers.exposition)


def application(routes: Sequence[Route]) -> ASGIApp:
    """These routes, with an error in JSON for every other request."""
    known = ", ".join(sorted({*PATHS, *(route.path for route in routes)}))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"no route {request.url.path}; there are {known}"
        elif error.status_code == 405:
            message = f"{request.method} is not a method of {request.url.path}"
        return JSONResponse(_error(message), error.status_code, error.headers)

    return Starlette(routes=list(routes), exception_handlers={HTTPException: refused})


def _guarded(route: Route, *, needs_token: bool, token: str | None) -> Route:
    endpoint: _Endpoint = route.endpoint

    @functools.wraps(endpoint)
    async def guarded(request: Request) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403, f"writing routes are not for pages of {origin}")
        if needs_token:
            _check_token(request.headers.get("authorization", ""), token)
        return await endpoint(request)

    return Route(route.path, guarded, methods=list(route.methods or ()))


def _check_token(given: str, token: str | None) -> None:
    if token is None:
        fix = "set --worker-system-token-file, or bind the system server to 127.0.0.1"
        raise HTTPException(403, f"writing routes are off without a token: {fix}")
    scheme, _, value = given.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(value.encode(), token.encode()):
        raise HTTPException(401, "a bearer token is needed", {"www-authenticate": "Bearer"})


class _OnlyAddresses:
    """ASGI: on loopback, refuses a request for a host that is neither an address nor localhost.

    A page may have its name resolve to 127.0.0.1, and would then read what is served here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"host", b"localhost").decode("latin-1")
            host = urlsplit(f"//{given}").hostname or ""
            if not _is_local_name(host):
                message = f"the system server is at an address or at localhost, not at {host!r}"
                await JSONResponse(_error(message), 421)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_local_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return True


def _error(message: str) -> dict[str, Any]:
    return {"error": message}
