"""The Python client of imstream under `imstream conform`."""

import asyncio
import json
import sys
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

from imstream.client import Client, ClientError, Refused, SessionEnded, Timing

TIMING = Timing(backoff=timedelta(milliseconds=50), backoff_max=timedelta(milliseconds=200))


def report(**line: object) -> None:
    """Write a report."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def keep(client: Client, online: asyncio.Event) -> None:
    """Keep a client connected until its session ends."""
    try:
        async with client:
            online.set()
            if (error := await client.ended()) is not None:
                raise error
    except SessionEnded as error:
        report(closed=error.code)


async def send(client: Client, online: asyncio.Event, message_id: str, contents: str) -> None:
    """Send a message, again while the server is busy, and report its end."""
    await online.wait()
    while True:
        reply = await client.send(contents, message_id=message_id)
        try:
            result = await reply.result()
        except Refused as refused:
            if refused.retry_after is None:
                return report(messageId=message_id, outcome="refused", text="")
            await asyncio.sleep(refused.retry_after.total_seconds())
        else:
            return report(messageId=message_id, outcome=result.outcome, text=result.text)


async def quietly(work: Coroutine[Any, Any, object]) -> None:
    """Do something, whose errors end it: the next step starts again."""
    try:
        await work
    except ClientError as error:
        sys.stderr.write(f"{error}\n")


async def main() -> None:
    """Do the steps."""
    tasks: list[asyncio.Task[None]] = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        step = json.loads(line)
        if step["step"] == "connect":
            for task in tasks:
                task.cancel()
            tokens = step["tokens"]
            client = Client(
                step["url"],
                step["userId"],
                token=lambda left=tokens: left.pop(0) if len(left) > 1 else left[0],
                timing=TIMING,
            )
            online = asyncio.Event()
            tasks = [asyncio.create_task(keep(client, online))]
        elif step["step"] == "send":
            tasks.append(asyncio.create_task(quietly(send(client, online, step["messageId"], step["contents"]))))
        else:
            tasks.append(asyncio.create_task(quietly(client.cancel(step["messageId"]))))


asyncio.run(main())
