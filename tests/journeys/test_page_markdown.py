"""The page's Markdown in a real browser, under the page's policy and with its styles."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette

from imstream.gateway.app import page_routes
from imstream.user_ids import UserIds
from tests.journeys.page_support import DESKTOP, PHONE, Page, open_page
from tests.support.processes import free_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

TEXT = """\
# How a queue works

A **queue** keeps *messages* until a worker is ~~ready~~ free; see [Redis](https://redis.io) or https://example.com/a_b.

1. Install it:
   ```bash
   imstream up --with-a-long-option=that-does-not-fit-on-the-screen --and-another=one --and-another=two --and-a-last-one
   ```
2. Start it
   - nested
     - [x] deeper

| Command | What it does | Since |
|:--------|:------------:|------:|
| `XADD` | appends an entry<br>to a stream | 5.0.0 |
| `XREADGROUP` | readsalonglinewithoutanyblankinitwhichisfartoolongforthescreenofanyphonethatthereis | 5.0.0 |

> quoted
> > and within it

<img src=x onerror="document.title='hacked'"> [a](javascript:document.title='hacked')
<script>document.title='hacked'</script>

A word without a blank: DonaudampfschifffahrtDonaudampfschifffahrtDonaudampfschifffahrtDonaudampfschifffahrtDonau
"""

MAKE_VIEW = """(async () => {
  const { MarkdownView } = await import("/markdown.js");
  const make = () => {
    const element = document.createElement("div");
    element.className = "answer";
    const copy = (text) => navigator.clipboard.writeText(text);
    return { element, view: new MarkdownView(element, { label: (name) => name, copy }) };
  };
  Object.assign(window, { make, shown: make() });
  const around = document.createElement("div");
  around.style.cssText = "overflow-y: auto";
  around.append(shown.element);
  for (const element of document.body.children) element.hidden = true;
  document.body.append(around);
})()"""


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """The address of the page as a node serves it; there is no node behind it."""
    port = free_port()
    app = Starlette(routes=page_routes(UserIds.NUMBER, 65536, 200))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve())
    await wait_until(lambda: server.started, "the page is served")
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    await serving


@pytest.fixture
async def page(chromium: str, address: str) -> AsyncIterator[Page]:
    """A tab with a view in place of the page's content. At the end, the browser must have reported no error."""
    async with open_page(chromium) as opened:
        await opened.visit(address)
        await opened.evaluate(MAKE_VIEW)
        yield opened
        assert opened.complaints == []


async def update(page: Page, text: str, *, done: bool = True) -> None:
    await page.evaluate(f"shown.view.update({json.dumps(text)}, {{ done: {json.dumps(done)} }})")


async def test_text_in_pieces_is_shown_like_the_whole_text(page: Page) -> None:
    same = f"""(() => {{
      const text = {json.dumps(TEXT)};
      for (let end = 0; end < text.length; end += 3) shown.view.update(text.slice(0, end));
      shown.view.update(text, {{ done: true }});
      const once = make();
      once.view.update(text, {{ done: true }});
      return shown.element.isEqualNode(once.element) && shown.element.children.length;
    }})()"""
    assert await page.evaluate(same) == 7


async def test_nothing_in_a_text_runs(page: Page) -> None:
    await update(page, TEXT)
    assert await page.evaluate("shown.element.querySelectorAll('img, script, [onerror]').length") == 0
    links = await page.evaluate("[...shown.element.querySelectorAll('a')].map((a) => [a.href, a.rel, a.target])")
    assert links == [
        [address, "noopener noreferrer", "_blank"] for address in ("https://redis.io/", "https://example.com/a_b")
    ]
    assert await page.evaluate("document.title") == "imstream"


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (PHONE, True)], ids=["desk, light", "phone, dark"])
async def test_only_code_and_tables_are_wider_than_the_screen_and_scroll_in_themselves(
    page: Page, tmp_path: Path, size: tuple[int, int], *, dark: bool
) -> None:
    await page.look(size, dark=dark)
    await update(page, TEXT)
    await page.drawn()
    assert await page.evaluate("document.documentElement.scrollWidth") == size[0]
    outside = await page.evaluate(
        "[...shown.element.querySelectorAll('*')].filter((e) => !e.closest('.code pre, .table table'))"
        f".filter((e) => e.getBoundingClientRect().right > {size[0]} + 0.5).map((e) => e.outerHTML)"
    )
    assert outside == []
    scrolled = await page.evaluate(
        "[...shown.element.querySelectorAll('pre, .table')].filter((e) => e.scrollWidth > e.clientWidth)"
        ".map((e) => [e.tabIndex, e.ariaLabel])"
    )
    assert scrolled == ([[0, "code bash"], [0, "table"]] if size == PHONE else [])
    await asyncio.to_thread((tmp_path / "markdown.png").write_bytes, await page.screenshot())


async def test_a_long_word_in_a_table_does_not_cover_the_next_cell(page: Page) -> None:
    await page.evaluate("shown.element.style.width = '40rem'")
    await update(page, TEXT)
    covering = """[...shown.element.querySelectorAll("td")].filter((cell) => {
      const range = document.createRange();
      range.selectNodeContents(cell);
      return range.getBoundingClientRect().right > cell.getBoundingClientRect().right;
    }).length"""
    assert await page.evaluate(covering) == 0


async def test_wide_code_is_scrolled_with_the_keyboard(page: Page) -> None:
    await page.look(PHONE)
    await update(page, TEXT)
    code = "shown.element.querySelector('pre')"
    await page.evaluate(f"{code}.focus()")
    assert await page.evaluate(f"document.activeElement === {code}")
    key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
    await page.call("Input.dispatchKeyEvent", type="keyDown", **key)
    await page.call("Input.dispatchKeyEvent", type="keyUp", **key)
    await page.until(f"{code}.scrollLeft > 0")


async def test_code_is_copied_with_its_button(page: Page) -> None:
    await update(page, "```python\nif a < b:\n    print(1)\n```\n")
    await page.allow_clipboard()
    await page.click(".answer .code button")
    await page.until("navigator.clipboard.readText().then((text) => text === 'if a < b:\\n    print(1)')")


async def test_a_selection_stays_while_the_text_grows(page: Page) -> None:
    await update(page, "Some **strong** words to select", done=False)
    await page.evaluate(
        "getSelection().setBaseAndExtent(shown.element.firstChild.lastChild, 1, shown.element.firstChild.lastChild, 6)"
    )
    await update(page, "Some **strong** words to select, and `more` of them\n\n- that\n- come", done=False)
    assert await page.evaluate("getSelection().toString()") == "words"


async def test_lists_and_tables_in_hebrew_or_arabic_begin_on_the_right(page: Page) -> None:
    await update(page, "- שלום\n- עולם\n\n> ציטוט\n\n| א | ב |\n|---|---|\n| 1 | 2 |\n\n- English\n- as before")
    directions = "[...shown.element.children].map((e) => getComputedStyle(e).direction)"
    assert await page.evaluate(directions) == ["rtl", "rtl", "rtl", "ltr"]
    cells = "[...shown.element.querySelectorAll('th')].map((e) => e.getBoundingClientRect().x)"
    first, second = await page.evaluate(cells)
    assert first > second
