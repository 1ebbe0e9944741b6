"""What the engine's own processes know at start-up, carried to the API process.

Owns three facts per data-parallel rank: its KV-cache blocks and bytes, and how long its slowest
worker took to load the model. Nothing else in vLLM 0.32 tells them outside the engine. Also puts
`core_truth` into the engine core.
Way: worker processes note (``WorkerWrapperBase.load_model``, ``initialize_from_config``) → the
engine core asks them once, after the KV cache is allocated and before it serves → its ready message
carries them in one field that vLLM's decoder ignores → the API process reads that field. No RPC is
made to a running engine.
Never raises out of a hook: where vLLM changed, the facts are unknown and the engine starts as ever.
Source: vllm/v1/engine/core.py, core_client.py, vllm/v1/worker/worker_base.py, 0.32.0.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from multiprocessing import resource_tracker
from typing import Any

from llm_worker import processes
from llm_worker.serving import core_truth
from llm_worker.settings import worker as settings

log = logging.getLogger(__name__)

_FIELD = "llm_worker_facts"  # in the ready message


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What one data-parallel rank reported when it got ready. None: unknown."""

    blocks: int  # the null block included
    kv_groups: int | None  # several: hybrid models
    kv_bytes: int | None  # allocated for the KV cache, summed over the rank's devices
    load_seconds: float | None  # the slowest of the rank's worker processes


# Worker process: what this process noted.
_noted: dict[str, Any] = {"load_seconds": None, "kv_bytes": None}

_forks_covered = False

# API process: engine instance -> rank -> facts.
_reported: dict[str, dict[int, RankFacts]] = {}


def install() -> None:
    """Set the hooks that belong to this process. Entry point ``vllm.general_plugins``.

    vLLM calls it in the API process, in every engine core and in every worker, and stats.py once
    more when vLLM loads it; it hooks only what that process has already imported, so it costs
    microseconds. A forked process calls it by itself, since vLLM loads no plugin a second time
    where it inherited the first. Safe to call again.
    """
    global _forks_covered  # noqa: PLW0603  os.register_at_fork can be neither asked nor undone
    try:
        if not _forks_covered:
            os.register_at_fork(after_in_child=install)
            _forks_covered = True
        end_with_parent()
        for module_name, class_name, method, wrap in _HOOKS:
            module = sys.modules.get(module_name)
            if module is not None:
                _hook(getattr(module, class_name), method, wrap)
    except Exception:
        log.warning("start-up facts of the engine will be missing", exc_info=True)


def end_with_parent() -> None:
    """Have the kernel kill this engine process when the one that started it is gone.

    vLLM's engine core outlives an API process that was killed (SIGKILL, ``os._exit``) and keeps the
    accelerator's memory. Only for descendants of a worker of ours on Linux, told by
    LLM_WORKER_PARENT_PID; a plain ``vllm serve`` is left as it is. The kernel means the *thread*
    that started this process, so the engine has to be constructed on one that lasts as long as its
    process, which is the main one.
    """
    serving = settings.parent_pid_from_env()
    if serving is None or serving == os.getpid() or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if serving not in (parent, processes.parent_of(parent)):
        return
    processes.end_with_parent(parent)
    _heed_parents_only(serving)


_STOPS = frozenset({signal.SIGTERM, signal.SIGINT})
_given: list[int] = []  # signals of a parent's that are on their way to the main thread
_heeding: int | None = None  # the process whose signals are sorted


@contextlib.contextmanager
def only_parents_signals() -> Iterator[None]:
    """Processes that are started meanwhile heed SIGTERM and SIGINT of their parents only.

    A service manager that stops a worker signals every process of it, and vLLM's engine core ends
    at once: requests in flight would be cut off before the drain has begun. So engine processes are
    started with both signals blocked, and once our plug-in runs in them, a thread takes the signals
    and looks who sent them. Where it does not run, vLLM's own patience ends in SIGKILL.
    """
    # Starting it later would unblock both behind our back.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_parents_only(serving: int) -> None:
    global _heeding  # noqa: PLW0603  a fork inherits the name, but not the thread
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    main = threading.main_thread()
    if _heeding == os.getpid() or not blocked >= _STOPS or threading.current_thread() is not main:
        return
    _heeding = os.getpid()
    given = signal.SIGRTMIN + 7
    signal.signal(given, _take)

    def sort() -> None:
        while True:
            told = signal.sigwaitinfo(_STOPS)
            parents = {os.getpid(), os.getppid(), serving, processes.parent_of(serving)}
            if told.si_pid in parents:
                _given.append(told.si_signo)
                signal.pthread_kill(main.ident or 0, given)
            else:
                log.info("process %d is not the one that stops this engine", told.si_pid)

    threading.Thread(target=sort, name="signals", daemon=True).start()


def _take(_number: int, frame: Any) -> None:
    """Do on the main thread what the parent's signal would have done there."""
    number = _given.pop(0)
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)


def ranks(vllm_config: Any) -> Mapping[int, RankFacts]:
    """Return what the ranks of this engine reported, by rank; empty where none did."""
    return _reported.get(vllm_config.instance_id, {})


def model_load_seconds(vllm_config: Any) -> float | None:
    """Return how long the slowest worker took to build the model and load its weights.

    None where it is unknown: the package is missing in the engine's processes, or ``VLLM_PLUGINS``
    leaves it out.
    """
    times = [
        facts.load_seconds
        for facts in ranks(vllm_config).values()
        if facts.load_seconds is not None
    ]
    return max(times, default=None)


def _hook(owner: type, method: str, wrap: Callable[[Callable[..., Any]], Any]) -> None:
    original = getattr(owner, method, None)
    if getattr(original, "_llm_worker_hook", False):
        return
    wrapped = wrap(original) if original is not None else wrap(_delegate(method))
    wrapped._llm_worker_hook = True
    setattr(owner, method, wrapped)


def _delegate(method: str) -> Callable[..., Any]:
    """Stand in for a method that ``WorkerWrapperBase`` has only through its ``__getattr__``."""

    def delegate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, method)(*args, **kwargs)

    return delegate


def _time_load(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(self, *args, **kwargs)
        _noted["load_seconds"] = time.perf_counter() - started
        return result

    return load_model


def _note_kv_bytes(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def initialize_from_config(self: Any, kv_cache_configs: Any) -> Any:
        result = original(self, kv_cache_configs)
        try:
            _noted["kv_bytes"] = _allocated(kv_cache_configs[self.global_rank])
        except Exception:
            log.warning("size of the KV cache in bytes is unknown", exc_info=True)
        return result

    return initialize_from_config


def _allocated(kv_cache_config: Any) -> int:
    """Return the bytes of one worker's KV cache.

    Each entry names the size of the one allocation that all of them are placed in; host-resident
    entries are not on the device.
    """
    return max(
        (tensor.size for tensor in kv_cache_config.kv_cache_tensors if not tensor.host_resident),
        default=0,
    )


def _worker_facts(worker: Any) -> dict[str, Any]:
    """Run in each worker process, called by its engine core."""
    return dict(_noted)


def _ask_workers(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def initialize_kv_caches(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        try:
            workers = self.model_executor.collective_rpc(_worker_facts)
            loads = [w["load_seconds"] for w in workers if w["load_seconds"] is not None]
            sizes = [w["kv_bytes"] for w in workers]
            self._llm_worker_facts = {
                "kv_groups": len(config.kv_cache_groups),
                "kv_bytes": None if None in sizes else sum(sizes),
                "load_seconds": max(loads, default=None),
            }
        except Exception:
            log.warning("the workers' start-up facts are unknown", exc_info=True)
        return config

    return initialize_kv_caches


def _add_facts(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def make_ready_response(self: Any) -> Any:
        response = original(self)
        facts = getattr(self, "_llm_worker_facts", None)
        if facts is None:
            return response
        try:
            # msgspec encodes a dataclass and a map of its fields alike.
            message = {field.name: getattr(response, field.name) for field in fields(response)}
        except Exception:
            log.warning("start-up facts stay in the engine core", exc_info=True)
            return response
        return message | {_FIELD: facts}

    return make_ready_response


def _read_facts(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def apply_ready_response(self: Any, payload: bytes) -> Any:
        result = original(self, payload)
        try:
            if payload:
                # Not by the message's instance id: each of several API servers has its own.
                _report(self.vllm_config.instance_id, payload)
        except Exception:
            log.warning("start-up facts of the engine could not be read", exc_info=True)
        return result

    return apply_ready_response


def _report(instance_id: str, payload: bytes) -> None:
    import msgspec

    message = msgspec.msgpack.decode(payload)
    facts = message.get(_FIELD) or {}
    _reported.setdefault(instance_id, {})[message["data_parallel_rank"]] = RankFacts(
        blocks=message["num_gpu_blocks"],
        kv_groups=facts.get("kv_groups"),
        kv_bytes=facts.get("kv_bytes"),
        load_seconds=facts.get("load_seconds"),
    )


def run_coordinator(*args: Any, **kwargs: Any) -> None:
    """What vLLM's data-parallel coordinator runs, in a process that loads no plug-in by itself."""
    end_with_parent()
    run = _run_coordinator  # a fork inherited it
    if run is None:
        from vllm.v1.engine.coordinator import DPCoordinatorProc

        run = DPCoordinatorProc.run_coordinator
    run(*args, **kwargs)


_run_coordinator: Callable[..., None] | None = None  # vLLM's own


def _end_coordinator(original: Callable[..., None]) -> Callable[..., None]:
    global _run_coordinator  # noqa: PLW0603  a process is sent the function by its name
    _run_coordinator = original
    return run_coordinator


_HOOKS: tuple[tuple[str, str, str, Callable[[Callable[..., Any]], Any]], ...] = (
    ("vllm.v1.worker.worker_base", "WorkerWrapperBase", "load_model", _time_load),
    ("vllm.v1.worker.worker_base", "WorkerWrapperBase", "initialize_from_config", _note_kv_bytes),
    ("vllm.v1.engine.core", "EngineCore", "_initialize_kv_caches", _ask_workers),
    ("vllm.v1.engine.core", "EngineCoreProc", "_make_ready_response", _add_facts),
    ("vllm.v1.engine.core_client", "MPClient", "_apply_ready_response", _read_facts),
    ("vllm.v1.engine.core", "EngineCore", "reset_prefix_cache", core_truth.announce_reset),
    ("vllm.v1.engine.core", "EngineCore", core_truth.METHOD, core_truth.add),
    ("vllm.distributed.kv_events", "ZmqEventPublisher", "publish", core_truth.count_published),
    ("vllm.v1.engine.coordinator", "DPCoordinatorProc", "run_coordinator", _end_coordinator),
)
