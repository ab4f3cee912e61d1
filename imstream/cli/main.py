"""The commands. What a command needs is imported inside it, so that help and a quick command stay quick."""
# ruff: noqa: PLC0415 - see above

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import click

from imstream.cli import balancer as balancers
from imstream.cli import settings_notes
from imstream.cli.embedded_redis import EmbeddedSettings
from imstream.cli.options import TimeSpan, UserId, given, settings_options
from imstream.cli.parent import die_with
from imstream.cli.up_settings import UpSettings
from imstream.cli.user import user
from imstream.demo import marker
from imstream.demo.settings import DemoSettings
from imstream.errors import ImstreamError, SettingsError
from imstream.settings import Settings
from imstream.texts import DEFAULT_LANG, Lang

_A_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_SERVERS = ("up", "redis", "demo-ai")

ALIASES = {"redis_url": "--redis", "ai_url": "--ai"}


class _WrongSetting(click.ClickException):
    """A setting or an option is refused; the exit code is click's for wrong options."""

    exit_code = 2


def _own_lang() -> Lang:
    """The language of the terminal, of those we have."""
    return "en" if os.environ.get("LC_ALL", os.environ.get("LANG", "")).startswith("en") else DEFAULT_LANG


def _with_columns(text: str) -> str:
    """Text for click's help in which indented paragraphs keep their lines."""
    return "\n\n".join(f"\b\n{part}" if part.startswith(" ") else part for part in text.split("\n\n"))


class _Commands(click.Group):
    """Says in one line what imstream knows how to say; a traceback is for what nobody foresaw."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - what the command returns
        try:
            return super().invoke(ctx)
        except ImstreamError as error:
            raise (_WrongSetting if isinstance(error, SettingsError) else click.ClickException)(str(error)) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they are written here, the first to try first."""
        del ctx
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.option("--parent", type=int, hidden=True, help="Process that this one must not outlive.")
@click.version_option(package_name="imstream")
@click.pass_context
def main(ctx: click.Context, parent: int | None) -> None:
    """Chat between people and AI models that loses no message.

    \b
      client --ws--> node --> its Redis Stream --> worker --http--> AI backend
        ^                                            |
        +---------- words, as they come <------------+

    Start with "imstream up": it runs all parts on this machine, with an embedded Valkey as Redis and a demo AI, and
    prints the address of a page to chat on. Then try "imstream chat" and "imstream streams".

    In production the parts run alone: any Redis or Valkey from 6.2, any OpenAI-compatible AI backend, and
    "imstream node" as often as you like, each with an id of its own.

    Every option of a part is also a setting: --queue-limit is IMSTREAM_QUEUE_LIMIT, in the environment or in .env.
    The option wins over the environment, the environment over the file.
    """  # noqa: D301 - \b is click's mark for text that is not to be wrapped
    if parent is not None:
        die_with(parent)  # and what is to be said of the settings, the parent has said
    elif ctx.invoked_subcommand != "node":  # which logs it
        _tell_of_settings(with_file=ctx.invoked_subcommand in _SERVERS)


def _tell_of_settings(*, with_file: bool) -> None:
    file, warnings = settings_notes.look()
    if with_file and file:
        click.echo(f"settings read from {file}", err=True)
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)


@main.command()
@settings_options(UpSettings)
@settings_options(Settings, aliases=ALIASES)
@settings_options(EmbeddedSettings, full_names=True)
@settings_options(DemoSettings, full_names=True)
def up(**options: str | None) -> None:
    """Run everything on this machine: Valkey, demo AI, nodes.

    The embedded Valkey is left out when IMSTREAM_REDIS_URL (--redis) is set, the demo AI when IMSTREAM_AI_URL (--ai)
    is. Data stays in .imstream/: what was accepted is there at the next start.

    With --nodes 3 and HAProxy or nginx installed, that is in front of them, and a node that dies is started again: kill
    one and watch its users go on elsewhere.

    Ctrl-C stops the nodes first, which lets running answers end, then the others. Ctrl-C again kills them at once.
    """
    from imstream.cli import up as command

    sys.exit(command.run(given(options)))


@main.command()
@settings_options(Settings, aliases=ALIASES)
@click.pass_context
def node(ctx: click.Context, /, **options: str | None) -> None:
    """Run one node: WebSockets, its stream, its worker.

    It logs "ready" with its address when it serves. GET /readyz answers 200 while it can serve, GET /healthz unless
    its consumer loop is stuck. SIGTERM drains: running answers get --drain-grace to end, then it exits with 0. SIGHUP
    reloads the word list and the published keys of tokens.

    Keys and secrets (IMSTREAM_AI_KEY, IMSTREAM_MODERATION_KEY, IMSTREAM_AUTH_SECRET) are read from the environment or
    from .env; they have no option, because command lines can be read by every user of a machine.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it never ends a node, which reloads what it can as soon as it serves
    settings = Settings.load(**given(options))
    from imstream import logs
    from imstream.node import run

    if ctx.find_root().params["parent"] is None:
        logs.configure(settings)
        settings_notes.log_them()
    run(settings)


@main.command()
@click.option("--url", default="ws://127.0.0.1:8080/ws", show_default=True, help="The node's address.")
@click.option("--user", type=UserId(), default=10001, show_default=True, help="Who you are: a number above 10000.")
@click.option("--token", envvar=settings_notes.TOKEN, help="Your signed token; private only in IMSTREAM_TOKEN.")
@click.option("--lang", type=click.Choice(["zh", "en"]), default=_own_lang, help="Language; else the terminal's.")
def chat(url: str, user: int, token: str | None, lang: Lang) -> None:
    """Chat in the terminal; it reconnects and resumes."""
    from imstream.cli.chat_terminal import run

    sys.exit(run(url, user, token, lang))


@main.command()
@click.option("--user", type=UserId(), required=True, help="Whom it is for.")
@click.option("--ttl", type=TimeSpan(), metavar="TIME", default="1h", show_default=True, help="How long it holds.")
@click.option("--key", type=click.Path(dir_okay=False, path_type=Path), help="PEM file with the private key.")
@settings_options(Settings, only=["auth_algorithm", "auth_claim", "auth_issuer", "auth_audience"])
def token(user: int, ttl: timedelta, key: Path | None, **options: str | None) -> None:
    """Sign a token, for development.

    Prints nothing else, so that it can be given on, in the environment because every user of a machine can read command
    lines: IMSTREAM_TOKEN="$(imstream token --user 10001)" imstream chat

    It is signed with the secret in IMSTREAM_AUTH_SECRET (HS256), or with the private key in a file, whose kind says
    how: RSA (RS256), elliptic curve P-256 (ES256), Ed25519 or Ed448 (EdDSA). What else nodes check is taken from their
    settings.
    """
    from imstream.guards.auth.keys import sign

    click.echo(sign(Settings.load(**given(options)), user, ttl=ttl, key_file=key))


_DEMO_AI = f"""Run the demo AI backend: canned answers, no model.

{marker.__doc__}

It moderates, too (IMSTREAM_MODERATION_URL): a text with [[flag]] or [[flag violence hate]] in it is flagged.
"""


@main.command("demo-ai", help=_with_columns(_DEMO_AI))
@settings_options(DemoSettings)
def demo_ai(**options: str | None) -> None:
    """Run the demo AI backend until SIGTERM."""
    settings = DemoSettings.load(**given(options))
    from imstream.demo.server import run

    def announce(url: str) -> None:
        click.echo(f"ready: demo AI backend at {url} (canned answers, no model)")

    try:
        run(settings, announce)
    except OSError as error:
        where = f"{DemoSettings.variable('host')}={settings.host} {DemoSettings.variable('port')}={settings.port}"
        raise SettingsError(f"{where}: cannot listen: {error.strerror}") from None


@main.command()
@settings_options(EmbeddedSettings)
def redis(**options: str | None) -> None:
    """Run the embedded Valkey in the foreground.

    The command turns into the server: its process id and its signals are the server's own. It listens on 127.0.0.1,
    appends every write to a file and evicts nothing.
    """
    settings = EmbeddedSettings.load(**given(options))
    from imstream.cli.embedded_redis import become_server

    become_server(settings)


@main.command()
@click.option("--program", type=click.Choice(get_args(balancers.Program)), help="Which one; else what is installed.")
@click.option("--listen", default="127.0.0.1:8000", show_default=True, help="Address it listens on.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=balancers.FOLDER,
    show_default=True,
    help="Where its configuration and temporary files are kept.",
)
@click.option("--cert", type=_A_FILE, help="For https and wss: PEM file of the certificate, with its chain.")
@click.option("--key", type=_A_FILE, help="PEM file of its private key, if it is not in the same file.")
@click.option("--redirect", metavar="ADDRESS", help="With --cert: where whoever comes without TLS is sent on.")
@click.option("--print", "only_print", is_flag=True, help="Print the configuration instead of running it.")
@click.argument("nodes", nargs=-1, required=True, metavar="HOST:PORT...")
@click.pass_context
def balancer(  # noqa: PLR0913 - one for each option
    ctx: click.Context,
    *,
    program: balancers.Program | None,
    listen: str,
    folder: Path,
    cert: Path | None,
    key: Path | None,
    redirect: str | None,
    nodes: tuple[str, ...],
    only_print: bool,
) -> None:
    """Run HAProxy or nginx in front of nodes.

    It must be installed. The command turns into the program, in the foreground, with the configuration of ops/ for
    these nodes: each user always comes to the same node, a dead node's users are spread over the others.

    With --cert it takes https and wss and nothing else, such as with --listen 0.0.0.0:443 --redirect 0.0.0.0:80.
    """
    if cert is None and (key or redirect):
        raise SettingsError("--key and --redirect need --cert")
    program = program or balancers.installed()
    if program is None:
        raise SettingsError("neither HAProxy nor nginx is installed (Debian, Ubuntu: sudo apt install haproxy)")
    front = balancers.Front(program, listen, nodes, balancers.Tls(cert, key, redirect) if cert else None)
    if only_print:
        click.echo(balancers.configuration(front), nl=False)
        return
    if (parent := ctx.find_root().params["parent"]) is not None:
        die_with(parent, signal.SIGTERM)  # SIGKILL would leave the worker processes of nginx behind
    balancers.become(front, folder)


@main.command()
@settings_options(Settings, only=["node", "redis_url", "key_prefix", "redis_timeout"], aliases=ALIASES)
@click.option("--newest", type=click.IntRange(0, 1000), default=5, show_default=True, help="Dead letters shown.")
def streams(newest: int, **options: str | None) -> None:
    """Show a node's stream, without redis-cli.

    How many requests are unfinished, which of them are being worked on and by whom, and the newest dead letters.
    """
    settings = Settings.load(**given(options))
    from imstream.cli.streams import run

    run(settings, newest=newest)


main.add_command(user)
