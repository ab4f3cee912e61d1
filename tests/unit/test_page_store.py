"""The storage of the page in the browser: tests/npm/page_store.test.mjs, in Node.js."""

import subprocess
from pathlib import Path

from tests.support.npm import node

FOLDER = Path(__file__).parents[1] / "npm"


def test_the_page_without_storage_in_node() -> None:
    command = [*node(FOLDER), "--test", "--test-reporter=spec", str(FOLDER / "page_store.test.mjs")]
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
