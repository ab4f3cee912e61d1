"""`imstream up`: starts all parts, prints addresses, handles failures and signals, and leaves no process behind."""

import asyncio
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from imstream.client import Client
from imstream.demo.answer import canned_answer
from tests.support.peer import peer
from tests.support.processes import PYTHON, free_port, http_status, wait_for
from tests.support.servers import DemoBackend, RedisServer, missing
from tests.support.up_command import gone, up
from tests.support.users import user_id
from tests.support.waiting import wait_until

QUICK = ("--demo-pace", "1ms", "--demo-first", "0", "--drain-grace", "2s")


async def test_one_command_runs_everything_and_says_where(tmp_path: Path) -> None:
    with up(tmp_path, *QUICK) as imstream:
        imstream.wait_until_ready()
        output = imstream.running.output()
        assert output.startswith("starting redis, ai, node 0 …\n")
        assert "overcommit" not in output  # a warning of Valkey that is of no use here
        assert f"page     http://127.0.0.1:{imstream.port}/" in output
        assert http_status(f"http://127.0.0.1:{imstream.port}/") == 200
        assert http_status(f"http://127.0.0.1:{imstream.port}/readyz") == 200
        assert "demo: canned answers, no model" in output
        assert "embedded Valkey, data in .imstream/redis" in output
        assert (tmp_path / ".imstream/redis/appendonlydir").is_dir()
        assert sorted(imstream.children()) == ["demo-ai", "node", "redis"]
        async with Client(imstream.ws, user_id(10001)) as client:
            assert await (await client.send("为什么?")).text() == "".join(canned_answer("为什么?"))
        # The page opened from disk has the token of this run; a sandboxed frame has the same origin without it.
        [page_token] = re.findall(rf"or open  file:///.*#node=127\.0\.0\.1:{imstream.port}&token=(\S+)", output)
        for shown, code in ((None, "UNAUTHORIZED"), ("x" * 22, "UNAUTHORIZED"), (page_token, "SUCCESS")):
            async with peer(imstream.ws, headers={"Origin": "null"}) as socket:
                await socket.send_frame("INIT", userId=user_id(10001), **({} if shown is None else {"token": shown}))
                assert (await socket.frame())["code"] == code
        assert not any(page_token in word for child in imstream.children().values() for word in child.cmdline())
        assert re.search(
            r"^node 0 \| .*ready", imstream.running.output(), re.MULTILINE
        )  # a line of a child begins with its name


def test_the_commands_it_prints_show_the_stream(tmp_path: Path) -> None:
    with up(tmp_path, restricted=False) as imstream:
        imstream.wait_until_ready()
        output = imstream.running.output()
        [with_cli] = re.findall(r"the stream +(.*)", output)
        [without_cli] = re.findall(r"without redis-cli +(.*)", output)
        login = 'REDISCLI_AUTH="$(cat .imstream/redis/password)"'
        assert with_cli == f"{login} redis-cli -p {imstream.redis_port} XINFO STREAM 'im:{{node:0}}:requests'"
        words = shlex.split(without_cli)
        program = words[0] if shutil.which(words[0]) else str(tmp_path / words[0])
        shown = subprocess.run([program, *words[1:]], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert "unfinished requests  0" in shown.stdout
        if shutil.which("redis-cli") is None:
            missing("redis-cli")
        as_typed = ["sh", "-c", with_cli]
        shown = subprocess.run(as_typed, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert shown.stdout.startswith("length\n0\n")
        assert shown.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_node_first_and_everything_in_the_end(tmp_path: Path, number: signal.Signals) -> None:
    with up(tmp_path, *QUICK) as imstream:
        imstream.wait_until_ready()
        children = list(imstream.children().values())
        imstream.running.signal(number)
        assert imstream.running.wait(30) == 0
        assert gone(children)
        output = imstream.running.output()
        assert output.index("drained") < output.index("ready to exit, bye bye")  # the server's last line


async def test_ctrl_c_in_a_terminal_lets_a_running_answer_end(tmp_path: Path) -> None:
    with up(tmp_path, "--demo-pace", "10ms", in_terminal=True) as imstream:
        await asyncio.to_thread(imstream.wait_until_ready)
        async with Client(imstream.ws, user_id(10001)) as client, asyncio.timeout(30):
            reply = await client.send("Will this end?")
            await anext(aiter(reply))
            os.killpg(imstream.running.pid, signal.SIGINT)  # a terminal signals the whole group
            assert await reply.text() == "".join(canned_answer("Will this end?"))
        assert await asyncio.to_thread(imstream.running.wait, 30) == 0


def test_a_signal_while_it_starts_stops_what_has_started(tmp_path: Path) -> None:
    with up(tmp_path) as imstream:
        wait_for(lambda: "starting" in imstream.running.output(), imstream.running, "imstream up")
        assert imstream.running.terminate(30) == 0
        assert "imstream is ready" not in imstream.running.output()


async def test_what_was_accepted_is_answered_after_the_next_start(tmp_path: Path) -> None:
    question = "Will this be lost?"
    ports = (free_port(), free_port(), free_port())
    slow = ("--demo-first", "60s", "--drain-grace", "100ms")
    with up(tmp_path, *slow, ports=ports) as first:
        first.wait_until_ready()
        async with Client(first.ws, user_id(10001)) as client:
            reply = await client.send(question)
            await reply.accepted()
            assert await asyncio.to_thread(first.running.terminate, 30) == 0
            with up(tmp_path, *QUICK, ports=ports) as second:
                await asyncio.to_thread(second.wait_until_ready)
                assert await reply.text() == "".join(canned_answer(question))


@pytest.mark.parametrize("victim", ["node", "demo-ai", "redis"])
def test_a_child_that_dies_takes_the_rest_down_and_is_named(tmp_path: Path, victim: str) -> None:
    with up(tmp_path, "--drain-grace", "100ms") as imstream:
        imstream.wait_until_ready()
        children = imstream.children()
        children[victim].kill()
        assert imstream.running.wait(30) == 1
        assert gone(list(children.values()))
    name = {"node": "node 0", "demo-ai": "ai", "redis": "redis"}[victim]
    assert f"{name} exited unexpectedly (killed by SIGKILL); stopping the rest" in imstream.running.output()


def test_a_child_that_cannot_start_is_named(tmp_path: Path) -> None:
    with up(tmp_path) as first:
        first.wait_until_ready()
        with up(tmp_path) as second:  # other ports, the same data
            assert second.running.wait(30) == 1
        output = second.running.output()
    assert "redis  | Error: another embedded Valkey runs on .imstream/redis" in output
    assert "redis exited before it was ready (exit code 1); stopping the rest" in output


def test_nobody_survives_when_it_is_killed(tmp_path: Path) -> None:
    ports = (free_port(), free_port(), free_port())
    with up(tmp_path, ports=ports) as imstream:
        imstream.wait_until_ready()
        children = list(imstream.children().values())
        assert len(children) == 3
        imstream.running.kill()
        psutil.wait_procs(children, timeout=10)
        assert gone(children)
    with up(tmp_path, ports=ports) as again:
        again.wait_until_ready()


async def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    with up(tmp_path, "--demo-pace", "1s", "--drain-grace", "10m") as imstream:
        imstream.wait_until_ready()
        children = list(imstream.children().values())
        async with Client(imstream.ws, user_id(10001)) as client:
            reply = await client.send("Something long")
            await anext(aiter(reply))
            imstream.running.signal(signal.SIGINT)
            await wait_until(lambda: "draining" in imstream.running.output(), "the node to drain")
            imstream.running.signal(signal.SIGINT)
            assert await asyncio.to_thread(imstream.running.wait, 20) == 1
        assert gone(children)


def test_a_child_that_does_not_stop_is_killed_in_time(tmp_path: Path) -> None:
    with up(tmp_path, *QUICK) as imstream:
        imstream.wait_until_ready()
        children = imstream.children()
        children["demo-ai"].suspend()
        assert imstream.running.terminate(30) == 1
        assert gone(list(children.values()))
    assert "ai did not stop within 5 s and is killed" in imstream.running.output()


def test_it_goes_on_and_stops_well_when_nobody_reads_its_output_any_more(tmp_path: Path) -> None:
    port = free_port()
    command = [PYTHON, "-m", "imstream", "up", "--port", str(port), "--embedded-port", str(free_port())]
    command += ["--demo-port", str(free_port()), "--log-level", "debug"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while b"Ctrl-C stops everything" not in process.stdout.readline():
            pass
        process.stdout.readline()
        process.stdout.close()
        children = psutil.Process(process.pid).children(recursive=True)
        assert http_status(f"http://127.0.0.1:{port}/readyz") == 200
        process.terminate()
        assert process.wait(30) == 0
        assert gone(children)


def test_a_redis_and_an_ai_of_ones_own_are_used_instead(
    tmp_path: Path, redis_server: RedisServer, demo: DemoBackend
) -> None:
    ai_url = demo.url.replace("//", "//me:hush@")
    # The option is on the command line of imstream up and must not be on those of its children.
    with up(tmp_path, "--redis", redis_server.url, env={"IMSTREAM_AI_URL": ai_url}) as imstream:
        imstream.wait_until_ready()
        children = imstream.children()
        assert list(children) == ["node"]
        assert not any(secret in word for word in children["node"].cmdline() for secret in ("hush", "imstream-secret"))
        assert imstream.running.terminate(30) == 0
    output = imstream.running.output()
    assert f"AI       {demo.url}\n" in output
    assert f"redis-cli -u redis://127.0.0.1:{redis_server.port}/0 XINFO" in output
    assert "hush" not in output
    assert "imstream-secret" not in output
    assert not (tmp_path / ".imstream").exists()


async def test_settings_given_to_it_reach_the_parts(tmp_path: Path) -> None:
    with up(tmp_path, "--node", "a7", "--init-timeout", "100ms", "--demo-length", "3", *QUICK) as imstream:
        imstream.wait_until_ready()
        assert "'im:{node:a7}:requests'" in imstream.running.output()
        async with Client(imstream.ws, user_id(10001)) as client:
            assert await (await client.send("why?")).text() == "".join(canned_answer("why?", 3))


HUSH = "hush-of-more-than-thirty-two-bytes-in-length"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user of this machine can read, with data of an earlier version."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        data = folder / ".imstream" / "redis"
        (data / "appendonlydir").mkdir(parents=True)
        for file in ("appendonlydir/old.aof", "dump.rdb", "password"):
            (data / file).write_text("old")
        for path in (folder / ".imstream").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / ".imstream").chmod(0o755)
        yield folder


def as_somebody_else(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as another user of this machine, if this user is root."""
    user = "nobody" if os.geteuid() == 0 else None
    return subprocess.run(["bash", "-c", script], user=user, cwd="/", capture_output=True, text=True, check=False)


async def test_no_other_user_of_the_machine_reads_the_data_or_connects_without_the_password(open_folder: Path) -> None:
    own = open_folder / ".imstream"
    secrets = ("AI_KEY", "AUTH_SECRET", "MODERATION_KEY", "TOKEN")
    env = {"IMSTREAM_AUTH": "jwt", **{f"IMSTREAM_{name}": f"{HUSH}-{name}" for name in secrets}}
    with up(open_folder, *QUICK, restricted=False, env=env) as imstream:
        await asyncio.to_thread(imstream.wait_until_ready)
        output = imstream.running.output()
        password = (own / "redis" / "password").read_text().strip()
        assert len(password) > 40

        assert output.count("was open to other users of this machine and is now closed to them") >= 4
        everything = [own, *own.rglob("*")]
        assert len(everything) > 9
        assert [path for path in everything if path.stat().st_mode & 0o077] == []
        children = imstream.children()
        lines = [word for child in children.values() for word in child.cmdline()]
        assert not any(secret in word for word in lines for secret in (password, HUSH))
        for name, child in children.items():
            held = {variable: value for variable, value in child.environ().items() if HUSH in value}
            needed = {f"IMSTREAM_{secret}" for secret in secrets[:3]} if name == "node" else set()
            assert held.keys() == needed, name
        connect = f"exec 3<>/dev/tcp/127.0.0.1/{imstream.redis_port}"
        assert as_somebody_else(f"ls {open_folder}").stdout.split() == [f"up-{imstream.port}.log"]
        if os.geteuid() == 0:
            for look in (f"ls {own}", f"cat {own}/redis/password", f"cat {own}/redis/appendonlydir/*"):
                seen = as_somebody_else(look)
                assert (seen.stdout, "Permission denied" in seen.stderr) == ("", True), look
        for login in ("", "AUTH old", "AUTH default ''"):
            answer = as_somebody_else(
                f"{connect}; printf '%s\\r\\nKEYS *\\r\\nQUIT\\r\\n' \"{login}\" >&3; cat <&3"
            ).stdout
            assert "-NOAUTH" in answer
            assert "im:" not in answer
