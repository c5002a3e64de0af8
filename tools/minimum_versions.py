"""The lowest versions that pyproject.toml allows, as constraints for pip.

``python -m tools.minimum_versions > lowest.txt`` and ``pip install -c lowest.txt -e '.[test]'`` make the
oldest installation that detrkit claims to run in; ``bash .ci/minimum-versions`` runs the tests there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest_versions(project: dict[str, Any]) -> dict[str, Version]:
    """Package -> the highest of the lower bounds that the project's dependencies and extras give it.

    Raises:
        ValueError: A dependency has no lower bound.
    """
    extras = project.get("optional-dependencies", {})
    lowest: dict[str, Version] = {}
    for text in [*project["dependencies"], *(text for texts in extras.values() for text in texts)]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:  # its own extras
            continue
        bounds = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==")]
        if not bounds:
            raise ValueError(f"pyproject.toml: {text!r} has no lowest version; add one")
        lowest[requirement.name] = max([*bounds, lowest.get(requirement.name, bounds[0])])
    return lowest


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    for name, version in sorted(lowest_versions(project).items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
