"""A small annotated data set, for the commands that need one."""

from tests.training.conftest import annotations as annotations
