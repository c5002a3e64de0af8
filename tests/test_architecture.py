"""Which modules import which: no circles, and a package builds only on those before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"

# A package imports from itself and from the lines before its own.
ORDER = [
    {"common"},
    {"families"},
    {"kernels"},
    {"losses"},
    {"processing"},
    {"models"},
    {"results"},
    {"data"},
    {"evaluation"},
    {"engines"},
    {"checkpoints"},
    {"inference"},
    {"attention"},
    {"hub"},
    {"conversion"},
    {"integration"},
    {"training", "benchmark", "serving", "demo"},
    {"cli"},
]
LEVELS = {package: level for level, packages in enumerate(ORDER) for package in packages}

# Only give public names to what lies in the packages, and are imported by none of these.
FACADES = {"", "__main__", "errors", "endpoint"}


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


FILES = {_module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def _run_time_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports in a piece of code, those within functions too, but not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from _run_time_imports(child)


def _imported_by(path: Path) -> set[str]:
    """The modules of detrkit that a file imports."""
    found = set()
    for node in _run_time_imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in inner}
    return found & FILES.keys()


IMPORTS = {name: _imported_by(path) for name, path in FILES.items()}


def _package(module: str) -> str:
    return ([*module.split("."), ""])[1]


def test_there_is_an_import_to_judge() -> None:
    assert "detrkit.common.errors" in IMPORTS["detrkit.common.files"]
    assert any("detrkit.inference.detector" in imported for imported in IMPORTS.values())


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(IMPORTS).prepare()  # the error names the circle


def test_a_package_imports_only_those_before_it() -> None:
    upward = {
        (_package(module), _package(name))
        for module, imported in IMPORTS.items()
        for name in imported
        if _package(module) not in FACADES and _package(name) != ""
        if _package(module) != _package(name) and LEVELS[_package(module)] <= LEVELS[_package(name)]
    }
    assert not upward
