"""The program, as the tests of the command line run it."""

from tests.cli.conftest import detrkit_here as detrkit_here
from tests.cli.conftest import working_directory as working_directory
