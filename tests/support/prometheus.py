"""A real Prometheus with the rules of `ops/prometheus/`, and the queries of the dashboard.

async with prometheus(folder, "127.0.0.1:8080") as watching:
    await watching.query("up")          # samples, each with its labels
    await watching.firing()             # {"ImstreamRedisDown": "redis"}: alerts with their label `part`
    await watching.panel("Round trip")  # the values of the dashboard
"""

import asyncio
import json
import shutil
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.processes import Running, free_port, http_status, start, wait_for
from tests.support.servers import OPS, missing

RULES = OPS / "prometheus"
DASHBOARD = OPS / "grafana" / "imstream.json"


@dataclass
class Sample:
    """One value of the result of a query."""

    labels: dict[str, str]
    value: float

    def __str__(self) -> str:
        labels = ",".join(f"{name}={value}" for name, value in self.labels.items() if name != "__name__")
        return f"{labels or 'all'}: {self.value:.3g}"


@dataclass
class Prometheus:
    """A running Prometheus."""

    port: int
    process: Running

    async def query(self, expr: str) -> list[Sample]:
        """The samples of an expression now."""
        found = await self._get("query", query=expr)
        return [Sample(one["metric"], float(one["value"][1])) for one in found["result"]]

    async def firing(self) -> dict[str, str]:
        """The alerts that fire, with the part that each blames."""
        alerts = (await self._get("alerts"))["alerts"]
        return {one["labels"]["alertname"]: one["labels"]["part"] for one in alerts if one["state"] == "firing"}

    async def panel(self, title: str) -> list[Sample]:
        """The values of a panel of the dashboard within the last minute, each with its legend as a label."""
        dashboard = json.loads(DASHBOARD.read_text("utf-8"))
        [panel] = [one for one in dashboard["panels"] if one["title"] == title]
        shown = list[Sample]()
        for target in panel["targets"]:
            samples = await self.query(target["expr"].replace("$node", ".*").replace("$window", "1m"))
            for sample in samples:
                legend = target["legendFormat"]
                for name, value in sample.labels.items():
                    legend = legend.replace(f"{{{{{name}}}}}", value)
                shown.append(Sample({"legend": legend}, sample.value))
        return shown

    async def _get(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 - JSON
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        return json.loads(await asyncio.to_thread(_read, url))["data"]


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - a URL of the test's own
        content: bytes = answer.read()
        return content


def _configure(folder: Path, targets: Iterable[str], waits: Mapping[str, str]) -> Path:
    """Write the example configuration with these nodes; `waits`: other values of `for`, by alert."""
    alerts = yaml.safe_load((RULES / "alerts.yml").read_text("utf-8"))
    for rule in (rule for group in alerts["groups"] for rule in group["rules"] if rule["alert"] in waits):
        rule["for"] = waits[rule["alert"]]
    (folder / "alerts.json").write_text(json.dumps(alerts), "utf-8")  # JSON is YAML
    config = yaml.safe_load((RULES / "prometheus.yml").read_text("utf-8"))
    assert config["rule_files"] == ["recording.yml", "alerts.yml"]
    config["rule_files"] = [str(RULES / "recording.yml"), str(folder / "alerts.json")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": list(targets)}]
    file = folder / "prometheus.json"
    file.write_text(json.dumps(config), "utf-8")
    return file


@asynccontextmanager
async def prometheus(folder: Path, *targets: str, waits: Mapping[str, str] | None = None) -> AsyncIterator[Prometheus]:
    """Run Prometheus with the example configuration and these nodes; `waits`: other values of `for`, by alert."""
    program = shutil.which("prometheus")
    if program is None:
        missing("prometheus")
    file = _configure(folder, targets, waits or {})
    port = free_port()
    options = {
        "config.file": file,
        "storage.tsdb.path": folder / "prometheus",
        "web.listen-address": f"127.0.0.1:{port}",
        "log.level": "warn",
    }
    command = [program or "", *(f"--{name}={value}" for name, value in options.items())]
    process = start(command, folder / "prometheus.log")
    with process:
        ready = f"http://127.0.0.1:{port}/-/ready"
        await asyncio.to_thread(wait_for, lambda: http_status(ready) == 200, process, "prometheus")
        yield Prometheus(port, process)
