"""The wire protocol, situation by situation, as a client sees it: the frames sent, and the frames received."""

import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from imstream.demo.answer import canned_answer, pieces
from imstream.keys import Keys
from imstream.user_ids import UserIds
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import peer
from tests.support.redis_sets import Topology
from tests.support.servers import DemoBackend
from tests.support.users import USER_IDS, user_id
from tests.support.waiting import wait_until

USER, OTHER, THIRD = map(user_id, (10001, 10002, 10003))

QUEUE, EACH = 3, 2
"""The limits on unfinished requests: of the node, and of one user."""

BRIEF = "[[demo first=0 pace=1ms length=30]]"
LONG = "[[demo first=0 pace=20ms length=5000]]"

LANGUAGES = {None: "zh", "zh-CN,zh;q=0.9,en;q=0.8": "zh", "en-US,en;q=0.9": "en", "fr": "en", "fr, zh;q=0.5": "zh"}


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend, empty_redis: Topology) -> Iterator[OneNode]:
    """A node with small limits."""
    folder = tmp_path_factory.mktemp("wire")
    with standing_node(folder, demo.url, empty_redis, queue_limit=QUEUE, user_limit=EACH, concurrency=1) as node:
        yield node


@pytest.fixture
async def node(standing: OneNode) -> AsyncIterator[OneNode]:
    """The node; after the test it is idle again, and has logged no problem and no text of a user."""
    yield standing
    await standing.settled()
    standing.check_log()
    assert "demo" not in standing.now.process.output()


# Logging in


@pytest.mark.parametrize("accept_language", LANGUAGES)
async def test_init_logs_in_and_says_so_in_the_language_of_the_handshake(
    accept_language: str | None, node: OneNode
) -> None:
    async with peer(node.now.ws(USER), lang=accept_language) as someone:
        await someone.send_frame("INIT", userId=USER)
        welcome = await someone.frame()
    texts = {"zh": f"用户标识: {USER} 登录成功", "en": f"User id {USER}: logged in"}
    assert abs(int(welcome.pop("respTime")) - time.time() * 1000) < 60_000
    assert welcome == {
        "code": "SUCCESS",
        "msgType": "INIT",
        "contents": texts[LANGUAGES[accept_language]],
        "userId": USER,
        "heartbeatMs": 25_000,
        "node": "0",
    }


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_a_ping_and_a_heartbeat_are_answered_with_a_heartbeat_before_and_after_init(
    lang: str, node: OneNode
) -> None:
    text = {"zh": "心跳测试,很高兴收到你的心跳包", "en": "Heartbeat received, glad to hear from you"}[lang]
    async with peer(node.now.ws(USER), lang=lang) as someone:
        for logged_in in (False, True):
            if logged_in:
                await someone.login(USER)
            for beat in ("PING", '{"msgType":"HEARTBEAT"}', json.dumps({"msgType": "HEARTBEAT", "userId": USER})):
                await someone.send(beat)
                answer = await someone.frame()
                assert (answer["msgType"], answer["code"], answer["contents"]) == ("HEARTBEAT", "SUCCESS", text)


# Chatting


async def test_a_chat_is_accepted_streamed_and_done(node: OneNode) -> None:
    question = f"你好 😀 {BRIEF}"
    whole = canned_answer(question)
    async with node.peer(USER, lang="en") as someone:
        accepted = await someone.chat(USER, question, "m1")
        assert (accepted["code"], accepted["position"], accepted["node"]) == ("SUCCESS", 1, "0")
        assert accepted["contents"] == "Message received, place 1 in the queue"
        told = await someone.end_of("m1")
    deltas = [frame for frame in someone.frames if frame.get("event") == "delta"]
    assert told.events == ["accepted", *["delta"] * len(deltas), "done"]
    assert told.text == "".join(whole)
    assert {frame["attempt"] for frame in deltas} == {1}
    offsets = [frame["offset"] for frame in deltas]
    assert offsets == sorted(set(offsets))
    assert told.terminal is not None
    assert (told.terminal["finishReason"], told.terminal["offset"]) == ("stop", offsets[-1])
    assert told.terminal["usage"]["completion_tokens"] == len(whole)


async def test_what_is_called_accepted_is_recorded_whether_a_worker_is_free_or_not(node: OneNode) -> None:
    async with node.peer(USER) as someone:
        for message_id in ("begun", "waits"):
            assert (await someone.chat(USER, "hello [[demo first=30s]]", message_id))["event"] == "accepted"
            assert node.redis.exists(Keys().reply(USER, message_id))  # so that any node can resume or cancel it
        entries: Any = node.redis.xrange(Keys().reply(USER, "waits"))
        assert [fields["event"] for _, fields in entries] == ["queued"]
        for message_id in ("waits", "begun"):
            await someone.send_frame("CANCEL", messageId=message_id)
            assert (await someone.end_of(message_id)).events[-1] == "cancelled"


async def test_the_history_goes_to_the_backend(node: OneNode) -> None:
    history = [
        {"role": "user", "content": "one two three"},
        {"role": "assistant", "content": "four five"},
    ]
    async with node.peer(USER) as someone:
        await someone.chat(USER, f"six {BRIEF}", "m-history", history=history)
        told = await someone.end_of("m-history")
    assert told.terminal is not None
    context = "\n".join([*(turn["content"] for turn in history), f"six {BRIEF}"])
    assert told.terminal["usage"]["prompt_tokens"] == len(pieces(context))


async def test_a_message_without_an_id_is_given_one(node: OneNode) -> None:
    async with node.peer(USER) as someone:
        ids = []
        for _ in range(2):
            await someone.send_frame("CHAT", userId=USER, contents=f"hello {BRIEF}")
            ids.append((await someone.until(event="accepted"))["messageId"])
            assert (await someone.end_of(ids[-1])).events[-1] == "done"
    assert all(re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", one) for one in ids)
    assert len(set(ids)) == 2


@pytest.mark.parametrize("message_id", ["a", "A-z.0:9_", "x" * 64])
async def test_a_message_id_may_be_anything_of_its_alphabet(message_id: str, node: OneNode) -> None:
    async with node.peer(USER) as someone:
        assert (await someone.chat(USER, f"hello {BRIEF}", message_id))["event"] == "accepted"
        assert (await someone.end_of(message_id)).events[-1] == "done"


async def test_unknown_fields_are_ignored_in_every_frame(node: OneNode) -> None:
    unknown: dict[str, Any] = {"traceId": "x", "x": {"deep": [1, None]}, "event": "done", "code": 7, "user_id": None}
    async with peer(node.now.ws(USER)) as someone:
        await someone.send_frame("INIT", userId=USER, **unknown)
        assert (await someone.frame())["msgType"] == "INIT"
        await someone.send_frame("HEARTBEAT", **unknown)
        assert (await someone.frame())["msgType"] == "HEARTBEAT"
        history = [{"role": "user", "content": "hi", "name": "somebody"}]
        await someone.send_frame(
            "CHAT", userId=USER, contents=f"hi {BRIEF}", messageId="odd", history=history, **unknown
        )
        assert (await someone.end_of("odd")).events[-1] == "done"
        await someone.send_frame("CANCEL", messageId="odd", **unknown)
        assert (await someone.frame())["code"] == "TOO_LATE"


# Rejected frames, on a socket that stays open


def _chat(**fields: object) -> str:
    return json.dumps({"msgType": "CHAT", "userId": USER, "contents": "hello", "messageId": "m", **fields})


NOT_VALID = {
    "hello": "",
    "ping": "",
    '{"msgType":"CHAT"': "",
    "{}": "msgType",
    '{"msgType":"SHOUT","userId":10001}': "msgType",
    '{"msgType":7,"userId":10001}': "msgType",
    '{"msgType":"SHOUT","messageId": "m"}': "msgType",
    '{"msgType":"chat","userId":10001}': "msgType",
    '{"msgType":"CHAT","userId":10001}': "contents",
    _chat(contents=""): "contents",
    _chat(contents=7): "contents",
    _chat(contents=None): "contents",
    _chat(messageId=""): "messageId",
    _chat(messageId="x" * 65): "messageId",
    _chat(messageId="a b"): "messageId",
    _chat(messageId="消息"): "messageId",
    _chat(messageId=7): "messageId",
    _chat(history="hello"): "history",
    _chat(history=[{"role": "robot", "content": "hi"}]): "history.0.role",
    _chat(history=[{"role": "user", "content": "hi"}, {"role": "user"}]): "history.1.content",
    '{"msgType":"CANCEL"}': "messageId",
    '{"msgType":"INIT","userId":10001,"resume":{}}': "resume",
    '{"msgType":"INIT","userId":10001,"resume":[{"offset":1}]}': "resume.0.messageId",
    '{"msgType":"INIT","userId":10001,"resume":[{"messageId":"m","offset":-1}]}': "resume.0.offset",
    '{"msgType":"INIT","userId":10001,"resume":[{"messageId":"m","attempt":"x"}]}': "resume.0.attempt",
}


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_a_frame_that_is_not_valid_is_refused_with_the_name_of_its_field(lang: str, node: OneNode) -> None:
    begin = {"zh": "消息格式有误: ", "en": "The message is not valid: "}[lang]
    async with node.peer(USER, lang=lang) as someone:
        for text, field in NOT_VALID.items():
            await someone.send(text)
            refused = await someone.frame()
            assert (refused["msgType"], refused["code"]) == ("SYSTEM", "BAD_REQUEST"), text
            assert refused["contents"].startswith(f"{begin}{field}: " if field else begin), text
            assert refused.get("messageId") == ("m" if '"messageId": "m"' in text else None), text
        await someone.send("PING")
        assert (await someone.frame())["msgType"] == "HEARTBEAT"


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_nobody_chats_before_init_or_for_somebody_else(lang: str, node: OneNode) -> None:
    first = {"zh": "请先登录 (INIT)", "en": "Please log in first (INIT)"}[lang]
    other = {"zh": "不能以其他用户的身份操作", "en": "This socket belongs to another user"}[lang]
    async with peer(node.now.ws(USER), lang=lang) as someone:

        async def refused(msg_type: str, **fields: object) -> str:
            await someone.send_frame(msg_type, **fields)
            frame = await someone.frame()
            assert (frame["msgType"], frame["code"]) == ("SYSTEM", "FORBIDDEN")
            return str(frame["contents"])

        assert await refused("CHAT", userId=USER, contents="hello", messageId="m1") == first
        assert await refused("CANCEL", messageId="m1") == first
        assert await refused("INIT", userId=OTHER) == other  # not the user of the URL
        await someone.login(USER)
        assert await refused("CHAT", userId=OTHER, contents="hello", messageId="m1") == other
        assert await refused("CANCEL", userId=OTHER, messageId="m1") == other
        assert await refused("HEARTBEAT", userId=OTHER) == other
        assert await refused("INIT", userId=OTHER) == other
        await someone.login(USER)  # a second INIT is allowed
    assert node.unfinished() == 0


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_what_does_not_fit_is_told_busy_at_once_and_fits_later(lang: str, node: OneNode) -> None:
    for_all = {
        "zh": "当前排队人数较多,请稍后再重试!",
        "en": "Many people are waiting right now, please try again later!",
    }
    for_one = {
        "zh": "您有太多消息还在处理中,请等待回复后再发送!",
        "en": "Too many of your messages are still being answered, please wait for a reply!",
    }
    async with AsyncExitStack() as stack:
        users = {user: await stack.enter_async_context(node.peer(user, lang=lang)) for user in (USER, OTHER, THIRD)}
        for number in range(EACH):
            assert (await users[USER].chat(USER, f"{number} {LONG}", f"{lang}-{number}"))["event"] == "accepted"
        await wait_until(lambda: len(node.pending()) == 1, "a worker has taken one request")
        too_many = await users[USER].chat(USER, "one more", f"{lang}-more")
        accepted = await users[OTHER].chat(OTHER, f"his first {BRIEF}", f"{lang}-first")
        assert accepted["position"] == 2  # behind the one that is queued
        full = await users[THIRD].chat(THIRD, f"her first {BRIEF}", f"{lang}-first")
        for refused, text in ((too_many, for_one[lang]), (full, for_all[lang])):
            assert (refused["msgType"], refused["code"], refused["contents"]) == ("SYSTEM", "BUSY", text)
            assert 500 <= refused["retryAfterMs"] <= 10_000
        assert node.unfinished() == QUEUE
        counted = "messages refused because of load"
        await wait_until(
            lambda: {"user_busy", "busy"} <= {key for line in node.logged(counted) for key in line}, counted
        )

        for number in range(EACH):
            await users[USER].send_frame("CANCEL", messageId=f"{lang}-{number}")
            assert (await users[USER].end_of(f"{lang}-{number}")).events[-1] == "cancelled"
        assert (await users[OTHER].end_of(f"{lang}-first")).events[-1] == "done"
        # Rejected messages leave no record; sent again on the same socket, they are answered.
        assert node.record(THIRD, f"{lang}-first") == []
        assert (await users[THIRD].chat(THIRD, f"her first {BRIEF}", f"{lang}-first"))["event"] == "accepted"
        assert (await users[THIRD].end_of(f"{lang}-first")).events[-1] == "done"


# Frames that close the socket

IDS_BAD_IN_A_URL = {
    UserIds.NUMBER: ("abc", "10000", "0", "-10001", "1e9", "10001x", "10001.0", "１２３４５", str(2**53), "%00"),
    UserIds.TEXT: ("a%20b", "a%0Ab", "%00", "a%7Db", "a%25b", "%E4%BD%A0", "１２３４５", "<b>", "a" * 129),
}
IDS_BAD_IN_A_FRAME: dict[UserIds, tuple[object, ...]] = {
    UserIds.NUMBER: (None, "abc", 10000, 0, -10001, 10001.5, True, [10001], {}, 2**53),
    UserIds.TEXT: (None, "", "a b", "a\n", "\x85", "a}b", "a%b", "café", -5, 1.5, True, ["a"], {}, 2**53),
}


async def _is_refused(node: OneNode, url: str, frame: str | None, lang: str) -> None:
    async with peer(url, lang=lang) as someone:
        if frame is not None:
            await someone.send(frame)
        assert await someone.closed() == 4501
    [said] = someone.frames
    text = {"zh": "用户身份标识有误!", "en": "The user id is not valid!"}[lang]
    assert (said["msgType"], said["code"], said["contents"]) == ("SYSTEM", "SYSTEM_ERROR", text)
    assert node.unfinished() == 0


@pytest.mark.parametrize("lang", ["zh", "en"])
async def test_a_bad_user_id_in_the_address_ends_the_socket(lang: str, node: OneNode) -> None:
    for user in ("", *IDS_BAD_IN_A_URL[USER_IDS]):
        await _is_refused(node, f"{node.now.ws()}?userId={user}", None, lang)


@pytest.mark.parametrize("msg_type", ["INIT", "CHAT", "HEARTBEAT", "CANCEL"])
async def test_a_bad_user_id_in_a_frame_ends_the_socket(msg_type: str, node: OneNode) -> None:
    frame = {"msgType": msg_type, "contents": "hello", "messageId": "m1"}
    for user in IDS_BAD_IN_A_FRAME[USER_IDS]:
        if user is None and msg_type in {"HEARTBEAT", "CANCEL"}:
            continue  # optional there
        text = json.dumps({**frame, "userId": user})
        await _is_refused(node, node.now.ws(), text, "zh" if msg_type == "INIT" else "en")
    if msg_type in {"INIT", "CHAT"}:
        await _is_refused(node, node.now.ws(), json.dumps(frame), "en")


async def test_the_address_may_leave_the_user_id_to_init(node: OneNode) -> None:
    async with peer(node.now.ws()) as someone:
        assert (await someone.login(USER))["userId"] == USER
