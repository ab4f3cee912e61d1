"""The package of the client for browsers and Node.js: its files, its types, and the browsers that it runs in.

TypeScript and MDN's compatibility data are installed by `npm ci` in tests/npm. Each runs once for all tests of this
file, because it takes seconds.
"""

import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.npm import node

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "npm"
PACKAGE = ROOT / "imstream" / "gateway" / "static"
MODULES = sorted(PACKAGE.glob("*.js"))
DECLARED = (PACKAGE / "imstream.d.ts").read_text("utf-8")

WRONG = {
    "missing": ("  drop(): void;\n", ""),
    "invented": ("  drop(): void;\n", "  drop(): void;\n  jump(): void;\n"),
    "other": ("  text: string;\n", "  text: number;\n"),
    "incomplete": (' | "expired"', ""),
}
"""Changes of the types that disagree with the code."""

NEW = """[].toReversed();
'a'.toWellFormed();
/(?<=a)b/;
structuredClone({});
AbortSignal.timeout(1);
[].toReversed?.();
[].at(0);
function f(any) { any.toSorted(); any.slice(); }
"""


def packed(folder: Path) -> dict[str, str]:
    """Install the output of `npm pack` in a folder; returns its description, and the files."""
    pack = ["npm", "pack", PACKAGE, "--pack-destination", folder, "--json", "--cache", folder / "cache"]
    [found] = json.loads(subprocess.run([*map(str, pack)], capture_output=True, check=True).stdout)
    shutil.unpack_archive(folder / found["filename"], folder / "node_modules")
    (folder / "node_modules" / "package").rename(folder / "node_modules" / "imstream-client")
    return {"version": found["version"], "files": " ".join(sorted(file["path"] for file in found["files"]))}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    """The package, and the output of `tsc --strict` for the sample and for types that agree with the code or do not."""
    command = [*node(FOLDER), str(FOLDER / "node_modules" / "typescript" / "bin" / "tsc")]
    folder = tmp_path_factory.mktemp("types")
    package = packed(folder)
    for name in ("@types", "undici-types", "ws"):
        (folder / "node_modules" / name).symlink_to(FOLDER / "node_modules" / name)
    for name, (line, other) in {"right": ("", ""), **WRONG}.items():
        assert line in DECLARED
        (folder / name).mkdir()
        (folder / name / "declared.d.ts").write_text(DECLARED.replace(line, other) if line else DECLARED)
        shutil.copy(PACKAGE / "imstream.js", folder / name / "actual.js")
        shutil.copy(FOLDER / "agreement.ts", folder / name)
    shutil.copy(FOLDER / "sample.ts", folder)
    shutil.copy(ROOT / "ops" / "docs" / "examples" / "client.mjs", folder)
    shutil.copy(FOLDER / "tsconfig.json", folder)
    (folder / "package.json").write_text('{"type": "module"}')
    return package, subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


def test_npm_packs_the_client_and_its_types(compiled: tuple[dict[str, str], str]) -> None:
    package, _ = compiled
    assert package == {"version": version("imstream-server"), "files": "imstream.d.ts imstream.js package.json"}


def test_types_suffice_for_a_sample_that_uses_every_event_and_for_the_example_and_agree_with_the_code(
    compiled: tuple[dict[str, str], str],
) -> None:
    assert [
        line for line in compiled[1].splitlines() if not line.startswith((" ", *(f"{name}/" for name in WRONG)))
    ] == []


@pytest.mark.parametrize("name", WRONG)
def test_types_that_disagree_with_the_code_are_found(name: str, compiled: tuple[dict[str, str], str]) -> None:
    assert f"{name}/agreement.ts" in compiled[1]


def test_a_missing_websocket_is_one_sentence() -> None:
    script = f"""
        delete globalThis.WebSocket;
        const {{ ImstreamClient }} = await import("{PACKAGE}/imstream.js");
        new ImstreamClient({{ address: "http://127.0.0.1", userId: 10001 }}).connect();
    """
    command = [*node(FOLDER), "--input-type=module", "--eval", script]
    error = subprocess.run(command, check=False, capture_output=True, text=True).stderr
    assert "\nTypeError: There is no WebSocket here: pass a class as the option of this name." in error


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Features of the client, the page and `NEW` that are missing in Chrome 94 or Safari 15.4."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "new.js").write_text(NEW)
    files = (FOLDER / "compat.mjs", *MODULES, folder / "new.js")
    command = [*node(FOLDER), *map(str, files)]
    found: list[list[str]] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def test_the_client_and_the_page_use_nothing_that_the_oldest_browsers_lack(lacking: list[list[str]]) -> None:
    assert lacking[:-1] == [[] for _ in MODULES]


def test_features_missing_in_the_oldest_browsers_are_found(lacking: list[list[str]]) -> None:
    assert [line.partition(" is not")[0] for line in lacking[-1]] == [
        "1: toReversed",
        "2: toWellFormed",
        "3: regular expressions: lookbehind",
        "4: structuredClone",
        "5: timeout",
        "8: toSorted",
    ]
