"""`imstream up`: plans which parts run on this machine, runs them, and prints their addresses."""

import asyncio
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal
from urllib.parse import urlencode

import click
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from imstream.cli import balancer as balancers
from imstream.cli import embedded_redis
from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.cli.options import TOKEN
from imstream.cli.supervisor import Part, Supervisor
from imstream.demo.settings import DemoSettings, LocalAISettings
from imstream.errors import SettingsError
from imstream.keys import Keys
from imstream.private_files import UMASK
from imstream.settings import Settings
from imstream.settings_group import ENV_PREFIX, SettingsGroup
from imstream.urls import ANY_ADDRESS, RedisUrl, redact_url

_LOAD_LIMIT = 300.0  # seconds: a local model can have many gigabytes
_NUMBER_AT_END = re.compile(r"(.*?)([0-9]+)")

_NOISE = re.compile(rb"Memory overcommit must be enabled|Reading config from stdin|^for nodes: ")
"""Lines of the embedded Valkey that do not matter on a machine to try imstream on, and one of the local model with
settings that the nodes have from here."""

ORIGINS = "same,null"  # default origins of the nodes: also the page opened from disk


class UpSettings(SettingsGroup):
    """The settings of `imstream up` itself; environment variables begin with `IMSTREAM_UP_`."""

    model_config = SettingsConfigDict(env_prefix=f"{ENV_PREFIX}UP_")

    nodes: int = Field(1, ge=1, le=99, description="Number of nodes; each further one has the next id and port.")
    balancer: Literal["auto", "haproxy", "nginx", "none"] = "auto"
    """Load balancer in front of the nodes; auto: an installed one if there are several nodes."""
    balancer_port: int = Field(8000, ge=1, le=65535, description="Port of the load balancer.")
    local_ai: bool = Field(default=False, description="Run a real model on this machine instead of the demo AI.")


@dataclass(frozen=True, slots=True)
class UpPlan:
    """The parts and their addresses.

    Attributes:
        settings: Settings of the nodes; id and port are those of the first one.
        environment: Settings of the children in addition to the environment; see `environment_of`.
        page_token: The token that the page opened from disk needs in this run; None if that page is not allowed.
    """

    settings: Settings
    valkey: EmbeddedSettings | None
    ai: DemoSettings | LocalAISettings | None
    environment: dict[str, str] = field(repr=False)
    nodes: list[tuple[str, int]]
    balancer: balancers.Program | None
    balancer_port: int
    page_token: str | None = field(repr=False)

    @property
    def entry_point(self) -> str:
        """Where clients connect, as `host:port`."""
        port = self.balancer_port if self.balancer else self.settings.port
        return f"{reachable_host(self.settings.host)}:{port}"

    @property
    def redis_url(self) -> str:
        """The Redis of the nodes."""
        return self.valkey.url if self.valkey else self.settings.redis_url.get_secret_value()

    @property
    def ai_url(self) -> str:
        """The AI backend of the nodes, or the file of several."""
        if self.ai is None:
            return str(self.settings.ai_backends or self.settings.ai_url.get_secret_value())
        return f"http://{reachable_host(self.ai.host)}:{self.ai.port}/v1"

    def omitted(self) -> Iterator[str]:
        """The parts that do not run here, and the settings that replace them."""
        backends = "ai_url" if self.settings.ai_backends is None else "ai_backends"
        for part, name, runs in (("embedded Valkey", "redis_url", self.valkey), ("demo AI", backends, self.ai)):
            if runs is None:
                yield f"no {part}: {Settings.variable(name)} is set"

    def stages(self) -> tuple[list[list[Part]], list[list[Part]]]:
        """The parts in the order in which they start and stop. Clients still use the balancer while nodes drain."""
        servers = []
        if self.valkey:
            is_ready = partial(embedded_redis.answers, self.valkey.port, self.valkey.password_file)
            noise = None if "log_level" in self.valkey.model_fields_set else _NOISE
            servers.append([Part("redis", ["redis"], is_ready, self.environment_of(EmbeddedSettings), noise=noise)])
        if self.ai:
            is_ready = partial(_answers_http, reachable_host(self.ai.host), self.ai.port, "/v1/models")
            environment = self.environment_of(type(self.ai))
            ai = Part("ai", [self.ai.command], is_ready, environment, start_timeout=_LOAD_LIMIT, noise=_NOISE)
            servers.append([ai])
        nodes = [self._node_part(*node) for node in self.nodes]
        balancer = [[self._balancer_part(self.balancer)]] if self.balancer else []
        return [*servers, nodes, *balancer], [nodes, *balancer, *servers[::-1]]

    def environment_of(self, group: type[SettingsGroup]) -> dict[str, str]:
        """The variables of one settings group only: each part gets only the secrets that it needs."""
        names = {*map(group.variable, group.model_fields), *group.file_variables()}
        return {name: value for name, value in {**os.environ, **self.environment}.items() if name.upper() in names}

    def _node_part(self, node: str, port: int) -> Part:
        environment = self.environment_of(Settings)
        environment[Settings.variable("redis_url")] = self.redis_url
        if self.ai is not None:
            environment[Settings.variable("ai_url")] = self.ai_url
        if self.page_token is not None:
            environment[Settings.variable("page_token")] = self.page_token
        files = Settings.file_variables()  # their values may be overridden above, or by options
        return Part(
            name=f"node {node}",
            arguments=["node", "--node", node, "--port", str(port)],
            is_ready=partial(_answers_http, reachable_host(self.settings.host), port, "/readyz"),
            environment={name: value for name, value in environment.items() if files.get(name) not in environment},
            stop_timeout=self.settings.drain_grace.total_seconds() + 10,
            restarts=len(self.nodes) > 1,  # if the only node dies, the exit code must report it
        )

    def _balancer_part(self, program: balancers.Program) -> Part:
        host = self.settings.host
        listen = f"[{host}]:{self.balancer_port}" if ":" in host else f"{host}:{self.balancer_port}"
        nodes = [f"{reachable_host(host)}:{port}" for _, port in self.nodes]
        return Part(
            name=program,
            arguments=["balancer", "--program", program, "--listen", listen, *nodes],
            is_ready=partial(_answers_http, reachable_host(host), self.balancer_port, "/readyz"),
            restarts=True,
        )


def make_plan(options: Mapping[str, str]) -> UpPlan:
    """Make the plan from options, environment and `.env`; raises SettingsError.

    The options of `imstream up` and of nodes have no prefix; others have `embedded_`, `demo_` or `local_ai_`.
    """
    from imstream.guards.authentication import check_exposure  # noqa: PLC0415 - slow; not needed for help

    up = UpSettings.load(**_given(UpSettings, options))
    node_options, valkey_options = _given(Settings, options), _given(EmbeddedSettings, options, "embedded_")
    ai_group: type[DemoSettings | LocalAISettings] = LocalAISettings if up.local_ai else DemoSettings
    ai_options = _given(ai_group, options, "local_ai_" if up.local_ai else "demo_")
    settings = Settings.load(**node_options)
    check_exposure(settings)
    valkey = EmbeddedSettings.load(**valkey_options) if "redis_url" not in settings.model_fields_set else None
    own_ai = next((name for name in ("ai_backends", "ai_url") if name in settings.model_fields_set), None)
    ai = None if own_ai else ai_group.load(**ai_options)
    groups = ((Settings, node_options), (EmbeddedSettings, valkey_options), (ai_group, ai_options))
    environment = {group.variable(name): value for group, given in groups for name, value in given.items()}
    if up.local_ai and own_ai:
        raise SettingsError(f"{up.variable('local_ai')}=true is not allowed: {Settings.variable(own_ai)} is set")
    if isinstance(ai, LocalAISettings):
        for name, value in ai.node_settings().items():
            if name not in settings.model_fields_set:
                environment[Settings.variable(name)] = value
    if settings.log_format == "auto":  # the children write into pipes, but a person reads them
        environment[Settings.variable("log_format")] = "console"
    if "origins" not in settings.model_fields_set:
        environment[Settings.variable("origins")] = ORIGINS
    if valkey and "log_level" not in valkey.model_fields_set:
        environment[EmbeddedSettings.variable("log_level")] = "warning"
    plan = UpPlan(
        settings=settings,
        valkey=valkey,
        ai=ai,
        environment=environment,
        nodes=numbered_nodes(settings.node, settings.port, up.nodes),
        balancer=_choose_balancer(up),
        balancer_port=up.balancer_port,
        page_token=_page_token(settings),
    )
    _check_ports(plan)
    return plan


def _page_token(settings: Settings) -> str | None:
    """A new token for each run, unless one is set; None if the page from disk is not allowed or must log in anyway."""
    from imstream.guards.origin import parse_origins  # noqa: PLC0415 - as above

    origins = parse_origins(settings.origins if "origins" in settings.model_fields_set else ORIGINS)
    if settings.auth != "none" or not {"null", "*"} & set(origins):
        return None
    return secrets.token_urlsafe(16) if settings.page_token is None else settings.page_token.get_secret_value()


def _check_ports(plan: UpPlan) -> None:
    """Check all ports before anything starts; raises SettingsError."""
    node_variable = Settings.variable("port")
    nodes = {port: f"node {node}" for node, port in plan.nodes}
    listeners = [(node_variable, plan.settings.host, port) for port in nodes]
    metrics = [address for port in nodes if (address := plan.settings.metrics_address(port)) is not None]
    if len(set(metrics)) < len(metrics):
        raise SettingsError(
            f"{Settings.variable('metrics')}={plan.settings.metrics} is not allowed for several nodes: with a port "
            "such as +1000, each listens on its own port plus 1000"
        )
    listeners += [(Settings.variable("metrics"), *address) for address in metrics]
    listeners += [(part.variable("port"), part.host, part.port) for part in (plan.valkey, plan.ai) if part]
    if plan.balancer:
        listeners.append((UpSettings.variable("balancer_port"), plan.settings.host, plan.balancer_port))
    for variable, host, port in listeners:
        if port == 0:
            raise SettingsError(f"{variable}=0 is not allowed: imstream up needs a fixed port")
        if variable != node_variable and port in nodes:
            raise SettingsError(f"{variable}={port} is also the port of {nodes[port]}: choose another port for one")
        if (error := listen_error(host, port)) is not None:
            raise SettingsError(
                f"{variable}={port} cannot be used on {host} ({error}): is imstream running already? "
                f"Otherwise choose another port with {variable}"
            )


def listen_error(host: str, port: int) -> str | None:
    """Why this address cannot be listened on; None if it can."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        return (error.strerror or str(error)).partition(" (")[0]  # Python adds the address
    return None


def numbered_nodes(node: str, port: int, count: int) -> list[tuple[str, int]]:
    """Ids and ports of `count` nodes. Ids count on from the number at the end of `node`, or from 1 if it has none."""
    if port + count - 1 > 65535:  # noqa: PLR2004 - the last port
        raise SettingsError(f"{Settings.variable('port')}={port} is not allowed: {count} nodes need as many ports")
    found = _NUMBER_AT_END.fullmatch(node)
    name, first = (found[1], int(found[2])) if found else (f"{node}-", 1)
    return [(f"{name}{first + index}" if index else node, port + index) for index in range(count)]


def _choose_balancer(up: UpSettings) -> balancers.Program | None:
    if up.balancer == "auto":
        return balancers.installed_program() if up.nodes > 1 else None
    if up.balancer == "none":
        return None
    if balancers.find_program(up.balancer) is None:
        raise SettingsError(f"{up.variable('balancer')}={up.balancer} is not allowed: {up.balancer} is not installed")
    return up.balancer


def _given(group: type[SettingsGroup], options: Mapping[str, str], prefix: str = "") -> dict[str, str]:
    return {name: options[prefix + name] for name in group.model_fields if prefix + name in options}


def reachable_host(host: str) -> str:
    """An address at which a listener on `host` is reached, for URLs."""
    reached = ANY_ADDRESS.get(host, host)
    return f"[{reached}]" if ":" in reached else reached


async def _answers_http(host: str, port: int, path: str) -> bool:
    """Whether a GET is answered with 200."""
    request = f"GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n"
    [status] = await embedded_redis.probe(host.strip("[]"), port, request.encode())
    return status.split()[1:2] == [b"200"]


def run(options: Mapping[str, str]) -> int:
    """Run everything until Ctrl-C; returns the exit code. `options`: of the command line; see `make_plan`."""
    plan = make_plan(options)
    os.umask(UMASK)
    began = time.monotonic()
    for line in plan.omitted():
        click.echo(line)

    def announce() -> None:
        lines = "\n".join(f"  {line}".rstrip() for line in summary(plan))
        click.echo(f"\nimstream is ready after {time.monotonic() - began:.1f} s\n\n{lines}\n")

    return asyncio.run(Supervisor(*plan.stages()).run(announce))


def summary(plan: UpPlan) -> list[str]:
    """The addresses of all parts, and commands to try."""
    end = "Ctrl-C stops everything. Accepted messages are kept and answered after the next start."
    return [*_address_lines(plan), "", *_command_lines(plan), "", end]


def _address_lines(plan: UpPlan) -> Iterator[str]:
    yield f"page     http://{plan.entry_point}/"
    if plan.balancer:
        yield f"balancer {plan.balancer}, routes each user to one node; its configuration is in {balancers.FOLDER}"
    elif len(plan.nodes) > 1:
        why = f"{UpSettings.variable('balancer')}=none"
        if balancers.installed_program() is None:
            why = "install haproxy or nginx to have one at the next start"
        yield f"balancer none: {why}"
    for node, port in plan.nodes:
        yield f"node {node:<3} ws://{reachable_host(plan.settings.host)}:{port}/ws"
    if plan.page_token is not None:  # browsers do not send the fragment to servers
        file = Path(str(resources.files("imstream.gateway") / "static" / "index.html")).as_uri()
        fragment = urlencode({"node": plan.entry_point, "token": plan.page_token}, safe=":[]")
        yield f"or open  {file}#{fragment}"
    yield f"AI       {redact_url(plan.ai_url)}" + (f"   {plan.ai.about}" if plan.ai else "")
    if plan.valkey:
        data = f"data in {plan.valkey.data}, its password in {plan.valkey.password_file}"
        yield f"Redis    {plan.redis_url.partition('?')[0]}   embedded Valkey, {data}"
    else:
        yield f"Redis    {redact_url(plan.redis_url)}"
    yield from plan.omitted()
    yield f"metrics  {_metrics(plan.settings, len(plan.nodes))}"


def _metrics(settings: Settings, nodes: int) -> str:
    if not settings.shows_metrics_here and settings.metrics in {None, "off"}:
        why = "is off" if settings.metrics else f"is not set, and {Settings.variable('host')} is not loopback"
        return f"none: {Settings.variable('metrics')} {why}"
    host, port = settings.metrics_address(settings.port) or (settings.host, settings.port)
    others = ", and likewise for each node" if nodes > 1 else ""
    return f"http://{reachable_host(host)}:{port}/metrics{others}; imstream top shows them"


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
