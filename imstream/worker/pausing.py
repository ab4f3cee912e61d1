"""Follows the pauses that operators set in Redis: while one is on, this node starts no requests."""

import asyncio

import structlog

from imstream.errors import StoreError, StoreRefused
from imstream.settings import Settings
from imstream.store.pauses import Pause, Pauses
from imstream.worker.jobs import Jobs
from imstream.worker.lease_keeper import LeaseKeeper

log = structlog.get_logger()


class PauseFollower:
    """Reads the pauses. Before the first answer of Redis, nothing is started: a pause survives a restart of the node.

    Running calls continue. Requests that wait for a backend are handed back: no retry window ends while they wait.
    """

    def __init__(self, pauses: Pauses, jobs: Jobs, lease_keeper: LeaseKeeper, settings: Settings) -> None:
        self._interval = settings.read_block.total_seconds()  # the consumer looks for changes as often
        self._pauses = pauses
        self._jobs = jobs
        self._lease_keeper = lease_keeper
        self._known: Pause | None = None
        self._last_error = ""

    async def run(self) -> None:
        """Look for changes until cancelled."""
        while True:
            was_known = self._pauses.is_known
            try:
                await self._pauses.read()
                self._last_error = ""
            except StoreError as error:
                if isinstance(error, StoreRefused) and str(error) != self._last_error:
                    self._last_error = str(error)
                    log.error("pauses cannot be read", error=str(error))  # noqa: TRY400 - no defect
            if self._pauses.is_known and not was_known:
                self._jobs.changed.set()
            await self._follow()
            await asyncio.sleep(self._interval)

    async def _follow(self) -> None:
        for job in self._jobs:
            if job.calls.upstream is None and self._pauses.of(job.stream.node):
                job.stop("paused")
        pause = self._pauses.own if self._pauses.is_known else None
        if pause == self._known:
            return
        self._known = pause
        self._jobs.line.reason = None if pause is None else "paused"
        self._jobs.changed.set()
        if pause is None:
            log.info("pause ended")
        else:
            log.warning(
                "paused by an operator",
                reason=pause.reason,
                by=pause.by,
                new_messages="refused" if pause.refuses else "wait",
            )
        await self._lease_keeper.publish()
