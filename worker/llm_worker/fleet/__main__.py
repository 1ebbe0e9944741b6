"""``python -m llm_worker.fleet``: the fleet's KV index as a service of its own.

Composition only: settings → logging → fleet, routes, metrics → until SIGTERM. It reads KV events
and answers questions; nothing it serves changes anything, so it asks for no token.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
import threading
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llm_worker import __version__
from llm_worker.errors import EXIT_CONFIG, EXIT_INTERNAL, EXIT_STOPPED, ConfigError
from llm_worker.exposition.exposition import Exposition
from llm_worker.fleet.fleet import Fleet
from llm_worker.kv import routes
from llm_worker.kv.collector import KvCollector
from llm_worker.listening import listen
from llm_worker.logs import configure_logging
from llm_worker.metrics import ExporterMetrics
from llm_worker.observer.health import Verdict
from llm_worker.observer.probes import Probes
from llm_worker.observer.routes import application
from llm_worker.observer.server import SystemServer
from llm_worker.settings.fleet import FleetConfig, help_text, load

if TYPE_CHECKING:
    from starlette.types import ASGIApp

log = logging.getLogger(__name__)

ROUND_LATE_SECONDS = 15.0  # a round is due every second, and may take ten


class Service:
    """One fleet index and its server, from `start` to `close`."""

    def __init__(self, config: FleetConfig) -> None:
        """Bind the port; follow nobody yet.

        Raises:
            ConfigError: the address cannot be bound.
        """
        self.fleet = Fleet(
            config.sources,
            max_blocks=config.max_blocks,
            gone_seconds=config.gone_seconds,
            resolve_seconds=config.resolve_seconds,
        )
        exposition = Exposition(ExporterMetrics(CollectorRegistry()))
        exposition.register(
            "kv",
            KvCollector(
                self.fleet.index,
                listeners=self.fleet.listeners,
                crashes=lambda: self.fleet.pipeline.crashes,
                fleet=True,
                round_failures=lambda: self.fleet.round_failures,
            ),
        )
        exposition.register("process", REGISTRY)  # its CPU and memory: runbooks ask for them
        try:
            self.server = SystemServer(
                create_app(self.fleet, exposition), listen(config.host, config.port)
            )
        except OSError as error:
            raise ConfigError(
                [
                    f"the KV index cannot listen on {config.host}:{config.port}: choose another "
                    f"--port, or stop what holds it ({error.strerror or error})"
                ]
            ) from error

    def start(self) -> None:
        """Follow the fleet and serve."""
        # A rank that is followed takes four descriptors.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.fleet.start()
        self.server.start()

    def close(self) -> None:
        """Stop serving, then following."""
        self.server.close()
        self.fleet.close()


def create_app(fleet: Fleet, exposition: Exposition) -> ASGIApp:
    """The service's routes."""
    handlers = routes.KvHandlers(
        index=fleet.index,
        listeners=fleet.listeners,
        planes=tuple,
        more_status=fleet.status,
    )

    async def version(_: Request) -> Response:
        return JSONResponse({"version": __version__})

    app = application(
        [*routes.reading(handlers), *routes.writing(handlers), Route("/version", version)]
    )
    return Probes(app, FleetHealth(fleet), exposition)


class FleetHealth:
    """Whether the service is well."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def live(self) -> Verdict:
        """Does all run that has to?"""
        reasons = () if self._fleet.alive else ("a thread that indexes has ended",)
        return Verdict(not reasons, reasons)

    def ready(self) -> Verdict:
        """Was the fleet asked a moment ago?"""
        reasons = self.live().reasons
        since = self._fleet.seconds_since_round
        if since == float("inf"):
            reasons += ("nobody was asked yet",)
        elif since > ROUND_LATE_SECONDS:
            reasons += (f"the last round through the fleet ended {since:.0f} s ago",)
        return Verdict(not reasons, reasons)


def main() -> int:
    """Run the service as the command line says; return its exit code."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(help_text(), end="")
        return EXIT_STOPPED
    try:
        command = load(arguments)
        configure_logging(command.config.log_format, command.config.log_level)
        for warning in command.warnings:
            log.warning("%s", warning)
        if command.check_only:
            print(command.config.to_json(), end="")
            return EXIT_STOPPED
        service = Service(command.config)
    except ConfigError as error:
        print("the KV index cannot start with these settings:", file=sys.stderr)
        for problem in error.problems:
            print(f"  - {problem}", file=sys.stderr)
        return EXIT_CONFIG
    return _serve(service)


def _serve(service: Service) -> int:
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    service.server.ended.add_done_callback(lambda _: asked.set())
    service.start()
    asked.wait()
    failed = service.server.ended.done()
    service.close()
    if failed:
        log.error("the server ended by itself")
        return EXIT_INTERNAL
    return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
