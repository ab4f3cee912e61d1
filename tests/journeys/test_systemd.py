"""The units of ops/deploy/systemd: checked by systemd's own tools, and run by an instance of systemd."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest

from imstream.client import Client
from imstream.demo.answer import canned_answer
from tests.support.processes import free_port, http_status
from tests.support.servers import OPS, DemoBackend, RedisServer, missing
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

UNITS = OPS / "deploy" / "systemd"
INSTANCE = Path(__file__).parents[1] / "support" / "systemd_instance.sh"
MAX_EXPOSURE = 3.0

NOT_HERE = ("ProtectHome=", "ProtectKernelTunables=", "ProtectKernelLogs=")
"""Directives that need the mounts of a booted system."""


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with the paths of this checkout, and an empty node.env."""
    if shutil.which("systemd-analyze") is None:
        missing("systemd")
    folder = tmp_path / "units"
    shutil.copytree(UNITS, folder)
    service = folder / "imstream@.service"
    (tmp_path / "node.env").touch()
    text = service.read_text("utf-8").replace("/opt/imstream/bin/", f"{Path(sys.executable).parent}/")
    service.write_text(text.replace("/etc/imstream", str(tmp_path)))
    return folder


def drop_in(units: Path, text: str) -> None:
    """Add lines to the service."""
    file = units / "imstream@.service.d" / "own.conf"
    file.parent.mkdir()
    file.write_text(text if text.startswith("[") else f"[Service]\n{text}", "utf-8")


def test_systemd_understands_every_line_of_the_units(units: Path) -> None:
    instance = shutil.copy(units / "imstream@.service", units / "imstream@8080.service")
    [example] = re.findall(r"```ini\n(.*?)```", (OPS / "docs" / "deploy.md").read_text("utf-8"), re.DOTALL)
    drop_in(units, example)
    command = ["systemd-analyze", "verify", "--man=no", instance, str(units / "imstream.target")]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in verified.stderr.splitlines() if "imstream" in line]
    assert (verified.returncode, ours) == (0, [])


def test_a_node_is_exposed_to_little(units: Path) -> None:
    instance = shutil.copy(units / "imstream@.service", units / "imstream@8080.service")
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={MAX_EXPOSURE * 10:.0f}", instance]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stdout
    assert (level := re.search(r"exposure level .*: ([0-9.]+)", judged.stdout)) is not None
    assert float(level[1]) < MAX_EXPOSURE


class Instance:
    """A running instance of systemd."""

    def __init__(self, commands: IO[str], answers: IO[str]) -> None:
        self._commands, self._answers = commands, answers
        assert self._answer() == ("", "ready")

    def _answer(self) -> tuple[str, str]:
        lines: list[str] = []
        for line in self._answers:
            if line.startswith("="):
                return "".join(lines), line[1:].strip()
            lines.append(line)
        raise AssertionError("".join(lines))

    def systemctl(self, *words: str) -> str:
        """The output of a command that succeeds."""
        self._commands.write(" ".join(words) + "\n")
        self._commands.flush()
        output, code = self._answer()
        assert code == "0", (words, output)
        return output

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--property", name, "--value", unit).strip()


@contextmanager
def instance_of_systemd(units: Path) -> Iterator[Instance]:
    """Start an instance; with its namespace of processes, everything in it ends."""
    others_can_enter = all(folder.stat().st_mode & 0o001 for folder in Path(sys.executable).parents)
    if os.geteuid() != 0 or not others_can_enter:
        pytest.skip("needs root for namespaces, and a checkout that its users can read")
    command = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        "bash",
        str(INSTANCE),
        str(units),
    ]
    log = (units.parent / "log").open("ab")
    with (
        log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Instance(process.stdin, process.stdout)
        finally:
            process.kill()


@pytest.mark.long
async def test_a_node_drains_on_stop_and_comes_back_after_a_crash(
    units: Path, redis_server: RedisServer, demo: DemoBackend
) -> None:
    port, folder = free_port(), units.parent
    unit, ready = f"imstream@{port}.service", f"http://127.0.0.1:{port}/readyz"
    own = {"redis_url": redis_server.url, "ai_url": demo.url, "lease": "60s"}
    (folder / "node.env").write_text("".join(f"IMSTREAM_{name.upper()}={value}\n" for name, value in own.items()))
    # The unit has a /tmp of its own, where the checkout may be.
    drop_in(units, f"StandardOutput=append:{folder}/node.log\nBindReadOnlyPaths={OPS.parent}\n")
    service = units / "imstream@.service"
    lines = service.read_text("utf-8").splitlines()
    service.write_text("\n".join(line for line in lines if not line.startswith(NOT_HERE)))
    with instance_of_systemd(units) as systemd:
        await asyncio.to_thread(systemd.systemctl, "start", unit)
        await wait_until(lambda: http_status(ready) == 200, "the node is ready", limit=40)
        async with Client(f"ws://127.0.0.1:{port}/ws", user_id(10001)) as client, asyncio.timeout(60):
            question = "What if you die? [[demo length=200 pace=20ms]]"
            reply = await client.send(question)
            await anext(aiter(reply))
            crashed = await asyncio.to_thread(systemd.show, unit, "MainPID")
            await asyncio.to_thread(systemd.systemctl, "kill", "--signal=KILL", unit)
            # Far sooner than the lease ends: the new process detects that the one before has died.
            assert await reply.text() == "".join(canned_answer(question, 200))
            assert await asyncio.to_thread(systemd.show, unit, "NRestarts") == "1"
            assert await asyncio.to_thread(systemd.show, unit, "MainPID") != crashed

            reply = await client.send(question)
            await anext(aiter(reply))
            [node] = [one for one in psutil.process_iter() if is_node(one, port)]
            assert node.uids().real != 0
            stopping = asyncio.create_task(asyncio.to_thread(systemd.systemctl, "stop", unit))
            assert await reply.text() == "".join(canned_answer(question, 200))
            assert reply.attempt == 1
        await stopping
        assert await asyncio.to_thread(systemd.show, unit, "Result") == "success"
    log = (folder / "node.log").read_text("utf-8")
    assert log.count('"event":"drained"') == 1
    assert "Traceback" not in log
    assert f'-{port}"' in log  # the id: host name and port


def is_node(process: psutil.Process, port: int) -> bool:
    """Whether a process listens on this port."""
    try:
        return any(one.laddr.port == port and one.status == "LISTEN" for one in process.net_connections())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
