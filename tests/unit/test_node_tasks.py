"""Background tasks of a node: a failing one is restarted and ends nothing. And its status before they have run."""

import asyncio
from datetime import timedelta
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from imstream.ai.router import Backends
from imstream.errors import NodeTaken
from imstream.node import Node, keep_running
from imstream.settings import Settings
from tests.support.virtual_time import in_virtual_time


@in_virtual_time
async def test_a_background_task_that_fails_is_started_again_and_that_is_logged_once_for_each_reason() -> None:
    reasons = iter(
        [OverflowError("far ahead"), OverflowError("far ahead"), TypeError("no number"), TypeError("no number")]
    )
    began: list[float] = []

    async def run() -> None:
        began.append(asyncio.get_running_loop().time())
        for reason in reasons:
            raise reason

    with capture_logs() as logs:
        await keep_running("following", run)
    assert len(began) == 5
    assert all(after - before >= 1 for before, after in pairwise(began))
    event = "background task failed and is started again"
    assert [(line["event"], line["task"]) for line in logs] == [(event, "following")] * 2


@in_virtual_time
async def test_that_another_process_runs_the_node_is_no_failure() -> None:
    async def run() -> None:
        await asyncio.sleep(timedelta(seconds=1).total_seconds())
        raise NodeTaken("0", "http://far:80", 1, "far")

    with pytest.raises(NodeTaken):
        await keep_running("lease", run)


async def test_a_node_that_has_not_read_the_pauses_yet_confirms_none() -> None:
    """Otherwise a pause would be confirmed, although the node begins requests if it then reads that no pause is set."""
    settings = Settings()
    node = Node(settings, Backends(settings))
    assert node._status()["paused"] == ""  # noqa: SLF001 - no Redis is needed
