"""`imstream up` as a user runs it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.balancing import PROGRAMS
from tests.support.processes import PYTHON, Running, free_port, start, wait_for
from tests.support.servers import DENIED, node_rights


@dataclass
class Up:
    """A running `imstream up`."""

    running: Running
    port: int
    redis_port: int

    @property
    def ws(self) -> str:
        """The WebSocket URL of its node."""
        return f"ws://127.0.0.1:{self.port}/ws"

    def wait_until_ready(self, limit: float = 40) -> None:
        """Wait until it reports that everything runs."""
        said = "Ctrl-C stops everything"  # the last line
        wait_for(lambda: said in self.running.output(), self.running, "imstream up", limit=limit)

    def children(self) -> dict[str, psutil.Process]:
        """Its child processes by command; nodes after the first with their id, such as `node 1`."""
        found = psutil.Process(self.running.pid).children()
        return {_command(child): child for child in found}


def _command(process: psutil.Process) -> str:
    line = process.cmdline()
    if "node" in line:
        node = line[line.index("--node") + 1]
        return "node" if node == "0" else f"node {node}"
    balancer = next((program for program in PROGRAMS if any(program in word for word in line)), None)
    ai = next((program for program in ("demo-ai", "local-ai") if program in line), None)
    return ai or balancer or "redis"  # the process became the server


@contextmanager
def up(
    folder: Path,
    *options: str,
    ports: Sequence[int] = (),
    env: dict[str, str] | None = None,
    in_terminal: bool = False,
    restricted: bool = True,
) -> Iterator[Up]:
    """Start `imstream up` in a folder, on free ports unless some are given: of the node, the server, the AI.

    Its nodes have the permissions of `ops/redis-users.acl` on the embedded server, and no command may be denied.
    `in_terminal` gives it its own process group, as a shell does. Without `restricted`, the server requires its usual
    password instead.
    """
    port, redis_port, ai_port = ports or (free_port(), free_port(), free_port())
    command = [PYTHON, "-m", "imstream", "up", "--port", str(port)]
    command += ["--embedded-port", str(redis_port), "--demo-port", str(ai_port), *options]
    if in_terminal:
        command = ["setsid", *command]
    rights = {"IMSTREAM_EMBEDDED_CONFIG": str(node_rights(folder))} if restricted else {}
    env = {**rights, **(env or {})}
    with start(command, folder / f"up-{port}.log", cwd=folder, env=env) as running:
        yield Up(running, port, redis_port)
    assert DENIED not in running.output()


def gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether all these processes have ended."""
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
