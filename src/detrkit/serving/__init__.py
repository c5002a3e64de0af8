"""``detrkit serve``: a detector as an HTTP service.

A request's image is read in a thread, waits in a bounded queue for others of the same processed size, and
goes through the model with them: in this process, or in replicas on a Ray cluster.
"""

from __future__ import annotations

import importlib.util

from detrkit.common.errors import MissingExtraError

_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "python_multipart")


def require_packages() -> None:
    """Checks that the packages of the extra ``serve`` are installed.

    Raises:
        MissingExtraError: One is not.
    """
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError("detrkit serve", "serve", package=name)
