"""The form of requests with the options of a backend, over a real socket."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.ai.backend import OpenAIBackend, PromptMessage
from imstream.ai.backend_options import BackendOptions
from imstream.ai.dialect import OPENING, adapt
from imstream.ai.prompt.assembler import PromptAssembler
from imstream.ai.prompt.prompter import Prompter
from imstream.errors import BackendError, SettingsError
from imstream.model import ChatRequest
from imstream.settings import Settings
from tests.support.asking import Asking, asking
from tests.support.scripted_backend import Exchange, Request, refuses, scripted_backend, streams

Role = Literal["system", "user", "assistant"]
Turns = Sequence[tuple[Role, str]]

KEY = "s3cret-of-a-backend"


async def sent(turns: Turns = (("user", "hi"),), **settings: Any) -> Request:  # noqa: ANN401 - any setting
    """The request for a prompt, made with these settings."""
    async with asking(streams("Hello"), **settings) as asked:
        await answer(asked, turns)
        return asked.backend.requests[0]


async def answer(asked: Asking, turns: Turns) -> None:
    await asked.client.answer([PromptMessage(*turn) for turn in turns], on_text=asked.pieces.append)


async def messages(turns: Turns, **settings: Any) -> Turns:  # noqa: ANN401 - any setting
    """The messages that are sent for a prompt."""
    request = await sent(turns, **settings)
    return [(message["role"], message["content"]) for message in request.json["messages"]]


# Headers and parameters


async def test_headers_are_added_and_take_precedence() -> None:
    headers = {"HTTP-Referer": "https://chat.example", "user-agent": "ours", "Authorization": "Token t"}
    request = await sent(ai_headers=json.dumps(headers), ai_key="sk-1")
    assert request.headers["http-referer"] == "https://chat.example"
    assert request.headers["user-agent"] == "ours"
    assert request.headers["authorization"] == "Token t"


async def test_parameters_are_merged_into_the_request() -> None:
    body = {"temperature": 0.2, "stream_options": {"continuous": True}, "stop": ["\n"], "a": {"b": None}}
    request = await sent(ai_body=json.dumps(body))
    assert request.json == {
        "model": "demo",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "temperature": 0.2,
        "stop": ["\n"],
        "a": {"b": None},
        "stream_options": {"include_usage": True, "continuous": True},
    }


async def test_values_can_be_those_of_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_THE_BACKEND", f" {KEY}\n")
    request = await sent(
        ai_headers='{"api-key": "env:KEY_OF_THE_BACKEND", "X-Note": "env: is not a name"}',
        ai_body='{"user": {"ids": ["env:KEY_OF_THE_BACKEND"]}}',
    )
    assert request.headers["api-key"] == KEY
    assert request.headers["x-note"] == "env: is not a name"
    assert request.json["user"] == {"ids": [KEY]}


async def test_values_can_be_those_of_the_settings_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("settings")
    (folder / ".env").write_text(f"KEY_OF_THE_BACKEND={KEY}\n")
    monkeypatch.chdir(folder)
    assert (await sent(ai_headers={"api-key": "env:KEY_OF_THE_BACKEND"})).headers["api-key"] == KEY


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("ai_headers", "{", "a JSON object: not valid JSON"),
        ("ai_headers", "[]", "a JSON object, in braces"),
        ("ai_headers", f'{{"X": 1, "Y": "{KEY}"}}', "valid string"),
        ("ai_headers", f'{{"a b": "{KEY}"}}', "'a b' is not the name of a header"),
        ("ai_headers", f'{{"X": "{KEY}\\n"}}', "the header X must be printable ASCII"),
        ("ai_headers", '{"Content-Length": "1"}', "the header Content-Length is set by imstream"),
        ("ai_headers", '{"X": "env:NOWHERE_SET"}', "the environment variable NOWHERE_SET, which it names, is not set"),
        ("ai_body", '{"stream": false}', "the parameter stream is set by imstream"),
        ("ai_body", '{"messages": []}', "the parameter messages is set by imstream"),
        ("ai_body", '{"a": NaN}', "NaN is no number"),
        ("ai_body", '{"a": {"b": ["env:NOWHERE_SET"]}}', "the environment variable NOWHERE_SET"),
    ],
)
def test_a_wrong_object_is_refused_at_the_start_and_not_shown(option: str, value: str, why: str) -> None:
    with pytest.raises(SettingsError) as refused:
        OpenAIBackend(Settings.load(**{option: value}))
    assert str(refused.value).startswith(f"IMSTREAM_{option.upper()}=(hidden) is not allowed: ")
    assert why in str(refused.value)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"ai_headers": '{"api-key": "env:KEY_OF_THE_BACKEND"}'},
        {"ai_headers": '{"X-Tenant": "env:KEY_OF_THE_BACKEND"}'},
        {"ai_headers": f'{{"x-api-key": "{KEY}"}}'},
        {"ai_headers": f'{{"Authorization": "Token {KEY}"}}'},
        {"ai_body": '{"user": ["env:KEY_OF_THE_BACKEND"]}'},
    ],
)
async def test_no_error_shows_a_secret_that_the_backend_repeats(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_THE_BACKEND", KEY)
    async with asking(refuses(401, f"wrong: {KEY}"), **settings) as asked:
        with pytest.raises(BackendError) as failed:
            await asked.ask()
        assert "wrong: (hidden)" in str(failed.value)
        assert KEY not in repr(asked.client) + repr(Settings.load(**settings)) + str(failed.value)


async def test_no_error_shows_a_key_in_the_address_that_the_backend_repeats() -> None:
    async with scripted_backend() as backend:
        backend.then(refuses(401, f"wrong: {KEY}"))
        async with OpenAIBackend(Settings.load(ai_url=f"{backend.url}?api-key={KEY}")) as client:
            with pytest.raises(BackendError) as failed:
                await client.answer([PromptMessage("user", "hi")], on_text=lambda _: None)
    assert "wrong: (hidden)" in str(failed.value)
    assert KEY not in str(failed.value) + failed.value.detail


# The maximum of an answer


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_the_maximum_is_sent_under_the_name_of_the_option(name: str) -> None:
    request = await sent(ai_max_tokens=name, answer_tokens=777)
    assert {key: value for key, value in request.json.items() if "max" in key} == {name: 777}


async def test_no_maximum_is_sent_unless_it_is_named() -> None:
    assert [name for name in (await sent()).json if "max" in name] == []


# Roles


async def strict(exchange: Exchange) -> None:
    """Answer as strict chat templates do: a conversation alternates, begins with the user, and has text."""
    roles = [message["role"] for message in exchange.request.json["messages"]]
    if roles[0] == "system":
        roles = roles[1:]
    alternates = all(role == ("assistant" if place % 2 else "user") for place, role in enumerate(roles))
    says_something = all(message["content"].strip() for message in exchange.request.json["messages"])
    if alternates and says_something and len(roles) % 2:
        await streams("Hello")(exchange)
    else:
        await refuses(400, '{"message": "Conversation roles must alternate user/assistant/user/assistant/..."}')(
            exchange
        )


HISTORIES: dict[str, tuple[Turns, Turns]] = {
    "as it should be": (
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
    ),
    "a turn that was never answered": ([("user", "a"), ("user", "b")], [("user", "a\n\nb")]),
    "two answers": (
        [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")],
        [("user", "a"), ("assistant", "b\n\nc"), ("user", "d")],
    ),
    "a greeting": (
        [("system", "s"), ("assistant", "welcome"), ("user", "a")],
        [("system", "s"), ("user", OPENING), ("assistant", "welcome"), ("user", "a")],
    ),
    "a later system turn": (
        [("system", "s"), ("user", "a"), ("system", "t"), ("user", "b")],
        [("system", "s\n\nt"), ("user", "a\n\nb")],
    ),
    "a system turn only later": (
        [("user", "a"), ("system", "t"), ("user", "b")],
        [("system", "t"), ("user", "a\n\nb")],
    ),
    "empty turns": (
        [("system", " "), ("user", "a"), ("assistant", ""), ("user", "\n"), ("user", "b")],
        [("user", "a\n\nb")],
    ),
}


@pytest.mark.parametrize(("turns", "expected"), HISTORIES.values(), ids=HISTORIES)
async def test_roles_are_merged_until_they_alternate(turns: Turns, expected: Turns) -> None:
    async with asking(strict) as asked:
        await answer(asked, turns)
        got = [(message["role"], message["content"]) for message in asked.backend.requests[0].json["messages"]]
        assert got == expected


@pytest.mark.parametrize("turns", [before for before, _ in HISTORIES.values()], ids=HISTORIES)
async def test_roles_as_is_are_not_touched(turns: Turns) -> None:
    assert await messages(turns, ai_roles="as_is") == turns


TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.sampled_from(["", " ", "a", "b c"])))


@given(TURNS, st.sampled_from(["role", "user"]))
def test_any_prompt_alternates_and_keeps_its_words_in_order(turns: list[tuple[Role, str]], system: str) -> None:
    options = BackendOptions.model_validate({"system": system})
    got = adapt([PromptMessage(*turn) for turn in [*turns, ("user", "now")]], options)
    roles = [message["role"] for message in got]
    if system == "role" and roles[0] == "system":
        roles = roles[1:]
    assert roles == ["assistant" if place % 2 else "user" for place in range(len(roles))]
    assert len(roles) % 2 == 1
    for kind in (("system",), ("user", "assistant")):
        words = " ".join(content for role, content in [*turns, ("user", "now")] if role in kind).split()
        text = iter(" ".join(message["content"] for message in got).split())
        assert all(word in text for word in words)  # `in` consumes the iterator: in this order


# The system prompt


async def no_system_role(exchange: Exchange) -> None:
    if any(message["role"] == "system" for message in exchange.request.json["messages"]):
        await refuses(400, '{"message": "System role not supported"}')(exchange)
    else:
        await strict(exchange)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("system", "s"), ("user", "a")], [("user", "s\n\na")]),
        ([("system", "s"), ("user", "a"), ("system", "t"), ("user", "b")], [("user", "s\n\nt\n\na\n\nb")]),
        (
            [("system", "s"), ("assistant", "welcome"), ("user", "a")],
            [("user", "s"), ("assistant", "welcome"), ("user", "a")],
        ),
    ],
)
async def test_the_system_prompt_goes_in_front_of_the_first_user_turn(turns: Turns, expected: Turns) -> None:
    async with asking(no_system_role, ai_system="user") as asked:
        await answer(asked, turns)
        got = [(message["role"], message["content"]) for message in asked.backend.requests[0].json["messages"]]
        assert got == expected


async def test_system_turns_become_user_turns_where_they_are_if_roles_are_not_merged() -> None:
    turns: Turns = [("system", "s"), ("user", "a"), ("system", "t"), ("assistant", "b"), ("user", "c"), ("system", "u")]
    assert await messages(turns, ai_system="user", ai_roles="as_is") == [
        ("user", "s\n\na"),
        ("user", "t"),
        ("assistant", "b"),
        ("user", "c"),
        ("user", "u"),
    ]


# Reasoning


async def test_reasoning_in_tags_is_shown_only_with_the_option() -> None:
    script = streams("<th", "ink>hm", "</think>\n\n", "Hello")
    for option, text in [
        ("open_tags", "Hello"),
        ("tags", "Hello"),
        ("field", "<think>hm</think>\n\nHello"),
        ("none", "<think>hm</think>\n\nHello"),
    ]:
        async with asking(script, ai_reasoning=option) as asked:
            await asked.ask()
            assert asked.text == text


async def test_reasoning_is_no_part_of_a_summary() -> None:
    small: dict[str, Any] = {"context_tokens": 1000, "answer_tokens": 100, "history": "summarise"}
    history: list[tuple[Role, str]] = [("user", "word " * 100), ("assistant", "<think>hm</think>" + "word " * 100)] * 5
    async with asking(streams("<think>hm</th", "ink>They spoke"), **small) as asked:
        settings = Settings.load(**small)
        prompter = Prompter(settings, PromptAssembler(settings))
        request = ChatRequest(10001, "m", "and now?", tuple(history), "en", 0, "trace")
        prompt = await prompter.messages(request, asked.client)
    assert prompt[1].content.endswith("They spoke")
    assert "hm" not in "".join(message.content for message in prompt) + asked.backend.requests[0].body.decode()


# Options


def test_the_options_of_a_backend_are_the_settings_one_to_one() -> None:
    names = {name.removeprefix("ai_") for name in Settings.model_fields if name.startswith("ai_")}
    choice = {"name", "priority", "weight", "concurrency", "context_tokens", "answer_tokens"}
    options = {field.alias or name for name, field in BackendOptions.model_fields.items()} - choice
    assert options == {name for name in names if not name.startswith(("breaker", "backends"))}
    assert BackendOptions() == BackendOptions.of(Settings.load())


async def test_a_backend_can_have_options_of_its_own() -> None:
    async with scripted_backend(streams("Hello")) as backend:
        table = {"url": backend.url, "model": "m", "headers": {"X": "1"}, "body": {"top_k": 1}, "idle_timeout": "3s"}
        async with OpenAIBackend(Settings.load(), BackendOptions.model_validate(table)) as client:
            await client.answer([PromptMessage("user", "hi")], on_text=lambda _: None)
        assert backend.requests[0].headers["x"] == "1"
        assert (backend.requests[0].json["model"], backend.requests[0].json["top_k"]) == ("m", 1)
