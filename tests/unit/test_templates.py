"""Templates of the system prompt and the message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.ai.prompt.assembler import Template
from imstream.errors import SettingsError

NAMES = ("user", "contents")


def template(text: str) -> Template:
    return Template(text, NAMES, setting="IMSTREAM_X")


def test_variables_are_filled_in_and_doubled_braces_are_braces() -> None:
    filled = template('{user} asks: {contents} as {{"json": {{}}}}').fill({"user": "10001", "contents": "why?"})
    assert filled == '10001 asks: why? as {"json": {}}'


@given(st.text(), st.text())
def test_what_fills_a_variable_is_never_looked_at(user: str, contents: str) -> None:
    filled = template("{user}|{contents}|{user}").fill({"user": user, "contents": contents})
    assert filled == f"{user}|{contents}|{user}"


@pytest.mark.parametrize(
    "contents", ["{user}", "{{user}}", "{", "}", "{contents.__class__}", "{0}", "%s", "$user", "\\1"]
)
def test_braces_in_a_message_are_braces(contents: str) -> None:
    assert template("<{contents}>").fill({"user": "10001", "contents": contents}) == f"<{contents}>"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hello {name}", "{name} in line 1"),
        ("first\n{user!r}", "{user!r} in line 2"),
        ("{user.__class__}", "{user.__class__} in line 1"),
        ("{user:>20}", "{user:>20} in line 1"),
        ("{}", "{} in line 1"),
        ("{ user }", "{ user } in line 1"),
        ("\n\na { b", "{ in line 3"),
        ("a } b", "} in line 1"),
        ("{user", "{ in line 1"),
        ("{{{user}}", "} in line 1"),
    ],
)
def test_a_wrong_variable_and_a_stray_brace_are_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(SettingsError) as refused:
        template(text)
    assert str(refused.value) == (
        f"IMSTREAM_X is not allowed: {named}: the variables are {{user}}, {{contents}}; a brace is written {{{{ or }}}}"
    )


@given(st.text("{}ab", max_size=12))
def test_a_template_is_read_like_a_format_of_python_and_filled_alike(text: str) -> None:
    values = {"a": "{b}", "b": "}}{{"}
    expected: str | None
    filled: str | None
    try:
        expected = text.format_map(values)
    except (KeyError, ValueError, IndexError):
        expected = None
    try:
        filled = Template(text, ("a", "b"), setting="IMSTREAM_X").fill(values)
    except SettingsError:
        filled = None
    assert filled == expected
