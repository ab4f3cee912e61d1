"""The reference service *baseline*: about the minimum CPU of a chat service in Python, without queue, log or retries.

aiohttp reads whatever has arrived, each event is parsed, and each delta is sent as one frame. If this process, the
socket or the backend dies, the answer is lost.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

URL = os.environ.get("BENCH_AI_URL", "http://127.0.0.1:8090/v1") + "/chat/completions"


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Use one HTTP session for all sockets."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
        app.state.session = session
        yield


async def chat(websocket: WebSocket) -> None:
    """Serve one socket: each CHAT is answered before the next is read."""
    session: aiohttp.ClientSession = websocket.app.state.session
    await websocket.accept()
    try:
        while True:
            frame = json.loads(await websocket.receive_text())
            if frame["msgType"] != "CHAT":
                await send(websocket, msgType=frame["msgType"])
                continue
            message_id = frame["messageId"]
            messages = [*frame.get("history", []), {"role": "user", "content": frame["contents"]}]
            body = {"model": "bench", "messages": messages, "stream": True}
            async with session.post(URL, json=body) as response:
                async for text in deltas(response.content):
                    await send(websocket, msgType="CHAT", messageId=message_id, event="delta", contents=text)
            await send(websocket, msgType="CHAT", messageId=message_id, event="done")
    except WebSocketDisconnect:
        return


async def send(websocket: WebSocket, **frame: str) -> None:
    """Send one frame."""
    await websocket.send_text(json.dumps(frame, ensure_ascii=False, separators=(",", ":")))


async def deltas(content: aiohttp.StreamReader) -> AsyncIterator[str]:
    """The texts of an answer, as they arrive."""
    rest = b""
    while data := await content.readany():
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if event != b"data: [DONE]" and (text := json.loads(event[6:])["choices"][0]["delta"].get("content")):
                yield text


app = Starlette(routes=[WebSocketRoute("/ws", chat)], lifespan=lifespan)
