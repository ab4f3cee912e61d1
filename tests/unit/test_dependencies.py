"""The packages that imstream imports are declared."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported() -> set[str]:
    """The top-level modules that imstream imports, except its own and those of Python."""
    found = set[str]()
    for path in (ROOT / "imstream").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                found.add(node.module.partition(".")[0])
    return found - {"imstream"} - sys.stdlib_module_names


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    declared = {normal(re.split(r"[^\w.-]", line)[0]) for line in lines} | {"cryptography"}  # of pyjwt[crypto]
    installed = packages_distributions()
    missing = {name for name in imported() if declared.isdisjoint(map(normal, installed.get(name, [name])))}
    assert missing == set()
