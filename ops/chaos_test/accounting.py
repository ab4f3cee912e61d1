"""Accounts for every accepted message, with the categories of the Jepsen test of RabbitMQ. Pure.

accepted     `accepted` was sent to its client
answered     accepted; the client received the end that is recorded as the only terminal event, the last entry of the
             reply stream; the text is the backend's
lost         accepted and not answered: no end is recorded, or the client did not receive it
duplicated   a second terminal event is recorded, or was sent on the same socket
unexpected   a text other than the backend's, a cancellation without a request, an invalid frame, a reply to a message
             that was never sent
failed       given up, with a reason
recovered    the client had no receipt, and it was answered correctly
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from imstream.user_ids import UserId
from ops.chaos_test.history import TERMINAL, Complaint, Entry, Recorded, SentMessage

LOST, DUPLICATED, UNEXPECTED, FAILED = "lost", "duplicated", "unexpected", "failed"


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with one message."""

    user_id: UserId
    message_id: str
    verdict: str
    what: str


@dataclass
class Account:
    """The sums of a run.

    Attributes:
        asked: Messages that clients sent.
        answered: See the module; includes those cancelled by their client.
        recovered: See the module.
        restarted: Messages with more than one attempt.
        moved: Messages that more than one node worked on.
        attempts: Attempts of all messages; each is an AI call.
        waits: Seconds from `accepted` to the end, as received by clients.
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


def account(asked: Iterable[SentMessage], recorded: Recorded, complaints: Iterable[Complaint] = ()) -> Account:
    """Account for all messages."""
    total, known = Account(), set()
    by_message: dict[tuple[UserId, str], list[Complaint]] = defaultdict(list)
    for complaint in complaints:
        by_message[complaint.user_id, complaint.message_id].append(complaint)
    for message in asked:
        known.add(message.key)
        _add(total, message, recorded.get(message.key, []), by_message.pop(message.key, []))
    for (user_id, message_id), rest in by_message.items():  # about no message, or about an unknown one
        total.problems += [Problem(user_id, message_id, UNEXPECTED, one.what) for one in rest]
    for user_id, message_id in recorded.keys() - known:
        total.problems.append(Problem(user_id, message_id, UNEXPECTED, "a reply to a message that was never sent"))
    return total


def _add(total: Account, message: SentMessage, entries: Sequence[Entry], complaints: Sequence[Complaint]) -> None:
    problems = [
        *_problems(message, entries),
        *((DUPLICATED if one.twice else UNEXPECTED, one.what) for one in complaints),
    ]
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


def _problems(message: SentMessage, entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """The problems of one message, as verdict and sentence."""
    ends = _ends(entries)
    wrong = []
    if len(ends) > 1:
        wrong.append((DUPLICATED, f"{len(ends)} terminal events are recorded: {', '.join(one.event for one in ends)}"))
    elif ends and entries[-1] is not ends[0]:
        wrong.append((UNEXPECTED, f"{entries[-1].event} is recorded after {ends[0].event}"))
    if message.error:
        wrong.append((UNEXPECTED, f"the client gave up: {message.why}"))
    if message.accepted_at is not None:
        wrong += _not_answered(message, ends)
    for end in ends[:1]:
        wrong += _wrong_end(message, end)
        wrong += _wrong_text(message, end.event, _text(entries), "recorded")
    if message.outcome is not None and not message.error:
        wrong += _wrong_text(message, message.outcome, message.text, "received")
    return wrong


def _not_answered(message: SentMessage, ends: Sequence[Entry]) -> list[tuple[str, str]]:
    """The problems of an accepted message that was not answered."""
    if not ends:
        return [(LOST, f"accepted, and no end is recorded; the client received {message.outcome or 'nothing'}")]
    if message.error:
        return []
    if message.outcome is None:
        return [(LOST, f"{ends[0].event} is recorded, and the client did not receive it")]
    if message.outcome == "expired":
        return [(LOST, f"{ends[0].event} is recorded, and the client received EXPIRED")]
    if message.outcome != ends[0].event:
        return [(UNEXPECTED, f"{ends[0].event} is recorded, and the client received {message.outcome}")]
    return []


def _wrong_end(message: SentMessage, end: Entry) -> list[tuple[str, str]]:
    if end.event == "failed":
        return [(FAILED, f"{end.fields.get('reason', '?')}: {end.fields.get('error', '')}")]
    if end.event == "cancelled" and not message.cancelling:
        return [(UNEXPECTED, "cancelled without a request")]
    return []


def _text(entries: Sequence[Entry]) -> str:
    """The text of the last attempt."""
    texts: list[str] = []
    for entry in entries:
        if entry.event == "opened":
            texts.clear()
        texts.append(entry.text)
    return "".join(texts)


def _wrong_text(message: SentMessage, end: str, text: str, which: str) -> list[tuple[str, str]]:
    """The problem of a text that is not the backend's: all of it if it is done, otherwise a prefix."""
    expected = message.expected if end == "done" else message.expected[: len(text)]
    if end == "expired" or text == expected:
        return []
    same = next(
        (i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), min(len(text), len(expected))
    )
    instead = f"{text[same : same + 40]!r} instead of {expected[same : same + 40]!r}"
    lengths = f"{len(text)} characters instead of {len(expected)}"
    return [(UNEXPECTED, f"the {which} text differs from the backend's from {same} on: {instead} ({lengths})")]
