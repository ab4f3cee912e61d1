"""The page's Markdown: the tests in tests/npm/markdown*.test.mjs, in Node.js."""

import subprocess
from pathlib import Path

import pytest

from tests.support.npm import node

FOLDER = Path(__file__).parents[1] / "npm"


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("markdown.test.mjs", id="safe, incremental, linear"),
        pytest.param("markdown_spec.test.mjs", id="CommonMark and GFM"),
        pytest.param("markdown_cpu.test.mjs", id="time of the processor", marks=pytest.mark.long),
    ],
)
def test_markdown_in_node(file: str) -> None:
    command = [*node(FOLDER), "--test", "--test-reporter=spec", str(FOLDER / file)]
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
