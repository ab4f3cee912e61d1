"""A real model, killed in the middle of an answer, or its node: the answer continues and equals one without a fault.

At temperature 0 the model gives one question one answer, so the assembled text must be that answer to the character.
(Unless it computes in batches, see `tests/support/exact_model.py`.)
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.local_model import LocalModel, require_model, start_model
from tests.support.one_node import OneNode, one_node
from tests.support.peer import Told
from tests.support.servers import RedisServer
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("unmeasured")]

USER = user_id(10001)
QUESTION = "Explain in one paragraph what a message queue is."
TOKENS = 300  # three times those of the answer: the text so far is estimated when the rest is limited
BODY = '{"temperature": 0, "cache_prompt": false}'  # prompts that are cached round differently
SHOWN = pytest.mark.parametrize("shown", [1, 120, 400])
"""Characters that the client has received when something dies."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalModel]:
    """A server of the model that no test kills."""
    require_model()
    started = start_model(tmp_path_factory.mktemp("model"), exact=True)
    with started.process:
        yield started


def backends(folder: Path, *models: LocalModel) -> Path:
    """A file of backends, the preferred one first."""
    file = folder / "backends.toml"
    tables = [
        f'[[backend]]\nname = "model-{number}"\npriority = {number}\nurl = "{model.url}"\nmodel = "any"\n'
        f'continue = "assistant"\nmax_tokens = "max_tokens"\nbody = {{temperature = 0, cache_prompt = false}}\n'
        for number, model in enumerate(models)
    ]
    file.write_text("\n".join(tables), "utf-8")
    return file


async def whole_answer(node: OneNode) -> str:
    """The answer that nothing interrupts."""
    async with node.peer(USER) as someone:
        await someone.chat(USER, QUESTION, "whole")
        return (await someone.end_of("whole")).text


async def cut_answer(node: OneNode, shown: int) -> Told:
    """The text of a client when its node is killed in the middle of the answer, a part of which is recorded."""
    async with node.peer(USER) as someone:
        await someone.chat(USER, QUESTION, "cut")
        told = await someone.some_text("cut", shown)
        await wait_until(lambda: any("text" in entry for entry in node.record(USER, "cut")), "text is recorded")
        await node.killed()
    return told


def has_continued(node: OneNode) -> bool:
    """Whether the last attempt began behind recorded text."""
    *_, opened = (entry for entry in node.record(USER, "cut") if entry["event"] == "opened")
    return int(opened["offset"]) > 0


@SHOWN
async def test_an_answer_goes_on_at_another_server_when_its_own_is_killed(
    shown: int, model: LocalModel, redis_server: RedisServer, tmp_path: Path
) -> None:
    first = await asyncio.to_thread(start_model, tmp_path, exact=True)
    with first.process:
        file = backends(tmp_path, first, model)
        async with one_node(tmp_path, redis_server, first.url, ai_backends=file, answer_tokens=TOKENS) as node:
            whole = await whole_answer(node)
            async with node.peer(USER) as someone:
                await someone.chat(USER, QUESTION, "cut")
                await someone.some_text("cut", shown)
                await asyncio.to_thread(first.process.kill)
                told = await someone.end_of("cut")
            assert told.text == whole
            assert (told.attempt, "restart" in told.events) == (1, False)
            assert node.recorded(USER, "cut") == ("done", whole)
            assert has_continued(node)
            await node.settled()


@SHOWN
async def test_an_answer_goes_on_when_its_node_is_killed_and_started_again(
    shown: int, model: LocalModel, redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = model.node_settings(ai_body=BODY, answer_tokens=TOKENS)
    async with one_node(tmp_path, redis_server, model.url, **settings) as node:
        whole = await whole_answer(node)
        told = await cut_answer(node, shown)
        await node.start()
        async with node.peer(USER, resume={"cut": told}) as someone:
            assert (await someone.end_of("cut")).text == whole
        assert node.recorded(USER, "cut") == ("done", whole)
        assert has_continued(node)
        await wait_until(lambda: model.busy_slots() == 0, "the call of the killed node has ended")
        await node.settled()


@SHOWN
async def test_an_answer_goes_on_at_the_node_that_adopts_it(
    shown: int, model: LocalModel, redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = model.node_settings(ai_body=BODY, answer_tokens=TOKENS, lease="1s")
    async with one_node(tmp_path, redis_server, model.url, **settings) as node:
        whole = await whole_answer(node)
        adopter = OneNode(tmp_path, node.redis, node.redis_url, model.url, node.settings, name="1")
        await adopter.start()
        with adopter.now.process:
            told = await cut_answer(node, shown)
            async with adopter.peer(USER, resume={"cut": told}) as someone:
                assert (await someone.end_of("cut")).text == whole
            assert node.recorded(USER, "cut") == ("done", whole)
            assert has_continued(node)
            await node.all_finished()
