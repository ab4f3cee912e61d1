"""The decision about a request: as a table, and as properties for all inputs."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.errors import BackendError, FailureKind
from imstream.settings import Settings
from imstream.worker.disposition import WORKER_DIED, Bury, Limits, Retry, Wait, after_failure, before_start

LIMITS = Limits(attempts=4, deliveries=3, window=timedelta(minutes=3))

SPANS = st.timedeltas(timedelta(0), timedelta(hours=1))
LIMITS_OF_ANY_SIZE = st.builds(
    Limits, attempts=st.integers(1, 10), deliveries=st.integers(1, 10), window=SPANS.filter(bool)
)
BROKEN = st.builds(
    BackendError, st.sampled_from(["broken_stream", "http_500"]), st.text(), retry_after=st.none() | SPANS
)
AWAY = st.builds(
    BackendError,
    st.sampled_from(["http_503", "connect_failed"]),
    st.text(),
    kind=st.sampled_from(["away", "misconfigured"]),
    retry_after=st.none() | SPANS,
)
IMPOSSIBLE = st.builds(
    BackendError, st.sampled_from(["http_400", "context_too_long"]), st.text(), kind=st.just("impossible")
)
ATTEMPTS = st.integers(1, 20)


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def failed(kind: FailureKind, retry_after: float | None = None) -> BackendError:
    return BackendError("reason", "why", kind=kind, retry_after=None if retry_after is None else seconds(retry_after))


WINDOW = LIMITS.window


def buried(error: BackendError) -> Bury:
    """The end of a message with this failure: its error is never empty."""
    return Bury(error.reason, error.detail or error.reason, error.kind)


@pytest.mark.parametrize(
    ("error", "counted", "waited", "disposition"),
    [
        pytest.param(failed("broken"), 1, 0, Retry(seconds(0)), id="a first broken answer is tried again"),
        pytest.param(failed("broken"), 3, 0, Retry(seconds(0)), id="and so is the last but one"),
        pytest.param(failed("broken"), 4, 0, None, id="the last is not"),
        pytest.param(failed("broken"), 9, 0, None, id="nor one that should not have been"),
        pytest.param(failed("broken", 7), 1, 0, Retry(seconds(7)), id="not before the backend asked for"),
        pytest.param(failed("broken"), 1, 9999, Retry(seconds(0)), id="however long it had to wait before"),
        pytest.param(failed("impossible"), 1, 0, None, id="what is impossible is given up at once"),
    ],
)
def test_an_answer_that_broke_or_cannot_be(
    error: BackendError, counted: int, waited: float, disposition: Retry | None
) -> None:
    found = after_failure(error, counted=counted, has_text=False, waited=seconds(waited), limits=LIMITS)
    assert found == (disposition or buried(error))


@pytest.mark.parametrize("kind", ["away", "misconfigured"])
@pytest.mark.parametrize(
    ("retry_after", "waited", "after"),
    [
        pytest.param(None, 0, 0, id="the first failure begins the window"),
        pytest.param(7, 0, 7, id="not before the backend asked for"),
        pytest.param(None, 179, 0, id="up to the end of the window"),
        pytest.param(60, 150, 30, id="and not longer, whatever it asks for"),
        pytest.param(None, 180, None, id="at its end the message is given up"),
    ],
)
def test_a_backend_that_is_away_is_waited_for(
    kind: FailureKind, retry_after: float | None, waited: float, after: float | None
) -> None:
    error = failed(kind, retry_after)
    found = after_failure(error, counted=99, has_text=False, waited=seconds(waited), limits=LIMITS)
    assert found == (buried(error) if after is None else Wait(seconds(after), WINDOW - seconds(waited), error))


@pytest.mark.parametrize("deliveries", [0, 1, 2, 3])
def test_a_request_is_tried_as_long_as_its_workers_died_no_oftener_than_allowed(deliveries: int) -> None:
    assert before_start(deliveries, LIMITS) is None


def test_a_request_whose_workers_died_too_often_is_buried_with_the_count() -> None:
    assert before_start(4, LIMITS) == Bury(WORKER_DIED, "its worker died 3 times while working on it")


def test_the_limits_are_those_that_are_set() -> None:
    settings = Settings.load(max_attempts=7, max_deliveries=5, retry_window="1m")
    assert Limits.of(settings) == Limits(attempts=7, deliveries=5, window=timedelta(minutes=1))


# Rules


@given(IMPOSSIBLE, ATTEMPTS, SPANS, st.booleans(), LIMITS_OF_ANY_SIZE)
def test_what_cannot_succeed_is_never_tried_again(
    error: BackendError,
    counted: int,
    waited: timedelta,
    has_text: bool,  # noqa: FBT001 - drawn
    limits: Limits,
) -> None:
    found = after_failure(error, counted=counted, has_text=has_text, waited=waited, limits=limits)
    assert found == buried(error)


@given(BROKEN, ATTEMPTS, SPANS, st.booleans(), LIMITS_OF_ANY_SIZE)
def test_an_answer_that_breaks_is_tried_as_often_as_allowed(
    error: BackendError,
    counted: int,
    waited: timedelta,
    has_text: bool,  # noqa: FBT001 - drawn
    limits: Limits,
) -> None:
    match after_failure(error, counted=counted, has_text=has_text, waited=waited, limits=limits):
        case Retry(after):
            assert counted < limits.attempts
            assert after == (error.retry_after or timedelta(0))
        case verdict:
            assert verdict == buried(error)
            assert counted >= limits.attempts


@given(AWAY, ATTEMPTS, SPANS, st.booleans(), LIMITS_OF_ANY_SIZE)
def test_waiting_ends_with_the_window_and_never_by_the_number_of_attempts(
    error: BackendError,
    counted: int,
    waited: timedelta,
    has_text: bool,  # noqa: FBT001 - drawn
    limits: Limits,
) -> None:
    match after_failure(error, counted=counted, has_text=has_text, waited=waited, limits=limits):
        case Wait(after, window):
            assert not has_text
            assert timedelta(0) <= after <= window == limits.window - waited
        case Retry():
            assert has_text
            assert counted < limits.attempts
        case verdict:
            assert verdict == buried(error)
            assert waited >= limits.window or (has_text and counted >= limits.attempts)


@given(st.integers(0, 30), LIMITS_OF_ANY_SIZE)
def test_a_request_dies_with_its_worker_no_oftener_than_allowed(deliveries: int, limits: Limits) -> None:
    assert (before_start(deliveries, limits) is None) == (deliveries <= limits.deliveries)
