"""Accounts for every message ever accepted, counting as the Jepsen test of RabbitMQ does. Pure.

accepted     its client, or the wire to it, was told `accepted`
answered     accepted, its client was told how it ended, and the same is recorded as the one terminal event, the last
             entry of its reply stream; the text is the backend's
lost         accepted, and not answered: nothing recorded, or the client was never told
duplicated   a second terminal event is recorded, or was told on the same socket
unexpected   another text than the backend's, an end that nobody asked for, a frame that makes no sense, a reply to a
             message that was never asked
failed       given up, with a reason
recovered    its client was left in the dark whether it was accepted, and it ended as it should
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ops.chaos_test.history import TERMINAL, Asked, Complaint, Entry, Recorded

LOST, DUPLICATED, UNEXPECTED, FAILED = "lost", "duplicated", "unexpected", "failed"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one message."""

    user_id: int
    message_id: str
    verdict: str
    what: str


@dataclass
class Account:
    """The sums of a run.

    Attributes:
        asked: Messages that clients wanted answered.
        accepted: Those that were accepted.
        answered: Accepted, told and recorded once, with the right text; those cancelled by their client among them.
        cancelled: Those cancelled by their client.
        recovered: Those whose acceptance was in doubt and that ended well.
        restarted: Those that took more than one attempt.
        moved: Those that more than one node worked on.
        attempts: Attempts at all messages: each is an AI call.
        waits: Seconds from `accepted` to the end, as clients saw it.
        problems: All that is wrong.
    """

    asked: int = 0
    accepted: int = 0
    answered: int = 0
    cancelled: int = 0
    recovered: int = 0
    restarted: int = 0
    moved: int = 0
    attempts: int = 0
    waits: list[float] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        """Messages with this verdict."""
        return len({(one.user_id, one.message_id) for one in self.problems if one.verdict == verdict})


def account(asked: Iterable[Asked], recorded: Recorded, complaints: Iterable[Complaint] = ()) -> Account:
    """Account for all messages."""
    total, known = Account(), set()
    said: dict[tuple[int, str], list[Complaint]] = defaultdict(list)
    for complaint in complaints:
        said[complaint.user_id, complaint.message_id].append(complaint)
    for message in asked:
        known.add(message.key)
        _add(total, message, recorded.get(message.key, []), said.pop(message.key, []))
    for (user_id, message_id), left in said.items():  # about no message, or about one that nobody asked
        total.problems += [Problem(user_id, message_id, UNEXPECTED, one.what) for one in left]
    for user_id, message_id in recorded.keys() - known:
        total.problems.append(Problem(user_id, message_id, UNEXPECTED, "a reply to what was never asked"))
    return total


def _add(total: Account, message: Asked, entries: Sequence[Entry], complaints: Sequence[Complaint]) -> None:
    problems = [*_wrong(message, entries), *((DUPLICATED if one.twice else UNEXPECTED, one.what) for one in complaints)]
    total.problems += [Problem(*message.key, verdict, what) for verdict, what in problems]
    openings = [entry for entry in entries if entry.event == "opened"]
    total.asked += 1
    total.attempts += len(openings)
    total.restarted += len(openings) > 1
    total.moved += len({entry.by for entry in openings}) > 1
    total.accepted += message.accepted_at is not None
    if message.accepted_at is not None and message.ended_at is not None:
        total.waits.append(message.ended_at - message.accepted_at)
    ended = bool(_ends(entries))
    total.answered += not problems and ended and message.accepted_at is not None
    total.cancelled += not problems and message.outcome == "cancelled"
    total.recovered += not problems and ended and (message.unknown > 0 or message.accepted_at is None)


def _ends(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.event in TERMINAL]


def _wrong(message: Asked, entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """What is wrong with one message, as verdict and sentence."""
    ends = _ends(entries)
    wrong = []
    if len(ends) > 1:
        wrong.append((DUPLICATED, f"{len(ends)} terminal events are recorded: {', '.join(one.event for one in ends)}"))
    elif ends and entries[-1] is not ends[0]:
        wrong.append((UNEXPECTED, f"{entries[-1].event} is recorded after {ends[0].event}"))
    if message.error:
        wrong.append((UNEXPECTED, f"the client gave up: {message.why}"))
    if message.accepted_at is not None:
        wrong += _unkept(message, ends)
    for end in ends[:1]:
        wrong += _ended_badly(message, end)
        wrong += _other_text(message, end.event, _text(entries), "recorded")
    if message.outcome is not None and not message.error:
        wrong += _other_text(message, message.outcome, message.text, "told")
    return wrong


def _unkept(message: Asked, ends: Sequence[Entry]) -> list[tuple[str, str]]:
    """Whether the promise of `accepted` was broken."""
    if not ends:
        return [(LOST, f"accepted, and no end is recorded; the client was told {message.outcome or 'nothing'}")]
    if message.error:
        return []
    if message.outcome is None:
        return [(LOST, f"{ends[0].event} is recorded, and its client was not told")]
    if message.outcome == "expired":
        return [(LOST, f"{ends[0].event} is recorded, and its client was told that nothing is known of it")]
    if message.outcome != ends[0].event:
        return [(UNEXPECTED, f"{ends[0].event} is recorded, and its client was told {message.outcome}")]
    return []


def _ended_badly(message: Asked, end: Entry) -> list[tuple[str, str]]:
    if end.event == "failed":
        return [(FAILED, f"{end.fields.get('reason', '?')}: {end.fields.get('error', '')}")]
    if end.event == "cancelled" and not message.cancelling:
        return [(UNEXPECTED, "cancelled, and nobody asked for it")]
    return []


def _text(entries: Sequence[Entry]) -> str:
    """The text of the last attempt."""
    texts: list[str] = []
    for entry in entries:
        if entry.event == "opened":
            texts.clear()
        texts.append(entry.text)
    return "".join(texts)


def _other_text(message: Asked, end: str, text: str, which: str) -> list[tuple[str, str]]:
    """Whether a text is not the backend's: all of it when it is done, else its beginning."""
    expected = message.expected if end == "done" else message.expected[: len(text)]
    if end == "expired" or text == expected:
        return []
    same = next(
        (i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), min(len(text), len(expected))
    )
    instead = f"{text[same : same + 40]!r} instead of {expected[same : same + 40]!r}"
    lengths = f"{len(text)} characters instead of {len(expected)}"
    return [(UNEXPECTED, f"the {which} text differs from the backend's from {same} on: {instead} ({lengths})")]
