"""The vLLM boundary: what starts, serves and stops an engine.

Owns one ``AsyncLLM``, vLLM's own API application on it, the engine's processes and their shared
memory. It knows how to start them, how to tell that they died, and how to leave nothing behind.
It decides nothing: what follows a death or a signal is `app`'s business.

Source: vllm/entrypoints/launchers/launcher.py, 0.32.0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from llm_worker.metrics import ServingMetrics
from llm_worker.processes import end_descendants, mapped_segments, remove_segments
from llm_worker.serving import core_truth, hooks, ledger, recorder, stat_logger
from llm_worker.serving.hashing import hash_blocks
from llm_worker.settings.worker import Config

if TYPE_CHECKING:
    import uvicorn
    from vllm.v1.engine.async_llm import AsyncLLM

EXIT_CODE_SECONDS = 0.5

# Names and times a start-up phase: ``with phase("configure"): ...``
Phase = Callable[[str], contextlib.AbstractContextManager[None]]


class Engine:
    """A running vLLM engine, its processes and its shared memory."""

    def __init__(self, llm: AsyncLLM, args: Namespace, metrics: ServingMetrics) -> None:
        self._llm = llm
        self._metrics = metrics
        self._args = args
        # Empty where vLLM runs the engine in this process or on Ray.
        manager = getattr(llm.engine_core.resources, "engine_manager", None)
        self._processes = list(getattr(manager, "processes", []))
        self._segments = mapped_segments()
        self._models: Any = None  # vLLM's table of served models and adapters
        self._hashing: core_truth.Hashing | None = None
        # One question at a time, and a thread that nothing else waits for.
        self._hasher = ThreadPoolExecutor(1, "hashing")

    @classmethod
    async def start(
        cls, args: Namespace, config: Config, metrics: ServingMetrics, phase: Phase
    ) -> Engine:
        """Configure and start the engine; blocks this loop until the model is loaded.

        Raises:
            Exception: whatever vLLM raises when it cannot start.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        with phase("configure"):
            engine_args = AsyncEngineArgs.from_cli_args(args)
            propagate_flash_late_interaction(args, engine_args)
            vllm_config = engine_args.create_engine_config(
                usage_context=UsageContext.OPENAI_API_SERVER
            )
        ledger.install_ledger(metrics)
        with phase("engine"), hooks.only_parents_signals():
            llm = AsyncLLM.from_vllm_config(
                vllm_config=vllm_config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=[stat_logger.bind(metrics, config.goodput)],
                enable_log_requests=engine_args.enable_log_requests,
                aggregate_engine_logging=engine_args.aggregate_engine_logging,
                disable_log_stats=engine_args.disable_log_stats,
            )
        return cls(llm, args, metrics)

    async def build_api(
        self, drain_seconds: float, on_started: Callable[[], None]
    ) -> uvicorn.Server:
        """vLLM's own API application on this engine, in a server that leaves signals alone.

        In-flight requests may take ``drain_seconds`` once the server is told to exit;
        ``on_started`` is called when it listens. vLLM's lifespan runs in it: periodic statistics in
        the log, and the frozen heap that keeps garbage collection out of token latencies.
        """
        import uvicorn
        from vllm import envs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.launcher import NoSignalServer
        from vllm.entrypoints.launchers.utils.constants import (
            H11_MAX_HEADER_COUNT_DEFAULT,
            H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT,
        )
        from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

        args = self._args
        await self._llm.reset_mm_cache()  # don't keep the profiling run's dummy data
        tasks = await self._llm.get_supported_tasks()
        app = build_app(args, tasks, self._llm.model_config)
        await init_app_state(self._llm, app.state, args, tasks)
        self._models = getattr(app.state, "openai_serving_models", None)
        config = uvicorn.Config(
            # Around the application: vLLM has closed its own list of middleware by now.
            ledger.Refusals(app, self._metrics, self.model_name, self.is_dead),
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            log_config=get_uvicorn_log_config(args) or uvicorn.config.LOGGING_CONFIG,
            access_log=not args.disable_uvicorn_access_log,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            timeout_graceful_shutdown=drain_seconds,  # type: ignore[arg-type]  # fractions work
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            ssl_ciphers=args.ssl_ciphers,
        )
        config.h11_max_incomplete_event_size = (
            args.h11_max_incomplete_event_size or H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT
        )
        config.h11_max_header_count = (  # type: ignore[attr-defined]  # as vLLM sets it
            args.h11_max_header_count or H11_MAX_HEADER_COUNT_DEFAULT
        )
        config.load()

        class Server(NoSignalServer):  # type: ignore[misc]
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if not self.started:
                    return
                # uvloop hides that somebody else listens there by now.
                for each in sockets or ():
                    if each.fileno() < 0 or not each.getsockopt(
                        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
                    ):
                        raise OSError("the API's port was taken by another process meanwhile")
                on_started()

        server: uvicorn.Server = Server(config)
        app.state.server = server  # vLLM's error handlers need it
        if args.enable_ssl_refresh:
            from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher

            app.state.ssl_refresher = SSLCertRefresher(
                ssl_context=config.ssl,
                key_path=config.ssl_keyfile,
                cert_path=config.ssl_certfile,
                ca_path=config.ssl_ca_certs,
            )
        return server

    async def warm_up(self) -> None:
        """One request for one token: proves that the engine answers before anyone is told so.

        It is a request like any other and is counted as one. Pooling models have none.

        Raises:
            Exception: whatever vLLM raises when the request fails.
        """
        from vllm import SamplingParams

        if "generate" not in await self._llm.get_supported_tasks():
            return
        bos = getattr(self._llm.tokenizer, "bos_token_id", None) or 0
        parameters = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        prompt: Any = {"type": "token", "prompt_token_ids": [bos]}
        async for _ in self._llm.generate(prompt, parameters, request_id=f"warm-up-{uuid4()}"):
            pass

    def model_load_seconds(self) -> float | None:
        """How long the slowest rank took to load the model; None where it cannot be known."""
        return hooks.model_load_seconds(self._llm.vllm_config)

    @property
    def model_name(self) -> str:
        """The name under which vLLM serves and labels the model."""
        return str(self._llm.model_config.served_model_name)

    def info(self) -> recorder.EngineCacheInfo:
        """What the engine has: blocks, limits, parallel sizes."""
        return recorder.engine_cache_info(self._llm.vllm_config)

    def pids(self) -> list[int]:
        """Its processes; one of them gone is an engine that died."""
        return [process.pid for process in self._processes if process.pid is not None]

    def segments(self) -> list[str]:
        """The shared memory that it has mapped."""
        return sorted(map(str, self._segments))

    def kv_event_sources(self) -> list[tuple[int, str, str | None, str]]:
        """Where each rank publishes its KV events, as the engine resolved it; empty: nowhere.

        Rank, endpoint, replay endpoint, topic.
        """
        return [
            (rank, source.endpoint, source.replay_endpoint, source.topic)
            for rank, source in sorted(self._llm.get_kv_event_sources().items())
        ]

    async def kv_truth(self, full: bool = False) -> list[dict[str, Any]]:
        """What each rank holds in its KV cache; see `core_truth.held`.

        Raises:
            Exception: whatever vLLM raises when an engine core does not know how to tell.
        """
        told: list[dict[str, Any]] = await self._llm.engine_core.call_utility_all_async(
            core_truth.METHOD, full
        )
        self._hashing = core_truth.Hashing.of(told[0]) if told else None
        return told

    def kv_block_size_tokens(self) -> int:
        """The size of the blocks that KV events name: what the engine told, else as configured."""
        hashing = self._hashing
        return self.info().block_size_tokens if hashing is None else hashing.block_size

    async def hash_blocks(
        self, asked: str | Sequence[int], adapter: str | None, cache_salt: str | None
    ) -> list[int | bytes]:
        """The hashes of a prompt's full blocks, by the engine's own functions, on a thread.

        Raises:
            ValueError: it cannot be a prompt of this engine.
        """
        lora = self._adapter(adapter)
        return await asyncio.get_running_loop().run_in_executor(
            self._hasher, hash_blocks, self._llm, self._hashing, asked, lora, cache_salt
        )

    def _adapter(self, name: str | None) -> Any:
        if name is None:
            return None
        adapter = getattr(self._models, "lora_requests", {}).get(name)
        if adapter is None:
            raise ValueError(f"no adapter {name!r} is loaded")
        return adapter

    def is_dead(self) -> bool:
        """Whether an engine process ended or vLLM gave the engine up; callable from any thread."""
        return bool(self._llm.errored) or bool(
            connection.wait([process.sentinel for process in self._processes], timeout=0)
        )

    def cut_off_after(self, seconds: float) -> None:
        """Have the ledger know that what is still in flight then is cut off, not given up."""
        ledger.cut_off_at(time.monotonic() + seconds)

    async def died(self) -> str:
        """Wait until an engine process ends or vLLM gives the engine up; return what happened.

        The processes are watched themselves: vLLM sets its own flag only after it has stopped the
        other ranks, which takes seconds.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        # Copies, because vLLM closes the originals whenever it likes.
        watched = [os.dup(process.sentinel) for process in self._processes]
        handler = self._llm.output_handler
        try:
            for descriptor in watched:
                loop.add_reader(descriptor, wake)
            if handler is not None:
                handler.add_done_callback(lambda _: wake())
            await ended
        finally:
            for descriptor in watched:
                loop.remove_reader(descriptor)
                os.close(descriptor)
        # vLLM may have noticed by its sockets before the kernel has given the memory back.
        sentinels = [process.sentinel for process in self._processes]
        ended_now = await asyncio.to_thread(connection.wait, sentinels, EXIT_CODE_SECONDS)
        for process in self._processes:
            if process.sentinel in ended_now:  # gone, but its exit code takes a moment longer
                await asyncio.to_thread(process.join, EXIT_CODE_SECONDS)
        causes = [
            f"{process.name} {_exit_text(process.exitcode)}"
            for process in self._processes
            if process.exitcode is not None
        ]
        return ", ".join(causes) or "vLLM gave the engine up (its log says why)"

    def stop(self, timeout: float) -> None:
        """Stop the engine and see to it that no process and no shared memory is left.

        Blocks for up to ``timeout`` seconds and a few more where processes have to be killed.
        """
        self._processes = []
        self._llm.shutdown(timeout=timeout)
        end_descendants(grace_seconds=2.0)
        remove_segments(self._segments)


def _exit_text(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"
