"""The image of ops/deploy/Dockerfile: its steps are carried out in namespaces, and its node runs as in a container.

No Docker is needed: Debian's own Python replaces the base image.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from imstream.client import Client
from imstream.demo.answer import canned_answer
from imstream.keys import Keys
from imstream.settings import Settings
from imstream.settings_group import parse_duration
from tests.support.processes import Running, free_port, http_status, start, wait_for
from tests.support.servers import OPS, DemoBackend, RedisServer
from tests.support.tokens import token

pytestmark = pytest.mark.usefixtures("unmeasured")

DEPLOY = OPS / "deploy"
SECRET = "of-more-than-thirty-two-bytes-in-length"  # noqa: S105 - a test's


@dataclass
class Stage:
    """A stage of a Dockerfile."""

    base: str
    copied: list[list[str]] = field(default_factory=list)
    run: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    user: str = ""
    command: list[str] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    """The stages of the Dockerfile by name; a stage begins as its base."""
    found: dict[str, Stage] = {}
    stage = Stage("")
    for line in (DEPLOY / "Dockerfile").read_text("utf-8").splitlines():
        words = line.split()
        match words[0] if words else "#":
            case "FROM":
                parent = found.get(words[1])
                stage = Stage(words[1], env=dict(parent.env), user=parent.user) if parent else Stage(words[1])
                stage.command = list(parent.command) if parent else []
                found[words[-1] if "AS" in words else ""] = stage
            case "COPY":
                stage.copied.append(words[1:])
            case "RUN":
                stage.run.append(line.removeprefix("RUN "))
            case "ENV":
                stage.env |= dict(word.split("=", 1) for word in words[1:])
            case "USER":
                stage.user = words[1]
            case "ENTRYPOINT":
                stage.command = json.loads(line.removeprefix("ENTRYPOINT "))
            case "CMD":
                stage.command = stage.command[:1] + json.loads(line.removeprefix("CMD "))
            case _:
                assert words == [] or words[0] in {"#", "WORKDIR", "EXPOSE", "STOPSIGNAL"} or line.startswith("#"), line
    return found


def test_every_file_that_is_copied_reaches_the_build() -> None:
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").split()
    assert allowed[0] == "*"
    for *sources, _ in stages()["build"].copied:
        for source in sources:
            assert (OPS.parent / source).exists()
            assert f"!{source}" in allowed


def test_no_stage_runs_as_root_and_no_command_needs_a_shell() -> None:
    made = stages()
    for name in ("", "node", "balancer"):
        uid, gid = made[name].user.split(":")
        assert int(uid) > 0 < int(gid)
        assert made[name].command[0] == "/opt/imstream/bin/imstream"
    assert (made[""].command, made[""].env) == (made["node"].command, made["node"].env)


@pytest.mark.long
@pytest.mark.timeout(1200)  # it installs all dependencies
async def test_the_node_of_the_image_drains_as_process_1_on_a_read_only_system_and_begins_nothing_again(
    tmp_path: Path, redis_server: RedisServer, demo: DemoBackend
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root for namespaces")
    build, node, port = stages()["build"], stages()["node"], free_port()
    context, secrets = tmp_path / "context", tmp_path / "secrets"
    for *sources, target in build.copied:
        for source in sources:
            goal = context / target / Path(source).name if target.endswith("/") else context / target
            copy(OPS.parent / source, goal)
    write_files(tmp_path / "build.sh", secrets, build, redis_server)
    env = {
        **node.env,
        "IMSTREAM_PORT": str(port),
        "IMSTREAM_NODE": "node-0",
        "IMSTREAM_AI_URL": demo.url,
        "IMSTREAM_AUTH": "jwt",
        "IMSTREAM_AUTH_SECRET_FILE": "/run/secrets/auth-secret",
        "IMSTREAM_REDIS_URL_FILE": "/run/secrets/redis-url",
    }
    paths = [tmp_path / "roots", tmp_path / "build.sh", context, node.user, secrets]
    script = Path(__file__).parents[1] / "support" / "image.sh"
    command = ["unshare", "--mount", "bash", str(script), *map(str, paths)]
    command += [*(f"{name}={value}" for name, value in env.items()), *node.command]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    stop_timeout = seconds(compose["services"]["node-0"]["stop_grace_period"])
    user, url = 10001, f"ws://127.0.0.1:{port}/ws"
    with container(command, tmp_path / "log") as running:
        ready = f"http://127.0.0.1:{port}/readyz"
        await asyncio.to_thread(wait_for, lambda: http_status(ready) == 200, running, "the image's node", 900)
        [first] = psutil.Process(running.pid).children()
        assert_contained(first)
        async with Client(url, user, token=token(SECRET, sub=str(user), exp=int(time.time()) + 600)) as client:
            question = "And if it is stopped? [[demo length=150 pace=20ms]]"
            reply = await client.send(question)
            await anext(aiter(reply))
            first.send_signal(signal.SIGTERM)
            async with asyncio.timeout(stop_timeout):
                assert await reply.text() == "".join(canned_answer(question, 150))
            assert (reply.attempt, reply.repeated) == (1, 0)
        assert await asyncio.to_thread(running.wait, stop_timeout) == 0
    assert '"event":"drained"' in running.output()
    assert "Traceback" not in running.output()
    with redis_server.client() as redis:
        [record] = redis.scan_iter(Keys().reply(user, "*"))
        events = [fields["event"] for _, fields in redis.xrange(str(record))]
        assert (events.count("opened"), events[-1]) == (1, "done")
        assert redis.xlen(Keys().requests("node-0")) == 0


@contextmanager
def container(command: Sequence[str], log: Path) -> Iterator[Running]:
    """Start a command that runs another user's process in namespaces; none is left at the end.

    A process loses the signal for the death of its parent when it changes its user, so the end of `unshare` would not
    end it. When process 1 of a namespace ends, the rest of the namespace does.
    """
    with start(command, log) as running:
        try:
            yield running
        finally:
            for process in (
                psutil.Process(running.pid).children(recursive=True) if running.process.poll() is None else ()
            ):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def test_a_test_that_fails_leaves_no_process(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root for namespaces")
    command = ["unshare", "--pid", "--fork", "--kill-child", "chroot", "--userspec=10001:10001", "/", "sleep", "1000"]
    left: list[psutil.Process] = []

    def is_contained(running: Running) -> bool:
        left[:] = psutil.Process(running.pid).children()
        return any(one.uids().real == 10001 for one in left)

    with pytest.raises(ZeroDivisionError), container(command, tmp_path / "log") as running:  # noqa: PT012 - it fails there
        wait_for(lambda: is_contained(running), running, "the container")
        _ = 1 / 0
    assert psutil.wait_procs(left, 10)[1] == []


def write_files(script: Path, secrets: Path, build: Stage, redis_server: RedisServer) -> None:
    """Write the commands of the build stage, and the secrets."""
    script.write_text("\n".join(build.run))
    secrets.mkdir()
    (secrets / "auth-secret").write_text(f"{SECRET}\n")
    (secrets / "redis-url").write_text(redis_server.url)
    script.parent.chmod(0o755)  # as the folders of an image


def assert_contained(process: psutil.Process) -> None:
    """Check that it is process 1, not root, without capabilities and HOME, and that it cannot write anything."""
    folder = Path(f"/proc/{process.pid}")
    status = (folder / "status").read_text("utf-8")
    assert re.search(r"^NSpid:.*\t1$", status, re.MULTILINE)
    assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    assert b"HOME=" not in (folder / "environ").read_bytes()
    mounts = [line.split() for line in (folder / "mounts").read_text("utf-8").splitlines()]
    assert "ro" in next(words[3] for words in mounts if words[1] == "/").split(",")


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, links as links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def seconds(text: str) -> float:
    """A time span of a manifest."""
    return Settings.load(drain_grace=parse_duration(text)).drain_grace.total_seconds()
