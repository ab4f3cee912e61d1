"""ops/deploy: the manifests agree with published schemas, with the settings, and with each other."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import redis
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from imstream.cli import settings_notes
from imstream.gateway.app import page_routes
from imstream.settings import Settings
from imstream.settings_group import parse_duration
from imstream.user_ids import UserIds
from tests.support.processes import free_port, start, wait_for
from tests.support.servers import OPS, missing, valkey_binary

DEPLOY = OPS / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
AFTER_DRAIN = 10
"""Seconds that a node may need after its drain grace, as in `imstream up`."""

DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}


def seconds(value: object) -> float:
    """A time span of a manifest."""
    span: Any = parse_duration(str(value))
    return float(span.total_seconds())


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return document


def objects() -> Iterator[dict[str, Any]]:
    """The objects of the manifests."""
    for name in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))["resources"]:
        yield from yaml.safe_load_all((KUBERNETES / name).read_text("utf-8"))


def of_kind(kind: str) -> dict[str, Any]:
    return next(one for one in objects() if one["kind"] == kind)


def pod() -> dict[str, Any]:
    found: dict[str, Any] = of_kind("StatefulSet")["spec"]["template"]["spec"]
    return found


def settings_env() -> dict[str, str]:
    """The settings of nodes in Kubernetes."""
    lines = (KUBERNETES / "settings.env").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


def unit() -> dict[str, str]:
    """The directives of the service; of those that are repeated, the last."""
    lines = (DEPLOY / "systemd" / "imstream@.service").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line))


# Schemas


def validator(one: Mapping[str, Any]) -> jsonschema.Draft202012Validator:
    """The validator of an object; without the published schemas, the test is skipped."""
    found = find_spec("kubernetes_validate")  # not imported: only its files are used
    if found is None or found.origin is None:
        if "WITHOUT_KUBERNETES" in os.environ:
            pytest.skip("the schemas of Kubernetes are not installed")
        missing("ops/requirements-kubernetes.txt")
        raise AssertionError
    folder = Path(found.origin).parent / "kubernetes-json-schema" / "v1.37.0-local-strict"
    group, _, version = one["apiVersion"].rpartition("/")
    name = "-".join(filter(None, (one["kind"].lower(), group.partition(".")[0], version)))
    schema, definitions = (json.loads((folder / f"{file}.json").read_text("utf-8")) for file in (name, "_definitions"))
    document = Resource.from_contents(definitions, DRAFT202012)
    known = Registry().with_resources([("/api/_definitions.json", document), (definitions["$id"], document)])
    return jsonschema.Draft202012Validator(schema, registry=known)


@pytest.mark.parametrize("one", list(objects()), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_the_objects_agree_with_the_published_schemas(one: dict[str, Any]) -> None:
    validator(one).validate(one)


def test_a_misspelt_field_would_be_found() -> None:
    one = of_kind("StatefulSet")
    one["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):
        validator(one).validate(one)


def test_kustomize_makes_the_same_objects_and_the_map_of_settings() -> None:
    if shutil.which("kubectl") is None:  # not of Debian
        pytest.skip("kubectl is not installed")
    made = subprocess.run(["kubectl", "kustomize", str(KUBERNETES)], capture_output=True, check=True).stdout
    kinds = {(one["kind"], one["metadata"]["name"].partition("-settings")[0]) for one in yaml.safe_load_all(made)}
    assert kinds == {*((one["kind"], one["metadata"]["name"]) for one in objects()), ("ConfigMap", "imstream")}


# Values that depend on each other


def test_no_supervisor_kills_a_node_that_drains() -> None:
    assert seconds(unit()["TimeoutStopSec"]) > seconds(DEFAULTS["drain_grace"].total_seconds()) + AFTER_DRAIN
    for name in ("node-0", "node-1"):
        node = compose()["services"][name]
        assert seconds(node["stop_grace_period"]) > seconds(node["environment"]["IMSTREAM_DRAIN_GRACE"]) + AFTER_DRAIN
    [container] = pod()["containers"]
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = waits + seconds(settings_env()["IMSTREAM_DRAIN_GRACE"]) + AFTER_DRAIN
    assert pod()["terminationGracePeriodSeconds"] > needed
    probe = container["readinessProbe"]
    assert waits >= probe["periodSeconds"] * probe["failureThreshold"]
    assert of_kind("StatefulSet")["spec"]["minReadySeconds"] > DEFAULTS["lease"].total_seconds()


def test_proxies_wait_longer_than_nodes() -> None:
    idle = DEFAULTS["idle_timeout"].total_seconds()
    annotations = of_kind("Ingress")["metadata"]["annotations"]
    limits = [annotations[f"nginx.ingress.kubernetes.io/proxy-{what}-timeout"] for what in ("read", "send")]
    for file, setting in (("haproxy.cfg", "timeout tunnel"), ("nginx.conf", "proxy_read_timeout")):
        limits += re.findall(rf"{setting} (90s)", (OPS / file).read_text("utf-8"))
    assert len(limits) == 4
    assert all(seconds(limit) > idle for limit in limits)


def test_the_ingress_passes_on_the_socket_and_every_file_of_the_page_and_nothing_else() -> None:
    [rule] = of_kind("Ingress")["spec"]["rules"]
    paths = [(one["path"], one["pathType"]) for one in rule["http"]["paths"]]
    routes = page_routes(UserIds.NUMBER, DEFAULTS["max_frame"], DEFAULTS["max_history"])
    assert sorted(paths) == sorted((path, "Exact") for path in ("/ws", *(route.path for route in routes)))


def test_the_table_of_the_document_has_these_values() -> None:
    table = (OPS / "docs" / "deploy.md").read_text("utf-8").partition("## Values that")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in table.splitlines() if line.startswith("| ")][2:]
    node, [container] = compose()["services"]["node-0"], pod()["containers"]
    spec = of_kind("StatefulSet")["spec"]
    assert rows == [
        ["–", "–", f"{container['lifecycle']['preStop']['sleep']['seconds']} s"],
        [f"{DEFAULTS['drain_grace'].total_seconds():g} s", *["30 s"] * 2],
        [f"{unit()['TimeoutStopSec']} s", "45 s", f"{pod()['terminationGracePeriodSeconds']} s"],
        ["–", "–", f"{spec['minReadySeconds']} s"],
        ["90 s"] * 3,
    ]
    assert node["stop_grace_period"] == "45s"
    assert node["environment"]["IMSTREAM_DRAIN_GRACE"] == settings_env()["IMSTREAM_DRAIN_GRACE"] == "30s"


# Settings and secrets


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """The folder of secrets for compose.yaml, made as documented."""
    deploy = tmp_path / "ops" / "deploy"
    deploy.mkdir(parents=True)
    shutil.copy(DEPLOY / "secrets", deploy)
    shutil.copy(OPS / "redis-users.acl", deploy.parent)
    for _ in range(2):  # the second time, it changes nothing
        subprocess.run([deploy / "secrets"], check=True)
        made = {file.name: file.read_text() for file in (deploy / "secrets.d").iterdir()}
    assert made == {file.name: file.read_text() for file in (deploy / "secrets.d").iterdir()}
    assert (deploy / "secrets.d").stat().st_mode & 0o777 == 0o700
    return deploy / "secrets.d"


def load(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Settings:
    """The settings of a node with these variables."""
    for name in [name for name in os.environ if name.startswith("IMSTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(folder)
    for name, value in environment.items():
        filled = re.sub(r"\$\{\w+:-(.*)\}", r"\1", value)
        monkeypatch.setenv(name, filled.replace("%H", "host").replace("%i", "8080"))
    assert settings_notes.check()[1] == []
    return Settings.load()


def test_the_settings_of_all_nodes_are_valid(monkeypatch: pytest.MonkeyPatch, secrets: Path, tmp_path: Path) -> None:
    for name in ("node-0", "node-1"):
        service = compose()["services"][name]
        environment = {
            variable: value.replace("/run/secrets", str(secrets)) for variable, value in service["environment"].items()
        }
        (secrets / "auth-secret").chmod(0o600)
        loaded = load(environment, monkeypatch, tmp_path)
        assert (loaded.node, service["hostname"], loaded.auth) == (name, name, "jwt")
        assert all((secrets / secret).is_file() for secret in service["secrets"])
    environment = settings_env()
    for variable in pod()["containers"][0]["env"]:
        if "value" in variable:
            file = tmp_path / Path(variable["value"]).name
            file.write_text("redis://imstream:x@redis:6379/0" if "redis" in file.name else 40 * "x")
            file.chmod(0o600)
            environment[variable["name"]] = str(file)
    assert {Path(value).name for name, value in environment.items() if name.endswith("_FILE")} == {
        *re.findall(r"--from-file=([\w-]+)", (OPS / "docs" / "deploy.md").read_text("utf-8"))
    }
    assert load(environment, monkeypatch, tmp_path).auth == "jwt"
    line = unit()["Environment"]
    loaded = load(dict(word.split("=", 1) for word in line.split()), monkeypatch, tmp_path)
    assert (loaded.node, loaded.port) == ("host-8080", 8080)


@pytest.mark.parametrize("node", ["imstream-0", "web-1.example.com-8080", "0a1b2c3d4e5f", 64 * "a"])
def test_a_host_name_is_a_node_id(node: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load({"IMSTREAM_NODE": node}, monkeypatch, tmp_path).node == node


def test_pods_are_not_root_and_get_no_variables_of_services() -> None:
    assert pod()["enableServiceLinks"] is False  # IMSTREAM_PORT=tcp://… of a service of this name
    assert of_kind("Service")["metadata"]["name"] == "imstream"
    assert pod()["securityContext"]["runAsNonRoot"] is True
    [container] = pod()["containers"]
    own = container["securityContext"]
    assert (own["readOnlyRootFilesystem"], own["allowPrivilegeEscalation"]) == (True, False)
    assert container["env"][0] == {"name": "IMSTREAM_NODE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    labels = of_kind("StatefulSet")["spec"]["selector"]["matchLabels"]
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels


# Allowed connections

Pod = tuple[str, str]
"""Namespace, and the value of its label `app.kubernetes.io/name`."""

NODE, REDIS, STRANGER = ("default", "imstream"), ("default", "valkey"), ("default", "other")
CONTROLLER, PROMETHEUS = ("ingress-nginx", "ingress-nginx"), ("monitoring", "prometheus")


def matches(peer: Mapping[str, Any], pod: Pod) -> bool:
    """Whether a peer of a policy in the namespace `default` selects a pod."""
    namespace = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name", "default")
    wanted = peer.get("podSelector", {}).get("matchLabels", {})
    return "ipBlock" not in peer and namespace == pod[0] and (not wanted or pod[1] in wanted.values())


def allowed(direction: str, of: Pod, other: Pod, port: object) -> bool:
    """Whether the policies of a pod allow a connection in this direction; without policies, all are."""
    peers = {"ingress": "from", "egress": "to"}[direction]
    policies = [
        one["spec"]
        for one in objects()
        if one["kind"] == "NetworkPolicy"
        and of[0] == "default"
        and matches(one["spec"], of)
        and direction.capitalize() in one["spec"]["policyTypes"]
    ]
    return not policies or any(
        any(one["port"] == port for one in rule["ports"]) and any(matches(peer, other) for peer in rule[peers])
        for policy in policies
        for rule in policy[direction]
    )


def may_connect(client: Pod, server: Pod, port: object) -> bool:
    """Whether the policies of both ends allow a connection."""
    return allowed("egress", client, server, port) and allowed("ingress", server, client, port)


def test_the_policies_allow_the_needed_connections_only() -> None:
    dns = ("kube-system", "kube-dns")
    needed = {
        (CONTROLLER, NODE, "http"),
        (PROMETHEUS, NODE, "metrics"),
        (NODE, REDIS, 6379),
        (REDIS, REDIS, 6379),
        (NODE, dns, 53),
    }
    everybody = [NODE, REDIS, STRANGER, CONTROLLER, PROMETHEUS, dns]
    ports: dict[Pod, list[object]] = {NODE: ["http", "metrics"], REDIS: [6379], dns: [53]}
    found = {
        (client, server, port)
        for client in everybody
        for server in ports
        for port in ports[server]
        if may_connect(client, server, port)
    }
    assert found - {(one, dns, 53) for one in everybody} == needed - {(NODE, dns, 53)}
    assert needed <= found
    assert not may_connect(NODE, STRANGER, 80)


def test_the_policies_name_the_pods_and_ports_that_there_are() -> None:
    [container] = pod()["containers"]
    policies = {one["metadata"]["name"]: one["spec"] for one in objects() if one["kind"] == "NetworkPolicy"}
    labels = of_kind("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert policies["imstream"]["podSelector"]["matchLabels"] == labels
    named = {one["port"] for rule in policies["imstream"]["ingress"] for one in rule["ports"]}
    assert named == {port["name"] for port in container["ports"]}
    backend = next(rule for rule in policies["imstream"]["egress"] if "ipBlock" in rule["to"][0])
    assert [one["port"] for one in backend["ports"]] == [443]
    assert settings_env()["IMSTREAM_AI_URL"].startswith("https://")
    document = (OPS / "docs" / "deploy.md").read_text("utf-8")
    for label in ("`app.kubernetes.io/name: valkey`", "`ingress-nginx`", "`monitoring`"):
        assert label in document


def test_the_containers_of_imstream_are_hardened() -> None:
    for name in ("node-0", "node-1", "demo", "balancer", "valkey", "prometheus"):
        service = compose()["services"][name]
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_valkey_starts_as_in_the_compose_file_and_its_users_can_log_in(secrets: Path, tmp_path: Path) -> None:
    services, port = compose()["services"], free_port()
    _, *options = services["valkey"]["command"]
    paths = {"/data": str(tmp_path), "/run/secrets/users.acl": str(secrets / "users.acl")}
    command = [valkey_binary(), *(paths.get(option, option) for option in options), "--port", str(port)]
    users = {"imstream": "redis", "viewer": "viewer", "admin": "admin"}
    with start([*command, "--bind", "127.0.0.1"], tmp_path / "log") as running:
        for user, name in users.items():
            password = (secrets / f"{name}-password").read_text()
            with redis.Redis(port=port, username=user, password=password, decode_responses=True) as client:
                wait_for(partial(exists, client), running, "valkey")
        for name, login in (("node-0", "imstream"), ("balancer", "viewer")):
            assert url(services[name]).startswith(f"redis://{login}@valkey:6379/0?password_file=/run/secrets/")
        with redis.Redis(port=port) as nobody, pytest.raises(redis.AuthenticationError):
            nobody.exists("im:nodes")
    assert (tmp_path / "appendonlydir").is_dir()


def exists(client: redis.Redis) -> bool:
    """Whether the user may read a key of imstream."""
    try:
        return client.exists("im:nodes") == 0
    except redis.ConnectionError:
        return False


def url(service: Mapping[str, Any]) -> str:
    return str(service["environment"]["IMSTREAM_REDIS_URL"])


def test_prometheus_scrapes_the_nodes_with_the_shipped_rules() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
    shipped = yaml.safe_load((OPS / "prometheus" / "prometheus.yml").read_text("utf-8"))
    assert config["rule_files"] == shipped["rule_files"]
    assert config["global"] == shipped["global"]
    [job] = config["scrape_configs"]
    assert job["job_name"] == "imstream"
    assert job["static_configs"] == [{"targets": ["node-0:9100", "node-1:9100"]}]
    mounted = [volume.split(":")[1] for volume in compose()["services"]["prometheus"]["volumes"]]
    assert {f"/etc/prometheus/{name}" for name in config["rule_files"]} <= set(mounted)
