"""The word guard: its file, reloading, and its verdicts."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from imstream.errors import SettingsError
from imstream.guards.chain import ChatAllowed, GuardChain
from imstream.guards.guard import ALLOW, Guard, GuardRejection, Reject
from imstream.guards.words.word_guard import (
    IN_ANSWER,
    IN_HISTORY,
    IN_MESSAGE,
    WordGuard,
    file_version,
    read,
)
from imstream.model import ChatRequest
from imstream.user_ids import UserId
from tests.support.guard_deps import guard_deps
from tests.support.waiting import wait_until


def _asked(contents: str, *history: tuple[str, str]) -> ChatRequest:
    return ChatRequest(10001, "m-1", contents, history, "en", 0, "trace")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("# not wanted\n\n敏感词\r\n  badword \n#badly\n", "utf-8-sig")
    return path


def _write(path: Path, data: str | bytes | None) -> None:
    """Replace the file atomically, or delete it."""
    if data is None:
        path.unlink()
        return
    new = path.with_suffix(".new")
    new.write_bytes(data if isinstance(data, bytes) else data.encode())
    new.replace(path)


def _change_unnoticed(path: Path, data: str) -> None:
    """Overwrite the file without a change of size, inode or modification time."""
    before = path.stat()
    assert len(data) == before.st_size
    path.write_text(data, "utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@asynccontextmanager
async def _running(path: Path, poll_interval: float = 0.02) -> AsyncIterator[tuple[WordGuard, list[EventDict]]]:
    with capture_logs() as logs:
        guard = WordGuard(path, masks=False, poll_interval=timedelta(seconds=poll_interval))
        async with guard.running():
            yield guard, logs


async def _refuses(guard: WordGuard, contents: str) -> bool:
    return await guard.check_chat(_asked(contents)) == IN_MESSAGE


# The file


def test_without_a_file_there_is_no_guard() -> None:
    assert WordGuard.create(guard_deps()) is None


WRONG = {
    "not there": (None, "cannot be read: No such file or directory"),
    "not UTF-8": ("good\nGüte\n".encode("latin-1"), "line 2 is not UTF-8"),
    "nothing in it": (b"# nothing\n\n", "it contains no word"),
    "no letters": ("good\n***\n\u200b\n。\n".encode(), "lines 2, 3, 4: no letter and no digit"),
    "signs around it": (b"good\nc++\nfine\n", "line 2: begins or ends with a sign"),
    "too long": (b"good\n" + b"x" * 201, "line 2: longer than 200 characters"),
    "much is wrong": (b"x!\n" * 30, "19, 20 and 10 more: begins or ends"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused_at_the_start_with_the_numbers_of_its_lines(what: str, tmp_path: Path) -> None:
    data, says = WRONG[what]
    path = tmp_path / "words.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        WordGuard.create(guard_deps(words=path))
    assert str(caught.value).startswith(f"IMSTREAM_WORDS={str(path)!r} is not allowed: ")
    assert says in str(caught.value)


def test_a_pipe_or_a_huge_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe, huge = tmp_path / "pipe", tmp_path / "huge"
    os.mkfifo(pipe)
    with pytest.raises(SettingsError, match="is not allowed: it is not a regular file"):
        read(pipe)
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SettingsError, match="is not allowed: it has more than 16777216 bytes"):
        read(huge)


async def test_a_list_follows_its_file(file: Path) -> None:
    async with _running(file) as (guard, logs):
        assert await _refuses(guard, "a Badword")
        assert not await _refuses(guard, "another")
        _write(file, "another\nand this\n")
        await wait_until(lambda: _refuses(guard, "another"), "the new list is loaded")
        assert not await _refuses(guard, "a Badword")
    assert [(one["event"], one["words"]) for one in logs] == [("word list loaded", 2), ("word list loaded", 2)]


@pytest.mark.parametrize("broken", [b"\xff\xfe", b"", b"*\n", None])
async def test_a_broken_file_leaves_the_list_as_it_was_and_is_said_once(
    broken: bytes | None, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[Path] = []

    def checked(path: Path) -> tuple[int, int, int] | None:
        checks.append(path)
        return file_version(path)

    monkeypatch.setattr("imstream.guards.words.word_guard.file_version", checked)
    async with _running(file) as (guard, logs):
        _write(file, broken)
        await wait_until(lambda: len(logs) == 2, "the error is logged")
        so_far = len(checks)
        await wait_until(lambda: len(checks) > so_far + 2, "the file is checked again")
        assert await _refuses(guard, "badword")
        _write(file, "another\n")
        await wait_until(lambda: _refuses(guard, "another"), "a good file is loaded again")
    assert [one["event"] for one in logs] == [
        "word list loaded",
        "word list not loaded, the previous one stays",
        "word list loaded",
    ]
    assert logs[1]["log_level"] == "error"


async def test_what_is_logged_never_holds_a_word(file: Path) -> None:
    async with _running(file) as (guard, logs):
        _write(file, "!badword!\nanother\n")
        await wait_until(lambda: len(logs) == 2, "the error is logged")
        assert await _refuses(guard, "badword")
    assert "badword" not in str(logs)


async def test_the_file_is_read_again_when_that_is_asked_for(file: Path) -> None:
    _write(file, "badword")
    async with _running(file, poll_interval=3600) as (guard, logs):
        _change_unnoticed(file, "another")
        assert await GuardChain([guard, Guard()]).reload() == ["word list"]
        await wait_until(lambda: _refuses(guard, "another"), "the new list is loaded")
        assert await guard.reload() == "word list"
        await wait_until(lambda: len(logs) == 3, "it is loaded again, although it has not changed")


async def test_a_defect_does_not_end_the_watch(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> None:
        raise MemoryError

    async with _running(file) as (guard, logs):
        with monkeypatch.context() as patched:
            patched.setattr("imstream.guards.words.word_guard.read", fails)
            _write(file, "another\n")
            await wait_until(lambda: len(logs) == 2, "the defect is logged")
        _write(file, "another\nand this\n")
        await wait_until(lambda: _refuses(guard, "another"), "the new list is loaded")


async def test_an_answer_that_runs_keeps_the_list_it_began_with(file: Path) -> None:
    async with _running(file) as (guard, _):
        listening = guard.answer_filter(_asked("hello"))
        assert listening is not None
        assert listening.feed("so bad") == "so "
        _write(file, "another\n")
        await wait_until(lambda: _refuses(guard, "another"), "the new list is loaded")
        with pytest.raises(GuardRejection):
            listening.feed("word. An")


# Verdicts


async def test_a_message_with_a_word_is_refused_as_a_violation(file: Path) -> None:
    guard = WordGuard(file, masks=False)
    assert await guard.check_chat(_asked("these are fine words")) == ALLOW
    assert await guard.check_chat(_asked("b-a-d-w-o-r-d")) is IN_MESSAGE
    assert IN_MESSAGE.violation


async def test_a_violation_is_told_and_others_are_not(file: Path) -> None:
    notified = list[UserId]()

    class Listening(Guard):
        async def on_violation(self, user_id: UserId) -> None:
            notified.append(user_id)

    guards = GuardChain([WordGuard(file, masks=False), Listening()])
    assert await guards.check_chat(_asked("go on", ("user", "badword"))) is IN_HISTORY
    assert notified == []
    assert await guards.check_chat(_asked("badword")) is IN_MESSAGE
    assert notified == [10001]


async def test_a_word_in_any_earlier_turn_is_refused_but_no_violation(file: Path) -> None:
    guard = WordGuard(file, masks=False)
    for role in ("user", "assistant", "system"):
        assert await guard.check_chat(_asked("go on", ("user", "hello"), (role, "这是敏感词"))) is IN_HISTORY
    assert not IN_HISTORY.violation
    assert await guard.check_chat(_asked("badword", ("user", "badword"))) is IN_MESSAGE


async def test_a_turn_that_was_clean_is_looked_at_again_when_the_list_has_changed(file: Path) -> None:
    asked = _asked("another", ("user", "another one"))
    async with _running(file) as (guard, logs):
        assert await guard.check_chat(asked) == ALLOW
        assert await guard.check_chat(asked) == ALLOW
        _write(file, "another one\n")
        await wait_until(lambda: len(logs) == 2, "the new list is loaded")
        assert await guard.check_chat(asked) is IN_HISTORY


async def test_masking_changes_the_message_and_the_earlier_turns(file: Path) -> None:
    guards = GuardChain([WordGuard(file, masks=True)])
    passed = await guards.check_chat(_asked("a badword", ("user", "敏 感 词!"), ("assistant", "well")))
    assert isinstance(passed, ChatAllowed)
    assert passed.request == _asked("a ＊＊＊＊＊＊＊", ("user", "＊＊＊＊＊!"), ("assistant", "well"))
    assert await WordGuard(file, masks=True).check_chat(_asked("fine", ("user", "fine"))) is ALLOW


def test_an_answer_is_masked_or_ends_with_a_refusal_that_is_no_violation(file: Path) -> None:
    shown: list[str] = []
    masking = GuardChain([WordGuard(file, masks=True)]).answer_filter(_asked("hello"), shown.append)
    assert masking is not None
    for piece in ("A bad", "word, 敏", "感", "词。 And a bad"):
        masking.feed(piece)
    masking.end()
    assert "".join(shown) == "A ＊＊＊＊＊＊＊, ＊＊＊。 And a bad"
    refusing = GuardChain([WordGuard(file, masks=False)]).answer_filter(_asked("hello"), shown.append)
    assert refusing is not None
    refusing.feed("so far so bad")
    with pytest.raises(GuardRejection) as caught:
        refusing.feed("word it")
    assert caught.value.verdict is IN_ANSWER
    assert not IN_ANSWER.violation


@pytest.mark.parametrize("verdict", [IN_MESSAGE, IN_HISTORY, IN_ANSWER])
def test_the_sentences_need_no_values(verdict: Reject) -> None:
    assert "{" not in verdict.sentence.zh + verdict.sentence.en
