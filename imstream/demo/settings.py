"""Settings of the demo backend, from `IMSTREAM_DEMO_*`, `.env` or the command line."""

from datetime import timedelta
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from imstream.settings import ENV_PREFIX, Duration, SettingsGroup

Span = Annotated[Duration, Field(ge=timedelta(0))]
Rate = Annotated[float, Field(ge=0, le=1)]


class DemoSettings(SettingsGroup):
    """The environment variable of a setting is `IMSTREAM_DEMO_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=f"{ENV_PREFIX}DEMO_")

    host: str = Field("127.0.0.1", description="Address the demo backend listens on.")
    port: int = Field(8090, ge=0, le=65535, description="Port the demo backend listens on; 0 for a free one.")

    pace: Span = Field(timedelta(milliseconds=30), description="Time between two deltas; 0 sends the answer at once.")
    first: Span = Field(timedelta(milliseconds=200), description="Time before the first delta.")
    length: int = Field(0, ge=0, le=100_000, description="Number of deltas of an answer; 0 for the natural length.")

    fail_rate: Rate = Field(0.0, description="Share of calls answered with 500 or 503.")
    busy_rate: Rate = Field(0.0, description="Share of the other calls answered with 429.")
    hang_rate: Rate = Field(0.0, description="Share of the other calls that never get a first delta.")
    break_rate: Rate = Field(0.0, description="Share of the other calls whose connection is closed in the middle.")
    retry_after: Span = Field(timedelta(seconds=1), description="Retry-After of a 429, in whole seconds.")
    seed: int | None = Field(None, description="Seed of the random faults, to repeat them.")
