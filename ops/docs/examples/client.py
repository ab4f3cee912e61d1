# A short client of imstream. With conform_driver.py, it passes `imstream conform`: see clients.md.
import asyncio
import json
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from websockets import ClientConnection, ConnectionClosed, broadcast, connect


class Client:
    def __init__(self, url: str, user_id: int, token: Callable[[], str], report: Callable[..., None]) -> None:
        self.url, self.user_id, self.token, self.report = f"{url}?userId={user_id}", user_id, token, report
        self.messages: dict[str, dict[str, Any]] = {}  # those without an end
        self.sockets: list[ClientConnection] = []  # the one that is logged in

    def send(self, frame: dict[str, Any]) -> None:  # a CHAT or a CANCEL
        message = self.messages.setdefault(frame["messageId"], {"point": {}, "text": "", "again": {}})
        message["again"][frame["msgType"]] = frame  # frames that may not have arrived
        self.write({frame["msgType"]: frame})

    def write(self, frames: dict[str, Any]) -> None:
        for frame in frames.values():
            broadcast(self.sockets, json.dumps({"userId": self.user_id, **frame}))  # if it is open

    async def run(self) -> None:
        token, wait = self.token(), 0.1
        async for socket in connect(self.url, max_size=2**24):  # tries again while there is no connection
            points = [message["point"] for message in self.messages.values() if message["point"]]
            frame: dict[str, Any] = {"msgType": "INIT", "userId": self.user_id, "token": token, "resume": points[-64:]}
            with suppress(ConnectionClosed):
                await socket.send(json.dumps(frame))
                while True:
                    frame = json.loads(await socket.recv())
                    if frame["msgType"] == "INIT":
                        self.sockets, heartbeat = [socket], frame.get("heartbeatMs", 25_000) / 1000
                        for message in self.messages.values():
                            self.write(message["again"])
                    if frame["msgType"] in ("INIT", "HEARTBEAT"):
                        asyncio.get_running_loop().call_later(heartbeat, broadcast, [socket], "PING")
                    elif frame["msgType"] in ("CHAT", "SYSTEM") and frame.get("messageId") in self.messages:
                        self.receive(frame, self.messages[frame["messageId"]])
                        wait = 0.1
            closed, refused, token = socket.close_code or 1006, token, self.token()
            if 4500 < closed < 5000 or (closed == 4500 and token == refused and frame.get("code") != "INIT_TIMEOUT"):
                return self.report(closed=closed)
            await asyncio.sleep(random.uniform(wait, wait := min(30, 2 * wait)))

    def receive(self, frame: dict[str, Any], message: dict[str, Any]) -> None:
        event = frame.get("event") or {"EXPIRED": "expired"}.get(frame["code"], "refused")
        if event in ("accepted", "restart", "delta"):
            message["again"].pop("CHAT", None)
            message["text"] = message["text"] + frame["contents"] if event == "delta" else ""
            message["point"] = {name: frame.get(name, 0) for name in ("messageId", "attempt", "offset")}
        elif event == "refused" and "retryAfterMs" in frame:
            asyncio.get_running_loop().call_later(frame["retryAfterMs"] / 1000, self.write, message["again"])
        elif event in ("done", "failed", "cancelled", "expired") or (event == "refused" and not message["point"]):
            self.messages.pop(frame["messageId"])["again"].clear()
            self.report(messageId=frame["messageId"], outcome=event, text=message["text"])
