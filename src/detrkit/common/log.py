"""The library's logger."""

from __future__ import annotations

import logging

from detrkit.common.text import printable


def _escape(record: logging.LogRecord) -> bool:
    """Escapes what a log file cannot hold, such as half a surrogate in a file name; keeps every record."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


logger = logging.getLogger("detrkit")
logger.addFilter(_escape)
