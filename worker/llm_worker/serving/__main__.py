"""``python -m llm_worker.serving PARENT BOARD BROKER -- ARGUMENTS``: started by the supervisor.

Kept thin: vLLM's processes import this module once more.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

from llm_worker.errors import EXIT_INTERNAL, ConfigError, refuse
from llm_worker.logs import configure_logging
from llm_worker.processes import end_with_parent
from llm_worker.settings.worker import Config, load

# A library's thread that never ends must not keep a process that is done alive.
INTERPRETER_EXIT_SECONDS = 10.0


def main(arguments: list[str]) -> int:
    """Serve as the command line says; return the exit code."""
    if arguments[:1] == ["--explain"]:
        from llm_worker.serving.launch import explain

        return explain(arguments[1:])
    parent, board, broker = map(int, arguments[:3])
    end_with_parent(parent)
    try:
        config = load(arguments[4:]).config
        configure_logging(config.log_format, config.log_level)
        return _run(config, board, broker)
    except ConfigError as error:
        return refuse("llm_worker cannot serve with these settings", error)
    except Exception:
        logging.getLogger("llm_worker").exception("unexpected error")
        return EXIT_INTERNAL


def _run(config: Config, board: int, broker: int) -> int:
    # In this order: prometheus_client looks for its directory when it is first imported.
    from llm_worker.exposition.multiprocess import MultiprocessError, prepare_multiprocess

    try:
        multiprocess = prepare_multiprocess(config.multiproc_dir)
    except MultiprocessError as error:
        raise ConfigError([str(error)]) from error
    from llm_worker.serving.app import Serving

    if multiprocess is None:
        return Serving(config, board, broker).run()
    with multiprocess:
        return Serving(config, board, broker, multiprocess).run()


def _exit(code: int) -> None:
    """Leave through the interpreter's own clean-up, but not for longer than it deserves."""

    def force() -> None:
        time.sleep(INTERPRETER_EXIT_SECONDS)
        os._exit(code)

    threading.Thread(target=force, daemon=True, name="exit-deadline").start()
    logging.shutdown()
    sys.exit(code)


if __name__ == "__main__":
    _exit(main(sys.argv[1:]))
