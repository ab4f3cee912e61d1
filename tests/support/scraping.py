"""Reads the metrics of a node, as Prometheus does."""

import asyncio
import urllib.request
from collections.abc import Mapping

from tests.support.waiting import wait_until

Series = dict[str, float]
"""Values by series as they are written, such as `imstream_admissions_total{result="busy"}`."""


def parse(text: str) -> Series:
    """The series of a text in the exposition format."""
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {series: float(value) for series, _, value in lines}


def scrape(http: str) -> Series:
    """The series that an address serves."""
    with urllib.request.urlopen(f"{http}/metrics", timeout=5) as answer:  # noqa: S310 - a URL of the test's own
        return parse(answer.read().decode())


async def scraped(http: str) -> Series:
    """`scrape` without blocking the event loop."""
    return await asyncio.to_thread(scrape, http)


async def metrics_become(
    http: str, wanted: Mapping[str, float], *, since: Series | None = None, limit: float = 10.0
) -> None:
    """Wait until series have these values, or differ so much from those of an earlier scrape; absent ones are 0."""
    before, found = since or {}, Series()

    async def have_become() -> bool:
        now = await scraped(http)
        found.clear()
        found.update({series: now.get(series, 0.0) - before.get(series, 0.0) for series in wanted})
        return found == dict(wanted)

    try:
        await wait_until(have_become, "the metrics have changed", limit=limit)
    except AssertionError as error:
        wrong = {series: (found.get(series), value) for series, value in wanted.items() if found.get(series) != value}
        raise AssertionError(f"found and wanted: {wrong}") from error
