"""Reading from the Hub where it may not be within reach."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from detrkit.common.log import logger
from detrkit.common.without_torch import has_torch

# Seconds within which the Hub is not asked again whether it is within reach.
_REMEMBERED = 60.0
_WAIT = 10.0  # seconds; a Hub that is only slow counts as within reach
# What HTTP clients raise where no connection comes about.
_NO_CONNECTION = ("ConnectError", "ConnectionError")

_lock = threading.RLock()  # re-entered where reading a model reads its settings
_last: tuple[float, bool] | None = None


@contextmanager
def cache_if_hub_is_away(name: str) -> Iterator[None]:
    """Within the block, a Hub that no connection reaches is not asked: what is in the cache is used.

    Its client would try again for half a minute for every file, also for those that are in the cache.

    Args:
        name: The Hub id that is about to be read; for a folder nothing is done.
    """
    if Path(name).is_dir() or not has_torch():  # without which no model of the Hub runs
        yield
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield
        return
    if _is_within_reach(f"{constants.ENDPOINT}/{name}/resolve/main/config.json"):
        yield
        return
    with _lock:  # two threads would each take the other's setting for the one to restore
        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


def _is_within_reach(address: str) -> bool:
    global _last
    if _last is not None and time.monotonic() - _last[0] < _REMEMBERED:
        return _last[1]
    from huggingface_hub.utils import get_session

    answers = True
    try:
        get_session().head(address, timeout=_WAIT)
    except Exception as error:
        answers = type(error).__name__ not in _NO_CONNECTION
        if not answers:
            logger.warning("No answer from %s; only what is in the cache is used.", urlsplit(address).netloc)
    _last = time.monotonic(), answers
    return answers
