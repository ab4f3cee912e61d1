"""The decision about a request: as a table, and as properties for all inputs."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.errors import BackendError, PermanentBackendError, TransientBackendError
from imstream.settings import Settings
from imstream.worker.disposition import WORKER_DIED, Bury, Limits, Retry, after_failure, before_start

LIMITS = Limits(attempts=4, deliveries=3, window=timedelta(minutes=3))

SPANS = st.timedeltas(timedelta(0), timedelta(hours=1))
LIMITS_OF_ANY_SIZE = st.builds(
    Limits, attempts=st.integers(1, 10), deliveries=st.integers(1, 10), window=SPANS.filter(bool)
)
TRANSIENT = st.builds(
    TransientBackendError, st.sampled_from(["http_503", "connect_failed"]), st.text(), retry_after=st.none() | SPANS
)
PERMANENT = st.builds(PermanentBackendError, st.sampled_from(["http_400", "context_too_long"]), st.text())
ATTEMPTS = st.integers(1, 20)


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def busy(retry_after: float | None = None) -> TransientBackendError:
    return TransientBackendError(
        "http_429", "slow down", retry_after=None if retry_after is None else seconds(retry_after)
    )


@pytest.mark.parametrize(
    ("error", "attempt", "elapsed", "disposition"),
    [
        pytest.param(busy(), 1, 0, Retry(seconds(0)), id="a first failure is tried again"),
        pytest.param(busy(), 3, 0, Retry(seconds(0)), id="and so is the last but one"),
        pytest.param(busy(), 4, 0, Bury("http_429", "slow down"), id="the last is not"),
        pytest.param(busy(), 9, 0, Bury("http_429", "slow down"), id="nor one that should not have been"),
        pytest.param(busy(7), 1, 0, Retry(seconds(7)), id="not before the backend asked for"),
        pytest.param(busy(0), 1, 0, Retry(seconds(0)), id="which may be at once"),
        pytest.param(busy(60), 1, 120, Retry(seconds(60)), id="up to the end of the window"),
        pytest.param(busy(60), 1, 121, Bury("http_429", "slow down"), id="but not past it"),
        pytest.param(busy(), 1, 180, Retry(seconds(0)), id="the window ends here"),
        pytest.param(busy(), 1, 181, Bury("http_429", "slow down"), id="and is over here"),
        pytest.param(PermanentBackendError("http_400", "no"), 1, 0, Bury("http_400", "no"), id="refused for good"),
        pytest.param(BackendError("odd", "what?"), 1, 0, Retry(seconds(0)), id="a failure of no known kind may pass"),
    ],
)
def test_a_failed_attempt(error: BackendError, attempt: int, elapsed: float, disposition: Retry | Bury) -> None:
    assert after_failure(error, attempt=attempt, elapsed=seconds(elapsed), limits=LIMITS) == disposition


@pytest.mark.parametrize("deliveries", [0, 1, 2, 3])
def test_a_request_is_tried_as_long_as_its_workers_died_no_oftener_than_allowed(deliveries: int) -> None:
    assert before_start(deliveries, LIMITS) is None


def test_a_request_whose_workers_died_too_often_is_buried_with_the_count() -> None:
    assert before_start(4, LIMITS) == Bury(WORKER_DIED, "its worker died 3 times while working on it")


def test_the_limits_are_those_that_are_set() -> None:
    settings = Settings.load(max_attempts=7, max_deliveries=5, retry_window="1m")
    assert Limits.of(settings) == Limits(attempts=7, deliveries=5, window=timedelta(minutes=1))


# Rules


@given(PERMANENT, ATTEMPTS, SPANS, LIMITS_OF_ANY_SIZE)
def test_what_cannot_succeed_is_never_tried_again(
    error: PermanentBackendError, attempt: int, elapsed: timedelta, limits: Limits
) -> None:
    assert after_failure(error, attempt=attempt, elapsed=elapsed, limits=limits) == Bury(error.reason, error.detail)


@given(TRANSIENT, ATTEMPTS, SPANS, LIMITS_OF_ANY_SIZE)
def test_a_retry_keeps_every_limit_and_the_wish_of_the_backend(
    error: TransientBackendError, attempt: int, elapsed: timedelta, limits: Limits
) -> None:
    match after_failure(error, attempt=attempt, elapsed=elapsed, limits=limits):
        case Retry(after):
            assert attempt < limits.attempts
            assert after == (error.retry_after or timedelta(0))
            assert elapsed + after <= limits.window
        case Bury(reason, told):
            assert (reason, told) == (error.reason, error.detail)
            assert attempt >= limits.attempts or elapsed + (error.retry_after or timedelta(0)) > limits.window


@given(st.lists(st.tuples(TRANSIENT, SPANS), min_size=20, max_size=20), LIMITS_OF_ANY_SIZE)
def test_no_backend_is_called_oftener_than_there_are_attempts(
    failures: list[tuple[TransientBackendError, timedelta]], limits: Limits
) -> None:
    calls, elapsed = 0, timedelta(0)
    for error, took in failures:
        calls += 1
        elapsed += took
        decision = after_failure(error, attempt=calls, elapsed=elapsed, limits=limits)
        if isinstance(decision, Bury):
            break
        elapsed += decision.after
        assert elapsed <= limits.window  # so none begins outside it
    assert calls <= limits.attempts


@given(st.integers(0, 30), LIMITS_OF_ANY_SIZE)
def test_a_request_dies_with_its_worker_no_oftener_than_allowed(deliveries: int, limits: Limits) -> None:
    assert (before_start(deliveries, limits) is None) == (deliveries <= limits.deliveries)
