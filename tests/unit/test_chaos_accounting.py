"""The accounts of a chaos run: made-up histories, and what is counted."""

from dataclasses import replace

import pytest

from ops.chaos_test.accounting import DUPLICATED, FAILED, LOST, UNEXPECTED, account
from ops.chaos_test.history import Complaint, Entry, SentMessage

GOOD = SentMessage(10001, "m", "q", "the answer", accepted_at=1.0, ended_at=3.5, outcome="done", text="the answer")
RECORD = [
    Entry("queued", 0),
    Entry("opened", 1, by="0"),
    Entry("text", 1, "the ans"),
    Entry("opened", 2, by="1"),
    Entry("text", 2, "the "),
    Entry("done", 2, "answer"),
]


def verdicts(asked: SentMessage, record: list[Entry] | None, *complaints: Complaint) -> list[str]:
    """The problems of one message."""
    return [one.verdict for one in account([asked], {asked.key: record} if record else {}, complaints).problems]


def test_a_message_that_was_told_and_recorded_once_is_answered() -> None:
    sums = account([GOOD], {GOOD.key: RECORD})
    assert (sums.accepted, sums.answered, sums.problems) == (1, 1, [])
    assert (sums.attempts, sums.restarted, sums.moved, sums.waits) == (2, 1, 1, [2.5])


def test_a_lost_a_duplicated_and_a_wrong_message_are_counted_apart() -> None:
    lost = replace(GOOD, message_id="lost", outcome=None, ended_at=None, text="")
    twice = replace(GOOD, message_id="twice")
    wrong = replace(GOOD, message_id="wrong", text="the other answer")
    records = {
        GOOD.key: RECORD,
        lost.key: RECORD[:3],
        twice.key: [*RECORD, Entry("done", 2)],
        wrong.key: RECORD,
    }
    sums = account([GOOD, lost, twice, wrong], records)
    assert (sums.accepted, sums.answered) == (4, 1)
    assert {one.message_id: one.verdict for one in sums.problems} == {
        "lost": LOST,
        "twice": DUPLICATED,
        "wrong": UNEXPECTED,
    }
    assert [sums.count(verdict) for verdict in (LOST, DUPLICATED, UNEXPECTED, FAILED)] == [1, 1, 1, 0]


@pytest.mark.parametrize("record", [None, RECORD[:1], RECORD[:5]])
def test_accepted_without_a_recorded_end_is_lost(record: list[Entry] | None) -> None:
    assert verdicts(replace(GOOD, outcome=None, text=""), record) == [LOST]


@pytest.mark.parametrize("outcome", [None, "expired"])
def test_a_recorded_answer_that_its_client_was_not_told_is_lost(outcome: str | None) -> None:
    assert verdicts(replace(GOOD, outcome=outcome, text=""), RECORD) == [LOST]


def test_what_was_never_accepted_cannot_be_lost() -> None:
    sums = account([replace(GOOD, accepted_at=None, ended_at=None, outcome=None, text="")], {})
    assert (sums.asked, sums.accepted, sums.answered, sums.problems) == (1, 0, 0, [])


def test_an_answer_to_a_message_whose_acceptance_was_in_doubt_is_recovered() -> None:
    silent = replace(GOOD, message_id="silent", accepted_at=None, ended_at=None, outcome=None, text="", unknown=1)
    sent_again = replace(GOOD, message_id="sent-again", unknown=2)
    sums = account([GOOD, silent, sent_again], dict.fromkeys((GOOD.key, silent.key, sent_again.key), RECORD))
    assert (sums.accepted, sums.answered, sums.recovered, sums.problems) == (2, 2, 2, [])


@pytest.mark.parametrize(
    ("text", "told"),
    [("the answ", "the answer"), ("the answer", "the answ"), ("the the answer", "the answer"), ("", "the answer")],
)
def test_another_text_than_the_backends_is_unexpected_whether_it_is_recorded_or_told(text: str, told: str) -> None:
    record = [Entry("opened", 1, by="0"), Entry("done", 1, text)]
    assert UNEXPECTED in verdicts(replace(GOOD, text=told), record)


def test_anything_recorded_after_the_end_is_unexpected() -> None:
    assert set(verdicts(GOOD, [*RECORD, Entry("opened", 3, by="2")])) == {UNEXPECTED}


def test_an_end_that_differs_from_what_was_told_is_unexpected() -> None:
    assert verdicts(replace(GOOD, cancelling=True), [*RECORD[:5], Entry("cancelled", 2)]) == [UNEXPECTED]


def test_cancelling_may_come_too_late_and_leaves_the_text_so_far() -> None:
    cancelled = replace(GOOD, outcome="cancelled", text="the ans", cancelling=True)
    sums = account([cancelled], {cancelled.key: [*RECORD[:5], Entry("cancelled", 2)]})
    assert (sums.answered, sums.cancelled, sums.problems) == (1, 1, [])
    assert verdicts(replace(GOOD, cancelling=True), RECORD) == []
    assert verdicts(replace(cancelled, cancelling=False), [*RECORD[:5], Entry("cancelled", 2)]) == [UNEXPECTED]


def test_a_message_that_was_given_up_is_told_apart_with_its_reason() -> None:
    failed = replace(GOOD, outcome="failed", text="")
    end = Entry("failed", 2, fields={"reason": "http_503", "error": "no"})
    (problem,) = account([failed], {failed.key: [*RECORD[:4], end]}).problems
    assert (problem.verdict, problem.what) == (FAILED, "http_503: no")


def test_a_breach_of_the_contract_is_unexpected_and_the_message_not_lost_when_it_is_recorded() -> None:
    assert verdicts(replace(GOOD, outcome=None, error=True, why="ProtocolViolation"), RECORD) == [UNEXPECTED]


def test_frames_that_should_not_have_been_said_are_counted_with_their_message() -> None:
    key = GOOD.key
    assert verdicts(GOOD, RECORD, Complaint(*key, "done after the end", twice=True)) == [DUPLICATED]
    assert verdicts(GOOD, RECORD, Complaint(*key, "delta after the end")) == [UNEXPECTED]
    assert verdicts(GOOD, RECORD, Complaint(0, "", "a frame that makes no sense")) == [UNEXPECTED]


def test_a_reply_to_what_was_never_asked_is_unexpected() -> None:
    (problem,) = account([GOOD], {GOOD.key: RECORD, (10001, "stranger"): RECORD}).problems
    assert (problem.message_id, problem.verdict) == ("stranger", UNEXPECTED)
