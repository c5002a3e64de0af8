"""Errors that a user can act on: each names what is wrong and what to do.

The command line prints them as one line and exits with status 2.
"""

from __future__ import annotations

import importlib.util


class DetrkitError(Exception):
    """Base of the errors that detrkit raises for a user's mistake or a bad file."""


class ImageError(DetrkitError, ValueError):
    """An image that cannot be found, read or used."""


class ImageTooLargeError(ImageError):
    """An image of more pixels or bytes than the limits allow."""


class AnnotationError(DetrkitError, ValueError):
    """Annotations that do not fit their image or format."""


class CheckpointError(DetrkitError, ValueError):
    """A checkpoint or model folder that cannot be found, read or used."""


class SettingError(DetrkitError, ValueError):
    """A setting that does not exist, is out of range or is not available on this machine."""


class TrainingError(DetrkitError, RuntimeError):
    """A training run that cannot continue."""


class MissingExtraError(DetrkitError, ImportError):
    """A feature whose optional packages are not installed."""

    def __init__(self, feature: str, extra: str | None = None, *, package: str | None = None) -> None:
        """Names what is missing.

        Args:
            feature: What needs it.
            extra: The extra of detrkit with the packages.
            package: The package, where no extra has it; beside an extra the part of it that does without
                PyTorch, for an installation without.
        """
        alone = package is not None and (extra is None or importlib.util.find_spec("torch") is None)
        if alone:
            super().__init__(f"{feature} needs {package}, which is not installed; run: pip install {package}")
        else:
            super().__init__(
                f"{feature} needs packages that are not installed; in the detrkit checkout run: "
                f"pip install '.[{extra}]'"
            )


class MissingTorchError(DetrkitError, ImportError):
    """A feature that needs PyTorch, in an installation for exported models that does without."""

    def __init__(self, feature: str, package: str = "PyTorch") -> None:
        """Names what is missing.

        Args:
            feature: What needs it.
            package: PyTorch, or a package of the full installation that needs it.
        """
        super().__init__(
            f"{feature} needs {package}, which is not installed: this installation runs exported models "
            "only; for all of detrkit run in its checkout: pip install ."
        )
