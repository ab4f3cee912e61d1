"""The configurations of ops/, and those rendered from them."""

import os
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner

from imstream.cli import balancer
from imstream.cli.balancer import BalancerConfig, Program, Tls, render
from imstream.cli.main import main
from imstream.errors import SettingsError
from tests.support.processes import PYTHON
from tests.support.servers import missing

ROOT = Path(__file__).parents[2]
SHIPPED = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}
PROGRAMS = get_args(Program)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_shipped_configuration_is_that_of_three_nodes_on_this_machine(program: Program) -> None:
    nodes = [f"127.0.0.1:{port}" for port in (8080, 8081, 8082)]
    assert render(BalancerConfig(program, "127.0.0.1:8000", nodes)) == (ROOT / "ops" / SHIPPED[program]).read_text(
        "utf-8"
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_other_nodes_get_the_same_line_each(program: Program) -> None:
    nodes = [f"10.0.0.{number}:80" for number in range(1, 6)]
    lines = [line.split() for line in render(BalancerConfig(program, "0.0.0.0:9000", nodes)).splitlines()]
    servers = [" ".join(words) for words in lines if words[:1] == ["server"] and words[1] != "{"]
    assert len(servers) == len(nodes)
    for node, server in zip(nodes, servers, strict=True):
        same, first = (re.sub(r" id \d+$", "", one) for one in (server, servers[0]))
        assert same.replace(node, "*") == first.replace(nodes[0], "*") != same
    [listens] = [words[1].rstrip(";") for words in lines if words[:1] in (["listen"], ["bind"])]
    assert listens == "0.0.0.0:9000"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("nodes", [["10.0.0.1:80"], ["[::1]:8080", "[::1]:8081"], ["localhost:1", "localhost:2"]])
def test_the_programs_take_what_is_made(program: Program, nodes: list[str], tmp_path: Path) -> None:
    path = balancer.find_program(program)
    if path is None:
        missing(program)
        return
    (tmp_path / "config").write_text(render(BalancerConfig(program, "[::1]:8000", nodes)))
    test = {"haproxy": "-c -f config", "nginx": f"-t -e stderr -p {tmp_path} -c {tmp_path}/config"}[program]
    subprocess.run([path, *test.split()], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    "address", ["", "10.0.0.1", ":80", "10.0.0.1:http", "a:1; include x", "a b:1", "::1:80", "a:1\n"]
)
def test_what_is_no_address_never_gets_into_a_configuration(address: str) -> None:
    for listen, node in ((address, "a:1"), ("a:1", address)):
        with pytest.raises(SettingsError, match="is not an address"):
            render(BalancerConfig("nginx", listen, [node]))


@pytest.mark.parametrize("program", PROGRAMS)
def test_with_a_certificate_nothing_is_listened_to_without_tls_but_what_sends_on(
    program: Program, tmp_path: Path
) -> None:
    (tmp_path / "c.pem").touch()
    for redirect, plain in ((None, []), ("[::1]:80", ["[::1]:80" if program == "nginx" else "::1:80"])):
        made = render(BalancerConfig(program, "0.0.0.0:443", ["a:1"], Tls(tmp_path / "c.pem", redirect=redirect)))
        lines = [line.split() for line in made.splitlines()]
        listens = [words[1:] for words in lines if words[:1] in (["listen"], ["bind"])]
        assert [words[0].rstrip(";") for words in listens if not {"ssl", "ssl;"} & {*words}] == plain
        [with_tls] = [words for words in listens if {"ssl", "ssl;"} & {*words}]
        assert with_tls[0] == "0.0.0.0:443"
        used = "".join(line for line in made.splitlines() if not line.lstrip().startswith("#"))
        assert ("https://$host:443$request_uri" in used or "host_only]:443%" in used) == bool(plain)
        assert "chat.example.com" not in used
        assert "800" not in used


def test_a_file_that_cannot_be_read_or_named_is_refused(tmp_path: Path) -> None:
    for name in ("a; include x", "a b.pem", "c.pem"):
        (tmp_path / name).touch()
    problems = {"gone": "cannot be read", "a; include x": "cannot be named", "a b.pem": "cannot be named"}
    for name, problem in problems.items():
        with pytest.raises(SettingsError, match=problem):
            render(BalancerConfig("nginx", "a:1", ["a:2"], Tls(tmp_path / name)))
    with pytest.raises(SettingsError, match="is not an address"):
        render(BalancerConfig("nginx", "a:1", ["a:2"], Tls(tmp_path / "c.pem", redirect="a:1; include x")))
    with pytest.raises(SettingsError, match="HAProxy takes one file"):
        render(BalancerConfig("haproxy", "a:1", ["a:2"], Tls(tmp_path / "c.pem", key=tmp_path / "c.pem")))


def test_a_program_is_found_where_the_path_of_an_ordinary_user_does_not_lead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nginx"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(balancer, "_PLACES", (str(tmp_path),))
    assert balancer.find_program("nginx") == str(program)
    assert balancer.find_program("haproxy") is None
    assert balancer.installed_program() == "nginx"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[list[str]]]:
    """The commands that would be executed; the umask is restored."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    monkeypatch.setattr(balancer, "find_program", lambda _: "/bin/true")
    monkeypatch.chdir(tmp_path)
    previous = os.umask(0o022)
    yield commands
    os.umask(previous)


@pytest.mark.parametrize("program", PROGRAMS)
def test_its_files_cannot_be_read_by_other_users(program: Program, started: list[list[str]], tmp_path: Path) -> None:
    folder = tmp_path / ".imstream" / "balancer"
    (folder / "body").mkdir(parents=True)
    (folder / SHIPPED[program]).write_text("old")
    become = CliRunner().invoke(main, ["balancer", "--program", program, "127.0.0.1:8080"])
    assert become.exit_code == 0, become.output
    assert len(started) == 1
    assert [path for path in (folder.parent, *folder.parent.rglob("*")) if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_can_execute_itself_again_without_its_folder_in_path(
    program: Program, started: list[list[str]]
) -> None:
    assert CliRunner().invoke(main, ["balancer", "--program", program, "127.0.0.1:8080"]).exit_code == 0
    assert started[0][0] == "/bin/true"


def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(started: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["balancer", "--program", "nginx", "--folder", "file/below", "127.0.0.1:8080"])
    assert (result.exit_code, started) == (2, [])
    assert result.output == "Error: --folder=file/below cannot be used: Not a directory: file/below\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_limits_are_those_of_the_readme(program: Program) -> None:
    made = render(BalancerConfig(program, "a:1", ["a:2"]))
    document = (ROOT / "ops" / "docs" / "balancers.md").read_text("utf-8")
    table = document.partition("| of one address |")[2].partition("\n\n")[0]
    numbers = [line.split("|")[2].strip().replace(",", "") for line in table.splitlines()[2:]]
    assert numbers == ["1000", "400", "2000", "10"]
    used = "\n".join(line for line in made.splitlines() if not line.lstrip().startswith("#"))
    kinds = {
        "nginx": ("connections {}", "zone=handshakes burst={}", "zone=requests burst={}", "client_header_timeout {}s"),
        "haproxy": ("(connections) gt {}", "(handshakes) ge {}", "(requests) ge {}", "http-request {}s"),
    }[program]
    for kind, number in zip(kinds, numbers, strict=True):
        assert re.search(re.escape(kind.format(number)).replace(r"\ ", " +"), used), kind


def test_an_installed_package_has_the_configurations_of_ops(tmp_path: Path) -> None:
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    subprocess.run([PYTHON, "-c", build, str(tmp_path)], check=True, cwd=ROOT, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as package:
        for name in SHIPPED.values():
            assert package.read(f"imstream/cli/{name}") == (ROOT / "ops" / name).read_bytes()
