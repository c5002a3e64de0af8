"""The errors that detrkit raises, by their public names."""

from detrkit.common.errors import AnnotationError as AnnotationError
from detrkit.common.errors import CheckpointError as CheckpointError
from detrkit.common.errors import DetrkitError as DetrkitError
from detrkit.common.errors import ImageError as ImageError
from detrkit.common.errors import ImageTooLargeError as ImageTooLargeError
from detrkit.common.errors import MissingExtraError as MissingExtraError
from detrkit.common.errors import SettingError as SettingError
from detrkit.common.errors import TrainingError as TrainingError
