"""The parts of `ops.benchmark.scale`, each of which starts its nodes and stops them."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import redis

from imstream.gateway.server import OTHER_FILES, SPARE_CONNECTIONS
from imstream.keys import Keys
from ops.benchmark.crowd import counted
from ops.benchmark.load import FIRST_USER
from ops.benchmark.processes import Process, Stage, machine_cpu
from ops.benchmark.runs import SETTLE, Child

IDLE, STORM, CHATS, CHECK, MESSAGES = range(1, 6)
"""The databases of the nodes of each part."""

CROWD = 10_000
"""Maximum number of sockets in one process of the load generator, and from one source address."""


@dataclass(frozen=True)
class Load:
    """Paced answers: `chats` begin in each second for `seconds`, after a ramp of the length of an answer.

    An answer has a delta every `milliseconds`.
    """

    chats: float
    deltas: int
    seconds: float
    milliseconds: int = 20

    @property
    def length(self) -> float:
        """Seconds from the first delta of an answer to the last."""
        return self.deltas * self.milliseconds / 1000

    @property
    def members(self) -> int:
        """Users that are enough for it, also if answers take half as long again."""
        return round(self.chats * (1.5 * self.length + 2)) + 1


@dataclass(frozen=True)
class Plan:
    """The extent of the measurement; times in seconds.

    Attributes:
        idle: Maximum number of idle sockets.
        heartbeat: Time within which each idle socket sends one heartbeat.
        storm: Number of users who lose their node.
        storm_deltas: Deltas of their answers, `storm_pace` milliseconds apart.
        storm_limit: Time limit for all their answers.
        lease: Settings of the nodes of the storm; none: defaults.
        short: The load with short answers that gives the costs of a chat.
        long: The load with long answers.
        check: The load that is predicted.
        messages: Number of queued messages, and of dead letters.
    """

    idle: int = 50_000
    heartbeat: float = 25.0
    storm: int = 5_000
    storm_deltas: int = 15
    storm_pace: int = 2_000
    storm_limit: float = 150.0
    lease: tuple[tuple[str, object], ...] = ()
    short: Load = Load(chats=100, deltas=100, seconds=15)
    long: Load = Load(chats=25, deltas=400, seconds=15)
    check: Load = Load(chats=60, deltas=200, seconds=30)
    messages: int = 1_000


SMALL = Plan(
    idle=200,
    heartbeat=0.5,
    storm=100,
    storm_deltas=8,
    storm_pace=500,
    lease=(("lease", "2s"), ("sweep_interval", "1s")),
    short=Load(chats=20, deltas=10, seconds=1),
    long=Load(chats=5, deltas=40, seconds=1),
    check=Load(chats=10, deltas=25, seconds=1),
    messages=50,
)
"""A variant for tests: its figures mean nothing."""


class Crowd(Child):
    """`ops.benchmark.crowd` in its own process."""

    def __init__(self) -> None:
        super().__init__("ops.benchmark.crowd")

    def do(self, command: str, **arguments: object) -> dict[str, Any]:
        """Give a command and read its (first) answer."""
        self.send(json.dumps({"command": command, **arguments}))
        return self.next()

    def next(self) -> dict[str, Any]:
        """Read the next answer."""
        return cast("dict[str, Any]", json.loads(self.answer()))


@contextmanager
def crowd(nodes: list[Process], count: int, first_user: int = FIRST_USER, number: int = 1) -> Iterator[Crowd]:
    """Users who are logged in, on the first of the nodes; `number` chooses their source address."""
    urls = [f"ws://127.0.0.1:{node.port}/ws" for node in nodes]
    with Crowd() as members:
        source = f"127.0.0.{1 + number}"
        members.do("open", urls=urls, count=count, first_user=first_user, source=source)
        yield members


@dataclass(frozen=True)
class Reading:
    """Counters at one moment. CPU in seconds, memory in bytes; `others`: backend and load generator."""

    time: float
    node_cpu: float
    redis_cpu: float
    others_cpu: float
    machine_cpu: float
    node_memory: int
    redis_memory: int
    commands: int
    scripts: int
    redis_in: int
    redis_out: int

    @classmethod
    def take(cls, stage: Stage, node: Process, *generators: Child) -> "Reading":
        """Read them now."""
        with redis.Redis(port=stage.redis.port) as client:
            stats, memory, calls = (
                cast("dict[str, Any]", client.info(part)) for part in ("stats", "memory", "commandstats")
            )
        scripts = sum(calls.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "eval"))
        return cls(
            time.monotonic(),
            node.cpu(),
            stage.redis.cpu(),
            stage.backend.cpu() + sum(generator.cpu() for generator in generators),
            machine_cpu(),
            node.memory(),
            memory["used_memory"],
            stats["total_commands_processed"],
            scripts,
            stats["total_net_input_bytes"],
            stats["total_net_output_bytes"],
        )


def idle(stage: Stage, plan: Plan) -> dict[str, Any]:
    """Sockets without chats: memory, and CPU of logins and of heartbeats."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    concurrency = 8
    count = min(plan.idle, files - SPARE_CONNECTIONS - OTHER_FILES - concurrency)
    node = stage.start_node(
        "idle", redis_url=stage.redis_url(IDLE), node_sockets=count, concurrency=concurrency, idle_timeout="10m"
    )
    time.sleep(SETTLE)
    empty = Reading.take(stage, node)
    with ExitStack() as stack:
        warm = max(1, count // 20)  # fills the pools of the node
        parts = [warm] + [min(CROWD, count - start) for start in range(warm, count, CROWD)]
        first, crowds = FIRST_USER, []
        for number, part in enumerate(parts, 1):
            crowds.append(stack.enter_context(crowd([node], part, first, number)))
            first += part
            if number == 1:
                time.sleep(SETTLE)
                before = Reading.take(stage, node)
        time.sleep(SETTLE)
        opened = Reading.take(stage, node)
        for one in crowds:
            one.send(json.dumps({"command": "heartbeats", "seconds": plan.heartbeat}))
        answers = [one.next() for one in crowds]
        after = Reading.take(stage, node)
    node.stop()
    new = count - warm
    return {
        "sockets": count,
        "file_limit": files,
        "node_memory_empty": empty.node_memory,
        "node_memory": opened.node_memory,
        "memory_per_socket": (opened.node_memory - before.node_memory) / new,
        "redis_memory_per_user": (opened.redis_memory - before.redis_memory) / new,
        "cpu_per_login": (opened.node_cpu - before.node_cpu) / new,
        "redis_cpu_per_login": (opened.redis_cpu - before.redis_cpu) / new,
        "logins_per_second": new / (opened.time - before.time),
        "cpu_per_heartbeat": (after.node_cpu - opened.node_cpu) / count,
        "heartbeats": sum(answer["answered"] for answer in answers),
        "heartbeat_cpu": (after.node_cpu - opened.node_cpu) / (after.time - opened.time),
        "heartbeat_p99": max(answer["seconds"]["p99"] for answer in answers),
    }


def storm(stage: Stage, plan: Plan) -> dict[str, Any]:
    """Kill one of two nodes while the answers of its users are under way."""
    count = min(plan.storm, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_CONNECTIONS - OTHER_FILES) // 2)
    shared: dict[str, Any] = {
        "redis_url": stage.redis_url(STORM),
        "node_sockets": CROWD,
        "concurrency": count,
        **dict(plan.lease),
    }
    nodes = [stage.start_node(name, **shared) for name in ("lost", "left")]
    with crowd(nodes, count) as members:
        time.sleep(SETTLE)
        before = nodes[0].memory()
        members.do("say", contents=counted(plan.storm_deltas, plan.storm_pace), until="text")
        memory = nodes[0].memory() - before
        under_way = members.do("storm", limit=plan.storm_limit)["under_way"]
        cpu, began = nodes[1].cpu(), time.monotonic()
        nodes[0].popen.kill()
        seen = members.next()
        seconds = time.monotonic() - began
        cpu, memory_left = nodes[1].cpu() - cpu, nodes[1].memory()
    nodes[1].stop()
    return {
        **seen,
        "under_way": under_way,
        "memory_per_answer": memory / count,
        "node_cpu": cpu,
        "node_memory": memory_left,
        "seconds": seconds,
    }


def chats(stage: Stage, node: Process, database: int, load: Load) -> dict[str, Any]:
    """Apply a load of paced answers to a node; each value for one chat, unless its name shows otherwise."""
    with crowd([node], load.members) as members:
        time.sleep(SETTLE)
        listpacks, size = _replies(stage, database)
        start = Reading.take(stage, node, members)
        arguments = {"chats": load.chats, "deltas": load.deltas, "milliseconds": load.milliseconds}
        members.do("rate", ramp=load.length + 1, seconds=load.seconds, **arguments)
        before = Reading.take(stage, node, members)
        window = members.next()
        after = Reading.take(stage, node, members)
        total = members.next()
        time.sleep(SETTLE)
        end = Reading.take(stage, node, members)
        listpacks, size = (new - old for new, old in zip(_replies(stage, database), (listpacks, size), strict=True))
    count, seconds = window["begun"], after.time - before.time
    return {
        "chats_per_second": count / seconds,
        "length": load.length,
        "seconds": seconds,
        "chats": total["chats"],
        "right": total["right"],
        "skipped": total["skipped"],
        "codes": total["codes"],
        "under_way": window["under_way"],
        "sockets": load.members,
        "first": window["first"],
        "node_cpu": (after.node_cpu - before.node_cpu) / count,
        "redis_cpu": (after.redis_cpu - before.redis_cpu) / count,
        "commands": (after.commands - before.commands) / count,
        "scripts": (after.scripts - before.scripts) / count,
        "redis_in": (after.redis_in - before.redis_in) / count,
        "redis_out": (after.redis_out - before.redis_out) / count,
        "frames": window["frames"] / count,
        "client_bytes": window["bytes"] / count,
        "reply_memory": (end.redis_memory - start.redis_memory) / total["chats"],
        "reply_listpacks": listpacks / total["chats"],
        "reply_bytes": size / total["chats"],
        "node_cores": (after.node_cpu - before.node_cpu) / seconds,
        "redis_cores": (after.redis_cpu - before.redis_cpu) / seconds,
        "foreign": max(0.0, _foreign(after) - _foreign(before)) / seconds,
        "node_memory": after.node_memory,
    }


def _replies(stage: Stage, database: int) -> tuple[int, int]:
    """Listpacks and bytes of all replies; the bytes as Redis dumps them without compression."""
    with redis.Redis(port=stage.redis.port, db=database) as client, client.pipeline(transaction=False) as pipeline:
        client.config_set("rdbcompression", "no")
        for key in client.scan_iter("*:reply:*", count=1000):
            pipeline.xinfo_stream(key).dump(key)
        found = pipeline.execute()
    return sum(info["radix-tree-keys"] for info in found[::2]), sum(map(len, found[1::2]))


def _foreign(reading: Reading) -> float:
    return reading.machine_cpu - reading.node_cpu - reading.redis_cpu - reading.others_cpu


def redis_messages(stage: Stage, plan: Plan) -> dict[str, float]:
    """Bytes of Redis for a queued message and for a dead letter, with the length of their question."""
    users, contents = max(1, plan.messages // 4), "x" * 200
    settings: dict[str, Any] = {
        "redis_url": stage.redis_url(MESSAGES),
        "concurrency": 1,
        "max_attempts": 1,
        "user_limit": 8,
    }
    node = stage.start_node("queue", ai_breaker_failures=plan.messages * 2, **settings)
    with crowd([node], users) as members:
        before = Reading.take(stage, node).redis_memory
        for number in range(4):
            members.do("say", contents=f"broken {number} {contents}", until="end")
        with redis.Redis(port=stage.redis.port, db=MESSAGES) as client:
            dead = cast("int", client.memory_usage(Keys().dead("queue"), samples=0)) / (4 * users)
        ended = Reading.take(stage, node).redis_memory
        for _ in range(4):
            members.do("say", contents=f"silent {contents}", until="accepted")
        queued = Reading.take(stage, node).redis_memory
    node.stop()
    count = 4 * users
    return {"dead": dead, "dead_and_reply": (ended - before) / count, "queued": (queued - ended) / count}
