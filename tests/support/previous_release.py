"""A checkout of the previous release with its locked packages, as a test partner.

It is created on first use in a directory that git ignores, and kept for the next run.
"""

import fcntl
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

COMMIT = "62a067c03b1e0f688123b17588c6b2d152f81492"
"""The previous release. Each release updates it."""

_ROOT = Path(__file__).parents[2]


@cache
def previous_python() -> str:
    """The interpreter that runs the previous release.

    Skips the test if the git history lacks it; in CI, fails.
    """
    if _git("cat-file", "-e", COMMIT).returncode != 0:
        reason = f"the git history is shallow: it lacks {COMMIT[:7]}, the previous release (git fetch --unshallow)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = _ROOT / ".previous" / COMMIT[:7]
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:  # several processes run tests concurrently
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ops" / "venv").exists():
            _git("worktree", "add", "--quiet", "--force", "--detach", str(folder), COMMIT).check_returncode()
        environment = {**os.environ, "PYTHON": str(Path(sys.executable).resolve())}
        made = subprocess.run(
            [folder / "ops" / "venv"], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert made.returncode == 0, made.stderr
    return str(folder / ".venv" / "bin" / "python")


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, check=False, timeout=60)
