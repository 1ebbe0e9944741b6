"""``python -m llm_worker.observer PARENT BOARD BROKER LIFELINE LISTENER -- ARGUMENTS``.

Started, and started again, by the supervisor.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from llm_worker.errors import EXIT_INTERNAL, ConfigError, refuse
from llm_worker.logs import configure_logging
from llm_worker.processes import end_with_parent
from llm_worker.settings.worker import load


def main(arguments: list[str]) -> int:
    """Observe as the command line says; return the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):  # those are the supervisor's to heed
        signal.signal(number, signal.SIG_IGN)
    parent, *descriptors = map(int, arguments[:5])
    end_with_parent(parent)
    try:
        config = load(arguments[6:]).config
        configure_logging(config.log_format, config.log_level)
        from llm_worker.observer.app import Observer

        return Observer(config, *descriptors).run()
    except ConfigError as error:
        return refuse("llm_worker cannot observe with these settings", error)
    except Exception:
        logging.getLogger("llm_worker").exception("unexpected error")
        return EXIT_INTERNAL


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    os._exit(code)  # nothing here has to be tidied up, and threads of libraries must not hold it
