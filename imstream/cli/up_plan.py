"""What `imstream up` is to run: which parts, where, in which order."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from imstream.cli import balancer as balancers
from imstream.cli import embedded_redis
from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.cli.options import as_environment
from imstream.cli.supervisor import Part
from imstream.cli.up_settings import UpSettings
from imstream.demo.settings import DemoSettings
from imstream.errors import SettingsError
from imstream.guards.authentication import check_exposure
from imstream.guards.origin import parse_origins
from imstream.settings import Settings, SettingsGroup

_EMBEDDED = "embedded_"
_DEMO = "demo_"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound to
_LAST_PORT = 65535

ORIGINS = "same,null"
"""Pages that may open sockets of nodes that are there to be tried: also the page that was opened from disk."""

_NUMBER_AT_END = re.compile(r"(.*?)([0-9]+)")


@dataclass(frozen=True, slots=True)
class UpPlan:
    """What runs where.

    Attributes:
        settings: Those of the nodes; the first node has their id and port, each further one the next number.
        valkey: The embedded server, unless a Redis was named.
        demo: The demo AI backend, unless an AI backend was named.
        environment: Settings of the children that are not in the environment; see `environment_of`.
        nodes: Id and port of each node.
        balancer: What is in front of them.
        balancer_port: Where it listens, at the address of the nodes.
        page_token: What a page opened from disk must show, good for this run; None when no such page may come.
    """

    settings: Settings
    valkey: EmbeddedSettings | None
    demo: DemoSettings | None
    environment: dict[str, str] = field(repr=False)
    nodes: list[tuple[str, int]]
    balancer: balancers.Program | None
    balancer_port: int
    page_token: str | None = field(repr=False)

    @property
    def door(self) -> str:
        """Where clients come in, as `host:port`."""
        port = self.balancer_port if self.balancer else self.settings.port
        return f"{reach(self.settings.host)}:{port}"

    @property
    def redis_url(self) -> str:
        """The Redis that the nodes use."""
        return self.valkey.url if self.valkey else self.settings.redis_url.get_secret_value()

    @property
    def ai_url(self) -> str:
        """The AI backend that the nodes use."""
        return (
            f"http://{reach(self.demo.host)}:{self.demo.port}/v1"
            if self.demo
            else self.settings.ai_url.get_secret_value()
        )

    def order(self) -> tuple[list[list[Part]], list[list[Part]]]:
        """The parts in the order in which they start, and in that in which they stop.

        Nodes drain while their clients still come through the balancer, so it stops after them.
        """
        servers = []
        if self.valkey:
            serves = partial(embedded_redis.answers, self.valkey.port, self.valkey.password_file)
            servers.append([Part("redis", ["redis"], serves, self.environment_of(EmbeddedSettings))])
        if self.demo:
            serves = partial(_answers, reach(self.demo.host), self.demo.port, "/v1/models")
            servers.append([Part("ai", ["demo-ai"], serves, self.environment_of(DemoSettings))])
        nodes = [self._node(*node) for node in self.nodes]
        front = [[self._front(self.balancer)]] if self.balancer else []
        return [*servers, nodes, *front], [nodes, *front, *servers[::-1]]

    def environment_of(self, group: type[SettingsGroup]) -> dict[str, str]:
        """The variables of one group, and no other: each part gets only the secrets that it needs."""
        names = {group.variable(name) for name in group.model_fields}
        return {name: value for name, value in {**os.environ, **self.environment}.items() if name.upper() in names}

    def _node(self, node: str, port: int) -> Part:
        return Part(
            name=f"node {node}",
            arguments=["node", "--node", node, "--port", str(port)],
            serves=partial(_answers, reach(self.settings.host), port, "/readyz"),
            environment=self.environment_of(Settings)
            | {Settings.variable("redis_url"): self.redis_url, Settings.variable("ai_url"): self.ai_url}
            | ({} if self.page_token is None else {Settings.variable("page_token"): self.page_token}),
            patience=self.settings.drain_grace.total_seconds() + 10,
            # Several are there to see one die. With the only one gone nothing is left, and the exit code shall say so.
            restarts=len(self.nodes) > 1,
        )

    def _front(self, program: balancers.Program) -> Part:
        host = self.settings.host
        listen = f"[{host}]:{self.balancer_port}" if ":" in host else f"{host}:{self.balancer_port}"
        nodes = [f"{reach(host)}:{port}" for _, port in self.nodes]
        return Part(
            name=program,
            arguments=["balancer", "--program", program, "--listen", listen, *nodes],
            serves=partial(_answers, reach(host), self.balancer_port, "/readyz"),
            restarts=True,
        )


def make_plan(typed: Mapping[str, str]) -> UpPlan:
    """What is to run, by the options, the environment and `.env`.

    Raises:
        SettingsError: A setting has a wrong value, or a port is taken.
    """
    of_valkey, of_demo = _starting_with(_EMBEDDED, typed), _starting_with(_DEMO, typed)
    of_up = {name: value for name, value in typed.items() if name in UpSettings.model_fields}
    of_node = {name: value for name, value in typed.items() if name in Settings.model_fields}
    settings, up = Settings.load(**of_node), UpSettings.load(**of_up)
    check_exposure(settings)
    valkey = EmbeddedSettings.load(**of_valkey) if "redis_url" not in settings.model_fields_set else None
    demo = DemoSettings.load(**of_demo) if "ai_url" not in settings.model_fields_set else None
    environment = {
        **as_environment(Settings, of_node),
        **as_environment(EmbeddedSettings, of_valkey),
        **as_environment(DemoSettings, of_demo),
    }
    if settings.log_format == "auto":  # the children write into pipes, but a person reads them
        environment[Settings.variable("log_format")] = "console"
    if "origins" not in settings.model_fields_set:
        environment[Settings.variable("origins")] = ORIGINS
    if valkey and "log_level" not in valkey.model_fields_set:
        environment[EmbeddedSettings.variable("log_level")] = "warning"
    plan = UpPlan(
        settings=settings,
        valkey=valkey,
        demo=demo,
        environment=environment,
        nodes=numbered(settings.node, settings.port, up.nodes),
        balancer=_choose_balancer(up),
        balancer_port=up.balancer_port,
        page_token=_page_token(settings),
    )
    _check_ports(plan)
    return plan


def _page_token(settings: Settings) -> str | None:
    """A new token for each run, unless one is set; None where no such page may come, or must log in anyway."""
    origins = parse_origins(settings.origins if "origins" in settings.model_fields_set else ORIGINS)
    if settings.auth != "none" or not {"null", "*"} & set(origins):
        return None
    return secrets.token_urlsafe(16) if settings.page_token is None else settings.page_token.get_secret_value()


def _check_ports(plan: UpPlan) -> None:
    """See whether every part can have its port, so that it is said before anything has started.

    Raises:
        SettingsError: One of them cannot.
    """
    nodes = {port: f"node {node}" for node, port in plan.nodes}
    for node_port in nodes:
        _check_free(Settings.variable("port"), plan.settings.host, node_port)
    others: list[tuple[str, str, int]] = []
    if plan.valkey:
        others.append((plan.valkey.variable("port"), embedded_redis.HOST, plan.valkey.port))
    if plan.demo:
        others.append((plan.demo.variable("port"), plan.demo.host, plan.demo.port))
    if plan.balancer:
        others.append((UpSettings.variable("balancer_port"), plan.settings.host, plan.balancer_port))
    for variable, host, port in others:
        if port in nodes:
            raise SettingsError(f"{variable}={port} is also the port of {nodes[port]}: choose another one for either")
        _check_free(variable, host, port)


def numbered(node: str, port: int, count: int) -> list[tuple[str, int]]:
    """Ids and ports of so many nodes: counted on from the number at the end of the id, or from 1 when it has none.

    Raises:
        SettingsError: There are not that many ports.
    """
    if port + count - 1 > _LAST_PORT:
        raise SettingsError(f"{Settings.variable('port')}={port} is not allowed: {count} nodes need as many ports")
    found = _NUMBER_AT_END.fullmatch(node)
    name, first = (found[1], int(found[2])) if found else (f"{node}-", 1)
    ids = [node, *(f"{name}{first + number}" for number in range(1, count))]
    return [(one, port + number) for number, one in enumerate(ids)]


def _choose_balancer(up: UpSettings) -> balancers.Program | None:
    if up.balancer == "none" or (up.balancer == "auto" and up.nodes == 1):
        return None
    if up.balancer == "auto":
        return balancers.installed()
    if balancers.find(up.balancer) is None:
        variable = up.variable("balancer")
        raise SettingsError(f"{variable}={up.balancer} is not allowed: {up.balancer} is not installed on this machine")
    return up.balancer


def _starting_with(prefix: str, typed: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in typed.items() if name.startswith(prefix)}


def _check_free(variable: str, host: str, port: int) -> None:
    """See whether a part could listen there.

    Raises:
        SettingsError: It could not; or the port is 0, and nobody would know where it is.
    """
    if port == 0:
        raise SettingsError(f"{variable}=0 is not allowed: imstream up must know the port")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise SettingsError(
            f"{variable}={port} cannot be used on {host} ({error.strerror}): is imstream running already? "
            f"Otherwise choose another port with {variable}"
        ) from None


def reach(host: str) -> str:
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
