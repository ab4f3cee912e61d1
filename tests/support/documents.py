"""Commands for redis-cli in ops/docs/operating.md, run as a node's user."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

import redis

from tests.support.redis_sets import Topology
from tests.support.servers import OPS


def redis_cli(
    heading: str, on: Topology, names: Mapping[str, str], *, since: str = "", until: str | None = None
) -> dict[str, Any]:
    """Run the commands of the block without a language in a section; their replies by command.

    `names` replaces parts of the examples, such as the user id. `since` and `until`: only from the first command that
    begins so, and before it.
    """
    text = (OPS / "docs" / "operating.md").read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    [block] = [code for language, code in blocks if not language]
    replies: dict[str, Any] = {}
    with redis.Redis.from_url(on.url, decode_responses=True, protocol=2) as client:
        client.response_callbacks.clear()  # replies as Redis sends them
        lines = block.splitlines()
        begin = next(number for number, line in enumerate(lines) if line.startswith(since))
        end = next((number for number, line in enumerate(lines) if until and line.startswith(until)), None)
        for line in lines[begin:end]:
            command = line
            for example, name in names.items():
                command = command.replace(example, name)
            replies[line] = client.execute_command(*shlex.split(command))
    return replies
