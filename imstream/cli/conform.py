"""The conformance kit, `imstream conform`: scenarios of the protocol, played to a client under test.

The kit is the server. The client is a program in any language that reads steps and writes reports, each a line of JSON:

    {"step": "connect", "url": "ws://127.0.0.1:40001/ws", "userId": 10001, "tokens": ["t-1"]}
    {"step": "send", "messageId": "m1", "contents": "hello"}
    {"step": "cancel", "messageId": "m1"}

    {"messageId": "m1", "outcome": "done", "text": "the whole answer"}
    {"closed": 4503}

Every `connect` starts again. `tokens` are for the logins, in this order; the last one stays. See ops/docs/clients.md.
"""

import asyncio
import json
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress

import click
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from imstream import wire
from imstream.cli.conform_stage import PIECES, USER, WHOLE, Nonconformity, Stage, accepted, answer, problem, same
from imstream.cli.racing import completes_first
from imstream.codes import CloseCode, Code
from imstream.errors import SettingsError
from imstream.wire import ClientCancel, Delta

QUIET = 1.0  # seconds of silence after which a client counts as gone


class Scenarios(Stage):
    """The scenarios: steps of a client, and checks."""

    async def login(self) -> None:
        """Connects with `userId` in the URL, and logs in with its token."""
        init = await self.connect()
        same("URL", self.path, f"/ws?userId={USER}")
        same("userId, token and resume of INIT", (init.user_id, init.token, init.resume), (USER, "t-1", []))

    async def chat(self) -> None:
        """Puts an answer together; reports one that failed, and one whose record has expired."""
        await self.welcome(await self.connect())
        await self.ask("m1")
        await self.send(*answer("m1"))
        await self.report(messageId="m1", **WHOLE)
        await self.ask("m2")
        await self.send(answer("m2")[0], wire.Failed(contents="sorry", message_id="m2", attempt=1, offset=0))
        await self.report(messageId="m2", outcome="failed")
        await self.ask("m3")
        await self.drop()
        await self.welcome(await self.connection())
        await self.send(wire.Expired(contents="too old", message_id="m3"))
        await self.report(messageId="m3", outcome="expired")

    async def resume(self) -> None:
        """After a drop at any frame, resumes a message where it stood; if it was not accepted, sends it again."""
        await self.welcome(await self.connect())
        for sent in range(10):
            name = f"m{sent}"
            restart = wire.Restart(contents="again", message_id=name, attempt=2, offset=0)
            frames = [accepted(name), *answer(name)[:-1], restart, *answer(name, 2)]
            await self.ask(name, is_accepted=False)
            await self.send(*frames[:sent])
            await self.drop()
            init = await self.welcome(await self.connection())
            last = frames[max(sent - 1, 0)]
            point = (name, getattr(last, "attempt", 0), getattr(last, "offset", 0))
            resumed = [(one.message_id, one.attempt, one.offset) for one in init.resume]
            expected = [point] if 0 < sent < len(frames) else []
            same(f"resume of INIT after {sent} frames", resumed, expected)
            if sent == 0:  # a duplicate may have been answered meanwhile: then all of it comes in one piece
                await self.expect_chat(name)
                text = "".join(PIECES)
                frames[1:] = [Delta(contents=text, message_id=name, attempt=1, offset=len(text)), answer(name)[-1]]
            await self.send(*frames[sent:])
            await self.report(messageId=name, **WHOLE)

    async def reopened(self) -> None:
        """After `failed`, shows an answer that follows `restart`, or keeps showing `failed`; resumes neither."""
        await self.welcome(await self.connect())
        await self.ask("m1")
        await self.send(answer("m1")[0], wire.Failed(contents="sorry", message_id="m1", attempt=1, offset=0))
        await self.report(messageId="m1", outcome="failed")
        await self.send(wire.Restart(contents="again", message_id="m1", attempt=2, offset=0), *answer("m1", 2))
        await self.ask("m2")
        await self.send(*answer("m2"))
        if (told := await self.next_report()).get("messageId") == "m1":
            same("report", {name: told.get(name) for name in WHOLE}, WHOLE)
            told = await self.next_report()
        same("report", {name: told.get(name) for name in ("messageId", *WHOLE)}, {"messageId": "m2", **WHOLE})
        await self.drop()
        same("resume of INIT", (await self.welcome(await self.connection())).resume, [])

    async def busy(self) -> None:
        """Sends a message that was refused with BUSY again, with its id, but not before `retryAfterMs`."""
        await self.welcome(await self.connect())
        await self.ask("m1", is_accepted=False)
        clock = asyncio.get_running_loop().time
        refused_at, wait = clock(), 0.3
        await self.send(problem(Code.BUSY, "m1", int(wait * 1000)))
        await self.expect_chat("m1")
        if (waited := clock() - refused_at) < wait - 0.02:
            raise Nonconformity(f"CHAT again after {waited:.2f} s, expected {wait} s")
        await self.send(accepted("m1"), *answer("m1"))
        await self.report(messageId="m1", **WHOLE)

    async def refused(self) -> None:
        """Gives up a message that was refused without `retryAfterMs`, whatever the code; does not send it again."""
        await self.welcome(await self.connect())
        await self.ask("m1", is_accepted=False)
        await self.send({"code": "NEWS", "respTime": "1", "msgType": "SYSTEM", "contents": "no", "messageId": "m1"})
        await self.report(messageId="m1", outcome="refused")
        await self.drop()
        same("resume of INIT", (await self.welcome(await self.connection())).resume, [])
        await self.ask("m2")

    async def cancel(self) -> None:
        """Cancels during an answer, before `accepted`, too late, and again if the connection was lost."""
        await self.welcome(await self.connect())
        for name in ("during", "early", "late", "lost"):
            shown = [] if name == "early" else [accepted(name), answer(name)[0]]
            await self.ask(name, is_accepted=False)
            await self.send(*shown)
            self.do("cancel", messageId=name)
            same("messageId", (await self.expect(ClientCancel)).message_id, name)
            if name == "lost":
                await self.drop()
                await self.welcome(await self.connection())
                await self.expect(ClientCancel)
            elif name == "late":
                await self.send(*answer(name)[1:], problem(Code.TOO_LATE, name))
                await self.report(messageId=name, **WHOLE)
                continue
            text = PIECES[0] if shown else ""
            await self.send(*([] if shown else [accepted(name)]))
            await self.send(wire.Cancelled(contents="stopped", message_id=name, attempt=1, offset=len(text)))
            await self.report(messageId=name, outcome="cancelled", text=text)

    async def drain(self) -> None:
        """After 1012, resumes its messages on another connection, and sends the message that was refused."""
        await self.welcome(await self.connect())
        for name in ("m1", "m2", "m3"):
            await self.ask(name, is_accepted=name != "m3")
        await self.send(answer("m2")[0])
        with suppress(ConnectionClosed):
            await self.send(problem(Code.UNAVAILABLE, "m3", 100))
        await self.close(CloseCode.DRAINING, Code.DRAINING)
        points = {one.message_id: one.offset for one in (await self.welcome(await self.connection())).resume}
        same("offsets in resume of INIT", points, {"m1": 0, "m2": len(PIECES[0])})
        await self.expect_chat("m3")
        await self.send(*answer("m1"), *answer("m2")[1:], accepted("m3"), *answer("m3"))
        for name in ("m1", "m2", "m3"):
            await self.report(messageId=name, **WHOLE)

    async def token(self) -> None:
        """After 4500, logs in with a new token."""
        await self.connect("t-1", "t-2")
        await self.close(CloseCode.NOT_AUTHENTICATED, Code.UNAUTHORIZED)
        init = await self.connection()
        same("token", init.token, "t-2")
        await self.welcome(init)
        await self.ask("m1")

    async def closed(self) -> None:
        """Stays away after 4500 without a new token, and after any other code from 4500 to 4999."""
        for code in (CloseCode.NOT_AUTHENTICATED, 4777):
            await self.welcome(await self.connect()) if code == 4777 else await self.connect()  # noqa: PLR2004
            await self.close(code, Code.UNAUTHORIZED)
            await self.report(closed=code)
            with suppress(TimeoutError, ConnectionClosed):
                async with asyncio.timeout(QUIET):
                    await self.connection()
                    raise Nonconformity("the client logs in again")

    async def heartbeat(self) -> None:
        """Sends heartbeats at the announced interval."""
        await self.welcome(await self.connect(), heartbeat_ms=100)
        for _ in range(3):
            await self.within(self.receive(), "heartbeat")

    async def cut(self) -> None:
        """Reads a message of two fragments and a frame in two parts; half a frame is not answered."""
        await self.welcome(await self.connect())
        await self.ask("m1")
        first, second, third, done = answer("m1")
        await self.socket.send((first.encode()[:40], first.encode()[40:]))
        for frame, parts in ((second, 2), (third, 1)):
            data = Frame(Opcode.TEXT, frame.encode().encode()).serialize(mask=False)
            for part in (data[:30], data[30:])[:parts]:
                await asyncio.sleep(0.05)  # else the parts arrive as one
                self.socket.transport.write(part)
        await asyncio.sleep(0.05)
        self.socket.transport.abort()
        offsets = [one.offset for one in (await self.welcome(await self.connection())).resume]
        same("offsets in resume of INIT", offsets, [len("".join(PIECES[:2]))])
        await self.send(third, done)
        await self.report(messageId="m1", **WHOLE)

    async def unknown(self) -> None:
        """Ignores fields, events, states and types of frames of a newer server; takes codes by their range."""
        await self.welcome(await self.connect())
        await self.ask("m1", is_accepted=False)
        first, *others = answer("m1")
        fields = json.loads(first.encode())
        rated = {**fields, "event": "rated", "offset": 99}
        await self.send(rated, {**rated, "msgType": "NEWS"})
        await self.close(4099, Code.SYSTEM_ERROR)
        await self.welcome(await self.connection())
        await self.expect_chat("m1")
        await self.send(accepted("m1"), {**fields, "new": {"deep": [1, None]}}, rated)
        await self.send({**fields, "event": "status", "state": "musing"}, *others[:1])
        await self.send({"code": "NEWS", "respTime": "1", "msgType": "SYSTEM", "contents": "new"}, *others[1:])
        await self.report(messageId="m1", **WHOLE)


SCENARIOS = [name for name in vars(Scenarios) if not name.startswith("_")]

SECTIONS = {
    "client-to-server": ("login", "cancel", "heartbeat"),
    "server-to-client": ("chat", "cut"),
    "several-sockets-resume-and-safe-retries": ("resume",),
    "codes": ("busy",),
    "close-codes": ("drain", "token", "closed"),
    "compatibility": ("reopened", "refused", "unknown"),
}
"""Sections of ops/docs/protocol.md and the scenarios that check them."""


async def _play(scenario: str, client: Process, limit: float) -> str:
    """Play one scenario; returns the error of the client, or nothing."""
    stage = Scenarios(client, limit)
    async with serve(stage.serve, "127.0.0.1", 0, compression=None, close_timeout=1) as server:
        stage.port = server.sockets[0].getsockname()[1]
        playing = asyncio.create_task(getattr(stage, scenario)())
        try:
            if await completes_first(playing, client.wait()):
                await playing
                return ""
            problem = f"the client has exited with {client.returncode}"
        except Nonconformity as error:
            problem = str(error)
        except ConnectionClosed as error:
            problem = f"the client ended the connection ({error})"
    section = next(section for section, scenarios in SECTIONS.items() if scenario in scenarios)
    happened = [f"  {line:.200}" for line in stage.transcript[-12:]]
    return "\n".join(f"{'':18} {line}" for line in (problem, *happened, f"see ops/docs/protocol.md#{section}"))


async def _work(command: Sequence[str], waiting: list[str], problems: dict[str, str], limit: float) -> None:
    """Play scenarios to one client. After a failure the next one begins with a new process."""
    while waiting:
        environment = dict(os.environ, no_proxy="127.0.0.1")
        client = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environment)
        try:
            is_right = True
            while waiting and is_right:
                scenario = waiting.pop(0)
                problems[scenario] = await _play(scenario, client, limit)
                is_right = not problems[scenario]
        finally:
            if client.returncode is None:
                os.kill(client.pid, signal.SIGKILL)  # `client.kill` takes the exit status of one that has just exited
            await client.wait()


async def _play_all(command: Sequence[str], scenarios: Sequence[str], jobs: int, limit: float) -> dict[str, str]:
    waiting, problems = list(scenarios), dict[str, str]()
    await asyncio.gather(*(_work(command, waiting, problems, limit) for _ in range(min(jobs, len(waiting)))))
    return problems


def run(command: Sequence[str], only: Sequence[str], *, jobs: int, limit: float) -> bool:
    """Play scenarios and print a table; whether the client passed all of them."""
    if unknown := set(only) - set(SCENARIOS):
        raise SettingsError(f"there is no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    try:
        problems = asyncio.run(_play_all(command, only or SCENARIOS, jobs, limit))
    except OSError as error:
        raise SettingsError(f"{command[0]}: cannot be started: {error.strerror}") from None
    for name in only or SCENARIOS:
        click.echo(f"{'FAILED' if problems[name] else 'ok':7} {name:10} {getattr(Scenarios, name).__doc__}")
        if problems[name]:
            click.echo(problems[name])
    passed = list(problems.values()).count("")
    click.echo(f"{passed} of {len(problems)} scenarios passed")
    return passed == len(problems)
