"""What can be set of `imstream up` itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from imstream.settings import ENV_PREFIX, SettingsGroup


class UpSettings(SettingsGroup):
    """How many nodes, and what is in front of them. The environment variable is `IMSTREAM_UP_` and the name."""

    model_config = SettingsConfigDict(env_prefix=f"{ENV_PREFIX}UP_")

    nodes: int = Field(1, ge=1, le=99, description="Nodes to run; each one after the first has the next id and port.")
    balancer: Literal["auto", "haproxy", "nginx", "none"] = Field(
        "auto", description="What is in front of the nodes; auto: what is installed, when there are several nodes."
    )
    balancer_port: int = Field(8000, ge=1, le=65535, description="Port of what is in front of the nodes.")
