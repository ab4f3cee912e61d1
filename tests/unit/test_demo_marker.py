"""The marker in a question that controls its call."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.demo.marker import Fault, Marker, parse_marker


def test_a_question_without_a_marker_is_left_as_it_is() -> None:
    assert parse_marker("  what is [[this]]? ") == ("  what is [[this]]? ", Marker())


def test_a_marker_is_read_and_taken_out_of_the_question() -> None:
    plain, marker = parse_marker("tell me [[demo length=200 pace=20ms first=2s status=400 after=3]] about streams")
    assert plain == "tell me about streams"
    assert (marker.length, marker.status) == (200, 400)
    assert (marker.pace, marker.first, marker.after) == (
        timedelta(milliseconds=20),
        timedelta(seconds=2),
        timedelta(seconds=3),
    )


@pytest.mark.parametrize("fault", list(Fault))
def test_every_fault_can_be_asked_for_by_its_name(fault: Fault) -> None:
    marker = parse_marker(f"x [[demo {fault}=2]]")[1]
    assert [marker.fault_of(call) for call in range(3)] == [fault, fault, None]


def test_faults_come_in_a_fixed_order_each_for_its_number_of_calls() -> None:
    marker = parse_marker("x [[demo break=1 busy=1 fail=2]]")[1]
    assert [marker.fault_of(call) for call in range(5)] == [Fault.FAIL, Fault.FAIL, Fault.BUSY, Fault.BREAK, None]


def test_what_is_not_understood_is_ignored_and_the_rest_is_kept() -> None:
    marker = parse_marker("x [[demo length=many pace=-1s fail=1 colour=red nonsense status=200]]")[1]
    assert marker == Marker(fail=1)


@given(st.text())
def test_no_text_in_a_marker_does_harm(text: str) -> None:
    plain, marker = parse_marker(f"why? [[demo {text}]]")
    assert plain.startswith("why?")
    assert isinstance(marker, Marker)
