"""The library's logger."""

from __future__ import annotations

import logging

from detrkit.common.text import printable


def _escape(record: logging.LogRecord) -> bool:
    """Escapes what a stranger's file name may hold and a log file cannot; every message passes."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


logger = logging.getLogger("detrkit")
logger.addFilter(_escape)
