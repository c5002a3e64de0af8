"""What the library logs can be written to any log."""

from __future__ import annotations

import logging

from detrkit.common.log import logger


def test_names_that_no_log_file_can_hold_are_escaped(tmp_path):
    handler = logging.FileHandler(tmp_path / "run.log", encoding="utf-8")
    logger.addHandler(handler)
    try:
        logger.warning("no image file %s", "a\ud800\x1b[31m\nb.png")
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert (tmp_path / "run.log").read_text("utf-8") == "no image file a\\ud800\\x1b[31m\\nb.png\n"
