"""The supervisor with a child that is never ready, and with one that fails to restart."""

import asyncio
import os
import signal
import socket

import pytest

from imstream.cli import supervisor
from imstream.cli.supervisor import Part, Supervisor
from tests.support.processes import free_port, http_status
from tests.support.waiting import wait_until


async def test_a_child_that_never_serves_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    async def never() -> bool:
        return False

    announced: list[bool] = []
    silent = Part("ai", ["demo-ai", "--port", "0"], never, start_timeout=1.0)
    both = Supervisor([[silent], [Part("node", ["node"], never)]])
    assert await both.run(lambda: announced.append(True)) == 1
    assert not announced
    out = capsys.readouterr().out
    assert out.startswith("starting ai, node …\n")
    assert "ai is not ready after 1 s; stopping the rest" in out


async def test_a_child_that_does_not_come_back_is_tried_again_ever_more_slowly_until_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port, said = free_port(), ""
    monkeypatch.setattr(supervisor, "MIN_RESTART_DELAY", 0.25)
    monkeypatch.setattr(supervisor, "MAX_RESTART_DELAY", 0.5)

    async def serves() -> bool:
        return await asyncio.to_thread(http_status, f"http://127.0.0.1:{port}/v1/models") == 200

    def has_said(words: str, times: int = 1) -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return said.count(words) >= times

    started = asyncio.Event()
    both = Supervisor([[Part("ai", ["demo-ai", "--port", str(port)], serves, restarts=True)]])
    running = asyncio.create_task(both.run(started.set))
    async with asyncio.timeout(60):
        await started.wait()
        [child] = both.running
        os.kill(child.process.pid, signal.SIGKILL)
        await wait_until(lambda: has_said("restarting"), "its end is seen")
        with socket.create_server(("127.0.0.1", port)):
            await wait_until(lambda: has_said("exited unexpectedly (exit code 2)", times=2), "two more tries", limit=20)
        await wait_until(lambda: has_said("ai is back"), "it is back", limit=20)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0
    pauses = [line.partition("restarting in ")[2] for line in said.splitlines() if "restarting" in line]
    assert pauses[:3] == ["0.25 s", "0.5 s", "0.5 s"]
