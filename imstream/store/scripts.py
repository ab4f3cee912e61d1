"""The Lua scripts of the store: one file in `lua/` for each atomic step."""

from __future__ import annotations

from importlib import resources

from imstream.redis.client import Script

_FOLDER = resources.files("imstream.store") / "lua"


def load_script(name: str) -> Script:
    """Load `lua/<name>.lua`."""
    return Script(_FOLDER.joinpath(f"{name}.lua").read_text("utf-8"))
