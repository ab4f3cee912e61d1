"""`imstream explain`: the timeline of one message."""

import sys
from collections.abc import Iterator

import click

from imstream.cli.admin import redis_command
from imstream.cli.options import parse_user_id
from imstream.cli.output import age, json_option, show, table
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.timeline import Event, Timeline, newest
from imstream.store.timeline import explain as read_timeline

LISTED = 10  # number of messages that are listed
_ONLY_JSON = {"since", "request", "retry_after", "characters", "counted"}  # fields that lines leave out


@click.command()
@redis_command("user_ids")
@json_option
@click.argument("user")
@click.argument("message", required=False)
async def explain(redis: RedisClient, settings: Settings, *, user: str, message: str | None, as_json: bool) -> None:
    """Show the history of a message, from Redis alone. Without MESSAGE, the user's newest messages are listed.

    It works while the message runs and as long as its reply is kept. Shows when it was asked, which nodes worked on it,
    which backend it waited for and why, its attempts and their text in characters, its end and its dead letter; never a
    text. Lists facts that are not recorded. Ends with 1 if there is no record.
    """
    user_id, keys = parse_user_id(user, settings.user_ids), Keys(settings.key_prefix)
    if message is None:
        listed = await newest(redis, keys, user_id, LISTED)
        show({"user": user_id, "messages": listed}, _listed(listed), as_json=as_json)
        sys.exit(not listed)
    found = await read_timeline(redis, keys, user_id, message)
    show(found, _lines(found), as_json=as_json)
    sys.exit(found.state == "unknown" and not found.events)


def _listed(found: list[Timeline]) -> Iterator[str]:
    if not found:
        yield "Redis has no messages of this user: none was accepted, or they have expired"
        return
    asked = (f"{one.events[0].at:%Y-%m-%d %H:%M:%S} UTC" if one.events else None for one in found)
    rows = ((at, one.message_id, one.now) for at, one in zip(asked, found, strict=True))
    yield from table([("asked", "message", "state"), *rows])


def _lines(found: Timeline) -> Iterator[str]:
    yield f"user {found.user}, message {found.message_id}: {found.now}"
    begin = found.events[0].at if found.events else None
    for one in found.events:
        passed = (one.at - begin).total_seconds() if begin else 0
        yield f"  {one.at:%Y-%m-%d %H:%M:%S}.{one.at.microsecond // 1000:03} UTC  {passed:+9.3f} s  {_sentence(one)}"
    if found.kept_for is not None:
        yield f"  the reply is kept for {age(found.kept_for)}"
    for gap in found.unknown:
        yield f"  not known: {gap}"


def _sentence(one: Event) -> str:
    about = one.about
    rest = "  ".join(f"{name} {' '.join(value.split())}" for name, value in about.items() if name not in _ONLY_JSON)
    match one.event:
        case "opened":
            how = f", which continues {one.offset} characters" if one.offset else ""
            return f"opened: attempt {one.attempt} on node {about.get('by', '?')}{how}"
        case "text":
            return f"text: {about['characters']} characters in {about['batches']} batches"
        case "done" | "failed" | "cancelled":
            return f"{one.event} after {one.offset} characters  {rest}".rstrip()
        case _:
            return f"{one.event}  {rest}".rstrip()
