"""Conversations, tabs, and the notes of the page on a message, in a real Chromium with a real node."""

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from imstream.cli.main import main
from imstream.demo.answer import canned_answer
from imstream.texts import Text
from tests.journeys.page_steps import (
    ENDLESS,
    LAST,
    SLOW,
    ask,
    ask_elsewhere,
    has_written,
    kept,
    listed,
    log_in,
    online,
    open_conversation,
    open_list,
    open_menu,
    open_question,
    says,
    status,
    whole_answer,
)
from tests.journeys.page_support import PHONE, Page, open_page, open_tab
from tests.journeys.test_wire_thinking import STOP, Model, delta
from tests.support.scripted_backend import DONE, scripted_backend
from tests.support.servers import DemoBackend, NodeProcess, RedisServer, start_node
from tests.support.users import user_id

pytestmark = pytest.mark.usefixtures("unmeasured")

SHOWN = f"{LAST}.querySelector('.answer').textContent"
QUESTIONS = "[...document.querySelectorAll('.question')].map((e) => e.textContent)"
FOCUSED = "document.activeElement"


async def test_a_second_question_is_sent_with_the_first_answer_when_that_is_there(
    page: Page, page_node: NodeProcess, valkey: RedisServer
) -> None:
    await log_in(page, page_node, 10011)
    await ask(page, f"First {SLOW}")
    await has_written(page, 20)
    await ask(page, f"Second {ENDLESS}")
    await says(page, "Will be sent after the answer above")
    await status(page, "answering")
    with valkey.client() as client:
        entries = client.xrange("im:{node:0}:requests")
    assert isinstance(entries, list)
    history = json.loads(entries[-1][1]["history"])
    assert [turn["content"] for turn in history] == [f"First {SLOW}", "".join(canned_answer(f"First {SLOW}"))]
    await page.press("Escape")
    await status(page, "cancelled")


@pytest.mark.long
async def test_a_long_conversation_is_sent_with_as_many_turns_as_a_message_may_have(
    page: Page, demo: DemoBackend, valkey: RedisServer, tmp_path: Path
) -> None:
    short = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="short", settings={"max_history": 2})
    with short.process:
        await log_in(page, short, 10026)
        for question in ("First", "Second", "Third"):
            await ask(page, question)
            await whole_answer(page, question)
    page.forgive_absence()


@pytest.mark.long
async def test_a_question_after_one_without_an_answer_waits_for_the_user_and_can_be_taken_back(
    page: Page, page_node: NodeProcess
) -> None:
    await log_in(page, page_node, 10012)
    await ask(page, "First [[demo fail=1 status=400 first=1s]]")
    await ask(page, "Second")
    await says(page, "Not sent, because the message above has no answer")
    await page.click("article:last-of-type .stop")
    await page.until("document.querySelectorAll('article').length === 1")
    assert await page.evaluate("document.querySelector('#box').value") == "Second"
    assert await page.evaluate(f"{FOCUSED}.id") == "box"
    await page.click("#write button")
    await page.click("article:last-of-type .again")
    await whole_answer(page, "Second")


async def test_conversations_are_listed_in_later_tabs_and_deleted_in_all_of_them(
    page: Page, page_node: NodeProcess
) -> None:
    await log_in(page, page_node, 10013)
    await ask(page, "The first conversation")
    await whole_answer(page, "The first conversation")
    await ask_elsewhere(page, "The second one")
    await whole_answer(page, "The second one")
    later = await open_tab(page)
    await log_in(later, page_node, 10013)
    assert await later.evaluate("document.querySelectorAll('article').length") == 0
    await open_list(later)
    await later.until("document.querySelectorAll('#list li').length === 2")
    assert await listed(later) == ["The second one", "The first conversation"]
    await open_conversation(later, "The first")
    await status(later, "done")
    await later.click("#list li:nth-child(2) .remove")
    assert "Delete the conversation “The first" in await later.evaluate("document.querySelector('#dialog').innerText")
    assert await later.evaluate(f"{FOCUSED}.textContent") == "Cancel"
    await later.press("Escape")
    await later.until("!document.querySelector('#dialog').open")
    await later.until(f"{FOCUSED}.ariaLabel === 'Delete “The first conversation”'")
    await later.click("#list li:nth-child(2) .remove")
    await later.click("#dialog button")
    await later.until("document.querySelectorAll('#list li').length === 1")
    await later.until("!document.querySelector('#welcome').hidden")
    await open_list(page)
    await page.until("document.querySelectorAll('#list li').length === 1")
    assert [record["contents"] for record in await page.kept()] == ["The second one"]


@pytest.mark.long
async def test_conversations_that_are_deleted_at_the_logout_leave_nothing_of_another_tab(
    page: Page, page_node: NodeProcess
) -> None:
    await log_in(page, page_node, 10041)
    await ask(page, "Known here")
    await whole_answer(page, "Known here")
    await page.keep(id="c9.m9", conversation="c9", contents="Known to another tab")
    await open_menu(page)
    await page.click("#leave")
    await page.until("document.querySelector('#dialog').open")
    await page.click("#dialog button:nth-child(2)")
    await page.until("!document.querySelector('#login').hidden")
    assert await page.kept() == []


@pytest.mark.long
async def test_a_running_answer_is_seen_with_its_question_on_every_device_of_the_user(
    page: Page, chromium: str, page_node: NodeProcess
) -> None:
    await log_in(page, page_node, 10014)
    async with open_page(chromium) as device, open_page(chromium) as late:
        await log_in(device, page_node, 10014)
        await ask(page, f"Who sees me? {ENDLESS}")
        await has_written(device, 20)
        await log_in(late, page_node, 10014)
        tab = await open_tab(page)
        await log_in(tab, page_node, 10014)
        for one in (late, tab):
            await has_written(one, 20)
        await page.press("Escape")
        for one in (page, device, late, tab):
            await status(one, "cancelled")
            assert await one.evaluate(QUESTIONS) == [f"Who sees me? {ENDLESS}"]
        await ask(device, "And an answer from there?")
        for one in (page, device, late):
            await page.until("document.querySelectorAll('article').length === 2")
            await whole_answer(one, "And an answer from there?")
        assert device.complaints == late.complaints == []


@pytest.mark.long
async def test_an_answer_is_written_again_and_replaces_the_first_one(page: Page, page_node: NodeProcess) -> None:
    await log_in(page, page_node, 10015)
    await ask(page, "Again, please")
    await whole_answer(page, "Again, please")
    first = (await kept(page))["id"]
    await page.evaluate(f"{LAST}.querySelector('.again').focus()")
    await page.press("Enter")
    await page.until(
        f"{LAST}.querySelector('.again').textContent === 'Answer again' && {LAST}.dataset.live === 'false'"
    )
    await whole_answer(page, "Again, please")
    [record] = await page.kept()
    assert record["id"] != first
    assert await page.evaluate(f"{LAST}.contains({FOCUSED})")


async def test_thinking_is_timed_and_shown_and_the_old_text_stays_grey_until_the_new_one_passes_it(
    page: Page, valkey: RedisServer, tmp_path: Path
) -> None:
    model = Model()
    isold = f"{LAST}.querySelector('.answer').classList.contains('old')"
    async with scripted_backend(model) as backend:
        settings = {"thinking": "show", "retry_window": "60s"}
        thinks = start_node(tmp_path, redis_url=valkey.url, ai_url=backend.url, node="thinks", settings=settings)
        with thinks.process:
            await log_in(page, thinks, 10016)
            await page.fill("#box", "What is 6 times 7?")
            await page.press("Enter")
            await says(page, "The AI has the question")
            model.says(delta(reasoning="Six times "), delta(reasoning="seven"))
            await page.until(f"/^Thinking · [1-9]\\d* s$/.test({LAST}.querySelector('.status').textContent)")
            await page.click(".thinking summary")
            await page.until(f"{LAST}.querySelector('.thinking p').textContent === 'Six times seven'")
            model.says(delta(content="It is forty-one, I think"))
            await page.until(f"{SHOWN} === 'It is forty-one, I think'")
            assert await page.evaluate(f"{LAST}.querySelector('.thinking p').checkVisibility()")
            model.says(b"")
            await page.until(isold)
            await says(page, "writing it again (attempt 2)")
            model.says(delta(content="It is forty-two"))
            assert await page.evaluate(SHOWN) == "It is forty-one, I think"
            model.says(delta(content=", which is certain"))
            await page.until(f"{SHOWN} === 'It is forty-two, which is certain' && !{isold}")
            model.says(event_length(), DONE)
            await says(page, "cut at the length limit")
            assert (await kept(page))["text"] == "It is forty-two, which is certain"
    page.forgive_absence()


def event_length() -> bytes:
    """The last part of an answer that has reached the model's limit."""
    return STOP.replace(b'"stop"', b'"length"')


async def run(*command: str) -> None:
    """Run a command of operators."""
    result = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert result.exit_code == 0, result.output


async def test_the_page_shows_that_an_operator_has_paused_the_service(
    page: Page, page_node: NodeProcess, valkey: RedisServer
) -> None:
    await log_in(page, page_node, 10022)
    await run("pause", "--redis", valkey.admin_url, "--all")
    try:
        await ask(page, "Are you resting?")
        await says(page, "The service is paused; the answer follows later")
    finally:
        await run("resume", "--redis", valkey.admin_url, "--all")
    await whole_answer(page, "Are you resting?")


@pytest.mark.long
async def test_the_page_counts_down_each_time_while_the_ai_service_is_away(
    page: Page, valkey: RedisServer, demo: DemoBackend, tmp_path: Path
) -> None:
    settings = {"ai_breaker_failures": 1, "ai_breaker_pause": "1s", "retry_window": "60s"}
    away = start_node(tmp_path, redis_url=valkey.url, ai_url=demo.url, node="away", settings=settings)
    with away.process:
        await log_in(page, away, 10017)
        await page.evaluate(
            "(window.told = new Set(), new MutationObserver(() => "
            f"told.add({LAST}?.querySelector('.status').textContent))"
            ".observe(document.querySelector('#exchanges'), { subtree: true, childList: true, characterData: true }))"
        )
        await ask(page, "Are you there? [[demo fail=2]]")
        await whole_answer(page, "Are you there?")
        told = await page.evaluate("[...told].join('\\n')")
        for seconds in (1, 2):  # the breaker's pause doubles
            assert f"The AI service is away, trying again in {seconds} s" in told
    page.forgive_absence()


async def test_a_message_that_is_answered_after_it_has_failed_is_shown_as_such_also_after_a_reload(
    page: Page, page_node: NodeProcess, valkey: RedisServer
) -> None:
    question = "Answer me after all [[demo fail=1 status=400]]"
    await log_in(page, page_node, 10018)
    await ask(page, question)
    await says(page, Text.REFUSED.en)
    await page.call("Page.reload")
    await online(page)
    await says(page, Text.REFUSED.en)
    await run("dead", "retry", "--redis", valkey.admin_url, "--node", "0", "--user", str(user_id(10018)))
    await says(page, "after it had failed at first")
    await whole_answer(page, question)
    await page.call("Page.reload")
    await says(page, "after it had failed at first")


async def test_a_text_that_is_too_long_is_kept_and_its_excess_is_shown(page: Page, page_node: NodeProcess) -> None:
    await log_in(page, page_node, 10019)
    await page.fill("#box", "长" * 22_000)
    await page.until("document.querySelector('#too-long').textContent.startsWith('Too long for one message: ')")
    await page.press("Enter")
    assert await page.evaluate("document.querySelector('#box').value.length") == 22_000
    assert await page.evaluate("document.querySelector('#write button').disabled")
    count = int(await page.evaluate("document.querySelector('#too-long').textContent.replace(/\\D/g, '')"))
    await page.evaluate("document.querySelector('#box').focus()")
    await page.fill("#box", "长" * (22_000 - count))
    await page.until("document.querySelector('#too-long').hidden")
    await page.press("Enter")
    await says(page, "This message is too long: it has about ")  # too long for the model: only the node can count that


@pytest.mark.long
async def test_enter_is_a_new_line_on_a_phone(page: Page, page_node: NodeProcess) -> None:
    await page.look(PHONE)
    await log_in(page, page_node, 10020)
    await page.fill("#box", "One")
    await page.press("Enter")
    await page.call("Input.insertText", text="two")
    assert await page.evaluate("document.querySelector('#box').value") == "One\ntwo"
    await page.click("#write button")
    await status(page, "done")
    assert await page.evaluate(QUESTIONS) == ["One\ntwo"]


async def test_messages_just_stored_by_another_tab_are_deleted_with_the_conversation(
    page: Page, page_node: NodeProcess
) -> None:
    await page.visit(f"{page_node.http}/")
    await page.until("document.querySelector('#language').textContent")
    race = """(async () => {
      const { Archive } = await import("/page-store.js");
      const told = [];
      const open = (ids) => new Archive("10001 http://here/", (removed) => ids.push(...removed));
      const [one, other] = [open([]), open(told)];
      const record = { id: "m1", conversation: "c1", at: 1 };
      await Promise.all([one, other].map((archive) => archive.put(record)));
      one.remove(["m1"]);
      other.put(record); // it has not heard of that yet
      while (!told.length) await new Promise((resolve) => setTimeout(resolve));
      return (await other.all()).length;
    })()"""
    assert await page.evaluate(race) == 0


@pytest.mark.long
async def test_a_conversation_that_two_tabs_delete_at_once_is_gone_in_both(page: Page, page_node: NodeProcess) -> None:
    await log_in(page, page_node, 10042)
    await ask(page, f"Delete me twice {ENDLESS}")
    await has_written(page)
    other = await open_tab(page)
    await log_in(other, page_node, 10042)
    for tab in (page, other):
        await open_question(tab)
    for tab in (page, other):
        await tab.evaluate("document.querySelector('#dialog button').click()")
    for tab in (page, other):
        await tab.until("document.querySelectorAll('#list li').length === 0")
        await tab.until("!document.querySelector('#welcome').hidden")
        await tab.until(f"{FOCUSED} !== document.body")
    assert await page.kept() == []
    await ask(other, "And now?")
    await whole_answer(other, "And now?")


async def test_conversations_that_the_browser_does_not_keep_are_not_lost_without_a_question(
    page: Page, page_node: NodeProcess
) -> None:
    forbid = "Object.defineProperty(window, 'indexedDB', { get() { throw new DOMException('', 'SecurityError'); } })"
    await page.call("Page.addScriptToEvaluateOnNewDocument", source=forbid)
    await log_in(page, page_node, 10043)
    await ask(page, "Private?")
    await status(page, "done")
    await open_list(page)
    await page.until("document.querySelector('#not-kept').checkVisibility()")
    assert await listed(page) == ["Private?"]
    await page.evaluate("document.querySelector('#leave').click()")
    await page.until("document.querySelector('#dialog').innerText.includes('they are lost')")
    await page.click("#dialog button:nth-child(2)")
    await page.until("!document.querySelector('#dialog').open")
    assert await page.evaluate("document.querySelectorAll('article').length") == 1
    await page.evaluate("document.querySelector('#leave').click()")
    # Declined, and asked again before the event that the dialog has closed, which does not answer the new question.
    await page.evaluate(
        "new Promise((resolve) => { const [back, leave] = ['#dialog button:nth-child(2)', '#leave']"
        ".map((name) => document.querySelector(name)); document.querySelector('#dialog')"
        ".addEventListener('close', resolve, { once: true }); back.click(); leave.click(); })"
    )
    await page.click("#dialog button")
    await page.until("!document.querySelector('#login').hidden")
