"""A real worker as a subprocess, for the tiers that need one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from support.waiting import until

START_SECONDS = 480.0  # two ranks on a busy two-core machine; one takes 20 on an idle one
SEGMENT = re.compile(r"/dev/shm/(psm_[0-9a-f]+)")


def free_ports(count: int) -> list[int]:
    """Ports that nobody holds right now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass
class WorkerProcess:
    """``python -m llm_worker --model tiny`` with ports of its own."""

    log_path: Path
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str = "tiny"
    api_port: int = 0
    system_port: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        """Start it; don't wait for anything."""
        api, system = free_ports(2)
        self.api_port, self.system_port = self.api_port or api, self.system_port or system
        command = [
            sys.executable, "-m", "llm_worker", "--model", self.model,
            "--host", "127.0.0.1", "--port", str(self.api_port),
            "--worker-system-port", str(self.system_port),
            "--max-model-len", "4096", "--kv-cache-memory-bytes", str(64 * 2**20),
            *self.arguments,
        ]  # fmt: skip
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                process_group=0,  # a test may signal it
            )

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def system(self) -> str:
        return f"http://127.0.0.1:{self.system_port}"

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        """GET from the system server."""
        return httpx.get(self.system + path, timeout=10, **kwargs)

    def health(self) -> dict[str, Any] | None:
        """``/health``, or None while nobody listens."""
        try:
            return dict(self.get("/health").json())
        except httpx.TransportError:
            return None

    def wait_until_listening(self, seconds: float = 60.0) -> None:
        """Until the system server answers."""
        self._until("the system server to answer", lambda: self.health() is not None, seconds)

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Until ``/ready`` says yes."""
        self._until("/ready", lambda: bool((self.health() or {}).get("ready")), seconds)

    def _until(self, what: str, ask: Callable[[], bool], seconds: float) -> None:
        until(what, ask, seconds, process=self.process, log=self.log_path)

    def samples(self) -> dict[str, float]:
        """``/metrics`` as it is now, by ``name{label="value",...}``, labels sorted.

        Serving publishes about once a second: a page from before the question is asked again,
        unless serving is gone or too late for it.
        """
        asked = time.monotonic()
        while True:
            found = self._samples()
            name = "llm_worker_serving_page_age_seconds"
            age = next((found[series] for series in found if series.startswith(name)), None)
            waited = time.monotonic() - asked
            if age is None or age < waited or waited > 5:
                return found
            time.sleep(0.05)

    def _samples(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found

    def complete(self, **body: Any) -> httpx.Response:
        """One completion."""
        return httpx.post(f"{self.api}/v1/completions", json={"model": "tiny", **body}, timeout=120)

    def stream(self, max_tokens: int, prompt: str = "hello") -> Iterator[dict[str, Any]]:
        """Chunks of one streamed completion that never stops early; ends at ``[DONE]``."""
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": max_tokens,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        with httpx.stream("POST", f"{self.api}/v1/completions", json=body, timeout=120) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def descendants(self) -> list[psutil.Process]:
        """The engine's processes and whatever else the worker started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def part(self, program: str) -> psutil.Process:
        """The ``serving`` or the ``observer`` process."""
        (found,) = (
            child
            for child in psutil.Process(self.process.pid).children()
            if f"llm_worker.{program}" in child.cmdline()
        )
        return found

    def engine_core(self) -> psutil.Process:
        """The process that a test kills."""
        (core,) = (
            child for child in self.descendants() if "EngineCore" in " ".join(child.cmdline())
        )
        return core

    def segments(self) -> set[Path]:
        """Shared memory that the worker and its engine have mapped."""
        found: set[Path] = set()
        for process in (psutil.Process(self.process.pid), *self.descendants()):
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
            found.update(Path(match.group(0)) for match in SEGMENT.finditer(maps))
        return found

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 60.0) -> int:
        """The exit code."""
        return self.process.wait(timeout=seconds)

    def close(self) -> None:
        """End it and everything it started, however it is doing."""
        if self.process.poll() is None:
            left = self.descendants()
            self.terminate()
            try:
                self.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                for child in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                self.wait()
