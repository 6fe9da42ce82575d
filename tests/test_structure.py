"""The package's levels: a file imports only from below. The imports are parsed, not run."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "projects" / "GlobalKD" / "globalkd"

#: Module or sub-package -> level. Inside a sub-package files may import each other.
LEVELS = {
    "config": 0,
    "dense_head": 0,
    "random_state": 0,
    "requirement": 0,
    "safe_loading": 0,
    "schedule": 1,
    "sparse_convolution": 0,
    "sparse_roi_align": 0,
    "visualization": 0,
    "config_reading": 1,
    "data": 1,
    "features": 1,
    "teacher": 2,
    "prototypes": 3,
    "pairing": 3,
    "losses": 4,
    "non_finite": 5,
    "distiller": 6,
    "meta_arch": 7,
    "engine": 8,
    "checks": 9,
    "analysis": 9,
    "export": 10,
    "experiments": 10,
    "__init__": 11,
}
FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def unit(parts):
    """The entry of LEVELS that a dotted name inside the package belongs to."""
    return parts[0] if parts else "__init__"


def is_module(name):
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def imported_units(source, package):
    """What a file of the package imports from the package.

    Args:
        source: the file's text.
        package: names of the packages that it lies in, below globalkd: () or ("losses",).
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (unit(name[1:]) for name in names if name[0] == "globalkd")
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                module = [*package[: len(package) + 1 - node.level], *module]
            elif module[0] == "globalkd":
                module = module[1:]
            else:
                continue
            if module:
                yield unit(module)
            else:  # `from . import teacher` names modules
                names = [alias.name for alias in node.names]
                yield from (name if is_module(name) else "__init__" for name in names)


@each_file
def test_imports_only_from_lower_levels(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = unit(parts)
    assert own in LEVELS, (
        f"{path.name} has no level: add {own!r} to LEVELS in {Path(__file__).name}, above "
        "everything that it imports"
    )
    imported = set(imported_units(path.read_text(), parts[:-1])) & set(LEVELS)
    for other in imported - {own}:
        assert LEVELS[other] < LEVELS[own], (
            f"{'/'.join(parts)}.py (level {LEVELS[own]}) imports {other} (level {LEVELS[other]})"
        )


@each_file
def test_has_a_module_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@each_file
def test_has_no_star_import(path):
    names = [
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert "*" not in names


@pytest.mark.parametrize(
    ("line", "package", "expected"),
    [
        ("from .teacher import Teacher", (), "teacher"),
        ("from . import teacher", (), "teacher"),
        ("from . import __version__", (), "__init__"),
        ("from .base import DistillLoss", ("losses",), "losses"),
        ("from ..teacher import Teacher", ("losses",), "teacher"),
        ("from .. import teacher", ("losses",), "teacher"),
        ("from ..losses.base import DistillLoss", ("analysis",), "losses"),
        ("import globalkd.losses.base", (), "losses"),
        ("from globalkd.losses import base", (), "losses"),
        ("def f():\n    from .trainer import Trainer", (), "trainer"),
    ],
)
def test_every_form_of_import_is_seen(line, package, expected):
    assert list(imported_units(line, package)) == [expected]


@pytest.mark.parametrize("line", ["import torch", "from torch import nn", "import globalkd_other"])
def test_imports_from_elsewhere_do_not_count(line):
    assert list(imported_units(line, ())) == []
