"""The request ledger: every request is received once and ends once, whatever becomes of it.

Owns the wrapper around ``AsyncLLM.generate`` and ``encode``, and the middleware that sees what
vLLM's API refuses by itself. vLLM counts neither client disconnects nor refusals. Never lets an
exception of ours out, and adds one generator frame per streamed output, nothing more.
Source: vllm/v1/engine/async_llm.py, vllm/exceptions.py, 0.32.0.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import (
    GracefulHTTPError,
    MaxQueuedTokensError,
    QueueOverflowError,
    VLLMClientError,
)
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from llm_worker.metrics import ENDINGS, StatMetrics

log = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 60.0

# The routes on which a request is one for the model; tests/contract holds them to vLLM's.
INFERENCE = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/systemone",
        "/v2/embed",
        "/cohere/v2/chat",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/pooling",
        "/classify",
        "/score",
        "/rerank",
    }
)


@dataclass(slots=True)
class _Visit:
    """One HTTP request on its way through vLLM's API."""

    reached_engine: bool = False
    status: int = 0  # 0 until the answer starts
    rejection: str = ""  # by vLLM's admission control, and why


_visit: ContextVar[_Visit | None] = ContextVar("llm_worker_visit", default=None)


def install_ledger(metrics: StatMetrics) -> None:
    """Count every request that ``AsyncLLM.generate`` or ``encode`` takes, and how it ends.

    Wraps both on the class, once per process; calling it again only sends later requests to the
    new ``metrics``. A request is received when its generator is first advanced, so one that is
    never iterated is none. With n > 1 it is one request, and the last completion's finish reason is
    its reason. Requests that vLLM's API refuses before they reach the engine are `Refusals`' to
    count; the sub-requests of a beam search each are one.
    """
    global _ledger  # noqa: PLW0603  the wrapped class is process-wide as well
    _ledger = _Ledger(metrics)
    for name in ("generate", "encode"):
        original = getattr(AsyncLLM, name)
        if not hasattr(original, "_llm_worker_original"):
            setattr(AsyncLLM, name, _counted(original))


def note_rejection(reason: str) -> None:
    """Have the request that is served right now end as rejected for this reason.

    vLLM asks its admission control before it hands a request over, and tells stat loggers the
    reason; what it answers is a 503 like that of a broken server.
    """
    visit = _visit.get()
    if visit is not None:
        visit.rejection = reason


def cut_off_at(moment: float) -> None:
    """From this time.monotonic() on a request whose consumer goes was cut off by the drain."""
    global _cut_off  # noqa: PLW0603  the process drains once, with all that it serves
    _cut_off = moment


_cut_off = float("inf")


class _Ledger:
    def __init__(self, metrics: StatMetrics) -> None:
        self._metrics = metrics
        self._errors = CaughtErrors(metrics)

    def receive(self, engine: Any, lora_request: Any) -> Callable[[str, str], None] | None:
        """Count one request in; return what counts it out, or None if that failed."""
        try:
            name = (
                engine.model_config.served_model_name
                if lora_request is None
                else lora_request.lora_name
            )
            ledger = self._metrics.ledger(name)
            ledger.receive()
        except Exception as error:
            self._errors.caught("ledger", error)
            return None
        return ledger.end

    def end(self, end: Callable[[str, str], None] | None, outcome: str, reason: str) -> None:
        if end is None:
            return
        try:
            end(outcome, reason)
        except Exception as error:
            self._errors.caught("ledger", error)


_ledger: _Ledger


def _counted(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., Any]:
    """Wrap an async generator method of ``AsyncLLM`` so that its end is counted, once.

    Per output this adds one generator frame and nothing else; the last output is looked at only
    when the request is over.
    """

    @functools.wraps(original)
    async def counted(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        visit = _visit.get()
        if visit is not None:
            visit.reached_engine = True
        ledger = _ledger
        lora = kwargs.get("lora_request")
        if lora is None and original.__name__ == "encode" and len(args) > 3:
            lora = args[3]  # encode(prompt, pooling_params, request_id, lora_request, ...)
        end = ledger.receive(self, lora)
        outputs = original(self, *args, **kwargs)
        output: Any = None
        try:
            async for output in outputs:
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            # A consumer may also stop right after the last output; then the request was served.
            if output is not None and output.finished:
                ledger.end(end, "finished", finish_reason(output))
            elif time.monotonic() >= _cut_off:
                ledger.end(end, "errored", "drain_timeout")
            else:
                ledger.end(end, "disconnected", "client")
            raise
        except BaseException as error:
            ledger.end(end, *failure(error))
            raise
        else:
            ledger.end(end, "finished", finish_reason(output))
        finally:
            # Closed here, not when the garbage collector finds it: vLLM aborts the request there.
            await outputs.aclose()

    counted._llm_worker_original = original  # type: ignore[attr-defined]
    return counted


def finish_reason(output: Any) -> str:
    """Return why a served request finished: the last of its completions that says so.

    Pooling outputs have no reason and streamed inputs may end without any output: ``stop``.
    A reason that is not in ``ENDINGS`` is an ``error``: it is one of a newer vLLM.
    """
    completions = getattr(output, "outputs", None)
    reason = "stop"
    if isinstance(completions, list):
        for completion in completions:
            reason = getattr(completion, "finish_reason", None) or reason
    return reason if ("finished", reason) in ENDINGS else "error"


def failure(error: BaseException) -> tuple[str, str]:
    """Return the ending of a request that raised: (outcome, reason)."""
    if isinstance(error, QueueOverflowError):
        return "rejected", "max_num_queued_reqs"
    if isinstance(error, MaxQueuedTokensError):
        return "rejected", "max_num_queued_tokens"
    if isinstance(error, (VLLMClientError, GracefulHTTPError)):
        return "rejected", "invalid"
    if isinstance(error, EngineDeadError):
        return "errored", "engine_dead"
    return "errored", "internal"


class Refusals:
    """ASGI middleware of vLLM's API: requests that it refuses before they reach the engine.

    Bad JSON, an unknown model, a prompt that is too long: vLLM answers those itself, and the
    wrapped ``generate`` never sees them, nor those for which there is no room or no engine any
    more. They are received and end all the same, under the served model's name. A request without
    valid credentials (401, 403) is left to the HTTP metrics.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: StatMetrics,
        model_name: str,
        engine_dead: Callable[[], bool],
    ) -> None:
        self._app = app
        self._ledger = metrics.ledger(model_name)
        self._engine_dead = engine_dead

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and look at how a refused request was answered."""
        if scope["type"] != "http" or scope["path"] not in INFERENCE or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        visit = _Visit()
        token = _visit.set(visit)

        def watch(message: Message) -> Awaitable[None]:  # no coroutine of ours per chunk
            if message["type"] == "http.response.start":
                visit.status = message["status"]
            return send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            _visit.reset(token)
            if not visit.reached_engine and visit.status >= 400 and visit.status not in (401, 403):
                self._ledger.receive()
                self._ledger.end(*self._ending(visit))

    def _ending(self, visit: _Visit) -> tuple[str, str]:
        if ("rejected", visit.rejection) in ENDINGS:
            return "rejected", visit.rejection
        if visit.status < 500:
            return "rejected", "invalid"
        return "errored", "engine_dead" if self._engine_dead() else "internal"


class CaughtErrors:
    """Counts what was caught instead of raised, and logs each stage at most once a minute."""

    def __init__(self, metrics: StatMetrics) -> None:
        self._metrics = metrics
        self._logged: dict[str, float] = {}
        self._lock = threading.Lock()

    def caught(self, stage: str, error: Exception) -> None:
        """Count one exception of ``stage``: scheduler, iteration, finished or ledger."""
        self._metrics.stat_logger_errors_total.labels(stage).inc()
        now = time.monotonic()
        with self._lock:
            if now - self._logged.get(stage, -_LOG_EVERY_SECONDS) < _LOG_EVERY_SECONDS:
                return
            self._logged[stage] = now
        log.warning(
            "recording failed in stage %s; serving goes on, this stage's metrics miss a step",
            stage,
            exc_info=error,
            extra={"stage": stage},
        )
