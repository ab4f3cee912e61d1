"""What the model is given."""

from __future__ import annotations

from imstream.ai.backend import Message
from imstream.ai.prompt import assemble
from imstream.store.chat_request import ChatRequest


def request(*history: tuple[str, str]) -> ChatRequest:
    return ChatRequest(10001, "m", "and now?", history, "en", 0, "trace")


def test_a_question_alone_is_one_message_of_the_user() -> None:
    assert assemble(request()) == [Message("user", "and now?")]


def test_the_conversation_comes_first_in_its_order() -> None:
    assert assemble(request(("system", "be brief"), ("user", "hi"), ("assistant", "hello"))) == [
        Message("system", "be brief"),
        Message("user", "hi"),
        Message("assistant", "hello"),
        Message("user", "and now?"),
    ]
