"""The Helm chart: what it renders, and what it refuses."""

import re
import shlex
import tomllib
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml
from flwr.common.config import parse_config_args
from flwr.supercore.cli.flower_superexec import _parse_args as parser_of_superexec
from flwr.superlink.cli.flower_superlink import (
    _parse_args_run_superlink as parser_of_superlink,
)
from flwr.supernode.cli.flower_supernode import (
    _parse_args_run_supernode as parser_of_supernode,
)

from tests.support.chart import (
    CASES,
    CHART,
    ROOT,
    Manifest,
    container,
    image_environment,
    make_keys,
    of_kind,
    pods,
    render,
    selected,
    values_of,
)

helm_python = pytest.importorskip(
    "helm_python", reason="Helm's engine is in the extra `dev`"
)
kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="Kubernetes' schemas are in the extra `dev`"
)

DOCKER = ROOT / "docker"
# The oldest that Chart.yaml allows, one between and the newest that has a schema here.
VERSIONS = ("1.27", "1.32", kubernetes_validate.latest_version())
INFO = 1


@pytest.fixture(params=CASES)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(values_of(request.param))[0]


def compose(name: str) -> dict[str, Any]:
    services = yaml.safe_load((DOCKER / name).read_text())["services"]
    return dict(services)


def flags(command: str | list[str]) -> list[str]:
    parts = shlex.split(command) if isinstance(command, str) else command
    return [part.partition("=")[0] for part in parts if part.startswith("--")]


def ports_of(pod: Manifest) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for p in container(pod)["ports"]}


def kind_of(name: str) -> str:
    """Return which part of the release a name is of."""
    return name.removeprefix("fl-").partition("-")[0]


# Lint and schemas


@pytest.mark.parametrize("case", [None, *CASES])
def test_helm_finds_nothing_to_warn_of(case: str | None) -> None:
    report = helm_python.lint(CHART, values_of(case) if case else None, strict=True)
    assert report["total_charts_linted"] == 1
    assert not report["errors"]
    assert not [m for m in report["messages"] if m["severity"] > INFO]


def test_there_is_something_to_render() -> None:
    assert len(CASES) >= 4
    meta = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert meta["kubeVersion"].startswith(f">={VERSIONS[0]}.")


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(version: str, manifests: list[Manifest]) -> None:
    for manifest in manifests:
        # The Prometheus Operator's, whose schema is not Kubernetes'.
        if manifest["kind"] != "PodMonitor":
            kubernetes_validate.validate(manifest, version, strict=True)
    wrong = of_kind(manifests, "StatefulSet").popitem()[1]
    wrong["spec"]["template"]["spec"]["readOnly"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_versions_are_the_package_s() -> None:
    meta = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert meta["appVersion"] == project["version"]


# Commands


def test_commands_are_those_of_the_compose_files(manifests: list[Manifest]) -> None:
    server, client = compose("compose.server.yml"), compose("compose.client.yml")
    host = compose("compose.yml")
    for name, pod in pods(manifests).items():
        command = container(pod)["command"]
        kind = kind_of(name)
        if kind == "superlink":
            assert command == host["superlink"]["command"]
        elif kind == "gate":
            assert command == server["gate"]["command"]
        elif kind == "serverapp":
            expected = flags(host["serverapp"]["command"])
            assert flags(command) == [*expected, "--health-server-address"]
        elif kind == "node":
            assert flags(command) == flags(client["supernode"]["command"])
        else:
            assert kind == "app"
            expected = flags(client["clientapp"]["command"])
            assert flags(command) == [*expected, "--health-server-address"]


def test_flower_takes_every_flag(manifests: list[Manifest]) -> None:
    scripts = {script.name for script in entry_points(group="console_scripts")}
    for name, pod in pods(manifests).items():
        [program, *arguments] = container(pod)["command"]
        numbers = ports_of(pod)
        kind = kind_of(name)
        if kind == "superlink":
            link = parser_of_superlink().parse_args(arguments)
            assert link.port == numbers["https"]
            assert link.enable_supernode_auth
            assert not link.insecure
        elif kind == "gate":
            with uvicorn.main.make_context(program, arguments) as context:
                assert context.params["port"] == numbers["https"]
            [file, variable] = context.params["app"].split(":")
            assert f"\n{variable} = " in (DOCKER / f"{file}.py").read_text()
            assert f"docker/{file}.py" in (DOCKER / "Dockerfile").read_text()
        elif kind == "node":
            [python, option, module, *arguments] = container(pod)["command"]
            assert (python, option) == ("python3", "-m")
            assert find_spec(module)
            node = parser_of_supernode().parse_args(arguments)
            assert node.port == numbers["runtime"]
            assert node.isolation == "process"
            config = parse_config_args([node.node_config])
            assert config["name"] == name.removeprefix("fl-node-")
            assert config["data-path"] == "/data"
            assert config["data-label"] in ("queue", "label")
        else:
            executor = parser_of_superexec().parse_args(arguments)
            assert executor.insecure == (kind == "app")
            assert executor.health_server_address == f"0.0.0.0:{numbers['health']}"
        if kind != "node":
            assert program in scripts


def test_node_config_reaches_flower_as_it_was_written() -> None:
    values = values_of("all-values")
    given = {
        "data-text": "title,body",
        "data-labels": "a < b,c & d,it's $(HOME)",
        "min-examples": 1_000_000,
        "cache-gigabytes": 0.5,
        "flag": True,
    }
    values["nodes"][0]["config"] = given
    pod = pods(render(values)[0])["fl-node-a"]
    [text] = [p for p in container(pod)["command"] if p.startswith("--node-config=")]
    config = parse_config_args([text.removeprefix("--node-config=")])
    assert config == {"name": "a", "data-path": "/data"} | given


# Names, ports and labels


def test_services_and_probes_name_ports_that_are_there(
    manifests: list[Manifest],
) -> None:
    made = pods(manifests)
    for name, service in of_kind(manifests, "Service").items():
        assert selected(manifests, service["spec"]["selector"]) == [name]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports_of(made[name])
    for name, pod in made.items():
        own, numbers = container(pod), ports_of(pod)
        kinds = [kind for kind in own if kind.endswith("Probe")]
        assert "livenessProbe" in kinds, name
        for kind in kinds:
            if "grpc" in own[kind]:
                assert own[kind]["grpc"]["port"] == numbers["health"]
                continue
            probe = own[kind].get("httpGet") or own[kind]["tcpSocket"]
            assert probe["port"] in numbers
            secure = "--ssl-certfile=/run/secrets/server.crt" in own["command"]
            if "scheme" in probe:
                assert probe["path"] == "/health"
                assert (probe["scheme"] == "HTTPS") == secure


def test_selectors_are_of_the_pods_own_labels(manifests: list[Manifest]) -> None:
    for name, maker in of_kind(manifests, "StatefulSet", "Deployment").items():
        assert selected(manifests, maker["spec"]["selector"]["matchLabels"]) == [name]
        if maker["kind"] == "StatefulSet":
            assert maker["spec"]["serviceName"] == name
        assert maker["spec"]["replicas"] == 1
    for name, pod in pods(manifests).items():
        if kind_of(name) == "node":
            rules = pod["spec"]["affinity"]["podAffinity"]
            [rule] = rules["requiredDuringSchedulingIgnoredDuringExecution"]
            app = name.replace("-node-", "-app-")
            assert selected(manifests, rule["labelSelector"]["matchLabels"]) == [app]


def test_mounts_and_volumes_are_each_others(manifests: list[Manifest]) -> None:
    for name, maker in of_kind(manifests, "StatefulSet", "Deployment").items():
        spec = maker["spec"]["template"]["spec"]
        volumes = [volume["name"] for volume in spec.get("volumes", [])]
        claims = maker["spec"].get("volumeClaimTemplates", [])
        volumes += [claim["metadata"]["name"] for claim in claims]
        mounts = container(maker["spec"]["template"])["volumeMounts"]
        assert sorted(volumes) == sorted(mount["name"] for mount in mounts), name
        paths = [mount["mountPath"] for mount in mounts]
        assert len({*paths}) == len(paths)


def dialled(manifests: list[Manifest]) -> set[tuple[str, str, int]]:
    """Return which part dials which other, at which of its ports."""
    services = of_kind(manifests, "Service")
    variables = {
        f"$({name.upper().replace('-', '_')}_SERVICE_HOST)": name for name in services
    }
    found = set()
    for name, pod in pods(manifests).items():
        texts = [part.partition("=")[2] for part in container(pod)["command"]]
        texts += [e["value"] for e in container(pod).get("env", [])]
        for text in texts:
            host, _, port = text.rpartition(":")
            host = variables.get(host, host)
            if host in services:
                [open_port] = services[host]["spec"]["ports"]
                assert open_port["port"] == int(port)
                pod_of = pods(manifests)[host]
                target = ports_of(pod_of)[open_port["targetPort"]]
                found.add((name, host, target))
    return found


def admitted(manifests: list[Manifest]) -> set[tuple[str, str, int]]:
    """Return who may dial whom in a release, of the ports that somebody serves.

    By the rules of NetworkPolicies, for pods of one namespace.
    """
    policies = of_kind(manifests, "NetworkPolicy").values()

    def allows(direction: str, pod: str, other: str, port: tuple[str, int]) -> bool:
        word = {"Ingress": "from", "Egress": "to"}[direction]
        binding = [
            policy["spec"]
            for policy in policies
            if direction in policy["spec"]["policyTypes"]
            and pod in selected(manifests, policy["spec"]["podSelector"]["matchLabels"])
        ]
        rules = [r for spec in binding for r in spec.get(direction.lower(), [])]
        return not binding or any(
            any(allowed["port"] in port for allowed in rule.get("ports", []))
            and (
                word not in rule
                or any(
                    other in selected(manifests, peer["podSelector"]["matchLabels"])
                    for peer in rule[word]
                    if "podSelector" in peer
                )
            )
            for rule in rules
        )

    made = pods(manifests)
    return {
        (name, other, port[1])
        for name in made
        for other in made
        for port in ports_of(made[other]).items()
        if name != other
        and allows("Ingress", other, name, port)
        and allows("Egress", name, other, port)
    }


def test_policies_let_through_what_is_dialled_and_nothing_else() -> None:
    manifests, _ = render(values_of("all-values"))
    # By hand, from who talks to whom in the compose files.
    expected = {
        ("fl-gate", "fl-superlink", 8000),
        ("fl-serverapp", "fl-superlink", 8000),
    }
    for node in ("a", "b"):
        expected.add((f"fl-node-{node}", "fl-gate", 8443))
        expected.add((f"fl-app-{node}", f"fl-node-{node}", 9094))
    assert dialled(manifests) == expected
    # The gate's port is open to everybody but a ClientApp.
    gate = {(name, "fl-gate", 8443) for name in ("fl-superlink", "fl-serverapp")}
    assert admitted(manifests) == expected | gate
    values = values_of("all-values") | {"networkPolicy": {"enabled": False}}
    assert ("fl-app-a", "fl-superlink", 8000) in admitted(render(values)[0])


def test_a_clientapp_has_no_way_out_unless_it_may_download() -> None:
    for offline in (True, False):
        values = values_of("site-values") | {"clientapp": {"offline": offline}}
        policies = of_kind(render(values)[0], "NetworkPolicy")
        spec = policies["fl-app-st-mary"]["spec"]
        assert ("Egress" in spec["policyTypes"]) is offline
        # Denied unless allowed: nobody dials it.
        assert "Ingress" in spec["policyTypes"]
        assert "ingress" not in spec


def test_peers_of_the_gate_and_of_metrics_are_limited() -> None:
    policies = of_kind(render(values_of("server-values"))[0], "NetworkPolicy")
    [rule] = policies["fl-gate"]["spec"]["ingress"]
    assert rule["from"] == [{"ipBlock": {"cidr": "192.0.2.0/24"}}]
    [rule] = policies["fl-serverapp"]["spec"]["ingress"]
    [peer] = rule["from"]
    assert "namespaceSelector" in peer
    assert rule["ports"] == [{"port": "metrics"}]


# Metrics, GPUs, policies


def test_metrics_are_served_to_other_pods_only_if_asked() -> None:
    for case, annotated, monitored in (
        ("server-values", True, False),
        ("gpu-values", False, True),
        ("all-values", False, False),
    ):
        manifests, _ = render(values_of(case))
        pod = pods(manifests)["fl-serverapp"]
        names = {e["name"]: e["value"] for e in container(pod)["env"]}
        on = annotated or monitored
        assert names.get("SLORA_METRICS_HOST") == ("0.0.0.0" if on else None)
        assert ports_of(pod).get("metrics") == (9464 if on else None)
        annotations = pod["metadata"].get("annotations", {})
        assert annotations.get("prometheus.io/port") == ("9464" if annotated else None)
        monitors = of_kind(manifests, "PodMonitor").values()
        assert [
            (
                selected(manifests, m["spec"]["selector"]["matchLabels"]),
                m["spec"]["podMetricsEndpoints"],
            )
            for m in monitors
        ] == ([(["fl-serverapp"], [{"port": "metrics"}])] if monitored else [])


def test_a_gpu_goes_to_what_holds_a_model() -> None:
    made = pods(render(values_of("gpu-values"))[0])
    gpus = {
        name: container(pod)["resources"]["limits"].get("nvidia.com/gpu")
        for name, pod in made.items()
    }
    assert {name for name, count in gpus.items() if count} == {
        "fl-serverapp",
        "fl-app-st-mary",
    }
    for name in ("fl-app-st-mary", "fl-node-st-mary"):
        assert made[name]["spec"]["runtimeClassName"] == "nvidia"
        assert made[name]["spec"]["tolerations"]


def test_a_node_s_policy_and_the_keys_that_it_trusts() -> None:
    made = pods(render(values_of("site-values"))[0])
    assert {*made} == {"fl-node-st-mary", "fl-app-st-mary"}
    link, app = container(made["fl-node-st-mary"]), container(made["fl-app-st-mary"])
    assert "--superlink=fl.example.org:8443" in link["command"]
    # As in the compose files for policies and for trusted keys.
    [policy] = compose("compose.client.policy.yml")["clientapp"]["environment"]
    [trusted] = compose("compose.client.trusted.yml")["supernode"]["environment"]
    for own, setting in ((app, policy), (link, trusted)):
        name, _, value = setting.partition("=")
        assert {"name": name, "value": value} in own["env"]
    secrets, *_ = made["fl-node-st-mary"]["spec"]["volumes"]
    [_, trusted_file] = secrets["projected"]["sources"]
    assert trusted_file["configMap"]["name"] == "st-mary-trusted"
    assert {"name": "policy", "mountPath": "/policy", "readOnly": True} in app[
        "volumeMounts"
    ]


# Secrets and hardening


def keys_of(pod: Manifest) -> dict[str, set[str]]:
    """Return the keys of each Secret that a pod mounts."""
    return {
        source["secret"]["name"]: {item["key"] for item in source["secret"]["items"]}
        for volume in pod["spec"]["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
        if "secret" in source
    }


def test_secrets_are_what_certs_sh_makes(tmp_path: Path) -> None:
    make_keys(tmp_path, ["fl.example.org", "fl-superlink", "fl-gate"], ["a"])
    made = {path.name for path in (tmp_path / "certs").iterdir()}
    nodes = {path.name for path in (tmp_path / "nodes" / "a").iterdir()}
    readable = [*(tmp_path / "certs").iterdir(), tmp_path / "nodes" / "a" / "key"]
    assert all(path.read_bytes() for path in readable)
    keys = {n: keys_of(p) for n, p in pods(render(values_of("all-values"))[0]).items()}
    server = {"ca.crt", "server.crt", "server.key"}
    # By hand, as in the compose files: each has what it needs, and a node its own key.
    assert keys == {
        "fl-superlink": {"slora-server": server | {"superexec"}},
        "fl-gate": {"slora-server": server},
        "fl-serverapp": {"slora-server": {"ca.crt", "superexec"}},
        "fl-node-a": {"node-a": {"ca.crt", "key"}},
        "fl-node-b": {"node-b": {"ca.crt", "key"}},
        "fl-app-a": {},
        "fl-app-b": {},
    }
    assert server | {"superexec"} <= made
    assert "ca.key" in made
    assert "key" in nodes


def test_files_that_commands_name_are_mounted(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests).items():
        mounted = {key for keys in keys_of(pod).values() for key in keys}
        text = " ".join(container(pod)["command"])
        named = {*re.findall(r"/run/secrets/([\w.]+)", text)}
        assert named <= mounted, name
        # The gate's own code, and what the SuperLink's configuration names.
        assert mounted - named <= {"ca.crt"}
        mounts = [mount["mountPath"] for mount in container(pod)["volumeMounts"]]
        for folder in re.findall(r"=(/state|/data)", text):
            assert folder in mounts or kind_of(name) == "node"


def test_the_key_and_the_data_of_a_node_are_apart(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests).items():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        if kind_of(name) == "node":
            assert "data" not in volumes
        if kind_of(name) == "app":
            assert not volumes & {"secrets"}


def test_containers_may_do_as_little_as_can_be(manifests: list[Manifest]) -> None:
    text = (DOCKER / "Dockerfile").read_text()
    [uid] = re.findall(r"useradd --uid (\d+)", text)
    for name, pod in pods(manifests).items():
        spec, own = pod["spec"], container(pod)
        assert "initContainers" not in spec
        assert not {"hostNetwork", "hostPID", "hostIPC"} & {*spec}
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        for key in ("runAsUser", "runAsGroup", "fsGroup"):
            assert spec["securityContext"][key] == int(uid)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert own["resources"]["limits"]["memory"]
        writable = [
            m["mountPath"] for m in own["volumeMounts"] if not m.get("readOnly")
        ]
        expected = {"/tmp", "/state", "/home/app/.flwr", "/home/app/.flwr/config.toml"}
        assert {*writable} <= expected, name
        # What is kept, and what Flower unpacks, can be written.
        environment = image_environment()
        environment |= {e["name"]: e["value"] for e in own.get("env", [])}
        if kind_of(name) in ("serverapp", "app"):
            assert environment["SLORA_HOME"] in writable
        if kind_of(name) != "gate":
            home = Path(environment["FLWR_HOME"])
            assert any(home.is_relative_to(folder) for folder in writable)


def test_run_directories_and_the_database_outlive_pods(
    manifests: list[Manifest],
) -> None:
    for name, maker in of_kind(manifests, "StatefulSet").items():
        claims = maker["spec"].get("volumeClaimTemplates", [])
        names = [claim["metadata"]["name"] for claim in claims]
        assert names == ([] if kind_of(name) == "node" else ["state"])


def test_flower_s_configuration_is_the_image_s() -> None:
    maps = of_kind(render(values_of("all-values"))[0], "ConfigMap")
    text = (DOCKER / "flower.toml").read_text()
    assert maps["fl-superlink"]["data"]["config.toml"] == text


# The guide


def test_the_guide_s_commands_make_the_secrets_of_its_releases() -> None:
    text = (ROOT / "docs" / "guides" / "kubernetes.md").read_text()
    made: dict[str, set[str]] = {}
    joined = text.replace("\\\n", "")
    for command in re.findall(r"^kubectl .* secret .*$", joined, re.MULTILINE):
        words = shlex.split(command)
        assert words[3:6] == ["create", "secret", "generic"]
        assert all(word.startswith("--from-file=") for word in words[7:])
        paths = [word.partition("=")[2] for word in words[7:]]
        made[words[6]] = {Path(path).name for path in paths}
    mounted: dict[str, set[str]] = {}
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    releases = [yaml.safe_load(block) for block in blocks if block.startswith("image:")]
    assert len(releases) == 2
    for values in releases:
        for pod in pods(render(values)[0]).values():
            for secret, keys in keys_of(pod).items():
                mounted.setdefault(secret, set()).update(keys)
    assert made == mounted


# What is refused


def refusal(case: str, **changed: Any) -> str:
    with pytest.raises(helm_python.HelmError) as caught:
        render(values_of(case) | changed)
    return str(caught.value)


NODE = {"name": "a", "secret": "a", "data": {"hostPath": {"path": "/srv"}}}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"supernodes": 3}, "additional properties 'supernodes' not allowed"),
        ({"supernode": {"superlink": "https://fl:8443"}}, "/supernode/superlink"),
        ({"supernode": {"superlink": "fl.example.org"}}, "does not match pattern"),
        ({"superlink": {"enabled": "yes"}}, "got string, want boolean"),
        ({"gate": {"service": {"port": 84430}}}, "maximum: got 84,430, want 65,535"),
        ({"gate": {"service": {"type": "Ingress"}}}, "/gate/service/type"),
        ({"metrics": {"port": 80}}, "minimum: got 80, want 1,024"),
        ({"image": {"pullPolicy": "always"}}, "/image/pullPolicy"),
        ({"superlink": {"storage": {"size": "10 GB"}}}, "/superlink/storage/size"),
        ({"serverapp": {"pod": {"hostNetwork": True}}}, "'hostNetwork' not allowed"),
        ({"nodes": [{"name": "a", "secret": "a"}]}, "missing property 'data'"),
        ({"nodes": [NODE | {"name": "St Mary"}]}, "/nodes/0/name"),
        ({"nodes": [NODE | {"data": {}}]}, "/nodes/0/data"),
        ({"nodes": [NODE | {"data": {"hostPath": {}, "nfs": {}}}]}, "maxProperties"),
        ({"nodes": [NODE | {"config": {"data-path": "/x"}}]}, "invalid propertyName"),
        ({"nodes": [NODE | {"config": {"data-text": 'a"b'}}]}, "does not match"),
        ({"nodes": [NODE | {"config": {"data-text": ["a"]}}]}, "got array"),
    ],
)
def test_values_that_mean_nothing_are_refused(
    changed: dict[str, Any], told: str
) -> None:
    assert told in refusal("all-values", **changed)


def test_values_that_do_not_go_together_are_refused() -> None:
    alone = {"superlink": {"enabled": False}}
    assert "supernode.superlink is empty; allowed: the host:port" in refusal(
        "all-values", **alone
    )
    assert "nodes is empty; allowed: a server, nodes or both" in refusal(
        "all-values", **alone, nodes=[]
    )
    assert "two of nodes have the name a; allowed: each name once" in refusal(
        "all-values", nodes=[NODE, NODE]
    )
    long = "n" * 40
    with (
        pytest.raises(helm_python.HelmError, match="allowed: 52"),
        helm_python.Chart.load(CHART) as chart,
    ):
        chart.render({"nodes": [NODE | {"name": long}]}, name="release-of-hospitals")
