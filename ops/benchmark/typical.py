"""The reference service *typical*: a chat service as commonly written, without queue, log or retries.

httpx streams the answer line by line, each line is parsed, and each delta is sent as one frame. httpx and uvicorn have
their defaults, except for a time limit that allows a complete answer.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

URL = os.environ.get("BENCH_AI_URL", "http://127.0.0.1:8090/v1") + "/chat/completions"


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Use one HTTP client for all sockets."""
    async with httpx.AsyncClient(timeout=60) as client:
        app.state.client = client
        yield


async def chat(websocket: WebSocket) -> None:
    """Serve one socket: each CHAT is answered before the next is read."""
    client: httpx.AsyncClient = websocket.app.state.client
    await websocket.accept()
    try:
        while True:
            frame = await websocket.receive_json()
            if frame["msgType"] != "CHAT":
                await websocket.send_json({"msgType": frame["msgType"]})
                continue
            message_id = frame["messageId"]
            messages = [*frame.get("history", []), {"role": "user", "content": frame["contents"]}]
            body = {"model": "bench", "messages": messages, "stream": True}
            async with client.stream("POST", URL, json=body) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    text = json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content")
                    if text:
                        await websocket.send_json(
                            {"msgType": "CHAT", "messageId": message_id, "event": "delta", "contents": text}
                        )
            await websocket.send_json({"msgType": "CHAT", "messageId": message_id, "event": "done"})
    except WebSocketDisconnect:
        return


app = Starlette(routes=[WebSocketRoute("/ws", chat)], lifespan=lifespan)
