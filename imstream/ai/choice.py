"""The choice of a backend for a call: by priority, then by weight and free slots."""

from collections.abc import Collection, Sequence

from imstream.ai.upstream import Upstream


def best(
    upstreams: Sequence[Upstream], tried: Collection[Upstream], tokens: int, *, continuing: bool
) -> Upstream | None:
    """The best of those that may be called now."""
    if len(upstreams) == 1:
        return upstreams[0] if upstreams[0].may_be_called(tokens) else None
    equals = candidates(upstreams, tried, tokens, continuing=continuing)
    return _by_weight(equals) if equals else None


def candidates(
    upstreams: Sequence[Upstream], tried: Collection[Upstream], tokens: int, *, continuing: bool
) -> list[Upstream]:
    """The equally good ones of those that may be called now; none while one that continues the answer is only full."""
    first, equals = None, list[Upstream]()
    for one in upstreams:
        if one.may_be_called(tokens):
            is_unknown = one.gate.breaker.tripped and not one.is_reachable
            rank = continuing and not one.can_continue, is_unknown, one in tried, one.options.priority
            if first is None or rank < first:
                first, equals = rank, []
            if rank == first:
                equals.append(one)
    if continuing and first is not None and first[0]:
        return [] if any(one.can_continue and one.is_only_full(tokens) for one in upstreams) else equals
    return equals


def _by_weight(upstreams: Sequence[Upstream]) -> Upstream:
    """Share calls in proportion to weights and free slots: each earns its part of a call, the richest one pays for it.

    The calls of one are spread evenly between those of the others ("smooth weighted round robin").
    """
    total = 0.0
    for one in upstreams:
        earned = one.options.weight * (1 - one.in_flight / one.slots.limit)
        one.credit += earned
        total += earned
    chosen = max(upstreams, key=lambda one: one.credit)
    chosen.credit -= total
    return chosen
