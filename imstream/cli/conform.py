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
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress

import click
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from imstream import wire
from imstream.cli.conform_stage import (
    PIECES,
    USER,
    WHOLE,
    Nonconformity,
    Stage,
    accepted,
    answer,
    check,
    problem,
)
from imstream.codes import CloseCode, Code
from imstream.errors import SettingsError
from imstream.wire import ClientCancel, Delta

QUIET = 1.0
"""Seconds of silence after which a client is believed to stay away."""


class Scenarios(Stage):
    """The scenarios: what a client does, and what is checked."""

    async def login(self) -> None:
        """Connects with `userId` in the URL, and logs in with its token."""
        init = await self.connect()
        path = self.socket.request.path if self.socket.request else ""
        check(f"userId={USER}" in path, f"no userId in the URL {path}")
        check((init.user_id, init.token, init.resume) == (USER, "t-1", []), "INIT has another user, token, or resumes")

    async def chat(self) -> None:
        """Puts an answer together; reports one that failed, and one that has no record any longer."""
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
            check(resumed == expected, f"INIT resumes {resumed} after frame {sent}, not {expected}")
            if sent == 0:  # a duplicate may have been answered meanwhile: then all of it comes in one piece
                await self.expect_chat(name)
                text = "".join(PIECES)
                frames[1:] = [Delta(contents=text, message_id=name, attempt=1, offset=len(text)), answer(name)[-1]]
            await self.send(*frames[sent:])
            await self.report(messageId=name, **WHOLE)

    async def busy(self) -> None:
        """Sends a message that was refused with BUSY again, with its id, but not before `retryAfterMs`."""
        await self.welcome(await self.connect())
        await self.ask("m1", is_accepted=False)
        clock = asyncio.get_running_loop().time
        refused_at, wait = clock(), 0.3
        await self.send(problem(Code.BUSY, "m1", int(wait * 1000)))
        await self.expect_chat("m1")
        check(clock() - refused_at >= wait - 0.02, f"CHAT again after {clock() - refused_at:.2f} s, not {wait} s")
        await self.send(accepted("m1"), *answer("m1"))
        await self.report(messageId="m1", **WHOLE)

    async def cancel(self) -> None:
        """Cancels during an answer, before `accepted`, too late, and once more if the connection was lost."""
        await self.welcome(await self.connect())
        for name in ("during", "early", "late", "lost"):
            shown = [] if name == "early" else [accepted(name), answer(name)[0]]
            await self.ask(name, is_accepted=False)
            await self.send(*shown)
            self.do("cancel", messageId=name)
            check((await self.expect(ClientCancel)).message_id == name, "CANCEL of another message")
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
        """After 1012, resumes its messages on another connection, and sends what the draining node refused."""
        await self.welcome(await self.connect())
        for name in ("m1", "m2", "m3"):
            await self.ask(name, is_accepted=name != "m3")
        await self.send(answer("m2")[0])
        with suppress(ConnectionClosed):
            await self.send(problem(Code.UNAVAILABLE, "m3", 100))
        await self.close(CloseCode.DRAINING, Code.DRAINING)
        points = {one.message_id: one.offset for one in (await self.welcome(await self.connection())).resume}
        check(points == {"m1": 0, "m2": len(PIECES[0])}, f"INIT resumes {points}")
        await self.expect_chat("m3")
        await self.send(*answer("m1"), *answer("m2")[1:], accepted("m3"), *answer("m3"))
        for name in ("m1", "m2", "m3"):
            await self.report(messageId=name, **WHOLE)

    async def token(self) -> None:
        """After 4500, logs in with a new token."""
        await self.connect("t-1", "t-2")
        await self.close(CloseCode.NOT_AUTHENTICATED, Code.UNAUTHORIZED)
        init = await self.connection()
        check(init.token == "t-2", f"token {init.token}, not t-2")  # noqa: S105 - no secret
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
        check(offsets == [len("".join(PIECES[:2]))], f"INIT resumes at {offsets}")
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


async def _play(scenario: str, client: Process, limit: float) -> str:
    """Play one scenario; what the client did wrong, or nothing."""
    stage = Scenarios(client, limit)
    async with serve(stage.serve, "127.0.0.1", 0, compression=None, close_timeout=1) as server:
        stage.port = server.sockets[0].getsockname()[1]
        try:
            await getattr(stage, scenario)()
        except Nonconformity as problem:
            return str(problem)
        except ConnectionClosed as error:
            return f"the client ended the connection ({error})"
    return ""


async def _work(command: Sequence[str], waiting: list[str], problems: dict[str, str], limit: float) -> None:
    """Play scenarios to one client. After a failure the next one begins with a new process."""
    while waiting:
        client = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        try:
            is_right = True
            while waiting and is_right:
                scenario = waiting.pop(0)
                problems[scenario] = await _play(scenario, client, limit)
                is_right = not problems[scenario]
        finally:
            with suppress(ProcessLookupError):
                client.kill()
            await client.wait()


async def _play_all(command: Sequence[str], scenarios: Sequence[str], jobs: int, limit: float) -> dict[str, str]:
    waiting, problems = list(scenarios), dict[str, str]()
    await asyncio.gather(*(_work(command, waiting, problems, limit) for _ in range(jobs)))
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
            click.echo(f"{'':18} {problems[name]}")
    passed = list(problems.values()).count("")
    click.echo(f"{passed} of {len(problems)} scenarios passed")
    return passed == len(problems)
