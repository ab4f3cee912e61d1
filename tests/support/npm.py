"""Programs for Node.js, with packages that `npm ci` installs in a folder of tests/."""

import os
import subprocess
from pathlib import Path
from shutil import which

import pytest

from tests.support.servers import missing

OLD = 20
"""Before this version, Node.js needs flags for features of the client."""


def node(folder: Path) -> list[str]:
    """The command that starts Node.js. Without it, or without the packages of a folder, the test is skipped."""
    if which("node") is None or not (folder / "node_modules").exists():
        if "WITHOUT_NPM" in os.environ:
            pytest.skip("the npm registry could not be reached")
        missing(f"node, or its packages (npm ci --prefix {folder} --ignore-scripts)")
    version = subprocess.run(["node", "--version"], check=True, capture_output=True, text=True).stdout
    is_old = int(version.removeprefix("v").partition(".")[0]) < OLD
    return ["node", *(("--experimental-global-customevent", "--experimental-global-webcrypto") if is_old else ())]
