"""README.md, ops/docs/ and .github/ agree with the code and with each other."""

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.cli.main import main
from imstream.cli.options import ChatSettings
from imstream.cli.up import UpSettings
from imstream.demo.settings import DemoSettings, LocalAISettings
from imstream.frame_parser import parse_frame
from imstream.settings import Settings
from imstream.settings_group import SettingsGroup
from ops.protocol_document import ASYNCAPI, PROTOCOL, asyncapi_text, protocol_text
from ops.settings_table import DOCUMENT, document

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "ops" / "docs"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / ".github").glob("*.md")), *sorted(DOCS.rglob("*.md"))]
GROUPS: list[type[SettingsGroup]] = [
    Settings,
    UpSettings,
    DemoSettings,
    LocalAISettings,
    EmbeddedSettings,
    ChatSettings,
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a document in one language, without their indentation."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return ["".join(line.removeprefix(indent) for line in code.splitlines(keepends=True)) for indent, code in blocks]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 200


def test_settings_document_is_current() -> None:
    assert DOCUMENT.read_text("utf-8") == document(), "run .venv/bin/python -m ops.settings_table"


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_is_listed_with_what_it_does(group: type[SettingsGroup]) -> None:
    table = DOCUMENT.read_text("utf-8")
    for field_name, field in group.model_fields.items():
        row = re.search(rf"^\| `{group.variable(field_name)}` \|[^|]*\| (.*) \|$", table, re.MULTILINE)
        assert row is not None, f"{group.variable(field_name)} is not in settings.md"
        assert row[1] == field.description


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_setting_that_is_named_exists(path: Path) -> None:
    known = {group.variable(field) for group in GROUPS for field in group.model_fields}
    known |= {variable for group in GROUPS for variable in group.file_variables()}
    named = set(re.findall(r"IMSTREAM_[A-Z_]*[A-Z](?![A-Z_*…])", path.read_text("utf-8")))
    assert named - known == set()


def test_files_and_methods_that_are_named_exist() -> None:
    package = ROOT / "imstream"
    sources = {path: path.read_text("utf-8") for path in package.rglob("*.py")}
    for path in (DOCS / "architecture.md", *sorted((DOCS / "decisions").glob("*.md"))):
        text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
        for file in re.findall(r"`([\w/]+\.(?:py|lua|js))`", text):
            exists = any((root / file).exists() for root in (ROOT, package, ROOT / "tests" / "journeys"))
            assert exists or file == "imstream/guards/links.py", f"{name(path)} names {file}"
        for owner, method in re.findall(r"`([A-Z]\w+)\.(\w+)`", text):
            found = [code for code in sources.values() if f"class {owner}" in code]
            assert any(f"def {method}(" in code for code in found), f"{name(path)} names {owner}.{method}"


def test_the_protocol_in_both_its_forms_is_current() -> None:
    hint = "run .venv/bin/python -m ops.protocol_document"
    assert ASYNCAPI.read_text("utf-8") == asyncapi_text(), hint
    assert PROTOCOL.read_text("utf-8") == protocol_text(PROTOCOL.read_text("utf-8")), hint


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_link_to_a_file_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}#{anchor} does not exist"


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [README]
    while waiting:
        path = waiting.pop()
        if path not in reached and path.suffix == ".md":
            reached.add(path)
            links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text("utf-8"))
            waiting += [(path.parent / link).resolve() for link in links]
    assert [name(path) for path in DOCUMENTS if path not in reached] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_code_blocks_are_valid(path: Path) -> None:
    for code in code_blocks(path, "python"):
        compile(code, name(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for code in code_blocks(path, "json"):
        for line in code.splitlines():
            assert parse_frame(line).user_id == json.loads(line)["userId"]
    for code in code_blocks(path, "sh"):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_commands_and_options_in_code_blocks_exist(path: Path) -> None:
    for code in code_blocks(path, "sh"):
        command_line = r"(?<![\w/.-])(?:ops/)?(imstream|up)(?![/@])((?: [^\n#|&>()]*)?)"
        ours = re.sub(r"^(docker|kubectl|sudo) .*$", "", code.replace("\\\n", " "), flags=re.MULTILINE)
        for call in re.findall(command_line, ours):
            words = ["up", *shlex.split(call[1])] if call[0] == "up" else shlex.split(call[1])
            command: click.Command = main
            while isinstance(command, click.Group):
                assert words, f"{call} names no command"
                found = command.get_command(click.Context(command), words.pop(0))
                assert found, f"{call} names an unknown command"
                command = found
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, call


def explained_events() -> set[str]:
    """The log events in the table of operating.md."""
    table = (DOCS / "operating.md").read_text("utf-8").partition("| log event |")[2].partition("\n\n")[0]
    return {event for row in table.splitlines()[2:] for event in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def test_every_log_event_that_is_explained_is_one_that_is_logged() -> None:
    code = "".join(path.read_text("utf-8") for path in (ROOT / "imstream").rglob("*.py"))
    assert explained_events()
    assert {event for event in explained_events() if f'"{event}"' not in code} == set()


def test_every_log_event_of_a_node_is_explained() -> None:
    node = [path for path in (ROOT / "imstream").rglob("*.py") if not {"cli", "client", "demo"} & set(path.parts)]
    code = "".join(path.read_text("utf-8") for path in node)
    logged = set(re.findall(r'\b_?(?:log|limited)\.(?:info|warning|error|exception)\(\s*"([^"%]+)"', code))
    assert logged - explained_events() == set()
