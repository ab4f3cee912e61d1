"""Take pictures of the page in each of its states: `ops/screenshots/take FOLDER`.

Every state is brought about by a real node with a scripted backend. Each is shown on a desktop and on a phone, in light
and dark colours, in English and Chinese. `page.png` is the picture of the README.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from imstream.cli.main import main
from tests.journeys.page_steps import (
    AXE,
    LAST,
    ask,
    ask_elsewhere,
    axe_findings,
    has_written,
    log_in,
    online,
    open_list,
    open_menu,
    open_question,
    says,
    status,
)
from tests.journeys.page_support import DESKTOP, PHONE, Page, open_page, running_chromium
from tests.journeys.test_page_markdown import TEXT
from tests.journeys.test_wire_thinking import STOP, Model, delta
from tests.support.backend_scripts import by_question
from tests.support.processes import free_port
from tests.support.scripted_backend import DONE, Exchange, Script, refuses, scripted_backend, streams
from tests.support.servers import NodeProcess, RedisServer, start_node, valkey_binary
from tests.support.tokens import SECRET, token
from tests.support.users import user_id

README = Path(__file__).parents[2] / "ops" / "screenshots" / "page.png"
README_SIZE = (800, 640)

VIEWS = ((DESKTOP, "light", "en"), (DESKTOP, "dark", "zh"), (PHONE, "light", "zh"), (PHONE, "dark", "en"))

REASONING = "The user asks about Redis Streams. A definition, the two commands, and a few lines of code are enough."
BEGINNING = """\
A **consumer group** shares the entries of one stream among several workers:

1. `XREADGROUP` gives each entry to one worker, and notes it as *pending*.
2. `XACK` removes that note when the work is done.

```python
async for entry in group.read("requests", block=2000):
    await answer(entry)
```

"""
REST = "If a worker dies, another one claims its pending entries, so nothing is lost."

FOREIGN = """\
# שלום עולם
פסקה בעברית עם `code` ו-**English words** בתוכה, וגם https://example.com/a/b.

- פריט ראשון
- פריט שני
  1. מקונן

> ציטוט

| עמודה | ערך |
|---|---|
| אחת | 1 |

مرحبا بالعالم: هذا نص عربي.

<script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) [b](data:text/html,x) ![c](https://evil.example/p.png)

https://example.com/a-very-long-address/that-does-not-end/0123456789/0123456789/0123456789/0123456789?query=0123456789

Rechtsschutzversicherungsgesellschaftenangestelltenverbandsvorsitzendenstellvertreterwahlvorschlag

```
one_line_of_code_that_is_far_too_long_for_a_phone(argument_number_one, argument_number_two, argument_number_three)
```
"""


@dataclass
class Camera:
    """Takes pictures of one page into a folder."""

    page: Page
    folder: Path
    problems: list[str]
    """The findings of axe, if it is installed."""

    async def take(self, name: str) -> None:
        """Take one picture for each view."""
        for size, colours, lang in VIEWS:
            await self.page.look(size, dark=colours == "dark")
            await self._speak(lang)
            kind = "phone" if size == PHONE else "desktop"
            shot = await self.page.screenshot()
            view = f"{name}-{kind}-{colours}-{lang}"
            await asyncio.to_thread((self.folder / f"{view}.png").write_bytes, shot)
            if AXE.exists():
                findings = await axe_findings(self.page, {"resultTypes": ["violations"]})
                self.problems += [f"{view}: {finding}" for finding in findings]
        await self.page.look(DESKTOP)
        await self._speak("en")
        sys.stdout.write(f"{name}\n")

    async def _speak(self, lang: str) -> None:
        if (await self.page.evaluate("document.documentElement.lang"))[:2] != lang:
            await self.page.evaluate("document.querySelector('#language').click()")


async def life_of_an_answer(camera: Camera, node: NodeProcess, model: Model) -> None:
    """From the login to a cut answer."""
    page = camera.page
    await page.visit(f"{node.http}/")
    await page.until("document.querySelector('#language').textContent")
    await camera.take("login")
    await page.fill("#user", "nobody")
    await page.press("Enter")
    await page.until("document.querySelector('#problem').checkVisibility()")
    await camera.take("login-wrong")
    await log_in(page, node)
    await camera.take("welcome")
    await ask(page, "What is a consumer group?")
    await says(page, "The AI has the question")
    await camera.take("started")
    model.says(delta(reasoning=REASONING))
    await says(page, "Thinking")
    await page.click(".thinking summary")
    await camera.take("thinking")
    model.says(delta(content=BEGINNING))
    await has_written(page, 100)
    await camera.take("answering")
    await page.look(README_SIZE)
    await page.evaluate("document.querySelector('.thinking').open = false")
    await asyncio.to_thread(README.write_bytes, await page.screenshot())
    await ask(page, "And what if a worker dies?")
    await says(page, "Will be sent after the answer above")
    await camera.take("held")
    model.says(b"")
    await page.until("document.querySelector('.answer').classList.contains('old')")
    model.says(delta(content=BEGINNING[:40]))
    await camera.take("written-again")
    model.says(delta(content=BEGINNING[40:] + REST), STOP.replace(b'"stop"', b'"length"'), DONE)
    await page.until("document.querySelector('article').dataset.status === 'done'")
    await page.until(f"{LAST}.dataset.status === 'answering' || {LAST}.dataset.status === 'queued'")
    await camera.take("cut")
    model.says(delta(content="Then its lease ends, and another node adopts its"))
    await has_written(page, 40)
    await page.press("Escape")
    await status(page, "cancelled")
    await camera.take("stopped")


async def trouble(camera: Camera) -> None:
    """Failed, delayed and oversized messages."""
    page = camera.page
    await ask_elsewhere(page, "Refuse me")
    await status(page, "failed")
    await ask(page, "And this?")
    await says(page, "Not sent")
    await camera.take("failed")
    await ask_elsewhere(page, "Are you there?")
    await says(page, "trying again in")
    await camera.take("away")
    await page.press("Escape")
    await status(page, "cancelled")
    await page.fill("#box", "长" * 22_000)
    await page.until("!document.querySelector('#too-long').hidden")
    await camera.take("too-long")
    await page.fill("#box", "")


async def paused(camera: Camera, valkey: RedisServer) -> None:
    """An operator has paused the service."""
    page = camera.page
    await asyncio.to_thread(CliRunner().invoke, main, ["pause", "--redis", valkey.admin_url, "--all"])
    await ask_elsewhere(page, "Are you resting?")
    await says(page, "The service is paused")
    await camera.take("paused")
    await asyncio.to_thread(CliRunner().invoke, main, ["resume", "--redis", valkey.admin_url, "--all"])
    await status(page, "done")


async def markdown(camera: Camera) -> None:
    """All Markdown of an answer, and hostile text."""
    page = camera.page
    for number, (name, text) in enumerate((("markdown", TEXT), ("foreign", FOREIGN))):
        await page.keep(
            id=f"c{number}.m1", conversation=f"c{number}", contents="שלום, מה שלומך?" * number or "?", text=text
        )
        await page.call("Page.reload")
        await page.until(f"Boolean({LAST}?.querySelector('.answer table'))")
        await online(page)
        for part, place in (("begin", 0), ("end", 99_999)):
            await page.evaluate(f"(document.querySelector('#log').scrollTop = {place})")
            await camera.take(f"{name}-{part}")


async def around(camera: Camera) -> None:
    """The list, the menu and the dialog."""
    page = camera.page
    await open_list(page)
    await page.until("document.querySelectorAll('#list li').length > 3")
    await camera.take("conversations")
    await open_question(page)
    await camera.take("question")
    await page.press("Escape")
    await page.press("Escape")
    await page.evaluate("document.querySelector('#list').hidden || document.querySelector('#toggle').click()")
    await open_menu(page)
    await camera.take("menu")
    await page.press("Escape")


async def lost(camera: Camera, node: NodeProcess) -> None:
    """The node dies during an answer."""
    page = camera.page
    await ask_elsewhere(page, "Are you mortal?")
    await status(page, "answering")
    node.process.kill()
    await page.until("document.querySelector('#menu').dataset.state === 'waiting'")
    await camera.take("connection-lost")


async def queue(camera: Camera, node: NodeProcess) -> None:
    """A queue, and one that is full."""
    page = camera.page
    await log_in(page, node)
    await ask(page, "Quick")
    await status(page, "done")
    await ask_elsewhere(page, "First")
    await status(page, "answering")
    for question, words in (("Second", "Next in the queue"), ("Third", "Place 2 in the queue")):
        await ask_elsewhere(page, question)
        await says(page, words)
    await camera.take("queued")
    await ask_elsewhere(page, "Fourth")
    await says(page, "Trying again in")
    await camera.take("busy")


async def quota(camera: Camera, node: NodeProcess) -> None:
    """A user has asked too much."""
    page = camera.page
    await log_in(page, node)
    await ask(page, "One")
    await status(page, "done")
    await ask(page, "Two")
    await status(page, "refused")
    await camera.take("quota")


async def expired(camera: Camera, node: NodeProcess) -> None:
    """A login ends during an answer."""
    page = camera.page
    await page.visit(f"{node.http}/")
    await page.fill("#user", str(user_id(10001)))
    await page.press("Enter")
    await page.until("document.querySelector('#secret').checkVisibility()")
    await page.fill("#token", token(exp=time.time() + 15))
    await page.press("Enter")
    await online(page)
    await ask(page, "First")
    await page.until("document.querySelector('#problem').textContent.includes('expired')")
    await camera.take("login-expired")


async def _endless(exchange: Exchange) -> None:
    """A script: an answer without an end."""
    await exchange.start()
    await exchange.send(delta(content="It takes a while"))
    await asyncio.Event().wait()


@asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[tuple[RedisServer, str, Model]]:
    """A Redis, and the URL of a backend with the model that answers most questions."""
    server = RedisServer(valkey_binary(), free_port(), folder)
    server.start()
    model = Model()
    scripts: dict[str, list[Script]] = {
        "Refuse me": [refuses(400, json.dumps({"error": {"message": "no"}}))],
        "Are you there?": [refuses(503)] * 20,
        "Are you resting?": [streams("Not any more.")],
        "Are you mortal?": [_endless],
        "Quick": [streams("Done.")],
        "One": [streams("Done.")],
        "First": [_endless] * 2,
    }
    try:
        async with scripted_backend(by_question(scripts, otherwise=model)) as backend:
            yield server, backend.url, model
    finally:
        server.stop()


async def take_all(pictures: Path, folder: Path) -> list[str]:
    """Start everything, and take all pictures. Return the findings of axe."""
    problems: list[str] = []

    def node(name: str, **settings: object) -> NodeProcess:
        breaker = {"ai_breaker_failures": 1, "ai_breaker_pause": "8s"}
        given = {"thinking": "show", "retry_window": "10m", **breaker, **settings}
        return start_node(folder, redis_url=valkey.url, ai_url=ai_url, node=name, settings=given)

    with running_chromium() as chromium:
        async with stage(folder) as (valkey, ai_url, model), open_page(chromium) as page:
            camera = Camera(page, pictures, problems)
            main_node = node("0")
            with main_node.process:
                await life_of_an_answer(camera, main_node, model)
                await trouble(camera)
                await paused(camera, valkey)
                await markdown(camera)
                await around(camera)
                await lost(camera, main_node)
            for name, scene, settings in (
                ("narrow", queue, {"concurrency": 1, "queue_limit": 3}),
                ("few", quota, {"daily_quota": 1}),
                ("asks", expired, {"auth": "jwt", "auth_secret": SECRET, "auth_leeway": "0s"}),
            ):
                with valkey.client() as client:
                    client.flushall()  # the dead node's requests
                other = node(name, **settings)
                with other.process:
                    async with open_page(chromium) as another:
                        await scene(Camera(another, pictures, problems), other)
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="imstream-pictures-") as temporary:
        sys.exit("\n".join(asyncio.run(take_all(target, Path(temporary)))))
