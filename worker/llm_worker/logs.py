"""How our log lines look. Imports nothing of ours."""

from __future__ import annotations

import json
import logging
from typing import Any


class JsonFormatter(logging.Formatter):
    """One JSON object a line; ``extra`` fields become keys."""

    _PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON: time (Unix seconds), level, logger, message, extras, exception."""
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({k: v for k, v in vars(record).items() if k not in self._PLAIN})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(log_format: str, log_level: str) -> None:
    """Send our loggers to standard error; vLLM configures its own.

    ``log_format`` is "text" or "json", ``log_level`` "debug", "info", "warning" or "error".
    """
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(
            logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%m-%d %H:%M:%S")
        )
    log = logging.getLogger("llm_worker")
    log.handlers = [handler]
    log.setLevel(log_level.upper())
    log.propagate = False
