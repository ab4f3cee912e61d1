"""The word list on a real node: messages and answers, refused and masked, and reloading."""

import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from imstream.client import Client, Failed, Refused
from imstream.demo.answer import canned_answer
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import Told
from tests.support.servers import DemoBackend
from tests.support.users import user_id
from tests.support.waiting import wait_until

USER = user_id(10001)

IN_MESSAGE = {
    "zh": "消息中含有不允许的词语,请修改后再发送!",
    "en": "The message contains words that are not allowed here. Please change it and send it again!",
}
IN_ANSWER = {
    "zh": "回答中出现了不允许的词语,已停止",
    "en": "The answer was stopped because of words that are not allowed here",
}

LIST = "# for the tests\nbadword\n敏感词\n演示后端\nprotocol of one\n全程\n"
"""The demo's answers contain the last three, in deltas of a word or two characters."""

BRIEF = "[[demo first=0 pace=1ms]]"
LONG = "[[demo first=0 pace=10ms length=3000]]"


def _node(folder: Path, demo: DemoBackend, action: str) -> Iterator[OneNode]:
    (folder / "words.txt").write_text(LIST, "utf-8")
    lenient = {"lock_after": 0, "ban_after": 0}  # one user sends all messages
    with standing_node(folder, demo.url, words=folder / "words.txt", words_action=action, **lenient) as node:
        yield node
    output = node.now.process.output()
    assert '"words":5' in output
    assert [word for word in ("badword", "敏感词", "演示后端") if word in output] == []


@pytest.fixture(scope="module")
def refusing_node(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node that rejects listed words."""
    yield from _node(tmp_path_factory.mktemp("refusing"), demo, "refuse")


@pytest.fixture(scope="module")
def masking_node(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node that masks listed words."""
    yield from _node(tmp_path_factory.mktemp("masking"), demo, "mask")


@pytest.fixture
async def refusing(refusing_node: OneNode) -> AsyncIterator[OneNode]:
    """The rejecting node; afterwards it is idle."""
    yield refusing_node
    await refusing_node.settled()
    refusing_node.check_log()


@pytest.fixture
async def masking(masking_node: OneNode) -> AsyncIterator[OneNode]:
    """The masking node; afterwards it is idle."""
    yield masking_node
    await masking_node.settled()
    masking_node.check_log()


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_a_message_with_a_word_is_refused_in_a_sentence_that_does_not_repeat_it(
    lang: str, refusing: OneNode
) -> None:
    calls = refusing.ai_stats()["calls"]
    async with refusing.peer(USER, lang=lang) as someone:
        for text in ("a badword", "Ｂ.Ａ.Ｄ.word!", "这是敏\u200b感 词吗"):
            refused = await someone.chat(USER, text, "m-refused")
            assert (refused["msgType"], refused["code"], refused["contents"]) == (
                "SYSTEM",
                "FORBIDDEN",
                IN_MESSAGE[lang],
            )
        assert (await someone.chat(USER, f"badwords {BRIEF}", "m-fine"))["event"] == "accepted"
        await someone.send_frame("CANCEL", messageId="m-fine")
        await someone.end_of("m-fine")
    assert refusing.record(USER, "m-refused") == []
    assert refusing.ai_stats()["calls"] <= calls + 1
    lines = [json.loads(line) for line in refusing.now.process.output().splitlines() if '"m-refused"' in line]
    assert {(line["event"], line["user"], line["peer"]) for line in lines} == {("message refused", USER, "127.0.0.1")}


async def test_a_word_in_the_history_is_refused_too(refusing: OneNode) -> None:
    async with refusing.peer(USER, lang="en") as someone:
        for role in ("user", "assistant"):
            history = [{"role": role, "content": "a badword"}, {"role": "user", "content": "fine"}]
            refused = await someone.chat(USER, "go on", "m-history", history=history)
            assert refused["code"] == "FORBIDDEN"
            assert str(refused["contents"]).startswith("Earlier in this conversation")


@pytest.mark.parametrize(("lang", "word"), [("zh", "演示后端"), ("en", "protocol of one")])
async def test_an_answer_stops_before_a_word_and_so_does_the_call_to_the_backend(
    lang: str, word: str, refusing: OneNode
) -> None:
    abandoned, message_id = refusing.ai_stats()["abandoned"], f"m-answer-{lang}"
    question = {"zh": "你好", "en": "hello"}[lang] + LONG
    async with refusing.peer(USER, lang=lang) as someone:
        await someone.chat(USER, question, message_id)
        told = await someone.end_of(message_id)
        await wait_until(lambda: refusing.ai_stats()["abandoned"] == abandoned + 1, "the call to the backend is closed")
    assert told.terminal is not None
    assert (told.terminal["event"], told.terminal["code"], told.terminal["contents"]) == (
        "failed",
        "FORBIDDEN",
        IN_ANSWER[lang],
    )
    # Text in the same delta as the word is not shown either.
    assert "".join(canned_answer(question)).partition(word)[0].startswith(told.text)
    assert refusing.recorded(USER, message_id) == ("failed", told.text)
    assert refusing.dead() == []
    refused = [one for one in refusing.now.process.output().splitlines() if '"event":"message refused"' in one]
    [line] = [one for one in refused if f'"message_id":"{message_id}"' in one]
    assert '"reason":"words_answer"' in line
    async with refusing.peer(USER, lang=lang, resume={message_id: Told()}) as later:
        again = await later.end_of(message_id)
    assert again.terminal is not None
    assert (again.text, again.terminal["contents"]) == (told.text, IN_ANSWER[lang])


async def test_a_program_learns_why_a_message_or_an_answer_was_refused(refusing: OneNode) -> None:
    async with Client(refusing.now.ws(), USER, lang="en") as client:
        with pytest.raises(Refused, match="words that are not allowed") as refused:
            await (await client.send("badword")).text()
        assert refused.value.code == "FORBIDDEN"
        question = f"hello {BRIEF}"
        with pytest.raises(Failed, match="The answer was stopped") as failed:
            await (await client.send(question)).text()
        # Text in the same network read as the listed word is not shown.
        shown = failed.value.text
        assert shown
        assert "".join(canned_answer(question)).partition("protocol of one")[0].startswith(shown)


@pytest.mark.parametrize("question", ["hello, bad-word", "敏 感 词是什么?", "你好"])
async def test_words_are_masked_in_what_is_asked_and_in_the_answer_across_its_deltas(
    question: str, masking: OneNode
) -> None:
    masked = question.replace("bad-word", "＊＊＊＊＊＊＊＊").replace("敏 感 词", "＊＊＊＊＊")
    answer = "".join(canned_answer(f"{masked} {BRIEF}"))
    for word in ("演示后端", "全程", "protocol of one"):
        answer = answer.replace(word, "＊" * len(word))
    async with masking.peer(USER) as someone:
        await someone.chat(USER, f"{question} {BRIEF}", f"m-{question}"[:2] + str(len(question)))
        [message_id] = someone.told
        told = await someone.end_of(message_id)
    assert told.events[-1] == "done"
    assert told.events.count("delta") > 1
    assert told.text == answer
    assert masking.recorded(USER, message_id) == ("done", answer)


async def test_a_changed_list_counts_from_the_next_message_on(refusing: OneNode) -> None:
    def loaded() -> int:
        return refusing.now.process.output().count("word list loaded")

    async with refusing.peer(USER, lang="en") as someone:
        assert (await someone.chat(USER, "a newword [[demo fail=9]]", "m-new"))["event"] == "accepted"
        await someone.send_frame("CANCEL", messageId="m-new")
        await someone.end_of("m-new")
        before = loaded()
        _replace(refusing, f"{LIST}newword\n")
        await wait_until(lambda: loaded() == before + 1, "the new list is loaded")
        assert (await someone.chat(USER, "a newword", "m-again"))["code"] == "FORBIDDEN"
        _replace(refusing, f"{LIST}newword!\n")
        await wait_until(
            lambda: "word list not loaded, the previous one stays" in refusing.now.process.output(), "it is refused"
        )
        assert (await someone.chat(USER, "a newword", "m-still"))["code"] == "FORBIDDEN"
        _replace(refusing, LIST)
        await wait_until(lambda: loaded() == before + 2, "the old list is loaded again")


async def test_a_hangup_has_the_list_read_again_and_harms_nobody(refusing: OneNode) -> None:
    process = refusing.now.process
    loaded = process.output().count("word list loaded")
    async with refusing.peer(USER, lang="en") as someone:
        process.signal(signal.SIGHUP)
        await wait_until(lambda: process.output().count("word list loaded") == loaded + 1, "the list is loaded again")
        await wait_until(lambda: '"event":"reloaded","what":["word list"]' in process.output(), "it is logged")
        assert (await someone.chat(USER, "a badword", "m-hangup"))["code"] == "FORBIDDEN"


def _replace(node: OneNode, text: str) -> None:
    """Replace the list."""
    new = node.folder / "new.txt"
    new.write_text(text, "utf-8")
    new.replace(node.folder / "words.txt")


async def test_a_node_with_a_wrong_list_does_not_start(refusing: OneNode, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes("fine\nGüte".encode("latin-1"))
    node = OneNode(
        tmp_path, refusing.redis, refusing.redis_url, refusing.ai_url, {"words": tmp_path / "words.txt"}, "1"
    )
    await node.start(wait=False)
    with node.now.process:
        assert await node.died() != 0
    assert "line 2 is not UTF-8" in node.now.process.output()
    node.check_log()
