"""Entry point: settings, logging, the supervisor, an exit code. Standard library only."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from llm_worker.errors import EXIT_INTERNAL, EXIT_STOPPED, ConfigError, refuse
from llm_worker.logs import configure_logging
from llm_worker.settings.worker import Config, help_text, load
from llm_worker.supervisor import Supervisor

log = logging.getLogger("llm_worker")


def main() -> int:
    """Run the worker as the command line says; return its exit code."""
    asked: list[int] = []
    # At once: process 1 of a container has no default action, so a signal before would be lost.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    arguments = sys.argv[1:]
    if arguments in (["--help"], ["-h"]):
        print(help_text(), end="")
        return EXIT_STOPPED
    try:
        command = load(arguments)
        if command.dump_to is not None:
            _dump(command.config, command.dump_to)
        configure_logging(command.config.log_format, command.config.log_level)
        for warning in command.warnings:
            log.warning("%s", warning)
        if command.check_only:
            print(command.config.to_json(), end="")
            return EXIT_STOPPED
        if command.vllm_help:  # vLLM's own parser knows; it takes seconds to import
            explain = [sys.executable, "-m", "llm_worker.serving", "--explain"]
            os.execv(sys.executable, [*explain, *command.config.engine_args])  # noqa: S606
        return Supervisor(command.config, arguments, lambda: bool(asked)).run()
    except ConfigError as error:
        return refuse("llm_worker cannot start with these settings", error)
    except Exception:
        log.exception("unexpected error")
        return EXIT_INTERNAL


def _dump(config: Config, path: Path) -> None:
    try:
        path.write_text(config.to_json(), encoding="utf-8")
    except OSError as error:
        fix = "choose a file that can be written"
        raise ConfigError([f"--dump-config-to: {error}: {fix}"]) from error


if __name__ == "__main__":
    sys.exit(main())
