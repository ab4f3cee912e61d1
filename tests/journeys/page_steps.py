"""Actions of people on the page, and its content, as steps of tests."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from imstream.demo.answer import canned_answer
from tests.journeys.page_support import Page
from tests.support.servers import NodeProcess
from tests.support.users import user_id
from tests.support.waiting import wait_until

PAGE_USER = 10001
"""The user of most tests of the page."""
SLOW = "[[demo pace=30ms]]"
ENDLESS = "[[demo length=5000 pace=20ms]]"
LAST = "[...document.querySelectorAll('article')].at(-1)"
AXE = Path(__file__).parents[1] / "npm" / "node_modules" / "axe-core" / "axe.min.js"
"""Installed by `npm ci --prefix tests/npm --ignore-scripts`."""


async def log_in(page: Page, node: NodeProcess, user: int = PAGE_USER) -> None:
    await page.visit(f"{node.http}/")
    await page.fill("#user", str(user_id(user)))
    await page.press("Enter")
    await online(page)


async def online(page: Page) -> None:
    await page.until("document.querySelector('#menu').dataset.state === 'online'")


async def ask(page: Page, question: str) -> None:
    count = await page.evaluate("document.querySelectorAll('article').length")
    await page.fill("textarea", question)
    await page.click("#write button")
    await page.until(f"document.querySelectorAll('article').length === {count + 1}")


async def stop(page: Page, button: str = "article:last-of-type .stop") -> None:
    """Stop the last answer: click the button, again if the growing answer moved it between locating and clicking."""

    async def has_gone() -> bool:
        return not await page.evaluate(f"document.querySelector({json.dumps(button)})?.checkVisibility()")

    for _ in range(5):
        await page.click(button)
        with suppress(AssertionError):  # it is drawn in the next frame, so text that appears much later was missed
            return await wait_until(has_gone, "the button has gone", limit=2)
    raise AssertionError("the button is still there")


async def status(page: Page, wanted: str) -> None:
    """Wait until the last message has this status."""
    await page.until(f"{LAST}?.dataset.status === '{wanted}'")


async def says(page: Page, words: str) -> None:
    """Wait until the line below the last answer contains this text."""
    await page.until(f"{LAST}.querySelector('.status').textContent.includes({json.dumps(words)})")


async def has_written(page: Page, length: int = 80) -> None:
    """Wait until this much of the last answer is visible."""
    await page.until(f"{LAST}.querySelector('.answer').textContent.length > {length}")


async def kept(page: Page) -> dict[str, Any]:
    """Return the stored part of the last message, with its raw text."""
    return (await page.kept())[-1]


async def whole_answer(page: Page, question: str) -> None:
    """Wait for the end of the last answer. It must equal the backend's text character by character."""
    await status(page, "done")

    async def is_kept() -> bool:
        return bool((await kept(page))["text"] == "".join(canned_answer(question)))

    await wait_until(is_kept, "the whole answer is kept")


async def ask_elsewhere(page: Page, question: str) -> None:
    """Ask in a new conversation, so that the question does not wait for the answer before it."""
    await page.click("#new")
    await ask(page, question)


async def open_list(page: Page) -> None:
    if await page.evaluate("document.querySelector('#list').hidden"):
        await page.click("#toggle")
    await page.until("document.querySelector('#list').checkVisibility()")


async def listed(page: Page) -> list[str]:
    """Return the titles in the open list of conversations."""
    titles: list[str] = await page.evaluate("[...document.querySelectorAll('#list .title')].map((e) => e.textContent)")
    return titles


async def open_conversation(page: Page, title: str) -> None:
    await open_list(page)
    find = f"[...document.querySelectorAll('#list .open')].find((e) => e.innerText.startsWith({json.dumps(title)}))"
    await page.until(f"{find} && ({find}.click(), true)")
    await page.until(f"document.querySelector('article .question').textContent.startsWith({json.dumps(title)})")


async def open_question(page: Page) -> None:
    """Open the dialog that asks whether to delete the first conversation of the list."""
    await open_list(page)
    await page.click("#list .remove")
    await page.until("document.querySelector('#dialog').open")


async def open_menu(page: Page) -> None:
    await page.click("#menu summary")
    await page.until("document.querySelector('#menu').open")


async def axe_findings(page: Page, options: dict[str, object]) -> list[str]:
    """Check the page with axe: the rule and the element of each violation."""
    if not await page.evaluate("'axe' in window"):
        await page.evaluate(AXE.read_text("utf-8"))
    found: list[str] = await page.evaluate(
        f"axe.run({json.dumps(options)}).then(({{ violations }}) => violations.flatMap(({{ id, nodes }}) =>"
        " nodes.map(({ html, failureSummary }) => `${id}: ${html.slice(0, 200)} ${failureSummary}`)))"
    )
    return found
