"""The schedule of a chaos run."""

from collections import defaultdict

import pytest

from ops.chaos_test.schedule import FAULT_RATES, NODE_KINDS, REST, Kind, draw


def test_the_seed_alone_makes_the_schedule() -> None:
    assert draw(7, 120, nodes=3, clients=18) == draw(7, 120, nodes=3, clients=18)
    assert draw(7, 120, nodes=3, clients=18) != draw(8, 120, nodes=3, clients=18)


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    short = draw(7, 60, nodes=3, clients=18)
    assert draw(7, 120, nodes=3, clients=18)[: len(short)] == short


@pytest.mark.parametrize("seed", range(5))
def test_two_minutes_hold_every_kind_of_fault(seed: int) -> None:
    assert {fault.kind for fault in draw(seed, 120, nodes=3, clients=18)} == set(Kind)


@pytest.mark.parametrize("seed", range(5))
def test_faults_are_in_order_in_time_and_bounded(seed: int) -> None:
    faults = draw(seed, 300, nodes=3, clients=18)
    assert faults == sorted(faults, key=lambda fault: fault.at)
    for fault in faults:
        rate = FAULT_RATES[fault.kind]
        assert 0 < fault.at < 300
        assert rate.shortest <= fault.outage <= rate.longest
        assert fault.target in range({**dict.fromkeys(NODE_KINDS, 3), Kind.CLIENT_DROP: 18}.get(fault.kind, 1))


@pytest.mark.parametrize("seed", range(5))
def test_no_part_is_struck_while_it_is_away(seed: int) -> None:
    back: dict[tuple[str, int], float] = defaultdict(float)
    for fault in draw(seed, 300, nodes=3, clients=18):
        if fault.kind is not Kind.CLIENT_DROP:
            part = (fault.kind.split()[0], fault.target)
            assert fault.at >= back[part]
            back[part] = fault.at + fault.outage + REST
