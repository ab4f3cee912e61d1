"""What an operator should know about the Redis server before trusting it with messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imstream.errors import StoreError

if TYPE_CHECKING:
    from imstream.store.connection import Commands


async def warnings(commands: Commands) -> list[str]:
    """One sentence for each setting of the server that can lose accepted messages, saying what to set instead."""
    try:
        info = {
            **_section(await commands.execute("INFO", "memory")),
            **_section(await commands.execute("INFO", "persistence")),
        }
    except StoreError as error:
        return [f"cannot look at the settings of Redis: {error}"]
    found = []
    policy = info.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys") or (policy.startswith("volatile") and info.get("maxmemory", "0") != "0"):
        found.append(
            f"Redis may evict accepted messages when memory is full (maxmemory-policy {policy}); "
            "set maxmemory-policy noeviction"
        )
    if info.get("aof_enabled") == "0":
        found.append("Redis loses accepted messages when it restarts (appendonly no); set appendonly yes")
    return found


def _section(text: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
