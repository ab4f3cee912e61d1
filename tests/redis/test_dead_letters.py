"""Dead letters: moved back in one step, never answered twice, and bounded (I9)."""

import asyncio
import json
import shlex
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from imstream.cli.main import main
from imstream.model import ChatRequest, Terminal, TerminalEvent
from imstream.store.dead_letters import DeadLetterBounds, DeadLetterOffice, Letter, Selection
from imstream.store.replies import Duplicate, Ended, Opened, OtherQuestion
from imstream.store.requests import Entry
from tests.redis.conftest import Store, chat_request

ROOT = Path(__file__).parents[2]
USER = 10001
SECOND = timedelta(seconds=1)
ALL = Selection()
FAILED = Terminal("failed", reason="http_503", error="away")


async def buried(store: Store, message_id: str = "m", user: int = USER, *, contents: str = "why?") -> ChatRequest:
    """A request that was opened once, recorded as failed, and buried."""
    request = chat_request(user, message_id, contents)
    await store.requests.ensure_group()
    await store.requests.admit(request)
    [entry] = await store.requests.read(count=1, block=SECOND)
    opened = await store.replies.open(user, message_id, request.question, request=f"0/{entry.entry_id}")
    assert isinstance(opened, Opened)
    await end(store, message_id, opened.attempt, FAILED, user)
    await store.requests.bury(entry, reason="http_503", error="away", attempts=opened.attempt)
    return request


async def end(store: Store, message_id: str, attempt: int, terminal: Terminal, user: int = USER) -> None:
    """Record the end of a reply, with a text of three characters."""
    await store.replies.append(user, message_id, attempt=attempt, before=0, after=3, text="abc", terminal=terminal)


async def letters_of(office: DeadLetterOffice, selection: Selection = ALL, node: str = "0") -> list[Letter]:
    return [letter async for letter in office.letters(node, selection)]


def office_of(store: Store) -> DeadLetterOffice:
    return DeadLetterOffice(store.redis_client, store.settings)


async def taken(store: Store) -> tuple[Entry, ChatRequest]:
    """The next request, as a worker takes it."""
    [entry] = await store.requests.read(count=1, block=SECOND)
    return entry, ChatRequest.from_fields(entry.fields, entry.entry_id)


async def opened(store: Store, entry: Entry, request: ChatRequest) -> Opened | Ended | Duplicate | OtherQuestion:
    """Open the reply as a worker does."""
    return await store.replies.open(
        request.user_id,
        request.message_id,
        request.question,
        request=f"0/{entry.entry_id}",
        after=request.earlier_attempts,
        reopens=request.reopens is not None,
    )


def events(store: Store, message_id: str = "m") -> list[tuple[str, str]]:
    """The recorded events, each with its attempt."""
    rows: Any = store.redis.xrange(store.keys.reply(USER, message_id))
    return [(fields["event"], fields["attempt"]) for _, fields in rows]


async def test_a_letter_that_is_retried_is_the_same_request_again_and_counted(store: Store) -> None:
    asked, office = await buried(store), office_of(store)
    [letter] = await letters_of(office)
    assert await office.retry(letter) == "retried"
    assert await office.retry(letter) == "unknown"  # as when the answer to the first call was lost
    assert store.dead() == []
    assert store.redis.hgetall(store.keys.load("0")) == {str(USER): "1"}
    entry, request = await taken(store)
    assert (request.fields(), request.reopens) == (asked.fields(), 1)
    assert {"reason", "error", "attempts", "dead_at"}.isdisjoint(entry.fields)


async def test_a_retried_request_reopens_its_failed_reply_once(store: Store) -> None:
    await buried(store)
    [letter] = await letters_of(office_of(store))
    await office_of(store).retry(letter)
    entry, request = await taken(store)
    began = await opened(store, entry, request)
    assert isinstance(began, Opened)
    assert began.attempt == 2
    assert (began.counted, began.waited) == (0, None)
    assert events(store) == [("opened", "1"), ("failed", "1"), ("reopened", "2"), ("opened", "2")]
    record = await store.replies.read(USER, "m")
    assert record is not None
    assert (record.attempt, record.text, record.terminal) == (2, "", None)
    assert record.question == request.question
    await end(store, "m", 2, Terminal("done", "stop"))
    assert isinstance(await opened(store, entry, request), Ended)  # delivered again: its worker died before the end
    record = await store.replies.read(USER, "m")
    assert record is not None
    assert (record.text, record.terminal) == ("abc", Terminal("done", "stop"))


async def test_a_retried_request_that_fails_again_is_one_letter_with_each_field_once(store: Store) -> None:
    await buried(store)
    for attempt in (2, 3):
        [letter] = await letters_of(office_of(store))
        assert await office_of(store).retry(letter) == "retried"
        entry, request = await taken(store)
        assert await opened(store, entry, request) == Opened(attempt)
        await end(store, "m", attempt, FAILED)
        assert isinstance(await opened(store, entry, request), Ended)  # of its own: not reopened by itself
        await store.requests.bury(entry, reason="empty_answer", error="nothing", attempts=attempt)
        [(_, flat)] = await store.redis_client.execute("XRANGE", store.keys.dead("0"), "-", "+")
        assert len(flat[::2]) == len(set(flat[::2]))
        [fields] = store.dead()
        assert (fields["reason"], fields["attempts"]) == ("empty_answer", str(attempt))


async def test_a_letter_that_was_added_to_the_requests_by_hand_is_buried_with_each_field_once(store: Store) -> None:
    await buried(store)
    [fields] = store.dead()
    await store.requests.ensure_group()
    store.redis.xadd(store.keys.requests("0"), dict[Any, Any](fields))
    [entry] = await store.requests.read(count=1, block=SECOND)
    await store.requests.bury(entry, reason="empty_answer", error="nothing", attempts=2)
    [_, (_, flat)] = await store.redis_client.execute("XRANGE", store.keys.dead("0"), "-", "+")
    assert len(flat[::2]) == len(set(flat[::2]))
    assert store.dead()[1]["reason"] == "empty_answer"


@pytest.mark.parametrize("event", ["done", "cancelled"])
async def test_a_letter_whose_message_was_answered_meanwhile_is_not_answered_twice(
    store: Store, event: TerminalEvent
) -> None:
    await buried(store)
    [letter] = await letters_of(office_of(store))
    store.redis.delete(store.keys.reply(USER, "m"))  # expired; then the user has asked again
    await store.replies.open(USER, "m", request="0/7-0")
    await office_of(store).retry(letter)
    entry, request = await taken(store)
    assert await opened(store, entry, request) == Duplicate("0/7-0")
    if event == "done":
        await end(store, "m", 1, Terminal("done", "stop"))
    else:
        await store.replies.cancel(USER, "m")
    assert await opened(store, entry, request) == Ended(event, "0/7-0")


async def test_a_letter_whose_reply_has_expired_is_answered_with_a_number_not_used_before(store: Store) -> None:
    await buried(store)
    store.redis.delete(store.keys.reply(USER, "m"))
    [letter] = await letters_of(office_of(store))
    assert not await office_of(store).has_reply(letter)
    await office_of(store).retry(letter)
    assert await opened(store, *await taken(store)) == Opened(2)
    record = await store.replies.read(USER, "m")
    assert record is not None
    assert record.question is not None


async def test_a_letter_stays_when_its_node_or_its_user_has_no_room(store: Store) -> None:
    await buried(store)
    [letter] = await letters_of(office_of(store))
    for _ in range(2):
        await store.requests.admit(chat_request(USER))
    assert await office_of(store).retry(letter) == "user_full"
    for number in range(3):
        await store.requests.admit(chat_request(USER + 1 + number))
    assert await office_of(store).retry(letter) == "node_full"
    assert await letters_of(office_of(store)) == [letter]
    assert events(store) == [("opened", "1"), ("failed", "1")]


async def test_letters_are_selected(store: Store) -> None:
    for number in range(3):
        await buried(store, f"m{number}", USER + number % 2)
    office = office_of(store)
    listed = await letters_of(office)
    assert [letter.fields["message_id"] for letter in listed] == ["m0", "m1", "m2"]
    assert await letters_of(office, Selection(user=str(USER))) == [listed[0], listed[2]]
    assert await letters_of(office, Selection(ids=(listed[1].entry_id,))) == [listed[1]]
    assert await letters_of(office, Selection(reason="http_400")) == []
    assert await letters_of(office, Selection(since=timedelta(hours=1))) == listed
    newest = office.letters("0", ALL, newest_first=True)
    assert [letter async for letter in newest] == listed[::-1]


async def test_letters_of_a_node_that_has_left_the_directory_are_found_and_its_requests_adopted(store: Store) -> None:
    await buried(store)
    store.redis.rename(store.keys.dead("0"), store.keys.dead("gone"))
    store.redis.zadd(store.keys.nodes(), {"0": 1})
    office = office_of(store)
    assert await office.nodes() == ["0", "gone"]
    [letter] = await letters_of(office, node="gone")
    assert await office.retry(letter) == "retried"
    assert store.redis.zscore(store.keys.nodes(), "gone") is not None


async def test_letters_are_bounded_in_bytes_age_and_number_the_oldest_first(store: Store) -> None:
    key = store.keys.dead("0")
    settings = store.settings.model_copy(update={"dead_bytes": 100_000})
    counted = list[int]()
    bounds = DeadLetterBounds(store.redis_client, settings, count_dropped=counted.append)
    old = "1000-0"
    store.redis.xadd(key, {"user": "1"}, id=old)
    assert await bounds.trim("0") == 1
    for number in range(300):
        store.redis.xadd(key, {"user": str(number), "contents": "x" * (10 if number < 200 else 2000)})
    dropped = await bounds.trim("0")
    assert sum(counted) == dropped + 1
    assert 200 < dropped < 270
    rows: Any = store.redis.xrange(key)
    assert [fields["user"] for _, fields in rows] == [str(number) for number in range(dropped, 300)]
    usage: Any = store.redis.memory_usage(key, 0)
    assert 80_000 < usage <= 100_000
    assert await bounds.trim("0") == 0


async def test_dead_letters_expire_with_the_newest_of_any_user(store: Store) -> None:
    await buried(store)
    left: Any = store.redis.pttl(store.keys.dead("0"))
    assert timedelta(days=6) < timedelta(milliseconds=left) <= timedelta(days=7)


async def test_making_room_drops_half_of_all_letters_and_concurrent_calls_are_one(store: Store) -> None:
    bounds = DeadLetterBounds(store.redis_client, store.settings)
    assert not await bounds.make_room()
    bounds = DeadLetterBounds(store.redis_client, store.settings)
    store.redis.zadd(store.keys.nodes(), {"0": 1, "other": 1})
    for number in range(100):
        store.redis.xadd(store.keys.dead("other"), {"user": str(number), "contents": "x" * 5000})
    assert await asyncio.gather(*(bounds.make_room() for _ in range(10))) == [True] * 10
    assert 45 <= store.redis.xlen(store.keys.dead("other")) <= 55
    for _ in range(20):
        last = await bounds.make_room()
    assert not last
    assert store.redis.exists(store.keys.dead("other")) == 0


# The commands


async def run(store: Store, *arguments: str, code: int = 0) -> str:
    """The output of `imstream dead`. It runs its own event loop, so it runs in a thread."""
    action, *rest = arguments
    command = ["dead", action, "--redis", store.settings.redis_url.get_secret_value(), *rest]
    result = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert result.exit_code == code, result.output
    return result.output


async def test_the_commands_list_show_retry_and_purge(store: Store) -> None:
    for number in range(4):
        await buried(store, f"m{number}", USER + number, contents="private\n你好")
    listed = json.loads(await run(store, "list", "--json"))
    assert [row["message_id"] for row in listed] == ["m3", "m2", "m1", "m0"]
    assert listed[0].keys() == {"id", "node", "dead_at", "user", "message_id", "reason", "error", "attempts"}
    text = await run(store, "list", "--limit", "1")
    assert "user 10004  message m3  http_503 after 1 attempts: away" in text
    assert "m2" not in text
    assert "private" not in await run(store, "list")
    assert "private\\n你好" in await run(store, "show", listed[0]["id"])
    [shown] = json.loads(await run(store, "show", "--user", "10001", "--json"))
    assert shown["contents"] == "private\n你好"

    assert "would be retried" in await run(store, "retry", "--user", "10001", "--dry-run")
    assert "is a request again\nretried: 1\n" in await run(store, "retry", "--user", "10001")
    store.redis.delete(store.keys.reply(10002, "m1"))
    row = json.loads(await run(store, "retry", "--user", "10002", "--json"))
    assert (row["message_id"], row["outcome"]) == ("m1", "expired")
    store.redis.hset(store.keys.status("0"), mapping={"queue_limit": 3, "user_limit": 9})  # as the node publishes them
    store.redis.expire(store.keys.status("0"), 60)
    full = await run(store, "retry", "--all", code=1)
    assert full.count("is a request again") == 1
    assert "stays: the node has no room" in full
    assert full.endswith("retried: 1, node_full: 1\n")
    assert "would be deleted" in await run(store, "purge", "--dry-run")
    assert "is deleted" in await run(store, "purge", "--since", "1h")
    assert await run(store, "list") == "no dead letters\n"
    assert await run(store, "retry") == "no dead letters\n"


async def test_the_documented_commands_of_redis_cli_do_the_same(store: Store) -> None:
    for number in range(2):
        await buried(store, f"m{number}", USER + number)
    letters = await letters_of(office_of(store))
    text = (
        (ROOT / "ops/docs/operating.md")
        .read_text("utf-8")
        .partition("redis-cli, on the server that has the node:")[2]
        .split("```")[1]
    )
    for number, letter in enumerate(letters):
        text = text.replace(f"179560000000{number}-0", letter.entry_id)
    answers, client = list[Any](), cast("Any", store.redis)
    for line in text.splitlines()[1:]:
        match shlex.split(line)[1:]:
            case ["--scan", "--pattern", pattern]:
                answers.append(list(store.redis.scan_iter(pattern)))
            case ["--eval", script, *rest]:
                keys, arguments = rest[: rest.index(",")], rest[rest.index(",") + 1 :]
                answers.append(store.redis.eval((ROOT / script).read_text("utf-8"), len(keys), *keys, *arguments))
            case command:
                answers.append(client.execute_command(*command))
    found, listed, shown, _, retried, purged = answers
    assert found == [store.keys.dead("0")]
    assert [entry_id for entry_id, _ in listed] == [letter.entry_id for letter in letters[::-1]]
    assert shown[0][1] == letters[0].fields
    assert (retried[0], purged) == ("retried", 1)
    assert store.dead() == []
    verdict = await opened(store, *await taken(store))
    assert isinstance(verdict, Opened)
    assert verdict.attempt == 2
