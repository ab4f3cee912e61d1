"""The file of several backends: its example in the documents, and the reports of mistakes."""

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from imstream.ai.backend import OpenAIBackend
from imstream.ai.backend_file import read_backends
from imstream.ai.backend_options import BackendOptions
from imstream.ai.router import Backends
from imstream.errors import SettingsError
from imstream.settings import Settings
from tests.unit.test_documents import DOCS, code_blocks

MINIMAL = '[[backend]]\nname = "a"\nurl = "http://a/v1"\nmodel = "m"\n'


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_KEY", "AZURE_OPENAI_KEY", "DASHSCOPE_KEY", "OPENROUTER_KEY"):
        monkeypatch.setenv(name, f"sk-{name}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "backends.toml"


def mistakes(file: Path, text: str, **settings: Any) -> list[str]:  # noqa: ANN401 - any setting
    """The error about a file, without its path."""
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_backends(file, Settings.load(**settings))
    return [line.removeprefix(f"{file}: ") for line in str(caught.value).splitlines()]


def test_the_example_in_the_documents_is_valid(file: Path) -> None:
    [text] = code_blocks(DOCS / "backends.md", "toml")
    file.write_text(text)
    settings = Settings.load(context_tokens=16384)
    backends = {options.name: options for options in read_backends(file, settings)}
    assert list(backends) == ["vllm-1", "vllm-2", "llama", "ollama", "dashscope", "openrouter", "azure", "openai"]
    for options in backends.values():
        OpenAIBackend(settings, options)
    first, azure = backends["vllm-1"], backends["azure"]
    assert (first.priority, first.weight, first.concurrency, first.continues) == (0, 2, 32, "vllm")
    assert azure.headers is not None
    assert azure.headers.get_secret_value() == {"api-key": "env:AZURE_OPENAI_KEY"}
    assert backends["openai"].key is not None
    assert backends["openai"].key.get_secret_value() == "sk-OPENAI_KEY"


def test_options_that_are_left_out_have_the_defaults_of_the_settings(file: Path) -> None:
    file.write_text(MINIMAL)
    [options] = read_backends(file, Settings.load(ai_idle_timeout="3s"))
    plain = BackendOptions.model_validate({"name": "a", "url": "http://a/v1", "model": "m"})
    assert options == plain.named_in(file)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("modell = 1", "modell is unknown; allowed are name, priority, weight, concurrency, "),
        ('key = "sk-1"', "key is unknown; allowed are "),
        ('continue = "yes"', "continue='yes' is not allowed: Input should be 'none', 'assistant', 'vllm' or 'prefix'"),
        ("concurrency = 0", "concurrency=0 is not allowed: Input should be greater than or equal to 1"),
        ("weight = 0", "weight=0 is not allowed: Input should be greater than 0"),
        ('idle_timeout = "soon"', "idle_timeout='soon' is not allowed: a time span such as 250ms, 30s, 15m, 1h or 1d"),
        ('headers = {Host = "x", "a b" = "c"}', "headers=(hidden) is not allowed: 'a b' is not the name of a header"),
        ("body = {n = 2}", "body=(hidden) is not allowed: the parameter n is set by imstream"),
        ('key_env = "NO_SUCH"', "key_env='NO_SUCH' is not allowed: must name an environment variable that is set"),
        ('key_env = "sk-1a2b"', "key_env=(hidden) is not allowed: must name an environment variable that is set"),
        ('key_file = "sk-1a2b"', "key_file: its file cannot be read: No such file or directory"),
        ('key_file = "/dev/null"', "key_file: its file is empty"),
        ('key_file = "k"\nkey_env = "PATH"', "key_env and key_file are both given: remove one of them"),
        ("context_tokens = 512", "context_tokens: they leave too few for a prompt; at least 64 beside answer_tokens"),
    ],
)
def test_a_mistake_is_reported_with_table_key_and_allowed_values(more: str, said: str, file: Path) -> None:
    line = mistakes(file, MINIMAL + more)[0]
    assert line.startswith(f"backend 1 (a): {said}")


def test_a_key_is_read_from_its_file_and_errors_about_it_name_that_option(file: Path) -> None:
    (secret := file.parent / "key").write_text("\ufeffsk-1\r\n")
    file.write_text(f'{MINIMAL}key_file = "{secret}"\n')
    [options] = read_backends(file, Settings.load())
    assert options.key is not None
    assert options.key.get_secret_value() == "sk-1"
    secret.write_text("not ascii: \u4f60")
    with pytest.raises(SettingsError, match=r"backend a, key_file=\(hidden\) is not allowed: must be printable ASCII"):
        Backends(Settings.load(ai_backends=file))


@pytest.fixture
def referring(file: Path) -> Path:
    """A file that names those of a key and of a header."""
    key, header = file.parent / "key", file.parent / "header"
    key.write_text("sk-1")
    header.write_text("tenant-1\n")
    file.write_text(f'{MINIMAL}key_file = "{key}"\nheaders = {{X-Tenant = "file:{header}"}}\n')
    return file


async def test_a_key_and_a_header_that_have_changed_in_their_files_are_used_after_a_reload(referring: Path) -> None:
    file, key, header = referring, referring.parent / "key", referring.parent / "header"
    async with Backends(Settings.load(ai_backends=file)) as backends:
        assert sent(backends) == ("Bearer sk-1", "tenant-1")
        assert not await backends.reload()
        key.write_text("sk-2")
        assert await backends.reload()
        assert sent(backends) == ("Bearer sk-2", "tenant-1")
        header.write_text("tenant-2\n")
        assert await backends.reload()
        assert sent(backends) == ("Bearer sk-2", "tenant-2")
        header.write_text("\n")
        with pytest.raises(SettingsError, match=r"backend a, headers: its file is empty"):
            await backends.reload()
        assert sent(backends) == ("Bearer sk-2", "tenant-2")


@pytest.mark.parametrize(("mode", "is_open"), [(0o440, False), (0o444, True)])
async def test_files_of_a_key_and_a_header_that_other_users_can_read_are_warned_about(
    mode: int, referring: Path, *, is_open: bool
) -> None:
    for name in ("key", "header"):
        (referring.parent / name).chmod(mode)
    with capture_logs() as logs:
        Backends(Settings.load(ai_backends=referring))
    options = {"key": "key_file", "header": f"{referring}, backend a, headers"}
    assert [line["event"] for line in logs] == [
        f"{option}: {referring.parent / name} can be read by other users of this machine"
        for name, option in options.items()
        if is_open
    ]


def sent(backends: Backends) -> tuple[str, str]:
    """The key and the header of the requests to the only backend."""
    [one] = backends
    request: Any = one.request
    headers = request[0].headers
    return headers["Authorization"], headers["X-Tenant"]


def test_all_mistakes_are_reported_at_once(file: Path) -> None:
    found = mistakes(file, f'{MINIMAL}{MINIMAL}[[backend]]\nname = "b"\nurl = "ftp://me:pass@b/v1"\n')
    assert found == [
        "backend 2 (a): name: an earlier backend has the same",
        "backend 3 (b): model is missing",
        "backend 3 (b): url='ftp://b/v1' is not allowed: an address that begins with http:// or https://",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[backend", "is not TOML: "),
        (f"backend = {'[' * 5000}", "is not TOML: "),
        ("", "must have a table [[backend]] for each backend, and nothing else: it has none"),
        ("[backend]\nname = 1", "must have a table [[backend]] for each backend, and nothing else: it has none"),
        (f"timeout = 3\n{MINIMAL}", "nothing else: timeout is unknown"),
    ],
)
def test_a_file_that_is_something_else_is_refused(text: str, said: str, file: Path) -> None:
    [line] = mistakes(file, text)
    assert said in line


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"IMSTREAM_AI_BACKENDS=.*no\.toml cannot be read: No such file"):
        Backends(Settings.load(ai_backends=tmp_path / "no.toml"))


def test_prompts_that_no_backend_takes_are_refused(file: Path) -> None:
    [line] = mistakes(file, f"{MINIMAL}context_tokens = 4096\n", context_tokens=8192)
    assert line == f"IMSTREAM_CONTEXT_TOKENS=8192 is not allowed: no backend in {file} takes such prompts; at most 4096"


def test_errors_that_are_found_later_name_the_place_in_the_file(file: Path) -> None:
    file.write_text(f'{MINIMAL}headers = {{"api-key" = "env:NO_SUCH"}}\n')
    with pytest.raises(SettingsError, match=r"backends\.toml, backend a, headers=\(hidden\) is not allowed: .*NO_SUCH"):
        Backends(Settings.load(ai_backends=file))


@pytest.fixture
def minimal(file: Path) -> Path:
    file.write_text(MINIMAL)
    return file


async def test_with_a_file_the_settings_of_a_single_backend_are_ignored_with_a_warning(minimal: Path) -> None:
    with capture_logs() as logs:
        settings = Settings.load(ai_backends=minimal, ai_url="http://b/v1", ai_model="n", ai_breaker_failures=3)
        async with Backends(settings) as backends:
            assert [str(one.options.url) for one in backends] == ["http://a/v1"]
    [told] = logs
    assert told["event"] == "settings of a single backend are ignored"
    assert told["ignored"] == ["IMSTREAM_AI_MODEL", "IMSTREAM_AI_URL"]
