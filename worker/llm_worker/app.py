"""The worker's life, from the first listener to the exit code.

Owns every part, every task and the order in which they stop: unready, drain, HTTP, KV events, KV
plane, engine, system server, exit. Nothing else wires anything. Reads top-down.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry

from llm_worker import __version__
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
from llm_worker.lifecycle import ExitRecord, InvalidTransition, Lifecycle, State
from llm_worker.metrics import Metrics
from llm_worker.observer.health import Health, Heartbeat
from llm_worker.observer.server import Handlers, SystemServer, create_app
from llm_worker.processes import (
    adopt_orphans,
    end_descendants,
    mapped_segments,
    remove_segments,
)
from llm_worker.settings.worker import Config

if TYPE_CHECKING:
    import uvicorn

    from llm_worker.exposition.multiprocess import MultiprocessDirectory
    from llm_worker.kv.worker import WorkerKv
    from llm_worker.serving.engine import Engine

log = logging.getLogger(__name__)

# The sum of these and the drain stays under compose's stop_grace_period.
ERROR_FLUSH_SECONDS = 5  # in-flight requests of a dead engine get their error
ENGINE_STOP_SECONDS = 5.0
EXIT_MARGIN_SECONDS = 15.0  # past all of the above the process is ended by force
SIGN_OF_LIFE_SECONDS = 5.0
TRUTH_SECONDS = 10.0  # for the engine to tell which KV blocks it holds
# How long a thread may keep the interpreter while another waits; Python's default is 5 ms. Short,
# so that a probe does not wait for the serving loop's burst; not shorter, or tokens wait for pages.
SWITCH_INTERVAL_SECONDS = 0.0005


def run(config: Config, multiprocess: MultiprocessDirectory | None = None) -> int:
    """Serve until asked to stop or until the engine dies; return the exit code.

    Raises:
        ConfigError: a setting turned out to be wrong only now, such as a busy port.
    """
    adopt_orphans()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    return Worker(config, multiprocess).run()


class Worker:
    """One worker process."""

    def __init__(self, config: Config, multiprocess: MultiprocessDirectory | None) -> None:
        self._config = config
        self._multiprocess = multiprocess
        self._began = time.monotonic()
        registry = CollectorRegistry()
        self.metrics = Metrics(registry)
        self.exposition = Exposition(self.metrics, config.constant_labels)
        if multiprocess is None:
            self.exposition.register("llm_worker", registry)
            self.exposition.register("vllm", REGISTRY)
        else:
            self.exposition.register_multiprocess(multiprocess)
            self.exposition.register("vllm", NotInFiles(REGISTRY))
        self.lifecycle = Lifecycle(self.metrics)
        self.heartbeat = Heartbeat(self.metrics)
        self.health = Health(self.lifecycle, self.heartbeat)
        self._engine: Engine | None = None
        self._calling_off: threading.Thread | None = None
        self.kv: WorkerKv | None = None
        if config.kv_index is not None:
            from llm_worker.kv.worker import WorkerKv  # 40 ms before the system server is up

            self.kv = WorkerKv(
                config.worker_id or f"{socket.gethostname()}:{config.system_port or os.getpid()}",
                plane=config.kv_index.plane,
                max_blocks=config.kv_index.max_blocks,
                connector=config.kv_index.connector,
            )
            self.exposition.register("kv", self.kv.collector())
        handlers = Handlers(
            health=self.health,
            exposition=self.exposition,
            version=_versions,
            engine_info=self._engine_info,
            drain=lambda: os.kill(os.getpid(), signal.SIGTERM),
            kv=None if self.kv is None else self.kv.handlers(),
        )
        self.system_server = SystemServer(
            create_app(handlers, token=config.token(), open_to_others=config.open_to_others),
            config.system_host,
            config.system_port,
        )
        self._record = (
            ExitRecord(config.state_dir, str(self.system_server.port)) if config.state_dir else None
        )

    def run(self) -> int:
        """The life itself; see ``run`` above."""
        if self._record is not None and (last := self._record.begin()) is not None:
            self.metrics.last_exit_timestamp_seconds.labels(last.reason).set(last.timestamp)
        self.system_server.start()
        code, reason = EXIT_INTERNAL, "internal"
        try:
            code, reason = self._serve_to_the_end()
        except ConfigError:
            reason = "start_failed"
            raise
        finally:
            self._let_calling_off_end()
            self._clean_up(reason)
            if self.kv is not None:
                self.kv.close()
            self.system_server.close()
        log.info("exit %d: %s", code, reason, extra={"exit_code": code, "reason": reason})
        return code

    def _serve_to_the_end(self) -> tuple[int, str]:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._call_off_start)
        try:
            with self._phase("import"):
                from llm_worker.serving import engine as boundary

                boundary.prepare_environment()
                import uvloop
                import vllm
            self.metrics.set_build(__version__, vllm.__version__)
            uvloop.run(self._main())
        except EngineStartError as error:
            self._let_calling_off_end()
            log.exception("start-up failed in phase %s", error.phase, extra={"phase": error.phase})
            self.lifecycle.to(State.DEAD, str(error))
            return EXIT_START_FAILED, "start_failed"
        except EngineDiedError as error:
            log.error("%s", error)  # noqa: TRY400 - where it was raised says nothing
            return EXIT_ENGINE_DIED, "engine_dead"
        return EXIT_STOPPED, "stopped"

    async def _main(self) -> None:
        """Start the engine and the API, serve, stop; on the serving loop.

        Raises:
            ConfigError, EngineStartError: it did not come up.
            EngineDiedError: it came up and died.
        """
        from llm_worker.serving import engine as boundary

        args = boundary.parse_arguments(self._config)
        listener = boundary.bind_api(args)
        try:
            engine = await boundary.Engine.start(args, self._config, self.metrics, self._phase)
            self._engine = engine
            self.health.engine_dead = engine.is_dead
            self.lifecycle.to(State.WARMING)
            await self._start_kv(engine)
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
            self.health.engine_dead = lambda: True
            if self.kv is not None:
                await asyncio.to_thread(self.kv.close)
            await asyncio.to_thread(engine.stop, ENGINE_STOP_SECONDS)

    async def _serve(
        self,
        engine: Engine,
        server: uvicorn.Server,
        listener: socket.socket,
        started: asyncio.Event,
    ) -> None:
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
        async with asyncio.TaskGroup() as tasks:
            api = tasks.create_task(server.serve(sockets=[listener]), name="api")
            died = tasks.create_task(engine.died(), name="engine-watch")
            stop = tasks.create_task(asked.wait(), name="stop-watch")
            system = tasks.create_task(self._system_server_ended(), name="system-server-watch")
            pulse = tasks.create_task(self.heartbeat.run(), name="heartbeat")
            signs = tasks.create_task(self._give_signs_of_life(), name="signs-of-life")
            up = tasks.create_task(self._announce(started), name="announce")

            await asyncio.wait({api, died, stop, system}, return_when=asyncio.FIRST_COMPLETED)
            up.cancel()
            if not died.done():
                self._begin_to_drain(
                    engine, server, "asked to stop" if stop.done() else "a part ended"
                )
                await asyncio.wait({api, died}, return_when=asyncio.FIRST_COMPLETED)
            cause = died.result() if died.done() else None
            if cause is not None:
                self._give_up(server, cause)
                await asyncio.wait({api})
            for task in (died, stop, system, pulse, signs):
                task.cancel()
        if cause is not None:
            raise EngineDiedError(cause)
        if not asked.is_set():
            raise RuntimeError("the API server or the system server ended by itself")

    async def _start_kv(self, engine: Engine) -> None:
        """Index the engine's KV blocks from here on."""
        if self.kv is None:
            return
        loop = asyncio.get_running_loop()

        def truth(full: bool) -> list[dict[str, Any]]:
            told = asyncio.run_coroutine_threadsafe(engine.kv_truth(full), loop)
            return told.result(TRUTH_SECONDS)

        try:
            await asyncio.wait_for(engine.kv_truth(), TRUTH_SECONDS)
        except Exception as error:  # the plug-in is missing there: no audits, no hashing
            log.warning("the engine does not tell what its KV cache holds: %s", error)
        self.kv.start(
            engine.kv_event_sources(),
            block_size=engine.kv_block_size_tokens(),
            truth=truth,
            hash_blocks=engine.hash_blocks,
            max_tokens=engine.info().max_model_len_tokens,
        )

    async def _announce(self, started: asyncio.Event) -> None:
        """Become ready once the API server listens."""
        await started.wait()
        self.metrics.startup_phase_seconds.labels("total").set(time.monotonic() - self._began)
        self.lifecycle.enter_phase("")
        self.lifecycle.to(State.READY)

    def _begin_to_drain(self, engine: Engine, server: uvicorn.Server, reason: str) -> None:
        self.lifecycle.to(State.DRAINING, reason)
        engine.cut_off_after(self._config.drain_seconds)
        self._end_by_force_after(self._config.drain_seconds, EXIT_INTERNAL, "internal")
        server.should_exit = True

    def _give_up(self, server: uvicorn.Server, cause: str) -> None:
        """The engine died: nothing can finish, everything in flight gets its error."""
        self.lifecycle.to(State.DEAD, cause)
        if self._record is not None:
            self._record.end("engine_dead")
        self._end_by_force_after(ERROR_FLUSH_SECONDS, EXIT_ENGINE_DIED, "engine_dead")
        server.config.timeout_graceful_shutdown = ERROR_FLUSH_SECONDS
        server.should_exit = True

    def _end_by_force_after(self, seconds: float, code: int, reason: str) -> None:
        """Whatever hangs on the way out, the process ends, and what it started with it."""

        def end() -> None:
            log.critical("the way out hangs; ending by force", extra={"exit_code": code})
            self._clean_up(reason)
            self._leave(code)

        timer = threading.Timer(seconds + ENGINE_STOP_SECONDS + EXIT_MARGIN_SECONDS, end)
        timer.daemon = True
        timer.start()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.lifecycle.enter_phase(name)
        began = time.monotonic()
        yield
        self.metrics.startup_phase_seconds.labels(name).set(time.monotonic() - began)

    def _note_model_load(self, engine: Engine) -> None:
        seconds = engine.model_load_seconds()
        if seconds is not None:
            self.metrics.startup_phase_seconds.labels("model_load").set(seconds)
            self.metrics.model_load_seconds.labels(engine.model_name).set(seconds)

    async def _system_server_ended(self) -> None:
        # Shielded: cancelling this task must not cancel the thread's own future.
        await asyncio.shield(asyncio.wrap_future(self.system_server.ended))

    async def _give_signs_of_life(self) -> None:
        """Tell the next run until when this one lived. In a thread: a disk may hang."""
        while self._record is not None:
            await asyncio.to_thread(self._record.alive)
            await asyncio.sleep(SIGN_OF_LIFE_SECONDS)

    def _engine_info(self) -> dict[str, Any] | None:
        return None if self._engine is None else dataclasses.asdict(self._engine.info())

    def _clean_up(self, reason: str) -> None:
        """Leave no process, no shared memory and no doubt about why this run ended."""
        segments = mapped_segments()
        end_descendants(grace_seconds=2.0)
        remove_segments(segments)
        if self._record is not None:
            self._record.end(reason)

    def _call_off_start(self, _number: int, _frame: object) -> None:
        """SIGTERM or SIGINT before the engine serves: nothing is in flight, so end here.

        In a thread: whatever import or constructor is running may hold a lock that the way out
        needs, and not all of them would let an exception pass. A start that has failed already is
        left to end as that.
        """
        if self._calling_off is None and self.lifecycle.state is not State.DEAD:
            self._calling_off = threading.Thread(target=self._call_off, name="stop", daemon=True)
            self._calling_off.start()

    def _call_off(self) -> None:
        self._end_by_force_after(0.0, EXIT_INTERNAL, "internal")
        with contextlib.suppress(InvalidTransition):  # it failed in this very moment
            self.lifecycle.to(State.DRAINING, "asked to stop during start-up")
        self._clean_up("stopped")
        self._leave(EXIT_STOPPED)

    def _let_calling_off_end(self) -> None:
        """Once a start is called off, that decides how the process ends."""
        if self._calling_off is not None:
            self._calling_off.join()

    def _leave(self, code: int) -> None:
        """End the process now, past the interpreter's own clean-up."""
        if self._multiprocess is not None:
            self._multiprocess.close()
        logging.shutdown()
        os._exit(code)


def _versions() -> dict[str, Any]:
    vllm = sys.modules.get("vllm")
    return {
        "llm_worker": __version__,
        "vllm": getattr(vllm, "__version__", None),  # None until it is imported
        "python": platform.python_version(),
    }
