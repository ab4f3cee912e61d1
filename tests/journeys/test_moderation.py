"""Moderation, from a socket through a node to the service and back."""

from collections.abc import Iterator

import pytest

from imstream.guards.moderation import FLAGGED
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import Told
from tests.support.servers import DemoBackend
from tests.support.users import user_id

USER = user_id(10001)
BRIEF = "[[demo first=0 pace=0 length=5]]"
MANY = 32


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node whose AI backend is its moderation service, too."""
    settings = {"moderation_url": demo.url, "lock_after": 0, "ban_after": 0}
    with standing_node(tmp_path_factory.mktemp("moderation"), demo.url, **settings) as node:
        yield node


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_a_flagged_message_fails_with_a_sentence_and_the_ai_is_not_asked(lang: str, node: OneNode) -> None:
    calls = node.ai_stats()["calls"]
    message_id = f"flagged-{lang}"
    async with node.peer(USER, lang=lang) as someone:
        assert (await someone.chat(USER, "unlikely words [[flag violence hate]]", message_id))["event"] == "accepted"
        told = await someone.end_of(message_id)
    assert told.events == ["accepted", "failed"]
    assert told.terminal is not None
    assert (told.terminal["code"], told.terminal["contents"]) == ("FORBIDDEN", getattr(FLAGGED, lang))
    assert node.ai_stats()["calls"] == calls
    async with node.peer(USER, lang=lang, resume={message_id: Told()}) as later:
        assert (await later.end_of(message_id)).terminal == {**told.terminal, "respTime": later.frames[-1]["respTime"]}


async def test_an_operator_is_told_the_categories_and_no_word_of_the_text(node: OneNode) -> None:
    async with node.peer(USER) as someone:
        await someone.chat(USER, "unlikely words [[flag self-harm]]", "told")
        await someone.end_of("told")
    await node.all_finished()
    assert node.dead() == []
    end = node.record(USER, "told")[-1]
    assert (end["reason"], end["error"]) == ("moderation", f"{FLAGGED.en} (self-harm)")
    [line] = [one for one in node.now.process.output().splitlines() if "message refused" in one and "told" in one]
    assert "self-harm" in line
    assert "unlikely" not in node.now.process.output()


async def test_other_messages_are_answered_and_a_burst_of_them_is_moderated_together(node: OneNode) -> None:
    moderations = node.ai_stats()["moderations"]
    async with node.peer(USER) as someone:
        for number in range(MANY):
            await someone.send_frame(
                "CHAT", userId=USER, messageId=f"many-{number}", contents=f"question {number} {BRIEF}"
            )
        for number in range(MANY):
            told = await someone.end_of(f"many-{number}")
            assert told.events[-1] == "done"
    made = node.ai_stats()["moderations"] - moderations
    assert 1 <= made < MANY
