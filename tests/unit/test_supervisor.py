"""What the supervisor does with a child that runs and never serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imstream.cli import supervisor
from imstream.cli.supervisor import Part, Supervisor

if TYPE_CHECKING:
    import pytest


async def test_a_child_that_never_serves_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def never() -> bool:
        return False

    announced: list[bool] = []
    monkeypatch.setattr(supervisor, "START_LIMIT", 1.0)
    both = Supervisor([[Part("ai", ["demo-ai", "--port", "0"], never)], [Part("node", ["node"], never)]])
    assert await both.run(lambda: announced.append(True)) == 1
    assert not announced
    out = capsys.readouterr().out
    assert out.startswith("starting ai, node …\n")
    assert "ai does not serve after 1 s; stopping the rest" in out
