"""The log of a service: one JSON object a line on stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

FIELDS = "fields"
"""Name of the attribute of a log record that carries further fields, a mapping."""

_LOGGERS = ("delf_milvus", "uvicorn")


class JsonLines(logging.Formatter):
    """time (ISO 8601, UTC), level, event, and the fields of the record; of an exception its trace."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        # ASCII: control characters of ids and paths stay escaped.
        return json.dumps(line, default=str)


def set_up(quiet: bool) -> None:
    """Send the records of this package and of the server to stderr as JSON lines. quiet: warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet or name == "uvicorn" else logging.INFO)
