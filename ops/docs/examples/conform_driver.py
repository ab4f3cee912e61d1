"""Runs a client under `imstream conform`: `python conform_driver.py client.py`. See clients.md.

The file defines `Client(url, user_id, token, report)` with `send(frame)` and `async run()`.
"""

import asyncio
import json
import runpy
import sys


def report(**line: object) -> None:
    print(json.dumps(line), flush=True)


async def main() -> None:
    client_class, client, task = runpy.run_path(sys.argv[1])["Client"], None, None
    while line := await asyncio.to_thread(sys.stdin.readline):
        match json.loads(line):
            case {"step": "connect", "url": url, "userId": user_id, "tokens": tokens}:
                if task:
                    task.cancel()

                def token(left: list[str] = tokens) -> str:
                    return left.pop(0) if len(left) > 1 else left[0]

                client = client_class(url, user_id, token, report)
                task = asyncio.create_task(client.run())
            case {"step": "send" | "cancel" as step, **frame} if client:
                client.send({"msgType": "CHAT" if step == "send" else "CANCEL", **frame})


asyncio.run(main())
