"""Public names of a package that are imported on first use."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any

from detrkit.common.without_torch import explained


def lazy_names(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Makes a package import lazily what it imports under ``if TYPE_CHECKING``.

    The imports in that block are the only list of the package's names. Type checkers follow them; at run time
    they are read from the package's source, as Transformers does for its own.

    Args:
        package: ``__name__`` of the package.

    Returns:
        The package's ``__all__``, ``__getattr__`` and ``__dir__``.
    """
    module = sys.modules[package]
    source: str = module.__spec__.loader.get_source(package)  # type: ignore[union-attr]
    blocks = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {str(alias.asname): str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(homes[name]), name)
        except ImportError as error:
            missing = explained(error, f"{package}.{name}")
            if missing is None:
                raise
            raise missing from error
        setattr(module, name, value)
        return value

    return list(homes), get, lambda: sorted({*vars(module), *homes})
