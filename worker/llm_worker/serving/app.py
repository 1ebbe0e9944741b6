"""The life of the serving process: engine, vLLM's API on it, drain, exit code. Reads top-down.

Owns what serving depends on, and the order in which it stops: unready, drain, HTTP, engine. What
only looks at it (pulse, metrics, calls from the observer) can fail without ending a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry

from llm_worker.errors import (
    EXIT_ENGINE_DIED,
    EXIT_INTERNAL,
    EXIT_START_FAILED,
    EXIT_STOPPED,
    ConfigError,
    EngineDiedError,
    EngineStartError,
)
from llm_worker.exposition.exposition import Exposition
from llm_worker.exposition.multiprocess import NotInFiles
from llm_worker.lifecycle import Lifecycle, State
from llm_worker.link.board import Board
from llm_worker.link.control import ControlServer
from llm_worker.link.status import HURRY, KvFacts
from llm_worker.metrics import ExporterMetrics, ServingMetrics
from llm_worker.serving.publisher import Publisher
from llm_worker.settings.worker import Config

if TYPE_CHECKING:
    import uvicorn

    from llm_worker.exposition.multiprocess import MultiprocessDirectory
    from llm_worker.serving.engine import Engine

log = logging.getLogger(__name__)

# The sum of these stays under supervisor.WAY_OUT_SECONDS.
ERROR_FLUSH_SECONDS = 5  # in-flight requests of a dead engine get their error
ENGINE_STOP_SECONDS = 5.0
EXIT_MARGIN_SECONDS = 10.0  # past all of the above the process is ended by force
HEARTBEAT_SECONDS = 0.25
TRUTH_SECONDS = 10.0  # for the engine to tell which KV blocks it holds


class Serving:
    """One engine and its API."""

    def __init__(
        self,
        config: Config,
        board: int,
        broker: int,
        multiprocess: MultiprocessDirectory | None = None,
    ) -> None:
        """``board`` and ``broker`` are descriptors from the supervisor; see `link`."""
        self._config = config
        self._began = time.monotonic()
        registry = CollectorRegistry()
        self.metrics = ServingMetrics(registry)
        self._board = Board(board)
        self._broker = socket.socket(fileno=broker)
        self._broker.set_inheritable(False)
        self._publisher = Publisher(self._board, os.getpid(), self.metrics)
        exposition = Exposition(ExporterMetrics(CollectorRegistry()), config.constant_labels)
        if multiprocess is None:
            exposition.register("llm_worker", registry)
            exposition.register("vllm", REGISTRY)
        else:
            exposition.register_multiprocess(multiprocess)
            exposition.register("vllm", NotInFiles(REGISTRY))
        self.lifecycle = Lifecycle(self._publisher.note)
        self._publisher.start(exposition)
        self._background: set[asyncio.Task[None]] = set()

    def run(self) -> int:
        """Serve until asked to stop or until the engine dies; return the exit code.

        Raises:
            ConfigError: a setting turned out to be wrong only now, such as a busy port.
        """
        try:
            with self._phase("import"):
                from llm_worker.serving import launch

                launch.prepare_environment()
                import uvloop
                import vllm
            self._publisher.say(vllm_version=vllm.__version__)
            uvloop.run(self._main())
        except EngineStartError as error:
            log.exception("start-up failed in phase %s", error.phase, extra={"phase": error.phase})
            self.lifecycle.to(State.DEAD, str(error))
            return EXIT_START_FAILED
        except EngineDiedError as error:
            log.error("%s", error)  # noqa: TRY400 - where it was raised says nothing
            return EXIT_ENGINE_DIED
        finally:
            self._publisher.close()
        return EXIT_STOPPED

    async def _main(self) -> None:
        """Start the engine and the API, serve, stop; on the serving loop.

        Raises:
            ConfigError, EngineStartError: it did not come up.
            EngineDiedError: it came up and died.
        """
        from llm_worker.serving import launch
        from llm_worker.serving.engine import Engine

        args = launch.parse_arguments(self._config)
        listener = launch.bind_api(args)
        try:
            engine = await Engine.start(args, self._config, self.metrics, self._phase)
            self.lifecycle.to(State.WARMING)
            await self._say_facts(engine)
            control = ControlServer(self._broker, self._methods(engine))
            control.start()
            with self._phase("api"):
                started = asyncio.Event()
                server = await engine.build_api(self._config.drain_seconds, started.set)
            with self._phase("warmup"):
                await engine.warm_up()
            self._note_model_load(engine)
        except ConfigError:
            raise
        except Exception as error:
            raise EngineStartError(self.lifecycle.phase, f"{error}") from error
        try:
            await self._serve(engine, server, listener, started)
        finally:
            await control.close()
            await asyncio.to_thread(engine.stop, ENGINE_STOP_SECONDS)

    async def _serve(
        self,
        engine: Engine,
        server: uvicorn.Server,
        listener: socket.socket,
        started: asyncio.Event,
    ) -> None:
        loop = asyncio.get_running_loop()
        stop, hurry = asyncio.Event(), asyncio.Event()
        # The same again is no hurry: a service manager signals every process of the worker.
        for number, event in (
            (signal.SIGTERM, stop), (signal.SIGINT, stop), (HURRY, hurry)
        ):  # fmt: skip
            loop.add_signal_handler(number, event.set)
        self._in_background(self._beat(), "heartbeat")
        self._in_background(self._announce(started), "announce")
        async with asyncio.TaskGroup() as tasks:
            api = tasks.create_task(server.serve(sockets=[listener]), name="api")
            died = tasks.create_task(engine.died(), name="engine-watch")
            watch = tasks.create_task(stop.wait(), name="stop-watch")
            await asyncio.wait({api, died, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not died.done():
                await self._drain(engine, server, {api, died}, hurry)
            cause = died.result() if died.done() else None
            if cause is not None:
                self._give_up(server, cause)
                await asyncio.wait({api})
            for task in (died, watch):
                task.cancel()
        if cause is not None:
            raise EngineDiedError(cause)
        if not stop.is_set():
            raise RuntimeError("the API server ended by itself")

    async def _drain(
        self,
        engine: Engine,
        server: uvicorn.Server,
        ends: set[asyncio.Task[Any]],
        hurry: asyncio.Event,
    ) -> None:
        """Unready at once; a lame duck first, then no new connections; return when one of ``ends``.

        Asked once more, requests in flight are given up.
        """
        lame = self._config.lame_duck_seconds
        self.lifecycle.to(State.DRAINING, "asked to stop")
        self._end_by_force_after(lame + self._config.drain_seconds, EXIT_INTERNAL)
        hurried = asyncio.create_task(hurry.wait(), name="hurry-watch")
        try:
            if lame:
                await asyncio.wait(
                    {*ends, hurried}, timeout=lame, return_when=asyncio.FIRST_COMPLETED
                )
            engine.cut_off_after(self._config.drain_seconds)
            server.should_exit = True
            await asyncio.wait({*ends, hurried}, return_when=asyncio.FIRST_COMPLETED)
            if hurried.done() and not any(task.done() for task in ends):
                log.warning("asked to stop once more: requests in flight are given up")
                engine.cut_off_after(0.0)
                server.force_exit = True
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurried.cancel()

    def _give_up(self, server: uvicorn.Server, cause: str) -> None:
        """The engine died: nothing can finish, everything in flight gets its error."""
        self.lifecycle.to(State.DEAD, cause)
        self._end_by_force_after(ERROR_FLUSH_SECONDS, EXIT_ENGINE_DIED)
        server.config.timeout_graceful_shutdown = ERROR_FLUSH_SECONDS
        server.should_exit = True

    def _end_by_force_after(self, seconds: float, code: int) -> None:
        """Whatever hangs on the way out, the process ends; the supervisor ends what it started."""

        def end() -> None:
            log.critical("the way out hangs; ending by force", extra={"exit_code": code})
            logging.shutdown()
            os._exit(code)

        timer = threading.Timer(seconds + ENGINE_STOP_SECONDS + EXIT_MARGIN_SECONDS, end)
        timer.daemon = True
        timer.start()

    # -- what looks at it, and may fail --------------------------------------------------------

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run ``work`` beside serving: if it breaks, that is logged."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._background.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("%s broke; serving goes on", name, exc_info=error)

        task.add_done_callback(ended)

    async def _beat(self) -> None:
        """The loop's pulse, and how late each beat came. A timer is the point here."""
        lag = self.metrics.serving_loop_lag_seconds
        while True:
            due = time.monotonic() + HEARTBEAT_SECONDS
            self._board.beat_loop()
            await asyncio.sleep(HEARTBEAT_SECONDS)
            lag.observe(max(0.0, time.monotonic() - due))

    async def _announce(self, started: asyncio.Event) -> None:
        """Become ready once the API server listens."""
        await started.wait()
        if self.lifecycle.state is not State.WARMING:
            return
        self.metrics.startup_phase_seconds.labels("total").set(time.monotonic() - self._began)
        self.lifecycle.enter_phase("")
        self.lifecycle.to(State.READY)

    async def _say_facts(self, engine: Engine) -> None:
        """Tell what the observer needs: which processes to watch, where KV events come from."""
        kv = None
        if self._config.kv_index is not None:
            try:
                await asyncio.wait_for(engine.kv_truth(), TRUTH_SECONDS)
            except Exception as error:  # the plug-in is missing there: no audits, no hashing
                log.warning("the engine does not tell what its KV cache holds: %s", error)
            kv = KvFacts(
                sources=engine.kv_event_sources(),
                block_size=engine.kv_block_size_tokens(),
                max_tokens=engine.info().max_model_len_tokens,
            )
        self._publisher.say(
            engine_pids=engine.pids(),
            segments=engine.segments(),
            model_name=engine.model_name,
            engine=dataclasses.asdict(engine.info()),
            kv=kv,
        )

    def _methods(self, engine: Engine) -> dict[str, Any]:
        """What the observer may ask for; see `link.control`."""

        async def kv_truth(full: bool) -> list[dict[str, Any]]:
            return await asyncio.wait_for(engine.kv_truth(full), TRUTH_SECONDS)

        return {"kv_truth": kv_truth, "hash_blocks": engine.hash_blocks}

    def _note_model_load(self, engine: Engine) -> None:
        seconds = engine.model_load_seconds()
        if seconds is not None:
            self.metrics.startup_phase_seconds.labels("model_load").set(seconds)
            self.metrics.model_load_seconds.labels(engine.model_name).set(seconds)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.lifecycle.enter_phase(name)
        began = time.monotonic()
        yield
        self.metrics.startup_phase_seconds.labels(name).set(time.monotonic() - began)
