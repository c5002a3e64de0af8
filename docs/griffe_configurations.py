"""Lets the reference show the fields of a configuration with their types and defaults.

Transformers makes ``__init__`` of a configuration out of its annotated fields when the class is created.
griffe, which reads the source without running it, does not know that.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_BASES = ("PreTrainedConfig", "DetrFamilyConfig", "DetrConfig")


class Configurations(griffe.Extension):
    """Gives configurations the ``__init__`` that they have at run time, and sessions their heading."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Makes sessions (``>>>``) of docstrings code rather than text, which takes the plural heading."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$(?=\s+>>>)", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Adds ``__init__`` to a configuration."""
        if not any(str(base).endswith(_BASES) for base in cls.bases):
            return
        parameters = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
        for name, attribute in cls.attributes.items():
            if attribute.annotation is None or "instance-attribute" not in attribute.labels:
                continue  # a ClassVar or a property
            parameters.append(
                griffe.Parameter(
                    name,
                    annotation=attribute.annotation,
                    kind=griffe.ParameterKind.keyword_only,
                    default=str(attribute.value),
                )
            )
        made = griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls)
        cls.set_member("__init__", made)
