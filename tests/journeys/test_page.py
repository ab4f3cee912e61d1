"""Use of the page in a real Chromium, with a real node, Valkey and the demo backend behind it."""

import asyncio
import json
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from imstream.demo.answer import canned_answer
from imstream.guards.account import QUOTA_EXHAUSTED
from imstream.texts import Text
from imstream.user_ids import UserIds
from tests.journeys.page_steps import (
    ENDLESS,
    LAST,
    SLOW,
    ask,
    ask_elsewhere,
    has_written,
    kept,
    log_in,
    online,
    open_conversation,
    open_menu,
    says,
    status,
    stop,
    whole_answer,
)
from tests.journeys.page_support import DESKTOP, PHONE, Page, open_page
from tests.support.noon import NOON
from tests.support.peer import peer
from tests.support.processes import free_port
from tests.support.servers import DemoBackend, NodeProcess, RedisServer, start_node
from tests.support.tokens import SECRET, token
from tests.support.users import USER_IDS, user_id

pytestmark = pytest.mark.usefixtures("unmeasured")

PAGE_TOKEN = "good-for-this-run"  # noqa: S105 - of these tests

PAGE_ON_DISK = Path(str(resources.files("imstream.gateway") / "static" / "index.html"))


@pytest.fixture(scope="module")
def long_named(
    valkey: RedisServer, demo: DemoBackend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    """A node whose id is as long as ids are in practice."""
    folder, node = tmp_path_factory.mktemp("node"), "eu-west-1-production-17"
    started = start_node(folder, redis_url=valkey.url, ai_url=demo.url, node=node)
    with started.process:
        yield started


async def test_a_person_logs_in_asks_and_reads_the_answer_as_it_is_written(page: Page, page_node: NodeProcess) -> None:
    await log_in(page, page_node)
    await ask(page, f"Why is the sky blue? {SLOW}")
    await status(page, "answering")
    await has_written(page, 20)
    seen = await page.evaluate(f"{LAST}.querySelector('.answer').textContent")
    await has_written(page, len(seen))
    await whole_answer(page, f"Why is the sky blue? {SLOW}")
    assert await page.evaluate(f"{LAST}.querySelector('blockquote').textContent") == "Why is the sky blue?"
    await says(page, "Answered by node 0")


async def test_an_answer_goes_on_where_it_stopped_when_the_connection_is_lost(
    page: Page, page_node: NodeProcess
) -> None:
    question = f"What if I lose you? {SLOW}"
    await log_in(page, page_node)
    await ask(page, question)
    for _ in range(2):
        before = await page.evaluate(f"{LAST}.querySelector('.answer').textContent.length")
        await has_written(page, before + 20)
        await open_menu(page)
        await page.click("#drop")
        await page.until("document.querySelector('#menu').dataset.state === 'waiting'")
        await says(page, "Connection lost")
        assert await page.evaluate("!document.querySelector('#trouble').hidden")
        await page.click("#trouble button")
        await online(page)
    await whole_answer(page, question)
    await says(page, "resumed")


async def test_an_answer_outlives_a_reload_of_the_page(page: Page, page_node: NodeProcess) -> None:
    question = f"Will you be there? {SLOW}"
    await log_in(page, page_node)
    await ask(page, "A first question")
    await status(page, "done")
    await ask(page, question)
    await has_written(page)
    await page.call("Page.reload")
    await page.until("document.querySelectorAll('article').length === 2")
    await whole_answer(page, question)


async def test_an_answer_outlives_its_node(page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path) -> None:
    question = f"Are you mortal? {SLOW}"
    first = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="mortal")
    with first.process:
        await log_in(page, first)
        await ask(page, question)
        await has_written(page)
        first.process.kill()
    await says(page, "Connection lost")
    second = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="mortal", port=first.port)
    with second.process:
        await whole_answer(page, question)
        page.forgive_absence()


async def test_the_page_says_which_node_it_talks_to_and_which_one_answered(
    page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    first = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="one")
    with first.process:
        await log_in(page, first)
        await page.until("document.querySelector('#via').textContent === 'node one'")
        await ask(page, "Who are you?")
        await says(page, "Answered by node one")
        assert first.process.terminate() == 0
        await page.until("document.querySelector('#menu').dataset.state === 'waiting'")
        trouble = "document.querySelector('#trouble').textContent"
        await page.until(f"{trouble}.startsWith('{Text.DRAINING.en} · Trying again in ')")
    assert await page.evaluate("document.querySelector('#via').textContent") == ""
    # As behind a load balancer: the same address, another node.
    second = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="two", port=first.port)
    with second.process:
        await online(page)
        await page.until("document.querySelector('#via').textContent === 'node two'")
        await ask(page, "And you?")
        await says(page, "Answered by node two")
        assert "node one" in await page.evaluate("document.querySelector('article .status').textContent")
        await page.click("#language")
        await page.until("document.querySelector('#via').textContent === '节点 two'")
        page.forgive_absence()


async def test_earlier_turns_are_sent_along(page: Page, page_node: NodeProcess, valkey: RedisServer) -> None:
    await log_in(page, page_node, 10002)
    await ask(page, "First")
    await status(page, "done")
    await ask(page, f"Second {ENDLESS}")
    await status(page, "answering")
    with valkey.client() as client:
        entries = client.xrange("im:{node:0}:requests")
    assert isinstance(entries, list)
    history = json.loads(entries[-1][1]["history"])
    assert [turn["content"] for turn in history] == ["First", "".join(canned_answer("First"))]
    await stop(page)
    await status(page, "cancelled")


async def test_a_stopped_answer_keeps_its_text_and_can_be_asked_again(page: Page, page_node: NodeProcess) -> None:
    await log_in(page, page_node)
    await ask(page, f"Too long for me {ENDLESS}")
    await has_written(page)
    await stop(page)
    await status(page, "cancelled")
    await says(page, "Stopped")
    assert len((await kept(page))["text"]) > 80
    await page.click(".again")
    await status(page, "answering")
    await stop(page)
    await status(page, "cancelled")


async def test_places_in_the_queue_and_a_full_queue(
    page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    settings = {"concurrency": 1, "queue_limit": 3}
    narrow = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="narrow", settings=settings)
    with narrow.process:
        await log_in(page, narrow)
        await ask(page, "Measured [[demo first=200ms pace=1ms]]")
        await whole_answer(page, "Measured [[demo first=200ms pace=1ms]]")
        await ask_elsewhere(page, f"One {ENDLESS}")
        await status(page, "answering")
        await ask_elsewhere(page, f"Two {ENDLESS}")
        await says(page, "Next in the queue · about ")
        await ask_elsewhere(page, "Three")
        await says(page, "Place 2 in the queue · about ")
        await ask_elsewhere(page, "Four")
        await status(page, "refused")
        refused = await kept(page)
        await says(page, Text.BUSY.en)
        await says(page, "Trying again in")
        await open_conversation(page, "One")
        await stop(page)
        await open_conversation(page, "Three")
        await says(page, "Next in the queue")
        await open_conversation(page, "Two")
        await stop(page)
        await open_conversation(page, "Four")
        await whole_answer(page, "Four")
        assert (await kept(page))["id"] == refused["id"]
    page.forgive_absence()


async def test_a_message_beyond_the_quota_of_the_day_is_told_so_and_not_sent_again(
    page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    one = {"daily_quota": 1, "quota_timezone": NOON}
    few = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="few", settings=one)
    with few.process:
        await log_in(page, few)
        await ask(page, "One")
        await whole_answer(page, "One")
        await ask(page, "Two")
        await status(page, "refused")
        await says(page, QUOTA_EXHAUSTED.en.partition("{until}")[0].format(quota=1))
        await page.until("!document.querySelector('article:last-of-type .again').hidden")
    page.forgive_absence()


async def test_a_message_that_cannot_be_answered_says_so_and_can_be_tried_again(
    page: Page, page_node: NodeProcess
) -> None:
    question = "Refuse me [[demo fail=1 status=400]]"
    await log_in(page, page_node)
    await ask(page, question)
    await status(page, "failed")
    await says(page, Text.REFUSED.en)
    await page.click(".again")
    await whole_answer(page, question)


async def test_an_answer_that_was_cut_is_marked_as_cut(
    page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    node = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="short", settings={"max_answer": 20})
    with node.process:
        await log_in(page, node)
        await ask(page, "Tell me everything")
        await says(page, "Answered by node short · cut at the length limit")
        await page.click("#language")
        await says(page, "已达长度上限，在此截断")
    page.forgive_absence()


async def test_an_interrupted_answer_is_written_again(page: Page, page_node: NodeProcess) -> None:
    question = "Break in the middle [[demo break=1 pace=10ms]]"
    await log_in(page, page_node)
    await ask(page, question)
    await says(page, "Interrupted, writing it again")
    await whole_answer(page, question)


async def test_the_page_works_from_disk_with_the_address_of_a_node_typed_in(
    page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    port = free_port()
    await page.visit(PAGE_ON_DISK.as_uri())
    await page.fill("#address", f"127.0.0.1:{port}")
    await page.press("Enter")
    await page.until("document.querySelector('#no-answer').checkVisibility()")
    page.forgive_absence()
    settings = {"origins": "same,null", "page_token": PAGE_TOKEN}  # as `imstream up` configures it
    late = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="late", port=port, settings=settings)
    with late.process:
        await page.click("#login .main")
        await page.until("document.querySelector('#problem').textContent.startsWith('Please log in with a token')")
        async with peer(late.ws(user_id(10001)), headers={"Origin": "null"}) as framed:  # a sandboxed frame
            await framed.send_frame("INIT", userId=user_id(10001))
            await framed.send_frame("CHAT", userId=user_id(10001), contents="Who is there?", messageId="m-framed")
            assert await framed.closed() == 4500
            assert [frame["code"] for frame in framed.frames] == ["UNAUTHORIZED"]
        # The address that `imstream up` prints.
        await page.visit(f"{PAGE_ON_DISK.as_uri()}#node=127.0.0.1:{port}&token={PAGE_TOKEN}")
        await online(page)
        await ask(page, "From disk?")
        await whole_answer(page, "From disk?")
        await page.call("Page.reload")
        await online(page)
        await whole_answer(page, "From disk?")


async def test_a_token_is_asked_for_only_when_the_node_wants_one_and_kept_nowhere(
    page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    settings = {"auth": "jwt", "auth_secret": SECRET}
    asks = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="asks", settings=settings)
    problem = "document.querySelector('#problem').textContent"
    with asks.process:
        await page.visit(f"{asks.http}/")
        assert await page.evaluate("document.querySelector('#secret').checkVisibility()") is False
        await page.fill("#user", str(user_id(10001)))
        await page.press("Enter")
        await page.until(f"{problem} === 'Please log in with a token'")
        await page.fill("#token", "wrong")
        await page.press("Enter")
        await page.until(f"{problem} === 'This token is not valid'")
        shown = token(exp=time.time() + 600)
        await page.fill("#token", shown)
        await page.press("Enter")
        await online(page)
        await ask(page, "Am I in?")
        await whole_answer(page, "Am I in?")

        stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, location.href])"
        assert shown not in await page.evaluate(stored)
        await page.call("Page.reload")
        await page.until(f"{problem} === 'Please log in with a token'")
        await page.fill("#token", shown)
        await page.press("Enter")
        await online(page)
        await whole_answer(page, "Am I in?")
    page.forgive_absence()


async def test_a_conversation_goes_on_after_its_login_has_ended(
    page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    settings = {"auth": "jwt", "auth_secret": SECRET, "auth_leeway": "0s"}
    asks = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="ends", settings=settings)
    with asks.process:
        await page.visit(f"{asks.http}/")
        await page.fill("#user", str(user_id(10001)))
        await page.press("Enter")
        await page.fill("#token", token(exp=time.time() + 10))  # long enough to ask, on a busy machine too
        await page.press("Enter")
        await online(page)
        question = "Who ends first? [[demo length=400 pace=30ms]]"
        await ask(page, question)
        await has_written(page)
        await page.until(f"document.querySelector('#problem').textContent === {json.dumps(Text.LOGIN_EXPIRED.en)}")
        await page.fill("#token", token(exp=time.time() + 600))
        await page.press("Enter")
        await online(page)
        await whole_answer(page, question)
        await says(page, "tokens")
    page.forgive_absence()


async def test_a_person_who_reads_chinese(chromium: str, page_node: NodeProcess) -> None:
    async with open_page(chromium, lang="zh-CN,zh;q=0.9") as page:
        await page.visit(f"{page_node.http}/")
        await page.until("document.querySelector('#login .main').textContent === '连接'")
        await page.fill("#user", str(user_id(10001)))
        await page.press("Enter")
        await online(page)
        await ask(page, "你好吗? [[demo fail=1 status=400]]")
        await says(page, Text.REFUSED.zh)
        await page.click(".again")
        await whole_answer(page, "你好吗?")
        await page.click("#language")
        await says(page, "Answered by node 0")
        assert await page.evaluate("document.documentElement.lang") == "en"
        assert page.complaints == []


async def test_a_wrong_user_id_is_not_sent(page: Page, page_node: NodeProcess) -> None:
    await page.visit(f"{page_node.http}/")
    wrong, why = {UserIds.NUMBER: ("10000", "above 10000"), UserIds.TEXT: ("a b", "1 to 128 letters")}[USER_IDS]
    await page.fill("#user", wrong)
    await page.press("Enter")
    await page.until(f"document.querySelector('#problem').textContent.includes('{why}')")
    assert await page.evaluate("!document.querySelector('#login').hidden")
    await page.click("#language")
    await page.until("document.querySelector('#problem').textContent.startsWith('用户标识')")


async def test_a_person_logs_in_with_an_e_mail_address_where_ids_are_text(
    page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    settings = {"user_ids": "text"}
    names = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="names", settings=settings)
    with names.process:
        await page.visit(f"{names.http}/")
        assert await page.evaluate("document.querySelector('#login label').innerText.trim()") == "User id"
        for user in ("ada+im@example.com", "10001"):
            await page.fill("#user", user)
            await page.press("Enter")
            await online(page)
            assert user in await page.evaluate("document.querySelector('#who').textContent")
            await ask(page, f"Who is {user}? [[demo pace=1ms]]")
            await whole_answer(page, f"Who is {user}?")
            with valkey.client() as client:
                assert len(list(client.scan_iter(f"im:{{user:{user}}}:reply:*"))) >= 1
            await page.evaluate("document.querySelector('#leave').click()")
            await page.click("#dialog button")
            await page.until("!document.querySelector('#login').hidden")


async def test_enter_chooses_a_word_in_an_input_method_and_sends_otherwise(page: Page, page_node: NodeProcess) -> None:
    await log_in(page, page_node)
    await page.click("textarea")
    await page.call("Input.imeSetComposition", text="nihao", selectionStart=5, selectionEnd=5)
    await page.press("Enter")
    await page.call("Input.insertText", text="你好")
    await page.press("Enter", shift=True)
    await page.call("Input.insertText", text="再见")
    assert await page.evaluate("document.querySelectorAll('article').length") == 0
    await page.press("Enter")
    await page.until(f"{LAST}?.querySelector('.question').textContent === '你好\\n再见'")


async def test_what_people_and_models_write_is_never_html(page: Page, page_node: NodeProcess) -> None:
    question = "<img src=x onerror=document.title='hacked'> <script>document.title='hacked'</script>"
    await log_in(page, page_node)
    await ask(page, question)
    await whole_answer(page, question)
    assert await page.evaluate(f"{LAST}.querySelector('blockquote').textContent") == question
    assert await page.evaluate("document.querySelectorAll('article img, article script').length") == 0
    assert await page.evaluate("document.title") == "imstream"


async def test_texts_of_people_and_models_are_read_in_the_order_of_writing(page: Page, page_node: NodeProcess) -> None:
    turned = "\u202e\u202d\u2067abc"  # overrides, and an isolate without an end
    text = f"{turned} `{turned} d` **{turned} e** f\n```\n{turned}\n```\n- {turned}"
    message = {"contents": f"{turned} ?", "text": text, "status": "done", "node": f"{turned}שלום"}
    await log_in(page, page_node)
    await page.keep(**message)
    await page.call("Page.reload")
    await status(page, "done")
    # Each character of a line stands to the right of the one before it.
    in_order = """(root) => {
      const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
      let right = -1, top = -1, seen = 0;
      for (let node; (node = walker.nextNode()); ) for (let at = 0; at < node.length; at++) {
        const range = document.createRange();
        range.setStart(node, at), range.setEnd(node, at + 1);
        const box = range.getBoundingClientRect();
        if (!box.width) continue;
        if (Math.abs(box.top - top) > 8) [right, top] = [-1, box.top];
        if (box.left < right - 1) return node.textContent;
        [right, seen] = [box.right, seen + 1];
      }
      return seen;
    }"""
    assert await page.evaluate(f"({in_order})({LAST}.querySelector('.question'))") == len("abc ?")
    assert await page.evaluate(f"({in_order})({LAST}.querySelector('.answer'))") == len("abc abc d abc e fCopyabcabc")
    shown = await page.evaluate(f"{LAST}.querySelector('.status').textContent")
    assert shown == "Answered by node \u2068abcשלום\u2069"
    assert (await kept(page))["text"] == text  # and the copied text is the original


async def test_answers_are_set_as_they_were_meant(page: Page, page_node: NodeProcess) -> None:
    text = """\
# Title
Some `code` and **weight**.

1. one
- two
> said

```python
a = 1

# no title
```
after
```
open"""
    wanted = [
        "H3 Title",
        "P Some <code>code</code> and <strong>weight</strong>.",
        "OL <li><p>one</p></li>",
        "UL <li><p>two</p></li>",
        "BLOCKQUOTE <p>said</p>",
        "python Copy a = 1\n\n# no title",
        "P after",
        " Copy open",
    ]
    message = {"contents": "?", "text": text, "status": "done"}
    await log_in(page, page_node)
    await page.keep(**message)
    await page.call("Page.reload")
    await status(page, "done")
    shown = await page.evaluate(
        f"[...{LAST}.querySelector('.answer').children].map((e) => e.className === 'code'"
        " ? [...e.querySelectorAll('span, button, code')].map((part) => part.textContent).join(' ')"
        " : `${e.tagName} ${e.innerHTML}`)"
    )
    assert shown == wanted


async def test_the_newest_words_stay_in_view_unless_the_person_scrolled_up(page: Page, page_node: NodeProcess) -> None:
    log = "document.querySelector('#log')"
    at_end = f"{log}.scrollHeight - {log}.scrollTop - {log}.clientHeight < 5"
    await log_in(page, page_node)
    await ask(page, f"A long one {ENDLESS}")
    await page.until(f"{log}.scrollHeight > 2 * {log}.clientHeight")
    await page.until(at_end)
    await page.evaluate(f"{log}.scrollTop = 100")
    await page.until("!document.querySelector('#latest').hidden")
    await has_written(page, await page.evaluate(f"{LAST}.querySelector('.answer').textContent.length") + 40)
    assert await page.evaluate(f"{log}.scrollTop") == 100
    await page.click("#latest")
    await page.until(at_end)
    await stop(page)
    await status(page, "cancelled")


async def test_a_long_conversation_opens_at_its_end_and_stays_there(page: Page, page_node: NodeProcess) -> None:
    log = "document.querySelector('#log')"
    at_end = f"{log}.scrollHeight - {log}.scrollTop - {log}.clientHeight < 5"
    text = "A paragraph of some words, as models write them.\n\n```\ncode\n```\n\n- item\n\n" * 1000
    await log_in(page, page_node, 10051)
    await page.keep(text=text)
    await page.call("Page.reload")
    await status(page, "done")
    await page.until(at_end)
    await page.drawn()
    assert await page.evaluate(at_end)
    # Blocks far above the view need no layout and no painting while the answer grows.
    above = "document.querySelector('.answer li').checkVisibility({ contentVisibilityAuto: true })"
    assert await page.evaluate(above) is False
    await ask(page, f"And more {ENDLESS}")
    await has_written(page)
    await page.until(at_end)
    await page.press("Escape")
    await status(page, "cancelled")


async def test_an_answer_is_copied_as_it_was_written(page: Page, page_node: NodeProcess) -> None:
    await log_in(page, page_node)
    await ask(page, "Copy me")
    await status(page, "done")
    await page.allow_clipboard()
    await page.click("article:last-of-type .copy")
    await page.until(f"{LAST}.querySelector('.copy').textContent.includes('Copied')")
    assert await page.evaluate("navigator.clipboard.readText()") == "".join(canned_answer("Copy me"))


async def test_a_logout_asks_whether_to_keep_the_conversations(page: Page, page_node: NodeProcess) -> None:
    async def log_out(button: int) -> None:
        await open_menu(page)
        await page.click("#leave")
        await page.click(f"#dialog button:nth-child({button})")

    await log_in(page, page_node, 10003)
    await page.click("#ideas button")
    await status(page, "done")
    await log_out(3)  # cancel
    await page.until("!document.querySelector('#dialog').open")
    assert await page.evaluate("document.querySelector('#chat').checkVisibility()")
    await log_out(1)
    await page.until("!document.querySelector('#login').hidden")
    assert await page.evaluate("document.querySelector('#user').value") == str(user_id(10003))
    assert await page.evaluate("document.querySelectorAll('article').length") == 0
    await page.press("Enter")
    await online(page)
    await open_conversation(page, "How does a message survive")
    await status(page, "done")
    await log_out(2)
    await page.until("!document.querySelector('#login').hidden")
    assert await page.kept() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 568)], ids=["desk", "phone", "small-phone"])
async def test_everything_fits_on_the_screen(
    page: Page, long_named: NodeProcess, tmp_path: Path, size: tuple[int, int], *, dark: bool
) -> None:
    await page.look(size, dark=dark)
    await log_in(page, long_named)
    await ask(page, "Is there room for a word like " + 20 * "Donaudampfschifffahrt" + "?")
    await status(page, "done")
    await page.drawn()
    width, height = size
    assert await page.evaluate("document.documentElement.scrollWidth") == width
    await open_menu(page)
    outside = await page.evaluate(
        f"[...document.querySelectorAll('header *, #write *, article *')].filter((e) => e.checkVisibility())"
        f".filter((e) => e.getBoundingClientRect().right > {width} + 0.5).map((e) => e.outerHTML)"
    )
    assert outside == []
    assert await page.evaluate("document.querySelector('#write').getBoundingClientRect().bottom") <= height
    paper = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in paper.strip("rgb()").split(",")) < 200) == dark
    await asyncio.to_thread((tmp_path / "page.png").write_bytes, await page.screenshot())
