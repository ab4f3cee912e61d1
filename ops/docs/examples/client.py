"""A client of imstream in about 60 lines. It reads steps and writes reports, see clients.md."""

import asyncio
import json
import random
import sys
from contextlib import suppress
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException


def report(**line: object) -> None:
    print(json.dumps(line), flush=True)


class Client:
    def __init__(self, options: dict[str, Any]) -> None:
        self.url, self.user_id = f"{options['url']}?userId={options['userId']}", options["userId"]
        self.tokens = options["tokens"]
        self.messages: dict[str, dict[str, Any]] = {}  # those without an end
        self.socket: ClientConnection | None = None
        self.code, self.failures, self.is_ready, self.tasks = "", 0, False, set[asyncio.Task[None]]()
        self.start(self.run())

    def start(self, work: Any, delay: float = 0) -> None:
        async def later() -> None:
            await asyncio.sleep(delay)
            await work

        self.tasks.add(task := asyncio.create_task(later()))
        task.add_done_callback(self.tasks.discard)

    async def run(self) -> None:
        refused = None
        while True:
            token = self.tokens.pop(0) if len(self.tokens) > 1 else self.tokens[0]
            if token == refused:
                return report(closed=4500)
            code = await self.connection(token)
            if code == 4500 and self.code != "INIT_TIMEOUT":
                refused = token
            elif code is not None and 4500 < code <= 4999:
                return report(closed=code)
            wait = 0 if code == 1012 and not self.failures else min(30, 0.1 * 2**self.failures)
            self.failures += 1
            await asyncio.sleep(wait * random.uniform(0.5, 1))

    async def connection(self, token: str) -> int | None:
        accepted = [one for one in self.messages.values() if one["accepted"]]
        resume = [{key: one[key] for key in ("messageId", "attempt", "offset")} for one in accepted[-64:]]
        try:
            async with connect(self.url, proxy=None) as self.socket:
                await self.write(msgType="INIT", token=token, resume=resume)
                while True:
                    await self.receive(json.loads(await self.socket.recv()))
        except (OSError, WebSocketException):
            self.is_ready = False
            return self.socket.close_code if self.socket else None

    async def write(self, **frame: object) -> None:
        with suppress(ConnectionClosed):  # after the next login it is sent again
            if self.socket and (self.is_ready or frame["msgType"] == "INIT"):
                await self.socket.send(json.dumps({"userId": self.user_id, **frame}))

    async def send(self, messageId: str, contents: str, **_: object) -> None:
        new = {"messageId": messageId, "contents": contents, "accepted": False, "text": "", "attempt": 0, "offset": 0}
        self.messages.setdefault(messageId, new)
        await self.write(msgType="CHAT", messageId=messageId, contents=contents)

    async def cancel(self, messageId: str, **_: object) -> None:
        if messageId in self.messages:
            self.messages[messageId]["cancelled"] = True  # again after a lost connection
        await self.write(msgType="CANCEL", messageId=messageId)

    async def beat(self, socket: object, interval: float) -> None:
        while self.socket is socket:
            await asyncio.sleep(interval)
            await self.write(msgType="HEARTBEAT")

    async def logged_in(self, heartbeat_ms: int) -> None:
        self.failures, self.is_ready = 0, True
        self.start(self.beat(self.socket, heartbeat_ms / 1000))
        for message in [one for one in self.messages.values() if not one["accepted"]]:
            await self.send(**message)
        for message in [one for one in self.messages.values() if "cancelled" in one]:
            await self.cancel(**message)

    async def receive(self, frame: dict[str, Any]) -> None:
        message, event, self.code = self.messages.get(frame.get("messageId", "")), frame.get("event"), frame["code"]
        if frame["msgType"] == "INIT":
            await self.logged_in(frame.get("heartbeatMs", 25_000))
        elif message is None:
            return
        elif frame["msgType"] == "SYSTEM" and not message["accepted"]:
            if "retryAfterMs" in frame:
                self.start(self.send(**message), frame["retryAfterMs"] / 1000)
            else:
                self.end(message, "refused")
        elif frame["msgType"] != "CHAT":
            return
        elif event == "accepted":
            message.update(accepted=True, text="", attempt=0, offset=0)
        elif event == "restart":
            message.update(text="", attempt=frame["attempt"], offset=0)
        elif event == "delta":
            message.update(text=message["text"] + frame["contents"], attempt=frame["attempt"], offset=frame["offset"])
        elif event in ("done", "failed", "cancelled") or frame["code"] == "EXPIRED":
            self.end(message, event or "expired")

    def end(self, message: dict[str, Any], outcome: str) -> None:
        del self.messages[message["messageId"]]
        report(messageId=message["messageId"], outcome=outcome, text=message["text"])


async def main() -> None:
    client: Client | None = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        options = json.loads(line)
        step = options.pop("step")
        if step == "connect":
            for task in client.tasks if client else ():
                task.cancel()
            client = Client(options)
        elif client:
            await getattr(client, step)(**options)


asyncio.run(main())
