"""Commands of operators for dead letters: `imstream dead`."""

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import wraps
from itertools import count
from typing import Any

import click

from imstream.cli.admin import DEAD_LETTER, redis_command
from imstream.cli.options import TimeSpan
from imstream.cli.output import echo, json_option, json_text
from imstream.cli.output import show as print_all
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.dead_letters import DeadLetterOffice, Letter, Selection

_OUTCOMES = {
    "retried": "is a request again",
    "expired": "is a request again; its reply has expired, so only clients that are connected then see the answer",
    "unknown": "is not there: it was retried before, purged or dropped",
    "node_full": "stays: the node has no room (IMSTREAM_QUEUE_LIMIT)",
    "user_full": "stays: the user has no room (IMSTREAM_USER_LIMIT)",
    "purged": "is deleted",
    "would_retry": "would be retried",
    "would_purge": "would be deleted",
}
_STAYS = frozenset({"node_full", "user_full"})


def _command(
    *, changes: bool = False, limit: int | None = None
) -> Callable[[Callable[..., Awaitable[bool]]], Callable[..., None]]:
    """Add the options that select letters. The command gets the office and the letters; its result is its success."""

    def decorate(command: Callable[..., Awaitable[bool]]) -> Callable[..., None]:
        @wraps(command)
        async def run(
            redis: RedisClient,
            settings: Settings,
            *,
            every: bool,
            limit: int | None,
            **options: Any,  # noqa: ANN401 - any option
        ) -> None:
            selection = Selection(**{name: options.pop(name) for name in Selection._fields})
            office = DeadLetterOffice(redis, settings)
            nodes = await office.nodes() if every else [settings.node]
            letters = _selected(office, nodes, selection, limit, newest_first=not changes)
            async with aclosing(letters):
                if not await command(office, letters, **options):
                    raise SystemExit(1)

        shown = "" if limit is None else f"; default {limit}"
        dry_run = click.option("--dry-run", is_flag=True, help="Only show which letters are meant.")
        options = [
            *([dry_run] if changes else []),
            click.argument("ids", nargs=-1, metavar="[ID]..."),
            click.option("--all", "every", is_flag=True, help="All nodes, also those that are gone for good."),
            click.option("--reason", help="Only letters with this reason, such as http_503."),
            click.option("--user", help="Only letters of this user."),
            click.option("--since", type=TimeSpan(), help="Only letters at most so old, such as 2h."),
            click.option("--limit", type=click.IntRange(1), default=limit, help=f"Maximum number of letters{shown}."),
            json_option,
        ]
        for option in reversed(options):
            run = option(run)
        return redis_command("node")(run)

    return decorate


async def _selected(
    office: DeadLetterOffice, nodes: list[str], selection: Selection, limit: int | None, *, newest_first: bool
) -> AsyncGenerator[Letter]:
    """The selected letters, node by node, at most `limit`."""
    numbers = count(1)
    for node in nodes:
        async with aclosing(office.letters(node, selection, newest_first=newest_first)) as letters:
            async for letter in letters:
                yield letter
                if next(numbers) == limit:
                    return


@click.group()
def dead() -> None:
    """List, show, retry and purge requests that were given up.

    Each dead letter is named by the ID in the first column, or selected by the options. Without --all, those of --node.
    """


@dead.command("list")
@_command(limit=20)
async def list_(_: DeadLetterOffice, letters: AsyncGenerator[Letter], *, as_json: bool) -> bool:
    """List dead letters, the newest first, without their text."""
    rows = [_row(letter) async for letter in letters]
    lines = [
        f"{row['id']}  {row['dead_at'][:19].replace('T', ' ')} UTC  node {row['node']}  {DEAD_LETTER.format(**row)}"
        for row in rows
    ]
    print_all(rows, lines or ["no dead letters"], as_json=as_json)
    return True


@dead.command()
@_command(limit=20)
async def show(_: DeadLetterOffice, letters: AsyncGenerator[Letter], *, as_json: bool) -> bool:
    """Show dead letters with all of their fields, including the user's text and the history."""
    shown = [{**letter.fields, **_row(letter)} async for letter in letters]
    lines = (line for row in shown for line in (*(f"{name:<11} {json_text(row[name])[1:-1]}" for name in row), ""))
    if shown or as_json:
        print_all(shown, lines, as_json=as_json)
    if not shown:
        echo("no dead letters", err=True)
    return bool(shown)


@dead.command()
@_command(changes=True)
async def retry(office: DeadLetterOffice, letters: AsyncGenerator[Letter], *, as_json: bool, dry_run: bool) -> bool:
    """Make requests of dead letters again, the oldest first.

    The answer is recorded under the same message id. Connected clients of the user receive restart and the answer, also
    after they have shown failed; others find it by resume. Letters that do not fit the caps of the node or of the user
    stay; then the command ends with 1, and can be repeated. A letter is never answered twice.
    """
    if not dry_run and (older := await office.older_nodes()):
        names = ", ".join(older)
        raise click.ClickException(f"a release that would lose retried letters runs on node {names}: upgrade")
    full = set[str]()

    async def outcome(letter: Letter) -> str:
        if dry_run:
            return "would_retry"
        if letter.node in full:
            return "node_full"
        has_reply = await office.has_reply(letter)  # before its worker may begin a new one
        verdict = await office.retry(letter)
        if verdict == "node_full":
            full.add(letter.node)
        return "expired" if verdict == "retried" and not has_reply else verdict

    return await _change(letters, outcome, as_json=as_json)


@dead.command()
@_command(changes=True)
async def purge(office: DeadLetterOffice, letters: AsyncGenerator[Letter], *, as_json: bool, dry_run: bool) -> bool:
    """Delete dead letters for good."""

    async def outcome(letter: Letter) -> str:
        if dry_run:
            return "would_purge"
        return "purged" if await office.purge(letter) else "unknown"

    return await _change(letters, outcome, as_json=as_json)


async def _change(
    letters: AsyncGenerator[Letter], change: Callable[[Letter], Awaitable[str]], *, as_json: bool
) -> bool:
    """Change each letter and print the result. Returns whether all were changed."""
    outcomes = Counter[str]()
    async for letter in letters:
        outcome, row = await change(letter), _row(letter)
        outcomes[outcome] += 1
        if as_json:  # a line for each: the command may be interrupted
            echo(json_text({**row, "outcome": outcome}))
        elif outcome not in _STAYS or outcomes[outcome] == 1:
            name = f"{row['id']}  node {row['node']}  user {row['user']}  message {row['message_id']}"
            echo(f"{name}  {_OUTCOMES[outcome]}")
    if not as_json:
        echo(", ".join(f"{outcome}: {number}" for outcome, number in outcomes.items()) or "no dead letters")
    return _STAYS.isdisjoint(outcomes)


def _row(letter: Letter) -> dict[str, str]:
    at = letter.dead_at.isoformat("T", "seconds")
    return {"id": letter.entry_id, "node": letter.node, "dead_at": at, **letter.about}
