"""The parser of the AsyncAPI project accepts asyncapi.json. It is installed by `npm ci` in tests/asyncapi."""

import json
import subprocess
from pathlib import Path

from ops.protocol_document import ASYNCAPI
from tests.support.npm import node
from tests.support.schemas import DOCUMENT

FOLDER = Path(__file__).parents[1] / "asyncapi"


def test_the_document_has_no_error_and_no_warning_and_a_broken_one_has(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(ASYNCAPI.read_text("utf-8").replace("#/components/schemas/UserId", "#/components/schemas/Nobody"))
    command = [*node(FOLDER), *map(str, (FOLDER / "check.mjs", ASYNCAPI, broken))]
    ours, other = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert ours == {"messages": len(DOCUMENT["components"]["messages"]), "problems": []}
    assert other["messages"] == 0
    assert any("UserId" in problem or "Nobody" in problem for problem in other["problems"])
