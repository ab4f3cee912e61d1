"""The page passes axe's accessibility checks in each of its main states, and the keyboard reaches everything."""

import pytest

from tests.journeys.page_steps import (
    AXE,
    ENDLESS,
    LAST,
    ask,
    axe_findings,
    has_written,
    log_in,
    online,
    open_list,
    open_menu,
    open_question,
    says,
    status,
    stop,
)
from tests.journeys.page_support import DESKTOP, PHONE, Page
from tests.support.npm import node as javascript
from tests.support.servers import NodeProcess

pytestmark = pytest.mark.usefixtures("unmeasured")

ANSWER = """\
# A title

## Below it

A [link](https://example.com) and `code`.

```python
a_line = "that is far too long for the screen of a phone, and for most desktops: it can be scrolled by the keyboard" * 2
```

| a | b |
|---|---|
| 1 | 2 |

- [x] done
"""


async def problems(page: Page, state: str, *, dark: bool = False) -> list[str]:
    """Findings of axe: the state of the page, the rule, and the element. In the dark, it looks at contrasts."""
    options: dict[str, object] = {"runOnly": ["color-contrast"]} if dark else {"resultTypes": ["violations"]}
    await page.look(await page.evaluate("[innerWidth, innerHeight]"), dark=dark)
    return [f"{state}: {finding}" for finding in await axe_findings(page, options)]


@pytest.mark.parametrize("size", [DESKTOP, pytest.param(PHONE, marks=pytest.mark.long)], ids=["desk", "phone"])
async def test_axe_finds_nothing(page: Page, page_node: NodeProcess, size: tuple[int, int]) -> None:
    javascript(AXE.parents[2])
    await page.look(size)
    await page.visit(f"{page_node.http}/")
    await page.until("document.querySelector('#language').textContent")
    found = await problems(page, "login")
    await page.click("#login .main")
    await online(page)
    found += await problems(page, "empty, dark", dark=True)
    await page.keep(text=ANSWER, frame={"finishReason": "length"})  # its status has the colour of warnings
    await page.call("Page.reload")
    await status(page, "done")
    await open_list(page)
    found += await problems(page, "conversations")
    await open_question(page)
    found += await problems(page, "question")
    await page.press("Escape")
    await page.press("Escape")
    await ask(page, f"Runs {ENDLESS}")
    await has_written(page)
    await ask(page, "Waits")
    await says(page, "Will be sent")  # its texts are drawn in the next frame
    await open_menu(page)
    found += await problems(page, "running, with the menu")
    found += await problems(page, "running, dark", dark=True)
    await page.press("Escape")
    await stop(page, "article:nth-last-of-type(2) .stop")
    await status(page, "done")
    found += await problems(page, "ended")
    assert found == []


async def test_the_keyboard_reaches_everything_and_focus_is_never_lost(page: Page, page_node: NodeProcess) -> None:
    await log_in(page, page_node, 10021)
    assert await page.evaluate("document.activeElement.id") == "box"
    await page.call("Input.insertText", text=f"By keyboard {ENDLESS}")
    await page.press("Enter")
    await has_written(page, 20)
    await open_list(page)
    reached = set()
    await page.evaluate("document.activeElement.blur()")
    for _ in range(20):
        await page.press("Tab")
        name = "(e => e.id || e.className.replace('quiet ', '') || e.localName)(document.activeElement)"
        reached.add(await page.evaluate(name))
    wanted = {"toggle", "new", "summary", "language", "open", "icon remove", "log", "stop", "box"}
    assert wanted <= reached
    await page.evaluate(f"{LAST}.querySelector('.stop').focus()")
    await page.press("Enter")
    await status(page, "cancelled")
    assert await page.evaluate(f"{LAST}.contains(document.activeElement)")
    await page.evaluate("document.querySelector('#list .remove').focus()")
    await page.press("Enter")
    await page.until("document.querySelector('#dialog').open")
    await page.evaluate("document.querySelector('#dialog button').click()")
    await page.until("document.querySelectorAll('#list li').length === 0")
    await page.until("document.activeElement !== document.body")
