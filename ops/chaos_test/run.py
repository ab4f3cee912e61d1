"""One run: start everything, inject faults, restore everything, wait for the replies and account for them."""

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ops.chaos_test.accounting import account
from ops.chaos_test.audit import Resources, connect, find_leftovers, recorded
from ops.chaos_test.clients import RandomClient
from ops.chaos_test.history import Complaint, Recorded, SentMessage
from ops.chaos_test.injector import Injector
from ops.chaos_test.network import Network
from ops.chaos_test.parts import Part
from ops.chaos_test.report import Results
from ops.chaos_test.schedule import draw
from ops.chaos_test.stage import Stage


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run.

    Attributes:
        seconds: How long faults are injected and messages sent.
        nodes: Number of nodes that are restarted; one more is killed for good.
        clients: Number of clients.
        rate: Maximum number of messages per second, of all clients together.
        patience: Seconds after that within which every accepted message must end.
        balancer: `haproxy`, `nginx`, or None: clients choose a node at random.
    """

    seed: int
    seconds: float
    nodes: int
    clients: int
    rate: float
    patience: float
    balancer: str | None

    def __str__(self) -> str:
        front = f"behind {self.balancer}" if self.balancer else "without a load balancer"
        return f"seed {self.seed}: {self.seconds:g} s, {self.nodes} + 1 nodes {front}, {self.clients} clients"


async def run(plan: Plan, folder: Path) -> tuple[Results, Recorded]:
    """Run; returns the results and the reply streams."""
    asked: list[SentMessage] = []
    ignored = _IgnoredFrames()
    logging.getLogger("imstream.client.connection").addHandler(ignored)
    faults = draw(plan.seed, plan.seconds, nodes=plan.nodes, clients=plan.clients)
    with (folder / "faults.log").open("w", encoding="utf-8") as log:
        async with Stage(folder, nodes=plan.nodes, seed=plan.seed, balancer=plan.balancer) as stage:
            before = Resources.of(stage.nodes[0])
            async with Network(stage.port_for_client) as network:
                injector = Injector(stage, network, log)
                injector.note(str(plan))
                stop = asyncio.Event()
                url = f"ws://127.0.0.1:{network.port}/ws"
                pause = plan.clients / plan.rate
                clients = [RandomClient(number, plan.seed, url, pause, asked) for number in range(plan.clients)]
                asking = [asyncio.create_task(client.run(stop)) for client in clients]
                await injector.run(faults, plan.seconds)
                stop.set()
                await stage.restore()
                injector.note("everything is restored")
                await _await_all(asking, plan.patience)
                injector.note("the clients have ended")
            with connect(stage.redis_port, stage.password) as client:
                leftovers = await find_leftovers(client, stage.nodes, stage.leaver.name.removeprefix("node "), before)
                streams = recorded(client)
            after = {node.name: Resources.of(node) for node in stage.nodes}
        unforeseen = _unforeseen([*stage.parts, stage.leaver])
    _add_accepted(asked, network)
    _write_messages(folder / "messages.jsonl", asked, streams)
    complaints = [*network.complaints, *ignored.complaints]
    sums = account(asked, streams, complaints)
    return Results(sums, injector.injected, leftovers, unforeseen, before, after, folder), streams


def _unforeseen(parts: Sequence[Part]) -> list[str]:
    """Events that no fault explains."""
    found = [death for part in parts for death in part.deaths]
    found += [
        f"{part.name} logged {count} exceptions: see {part.log}" for part in parts if (count := part.tracebacks())
    ]
    return found


async def _await_all(asking: Sequence[asyncio.Task[None]], patience: float) -> None:
    """Wait until all clients have ended; those that are still waiting after `patience` have lost a message."""
    _, late = await asyncio.wait(asking, timeout=patience)
    for task in late:
        task.cancel()
    results = await asyncio.gather(*asking, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):  # a defect of this program
            raise result


def _add_accepted(asked: Sequence[SentMessage], network: Network) -> None:
    """A message counts as accepted once the server sent `accepted`, even if its client did not receive it."""
    for message in asked:
        if message.accepted_at is None:
            message.accepted_at = network.accepted.get(message.key)


def _write_messages(file: Path, asked: Sequence[SentMessage], streams: Recorded) -> None:
    """Write all that is known of every message, one line each: Redis and its data are deleted after the run."""
    with file.open("w", encoding="utf-8") as out:
        for message in asked:
            entries = [entry.fields for entry in streams.get(message.key, [])]
            out.write(json.dumps({**asdict(message), "recorded": entries}, ensure_ascii=False) + "\n")


class _IgnoredFrames(logging.Handler):
    """Collects the frames that the client library ignored as invalid."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.complaints: list[Complaint] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the library's logger."""
        self.complaints.append(Complaint(0, "", record.getMessage()))
