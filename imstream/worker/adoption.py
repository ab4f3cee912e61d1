"""Finds the streams of dead nodes and consumes them here until they are empty or their node is back."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import structlog

from imstream.errors import StoreError
from imstream.worker.attempt import WorkerDeps
from imstream.worker.consumer import StreamConsumer

_MARGIN = 0.05  # seconds from the end of a lease to the scan for it; also the minimum between two scans
_UNCERTAIN = 0.2  # seconds between scans while it is not certain who is dead: at the start, and after Redis was away

log = structlog.get_logger()


class Adopter:
    """Adopts the streams of dead nodes. `run` until `stop`."""

    def __init__(self, deps: WorkerDeps, make_consumer: Callable[[str], StreamConsumer]) -> None:
        self._deps = deps
        self._make_consumer = make_consumer
        self._consumers: dict[str, StreamConsumer] = {}
        self._searched: set[str] = set()
        """Nodes whose groups have no consumer that an earlier process of this node has left."""
        self._read: set[str] = set()
        """Nodes whose streams this process has read: Redis may run a read after its time limit."""
        self._errors: dict[str, str] = {}  # the last error of each stream that cannot be read; it is logged once
        self._newer: dict[str, int] = {}  # number of requests in each stream that only a newer release supports
        self._interval = deps.settings.lease.total_seconds() / 3
        self._wake = asyncio.Event()
        self._stopping = False

    @property
    def adopted(self) -> list[str]:
        """The nodes whose streams are consumed here."""
        return list(self._consumers)

    def scan_now(self) -> None:
        """Scan without waiting: a node has announced that it is leaving, and may have worked on the same streams."""
        for consumer in self._consumers.values():
            consumer.sweep_soon()
        self._wake.set()

    def stop(self) -> None:
        """Adopt no further streams, and read no further requests of adopted ones."""
        self._stopping = True
        for consumer in self._consumers.values():
            consumer.stop()
        self._wake.set()

    async def run(self) -> None:
        """Scan for dead nodes until `stop`, then wait for the requests under way."""
        async with asyncio.TaskGroup() as group:
            while not self._stopping:
                try:
                    pause = await self._scan(group)
                except StoreError:
                    pause = self._interval  # the consumer logs that Redis is away
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                self._wake.clear()

    async def _scan(self, group: asyncio.TaskGroup) -> float:
        """Adopt all streams that can be adopted. Return the seconds until the next scan: when the next lease ends."""
        last_seen = await self._deps.leases.other_nodes()
        leases = await self._deps.leases.time_left(last_seen)
        for node, since in last_seen.items():
            try:
                can_adopt = self._deps.lease_keeper.can_declare_dead and not self._deps.pauses.own
                if can_adopt and leases[node] is None and node not in self._consumers:
                    await self._adopt_or_retire(group, node, since)
                is_searched = node in self._searched and node not in self._read
                if self._deps.lease_keeper.held and node not in self._consumers and not is_searched:
                    await self._resume(group, node)
            except StoreError as error:  # other streams may be on a healthy part of Redis
                if self._errors.get(node) != str(error):
                    self._errors[node] = str(error)
                    log.warning("stream of another node cannot be looked at", node=node, error=str(error))
            else:
                self._errors.pop(node, None)
        pauses = [self._interval, *(left.total_seconds() + _MARGIN for left in leases.values() if left is not None)]
        if not self._deps.lease_keeper.can_declare_dead:
            pauses.append(_UNCERTAIN)
        return max(_MARGIN, min(pauses))

    async def _adopt_or_retire(self, group: asyncio.TaskGroup, node: str, since: timedelta) -> None:
        unfinished = await self._deps.leases.unfinished(node)
        if unfinished == 0:
            if since > self._deps.settings.retire_after and await self._deps.leases.retire(node):
                log.info("node retired", node=node, unseen=str(since))
            return
        if unfinished == self._newer.get(node):
            return  # left to a node that supports their schema
        adopted = await self._deps.leases.adopt(node)
        if adopted is None:
            return
        if self._stopping:  # another node must not wait until our adoption expires
            await self._release(node)
            return
        self._deps.metrics.adoptions.inc()
        log.warning("stream of a dead node adopted", node=node, unfinished=adopted)
        self._start(group, node, self._make_consumer(node))

    async def _resume(self, group: asyncio.TaskGroup, node: str) -> None:
        """Finish what is pending under our name: no other node does while both nodes live.

        An earlier process of this node has left it, or Redis has run a read of ours after its time limit.
        """
        if not await self._deps.leases.has_pending(node):
            if node not in self._searched:  # removes our consumer if the node has claimed its entries
                await self._deps.leases.release_stream(node)
                self._searched.add(node)
        elif not self._stopping:
            log.info("resuming an earlier adoption", node=node)
            consumer = self._make_consumer(node)
            consumer.finish_pending()
            self._start(group, node, consumer)

    def _start(self, group: asyncio.TaskGroup, node: str, consumer: StreamConsumer) -> None:
        self._consumers[node] = consumer
        self._read.add(node)
        group.create_task(self._consume(node, consumer), name=f"adopted-{node}")

    async def _consume(self, node: str, consumer: StreamConsumer) -> None:
        """Run the consumer; renew the adoption until the stream is empty or its node is back."""
        consuming = asyncio.create_task(consumer.run(), name=f"worker-{node}")
        try:
            while not (await asyncio.wait([consuming], timeout=self._interval))[0]:
                with suppress(StoreError):  # unknown: reading on is safe, each entry is delivered once
                    unfinished = await self._deps.leases.adopt(node)
                    is_over = unfinished is None or unfinished <= len(consumer.newer)
                    if is_over or self._deps.pauses.own:  # another node may work on the rest
                        consumer.finish_pending()
                    else:  # also when the node was back and has died again
                        consumer.resume()
            await consuming
        finally:
            consuming.cancel()
            del self._consumers[node]
            self._newer[node] = len(consumer.newer)
        await self._release(node)

    async def _release(self, node: str) -> None:
        try:
            finished = await self._deps.leases.release_stream(node)
            log.info("adopted stream released", node=node, finished=finished)
        except StoreError as error:
            log.warning("adopted stream cannot be released", node=node, error=str(error))
