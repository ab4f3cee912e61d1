"""A short client of imstream. It reads steps and writes reports, see clients.md."""

import asyncio
import json
import random
import sys
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException


def report(**line: object) -> None:
    print(json.dumps(line), flush=True)


class Client:
    def __init__(self, url: str, userId: int, tokens: list[str]) -> None:
        self.url, self.user_id, self.tokens = f"{url}?userId={userId}", userId, tokens
        self.messages: dict[str, dict[str, Any]] = {}  # those without an end
        self.outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()  # frames for this connection
        self.task = asyncio.create_task(self.run())

    async def run(self) -> None:
        closed, code, failures, refused = 0, "", 0, None
        while not 4500 < closed <= 4999 and (token := self.tokens[0]) != refused:
            self.tokens = self.tokens[1:] or self.tokens
            resume = [one["point"] for one in self.messages.values() if "CHAT" not in one["again"]]
            init = {"msgType": "INIT", "userId": self.user_id, "token": token, "resume": resume[-64:]}
            socket: ClientConnection | None = None
            try:
                async with connect(self.url, proxy=None) as socket, asyncio.TaskGroup() as tasks:
                    await socket.send(json.dumps(init))
                    while True:
                        frame = json.loads(await socket.recv())
                        code = frame["code"]
                        if frame["msgType"] == "INIT":
                            failures = 0
                            tasks.create_task(self.write(socket, frame.get("heartbeatMs", 25_000) / 1000))
                        elif message := self.messages.get(frame.get("messageId", "")):
                            self.receive(message, **frame)
            except* (OSError, WebSocketException):
                closed = (socket and socket.close_code) or 1006
            refused = token if closed == 4500 and code != "INIT_TIMEOUT" else refused
            wait = 0 if closed == 1012 and not failures else min(30, 0.1 * 2**failures)
            failures = min(failures + 1, 9)
            await asyncio.sleep(wait * random.uniform(0.5, 1))
        report(closed=closed)

    async def write(self, socket: ClientConnection, heartbeat: float) -> None:
        self.outbox = asyncio.Queue()
        for message in self.messages.values():
            self.send_again(message)
        while True:
            try:
                frame = await asyncio.wait_for(self.outbox.get(), heartbeat)
            except TimeoutError:
                frame = {"msgType": "HEARTBEAT"}
            await socket.send(json.dumps({"userId": self.user_id, **frame}))

    def send(self, kind: str, messageId: str, **fields: str) -> None:
        if kind == "CHAT":
            point = {"messageId": messageId, "attempt": 0, "offset": 0}
            self.messages.setdefault(messageId, {"point": point, "text": "", "again": {}})
        if message := self.messages.get(messageId):
            message["again"][kind] = {"msgType": kind, "messageId": messageId, **fields}
            self.outbox.put_nowait(message["again"][kind])

    def send_again(self, message: dict[str, Any]) -> None:
        for frame in message["again"].values():  # what may not have arrived
            self.outbox.put_nowait(frame)

    def receive(self, message: dict[str, Any], /, msgType: str, code: str, event: str = "", **frame: Any) -> None:
        is_refusal = msgType == "SYSTEM" and "CHAT" in message["again"]
        if is_refusal and "retryAfterMs" in frame:
            asyncio.get_running_loop().call_later(frame["retryAfterMs"] / 1000, self.send_again, message)
        elif msgType == "CHAT" and event in ("accepted", "restart", "delta"):
            message["again"].pop("CHAT", None)
            message["text"] = message["text"] + frame["contents"] if event == "delta" else ""
            message["point"].update(attempt=frame.get("attempt", 0), offset=frame.get("offset", 0))
        elif is_refusal or (msgType == "CHAT" and (event in ("done", "failed", "cancelled") or code == "EXPIRED")):
            outcome = "refused" if is_refusal else event or "expired"
            del self.messages[message["point"]["messageId"]]
            message["again"].clear()
            report(messageId=message["point"]["messageId"], outcome=outcome, text=message["text"])


async def main() -> None:
    client: Client | None = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        options = json.loads(line)
        if (step := options.pop("step")) != "connect" and client:
            client.send("CHAT" if step == "send" else "CANCEL", **options)
            continue
        if client:
            client.task.cancel()
        client = Client(**options)


asyncio.run(main())
