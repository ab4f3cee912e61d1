"""`imstream up`: everything on this machine, for whoever wants to see it work."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imstream import embedded
from imstream.ai.demo.settings import DemoSettings
from imstream.cli.options import as_environment
from imstream.cli.redact import without_password
from imstream.cli.supervisor import Part, Supervisor
from imstream.embedded import EmbeddedSettings
from imstream.errors import SettingsError
from imstream.keys import Keys
from imstream.settings import Settings, SettingsGroup

if TYPE_CHECKING:
    from collections.abc import Mapping

_EMBEDDED = "embedded_"
_DEMO = "demo_"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs where.

    Attributes:
        settings: Those of the nodes; the first node has their id and port, each further one the next number.
        valkey: The embedded server, unless a Redis was named.
        demo: The demo AI backend, unless an AI backend was named.
        environment: What the children need to know besides the environment that is there.
        nodes: Id and port of each node.
    """

    settings: Settings
    valkey: EmbeddedSettings | None
    demo: DemoSettings | None
    environment: dict[str, str]
    nodes: list[tuple[str, int]]

    @property
    def redis_url(self) -> str:
        """The Redis that the nodes use."""
        return f"redis://{embedded.HOST}:{self.valkey.port}/0" if self.valkey else self.settings.redis_url

    @property
    def ai_url(self) -> str:
        """The AI backend that the nodes use."""
        return f"http://{_reach(self.demo.host)}:{self.demo.port}/v1" if self.demo else self.settings.ai_url

    def stages(self) -> list[list[Part]]:
        """The parts in the order in which they start."""
        stages = []
        if self.valkey:
            serves = partial(embedded.answers, self.valkey.port)
            stages.append([Part("redis", ["redis"], serves, self.environment)])
        if self.demo:
            serves = partial(_answers, _reach(self.demo.host), self.demo.port, "/v1/models")
            stages.append([Part("ai", ["demo-ai"], serves, self.environment)])
        return [*stages, [self._node(*node) for node in self.nodes]]

    def _node(self, node: str, port: int) -> Part:
        return Part(
            name=f"node {node}",
            arguments=["node", "--node", node, "--port", str(port)],
            serves=partial(_answers, _reach(self.settings.host), port, "/readyz"),
            environment=self.environment
            | {Settings.variable("redis_url"): self.redis_url, Settings.variable("ai_url"): self.ai_url},
            patience=self.settings.drain_grace.total_seconds() + 10,
        )


def run(typed: Mapping[str, str]) -> int:
    """Run everything until Ctrl-C; returns the exit code.

    Args:
        typed: The options that were given, by name; those of the embedded server and of the demo start with its name.

    Raises:
        SettingsError: A setting has a wrong value, or a port is taken.
    """
    plan = make_plan(typed)
    began = time.monotonic()

    def announce() -> None:
        click.echo(f"\nimstream is ready after {time.monotonic() - began:.1f} s\n")
        for line in _summary(plan):
            click.echo(f"  {line}" if line else "")
        click.echo()

    return asyncio.run(Supervisor(plan.stages()).run(announce))


def make_plan(typed: Mapping[str, str]) -> Plan:
    """What is to run, by the options, the environment and `.env`.

    Raises:
        SettingsError: A setting has a wrong value, or a port is taken.
    """
    of_valkey, of_demo = _starting_with(_EMBEDDED, typed), _starting_with(_DEMO, typed)
    of_node = {name: value for name, value in typed.items() if not name.startswith((_EMBEDDED, _DEMO))}
    settings = Settings.load(**of_node)
    valkey = EmbeddedSettings.load(**of_valkey) if "redis_url" not in settings.model_fields_set else None
    demo = DemoSettings.load(**of_demo) if "ai_url" not in settings.model_fields_set else None
    environment = {
        **as_environment(Settings, of_node),
        **as_environment(EmbeddedSettings, of_valkey),
        **as_environment(DemoSettings, of_demo),
    }
    if settings.log_format == "auto":  # the children write into pipes, but a person reads them
        environment[Settings.variable("log_format")] = "console"
    if valkey:
        _check_free(valkey, embedded.HOST, valkey.port)
        if "log_level" not in valkey.model_fields_set:
            environment[EmbeddedSettings.variable("log_level")] = "warning"
    if demo:
        _check_free(demo, demo.host, demo.port)
    _check_free(settings, settings.host, settings.port)
    return Plan(settings, valkey, demo, environment, [(settings.node, settings.port)])


def _starting_with(prefix: str, typed: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in typed.items() if name.startswith(prefix)}


def _check_free(group: SettingsGroup, host: str, port: int) -> None:
    """See whether a part could listen there, so that it is said before anything has started.

    Raises:
        SettingsError: It could not; or the port is 0, and nobody would know where it is.
    """
    variable = group.variable("port")
    if port == 0:
        raise SettingsError(f"{variable}=0 is not allowed: imstream up must know the port")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise SettingsError(
            f"{variable}={port} cannot be used on {host} ({error.strerror}): is imstream running already? "
            f"Otherwise choose another port with {variable}"
        ) from None


def _reach(host: str) -> str:
    """An address at which a listener on `host` is reached."""
    reached = _ANY_ADDRESS.get(host, host)
    return f"[{reached}]" if ":" in reached else reached


async def _answers(host: str, port: int, path: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection(host.strip("[]"), port)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
                return (await reader.readline()).split()[1:2] == [b"200"]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def _program() -> str:
    """The command imstream as it can be typed here."""
    if shutil.which("imstream"):
        return "imstream"
    installed = Path(sys.executable).with_name("imstream")
    return min(os.path.relpath(installed), str(installed), key=len)


def _summary(plan: Plan) -> list[str]:
    host = _reach(plan.settings.host)
    page = f"{host}:{plan.settings.port}"
    redis_url = without_password(plan.redis_url)
    stream = shlex.quote(Keys(plan.settings.key_prefix).requests(plan.settings.node))
    server = f"-p {plan.valkey.port}" if plan.valkey else f"-u {shlex.quote(redis_url)}"
    usual = {name: field.default for name, field in Settings.model_fields.items()}
    which_redis = f" --redis {redis_url}" if plan.valkey and redis_url != usual["redis_url"] else ""
    which_node = f" --url ws://{page}/ws" if plan.settings.port != usual["port"] else ""
    return [
        f"page     http://{page}/",
        *(f"node {node:<3} ws://{host}:{port}/ws" for node, port in plan.nodes),
        f"AI       {without_password(plan.ai_url)}" + ("   demo: canned answers, no model" if plan.demo else ""),
        f"Redis    {redis_url}" + (f"   embedded Valkey, data in {plan.valkey.data}" if plan.valkey else ""),
        "",
        f"the stream        redis-cli {server} XINFO STREAM {stream}",
        f"without redis-cli {_program()} streams{which_redis}",
        f"a chat client     {_program()} chat{which_node}",
        "",
        "Ctrl-C stops everything. What was accepted is kept, and answered after the next start.",
    ]
