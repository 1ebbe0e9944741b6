"""Entry point: configuration, logging, the worker, an exit code."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path

from llm_worker.errors import EXIT_CONFIG, EXIT_INTERNAL, EXIT_STOPPED, ConfigError
from llm_worker.logs import configure_logging
from llm_worker.settings.worker import Config, help_text, load

log = logging.getLogger("llm_worker")

# A library's thread that never ends must not keep a finished worker alive.
INTERPRETER_EXIT_SECONDS = 10.0


def main() -> int:
    """Run the worker as the command line says; return its exit code."""
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
        return _run(command.config)
    except ConfigError as error:
        print("llm_worker cannot start with these settings:", file=sys.stderr)
        for problem in error.problems:
            print(f"  - {problem}", file=sys.stderr)
        return EXIT_CONFIG


def _dump(config: Config, path: Path) -> None:
    try:
        path.write_text(config.to_json(), encoding="utf-8")
    except OSError as error:
        fix = "choose a file that can be written"
        raise ConfigError([f"--dump-config-to: {error}: {fix}"]) from error


def _run(config: Config) -> int:
    # In this order: prometheus_client looks for its directory when it is first imported.
    from llm_worker.exposition.multiprocess import MultiprocessError, prepare_multiprocess

    try:
        multiprocess = prepare_multiprocess(config.multiproc_dir)
    except MultiprocessError as error:
        raise ConfigError([str(error)]) from error
    from llm_worker import app

    if multiprocess is None:
        return app.run(config)
    with multiprocess:
        return app.run(config, multiprocess)


def _exit(code: int) -> None:
    """Leave through the interpreter's own clean-up, but not for longer than it deserves."""

    def force() -> None:
        time.sleep(INTERPRETER_EXIT_SECONDS)
        os._exit(code)

    threading.Thread(target=force, daemon=True, name="exit-deadline").start()
    logging.shutdown()
    sys.exit(code)


if __name__ == "__main__":
    try:
        exit_code = main()
    except SystemExit:
        raise
    except BaseException:
        log.exception("unexpected error")
        exit_code = EXIT_INTERNAL
    _exit(exit_code)
