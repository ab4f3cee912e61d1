"""`imstream up`: everything on this machine, for whoever wants to see it work."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from urllib.parse import urlencode

import click

from imstream.cli import balancer as balancers
from imstream.cli.embedded_redis import PASSWORD_FILE
from imstream.cli.settings_notes import TOKEN
from imstream.cli.supervisor import Supervisor
from imstream.cli.up_plan import UpPlan, make_plan, reach
from imstream.keys import Keys
from imstream.private_files import UMASK
from imstream.settings import Settings
from imstream.urls import RedisUrl, redact_url


def run(typed: Mapping[str, str]) -> int:
    """Run everything until Ctrl-C; returns the exit code.

    Args:
        typed: The options that were given, by name; those of the embedded server and of the demo start with its name.

    Raises:
        SettingsError: A setting has a wrong value, or a port is taken.
    """
    plan = make_plan(typed)
    os.umask(UMASK)
    began = time.monotonic()

    def announce() -> None:
        click.echo(f"\nimstream is ready after {time.monotonic() - began:.1f} s\n")
        for line in summary(plan):
            click.echo(f"  {line}" if line else "")
        click.echo()

    return asyncio.run(Supervisor(*plan.order()).run(announce))


def _program() -> str:
    """The command imstream as it can be typed here."""
    if shutil.which("imstream"):
        return "imstream"
    installed = Path(sys.executable).with_name("imstream")
    return min(os.path.relpath(installed), str(installed), key=len)


def _redis_cli(plan: UpPlan) -> str | None:
    """How redis-cli reaches this Redis; None behind Sentinel, where it would have to ask for the master first."""
    if plan.valkey:
        # In the environment: every user of the machine can read command lines.
        return f'REDISCLI_AUTH="$(cat {shlex.quote(str(plan.valkey.password_file))})" redis-cli -p {plan.valkey.port}'
    known = RedisUrl.parse(plan.settings.redis_url)
    if known.topology == "sentinel":
        return None
    follow = "-c " if known.topology == "cluster" else ""
    return f"redis-cli {follow}-u {shlex.quote(redact_url(known.server_url(*known.servers[0])))}"


def _which_redis(plan: UpPlan) -> str:
    if plan.valkey is None:
        return redact_url(plan.redis_url)
    where = f"data in {plan.valkey.data}, password in {PASSWORD_FILE} there"
    return f"{plan.redis_url.partition('?')[0]}   embedded Valkey, {where}"


def summary(plan: UpPlan) -> list[str]:
    """What a person wants to know of what runs, line by line."""
    host = reach(plan.settings.host)
    page = plan.door
    redis_url = redact_url(plan.redis_url)
    stream = shlex.quote(Keys(plan.settings.key_prefix).requests(plan.settings.node))
    redis_cli = _redis_cli(plan)
    usual = {name: field.default for name, field in Settings.model_fields.items()}
    which_redis = f" --redis {shlex.quote(redis_url)}" if plan.valkey and redis_url != str(usual["redis_url"]) else ""
    which_node = f" --url ws://{page}/ws" if page != f"127.0.0.1:{usual['port']}" else ""
    return [
        f"page     http://{page}/",
        *_front_line(plan),
        *(f"node {node:<3} ws://{host}:{port}/ws" for node, port in plan.nodes),
        *_from_disk(plan),
        f"AI       {redact_url(plan.ai_url)}" + ("   demo: canned answers, no model" if plan.demo else ""),
        f"Redis    {_which_redis(plan)}",
        "",
        *([f"the stream        {redis_cli} XINFO STREAM {stream}"] if redis_cli else []),
        f"without redis-cli {_program()} streams{which_redis}",
        f"a chat client     {_for_whom(plan)}{_program()} chat{which_node}",
        "",
        "Ctrl-C stops everything. What was accepted is kept, and answered after the next start.",
    ]


def _for_whom(plan: UpPlan) -> str:
    """How a chat client shows who it is, where that is asked and can be signed here."""
    signed_here = plan.settings.auth == "jwt" and plan.settings.auth_secret is not None
    return f'{TOKEN}="$({_program()} token --user 10001)" ' if signed_here else ""


def _from_disk(plan: UpPlan) -> list[str]:
    """Where the page is as a file, with the token of this run: browsers send nothing behind `#` to anybody."""
    if plan.page_token is None:
        return []
    page = Path(str(resources.files("imstream.gateway") / "static" / "index.html")).as_uri()
    return [f"or open  {page}#{urlencode({'node': plan.door, 'token': plan.page_token}, safe=':[]')}"]


def _front_line(plan: UpPlan) -> list[str]:
    if plan.balancer:
        return [
            f"balancer {plan.balancer}, which sends each user to one node; its configuration is in {balancers.FOLDER}"
        ]
    if len(plan.nodes) > 1 and balancers.installed() is None:
        return ["balancer none: install haproxy or nginx, and it is in front of the nodes at the next start"]
    return []
