"""`imstream up`: runs everything on this machine, for evaluation."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from urllib.parse import urlencode

import click

from imstream.cli import balancer as balancers
from imstream.cli.embedded_redis import PASSWORD_FILE
from imstream.cli.settings_notes import TOKEN
from imstream.cli.supervisor import Supervisor
from imstream.cli.up_plan import UpPlan, make_plan, reachable_host
from imstream.keys import Keys
from imstream.private_files import UMASK
from imstream.settings import Settings
from imstream.urls import RedisUrl, redact_url


def run(options: Mapping[str, str]) -> int:
    """Run everything until Ctrl-C; returns the exit code.

    Args:
        options: The command line options by name; those of the embedded server and of the demo have its prefix.

    Raises:
        SettingsError: A setting has a wrong value, or a port is in use.
    """
    plan = make_plan(options)
    os.umask(UMASK)
    began = time.monotonic()

    def announce() -> None:
        click.echo(f"\nimstream is ready after {time.monotonic() - began:.1f} s\n")
        for line in summary(plan):
            click.echo(f"  {line}" if line else "")
        click.echo()

    return asyncio.run(Supervisor(*plan.stages()).run(announce))


def summary(plan: UpPlan) -> list[str]:
    """The addresses of what runs, and commands to try."""
    end = "Ctrl-C stops everything. Accepted messages are kept and answered after the next start."
    return [*_address_lines(plan), "", *_command_lines(plan), "", end]


def _address_lines(plan: UpPlan) -> Iterator[str]:
    yield f"page     http://{plan.entry_point}/"
    if plan.balancer:
        yield f"balancer {plan.balancer}, routes each user to one node; its configuration is in {balancers.FOLDER}"
    elif len(plan.nodes) > 1 and balancers.installed_program() is None:
        yield "balancer none: install haproxy or nginx to have one at the next start"
    for node, port in plan.nodes:
        yield f"node {node:<3} ws://{reachable_host(plan.settings.host)}:{port}/ws"
    if plan.page_token is not None:  # browsers do not send the fragment to servers
        file = Path(str(resources.files("imstream.gateway") / "static" / "index.html")).as_uri()
        fragment = urlencode({"node": plan.entry_point, "token": plan.page_token}, safe=":[]")
        yield f"or open  {file}#{fragment}"
    yield f"AI       {redact_url(plan.ai_url)}" + ("   demo: canned answers, no model" if plan.demo else "")
    if plan.valkey:
        data = f"data in {plan.valkey.data}, password in {PASSWORD_FILE} there"
        yield f"Redis    {plan.redis_url.partition('?')[0]}   embedded Valkey, {data}"
    else:
        yield f"Redis    {redact_url(plan.redis_url)}"


def _command_lines(plan: UpPlan) -> Iterator[str]:
    program, defaults = _program(), {name: field.default for name, field in Settings.model_fields.items()}
    if redis_cli := _redis_cli(plan):
        stream = shlex.quote(Keys(plan.settings.key_prefix).requests(plan.settings.node))
        yield f"the stream        {redis_cli} XINFO STREAM {stream}"
    url = redact_url(plan.redis_url)
    option = f" --redis {shlex.quote(url)}" if plan.valkey and url != str(defaults["redis_url"]) else ""
    yield f"without redis-cli {program} streams{option}"
    can_sign = plan.settings.auth == "jwt" and plan.settings.auth_secret is not None
    token = f'{TOKEN}="$({program} token --user 10001)" ' if can_sign else ""
    option = f" --url ws://{plan.entry_point}/ws" if plan.entry_point != f"127.0.0.1:{defaults['port']}" else ""
    yield f"a chat client     {token}{program} chat{option}"


def _program() -> str:
    """The shortest name of the command `imstream` that works in this folder."""
    if shutil.which("imstream"):
        return "imstream"
    installed = Path(sys.executable).with_name("imstream")
    return min(os.path.relpath(installed), str(installed), key=len)


def _redis_cli(plan: UpPlan) -> str | None:
    """The redis-cli command for this Redis; None behind Sentinel, where the master's address would be needed first."""
    if plan.valkey:  # the password is in the environment, because every user of the machine can read command lines
        return f'REDISCLI_AUTH="$(cat {shlex.quote(str(plan.valkey.password_file))})" redis-cli -p {plan.valkey.port}'
    url = RedisUrl.parse(plan.settings.redis_url)
    if url.topology == "sentinel":
        return None
    cluster = "-c " if url.topology == "cluster" else ""
    return f"redis-cli {cluster}-u {shlex.quote(redact_url(url.server_url(*url.servers[0])))}"
