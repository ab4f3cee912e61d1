"""The README stays true where a test can tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.cli.up_settings import UpSettings
from imstream.demo.settings import DemoSettings
from imstream.settings import Settings, SettingsGroup
from imstream.wire import Code, Event, MsgType

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("group", [Settings, UpSettings, DemoSettings, EmbeddedSettings])
def test_every_setting_is_listed_with_what_it_does(group: type[SettingsGroup]) -> None:
    for name, field in group.model_fields.items():
        row = re.search(rf"^\| `{group.variable(name)}` \|[^|]*\| (.*) \|$", README, re.MULTILINE)
        assert row is not None, f"{group.variable(name)} is not in the README"
        assert row[1] == (field.description or "").rstrip(".")


def test_every_word_of_the_wire_is_explained() -> None:
    words = [*Code, *Event, *MsgType]
    assert [word for word in words if f"{word}" not in README] == []


def test_every_link_to_a_file_leads_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_log_event_that_is_explained_is_one_that_is_logged() -> None:
    table = README.partition("| log event |")[2].partition("\n\n")[0]
    events = [event for row in table.splitlines()[2:] for event in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    code = "".join(path.read_text("utf-8") for path in (ROOT / "imstream").rglob("*.py"))
    assert events
    assert [event for event in events if f'"{event}"' not in code] == []
