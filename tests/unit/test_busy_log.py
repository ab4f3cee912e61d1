"""Refusals because of load are counted in one line, once a second at most."""

import asyncio
import json

from structlog.testing import capture_logs

from imstream.gateway.busy_log import BusyLog
from tests.support.virtual_time import in_virtual_time


@in_virtual_time
async def test_a_flood_of_refusals_is_one_line_a_second_with_their_counts_and_users() -> None:
    busy = BusyLog()
    with capture_logs() as lines:
        for number in range(1000):
            busy.count("busy", 10001 + number % 7)
            busy.count("rate_limited", 10001)
            await asyncio.sleep(0.0025)
        await asyncio.sleep(1)
    assert len(lines) == 3
    assert {(line["event"], line["log_level"]) for line in lines} == {("messages refused because of load", "warning")}
    assert sum(line["busy"] for line in lines) == sum(line["rate_limited"] for line in lines) == 1000
    assert {(line["users"], line["top_user"]) for line in lines} == {(7, 10001)}
    assert json.dumps(lines)  # plain values


@in_virtual_time
async def test_without_refusals_there_is_no_line() -> None:
    with capture_logs() as lines:
        busy = BusyLog()
        busy.count("user_busy", 10001)
        await asyncio.sleep(60)
    assert len(lines) == 1
