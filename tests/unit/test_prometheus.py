"""The rules and the dashboard are valid and about series that nodes have; every alert has a runbook."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from imstream.metrics import Metrics
from ops.metrics_table import families
from tests.support.servers import missing
from tests.unit.test_documents import anchors

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "ops" / "prometheus"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "ops" / "grafana" / "imstream.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{panel['title']}: {target['expr']}": target["expr"] for panel in PANELS for target in panel["targets"]}

FOREIGN = {"redis_memory_used_bytes", "redis_memory_max_bytes", "redis_aof_last_write_status"} | {
    "redis_rdb_last_bgsave_status",
    "up",
    "ALERTS",
}
"""Series of redis_exporter and of Prometheus itself."""

OF_PROMETHEUS = {"instance", "job", "le"}
"""Labels that Prometheus adds, and that of buckets."""

ENDINGS = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
    "info": ("_info",),
}
"""Ends of the names of series, by the type of their family."""

PARTS = {"answers", "ai", "redis", "node", "clients"}


def rules(file: str) -> list[dict[str, Any]]:
    loaded = yaml.safe_load((PROMETHEUS / file).read_text("utf-8"))
    return [rule for group in loaded["groups"] for rule in group["rules"]]


ALERTS = rules("alerts.yml")
RECORDED = {rule["record"]: rule["expr"] for rule in rules("recording.yml")}
EXPRESSIONS = {
    **RECORDED,
    **{alert["alert"]: alert["expr"] for alert in ALERTS},
    **QUERIES,
    **{variable["name"]: variable.get("definition", "") for variable in DASHBOARD["templating"]["list"]},
}


def promtool(*arguments: str) -> None:
    """Run promtool; its complaints are the failure of the test."""
    program = shutil.which("promtool")
    if program is None:
        missing("promtool (Debian: prometheus)")
        return
    done = subprocess.run([program, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def node_series() -> dict[str, set[str]]:
    """The names of all series of a node's registry, with their labels."""
    metrics = Metrics()
    found = {sample.name: set(sample.labels) for family in metrics.registry.collect() for sample in family.samples}
    # Families with labels have no samples before the first event.
    for family, labels in families(metrics):
        for ending in ENDINGS[family.type]:
            found[family.name + ending] = {*found.get(family.name + ending, ()), *labels}
    return found


SERIES = node_series()


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The series that an expression selects, each with the labels of its matchers."""
    bare = re.sub(r"\b(?:by|on|group_left|without|ignoring)\s*\([^)]*\)", " ", expression)
    for name, matchers in re.findall(
        r"(?<![\w:$])((?:imstream|process|redis)[\w:]*|up|ALERTS)\b(?!\()(\{[^}]*\})?", bare
    ):
        if name in {"imstream", "imstream.*"} or f'"{name}' in expression.replace(f"{name}{{", ""):
            continue  # the value of a matcher
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))


def grouped(expression: str) -> set[str]:
    """The labels that an expression groups or joins by."""
    lists = re.findall(r"\b(?:by|on|group_left)\s*\(([^)]*)\)", expression)
    return {label.strip() for names in lists for label in names.split(",") if label.strip()}


def test_promtool_finds_nothing_wrong_with_the_configuration_and_its_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "recording.yml", "alerts.yml")


@pytest.mark.parametrize("file", sorted((PROMETHEUS / "tests").glob("*.yml")), ids=lambda file: file.name)
def test_every_scenario_fires_its_alert_and_no_other(file: Path) -> None:
    promtool("test", "rules", str(file))


def test_every_alert_has_a_scenario() -> None:
    scenarios = "".join(file.read_text("utf-8") for file in (PROMETHEUS / "tests").glob("*.yml"))
    assert [alert["alert"] for alert in ALERTS if f'alertname="{alert["alert"]}"' not in scenarios] == []


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_has_a_severity_a_part_and_a_runbook(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["labels"]["part"] in PARTS
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert len(alert["annotations"]["summary"]) <= 100
    file, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert anchor == alert["alert"].lower()
    assert anchor in anchors(ROOT / file), f"{file} has no heading {alert['alert']}"


def test_every_runbook_belongs_to_an_alert() -> None:
    headings = re.findall(r"^#+ (Imstream\w+)$", (ROOT / "ops/docs/operating.md").read_text("utf-8"), re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_series_and_label_that_is_used_exists(name: str) -> None:
    known = set[str]()
    for series, matched in selectors(EXPRESSIONS[name]):
        if series in FOREIGN or series in RECORDED:
            known |= matched | grouped(RECORDED.get(series, "")) | _labels_of(series)
            continue
        assert series in SERIES, f"no node has a series {series}"
        assert matched <= SERIES[series] | OF_PROMETHEUS, f"{series} has no labels {matched - SERIES[series]}"
        known |= SERIES[series]
    assert grouped(EXPRESSIONS[name]) <= known | OF_PROMETHEUS


def _labels_of(recorded: str) -> set[str]:
    """The labels that a recorded series may have: those of the series that it is computed from."""
    labels = set[str]()
    for series, _ in selectors(RECORDED.get(recorded, "")):
        labels |= SERIES.get(series, set()) or _labels_of(series)
    return labels


def test_series_are_found_in_expressions() -> None:
    found = dict(
        selectors(
            'sum by (a) (rate(imstream_x_total{b="imstream_y",c!~"d"}[1m])) / imstream:z unless up{job="imstream"}'
        )
    )
    assert found == {"imstream_x_total": {"b", "c"}, "imstream:z": set(), "up": {"job"}}


def test_the_dashboard_is_one_that_grafana_can_show() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert DASHBOARD["schemaVersion"] >= 39
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} >= {"datasource", "node"}
    places = set[tuple[int, int]]()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & places, f"{panel['title']} covers another panel"
        places |= cells


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_asks_the_chosen_data_source_about_the_chosen_nodes(panel: dict[str, Any]) -> None:
    assert panel["description"]
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
        for series in re.findall(r"imstream_\w+\{[^}]*\}?", target["expr"]):
            assert 'instance=~"$node"' in series
        assert not re.search(r"imstream_\w+(?![\w{])", target["expr"])


def test_every_query_of_the_dashboard_is_valid(tmp_path: Path) -> None:
    exprs = [query.replace("$node", ".*").replace("$window", "1m") for query in QUERIES.values()]
    recorded = [{"record": f"panel_{number}", "expr": expr} for number, expr in enumerate(exprs)]
    file = tmp_path / "queries.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recorded}]}), "utf-8")
    promtool("check", "rules", str(file))
