"""The files of deploy/ say what the program does: flags, settings, routes, metrics, exit codes, sizes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import make_photo, save_photo
from service.serving import READ, WRITE, run, serving, settings_of
from typer.testing import CliRunner

from delf_milvus.cli.main import app
from delf_milvus.errors import DatabaseError, DelfMilvusError
from delf_milvus.ingestion.shard import Shard
from delf_milvus.settings import load

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
MILVUS_OF_HELM = "delf-milvus"
"""The service that the chart makes for the release of the guides: `helm install delf zilliztech/milvus`."""


def manifests(folder: Path = KUBERNETES) -> list[dict[str, Any]]:
    return [one for file in sorted(folder.glob("*.yaml")) for one in yaml.safe_load_all(file.read_text()) if one]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in manifests() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def workloads() -> list[dict[str, Any]]:
    return [one for one in manifests() if one["kind"] in ("Job", "Deployment")]


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod(workload)["containers"]
    return dict(one)


def environment(workload: dict[str, Any]) -> dict[str, str]:
    """What a pod's process sees, secrets as long as real ones."""
    own = container(workload)
    values = {}
    for source in own["envFrom"]:
        values |= named("ConfigMap", source["configMapRef"]["name"])["data"]
    for one in own["env"]:
        values[one["name"]] = one.get("value") or "drawn-secret-of-24-chars"
    return values


EVERY_WORKLOAD = pytest.mark.parametrize("workload", workloads(), ids=lambda one: one["metadata"]["name"])


def test_the_manifests_are_those_that_the_guide_names() -> None:
    assert sorted((one["kind"], one["metadata"]["name"]) for one in manifests()) == [
        ("ConfigMap", "delf-settings"),
        ("Deployment", "delf-service"),
        ("HorizontalPodAutoscaler", "delf-service"),
        ("Job", "delf-index-build"),
        ("Job", "delf-ingest"),
        ("NetworkPolicy", "delf-milvus"),
        ("NetworkPolicy", "delf-service"),
        ("PersistentVolumeClaim", "delf-photos"),
        ("PodDisruptionBudget", "delf-service"),
        ("Service", "delf-service"),
    ]
    guide = (DEPLOY.parent / "examples/guides/scaling.md").read_text()
    for file in (*KUBERNETES.glob("*.yaml"), *(KUBERNETES / "monitoring").glob("*.yaml")):
        assert file.relative_to(KUBERNETES).as_posix() in guide


@EVERY_WORKLOAD
def test_pods_may_do_nothing_but_their_work(workload: dict[str, Any]) -> None:
    spec, own = pod(workload), container(workload)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    for bound in ("requests", "limits"):
        assert own["resources"][bound].keys() == {"cpu", "memory", "ephemeral-storage"}
    writable = [one["mountPath"] for one in own["volumeMounts"] if not one.get("readOnly")]
    assert writable == ["/tmp"] == [environment(workload)["HOME"]]
    assert {one["name"] for one in own["volumeMounts"]} == {one["name"] for one in spec["volumes"]}


@EVERY_WORKLOAD
def test_pods_run_as_the_user_of_the_image_and_on_this_version(workload: dict[str, Any]) -> None:
    user = re.findall(r"^USER (\d+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)[-1]
    assert int(user) == pod(workload)["securityContext"]["runAsUser"] != 0
    assert container(workload)["image"] == f"delf-milvus:{version('delf-milvus')}"
    assert 'ENTRYPOINT ["delf-milvus"]' in (DEPLOY / "Dockerfile").read_text()
    assert "command" not in container(workload)


@EVERY_WORKLOAD
def test_the_program_takes_the_arguments_of_pods(workload: dict[str, Any]) -> None:
    arguments = [word.replace("$(JOB_COMPLETION_INDEX)", "0") for word in container(workload)["args"]]
    # Help is shown after everything before it was understood.
    taken = CliRunner().invoke(app, [*arguments, "--help"])
    assert taken.exit_code == 0, taken.output
    assert CliRunner().invoke(app, [*arguments, "--no-such-flag", "--help"]).exit_code == 2
    mounted = {one["mountPath"] for one in container(workload)["volumeMounts"]}
    assert {word for word in arguments if word.startswith("/")} <= mounted


@EVERY_WORKLOAD
def test_settings_of_pods_exist_and_hold(
    workload: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {name: value for name, value in environment(workload).items() if name.startswith("DELF_MILVUS_")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    loaded = load()
    known = {name for name, _, _ in loaded.rows()}
    names = {name.removeprefix("DELF_MILVUS_").lower().replace("__", ".") for name in given}
    assert names <= known
    assert names <= {name for name, source in loaded.sources.items() if source == "environment"}
    assert loaded.settings.uri == f"http://{MILVUS_OF_HELM}:19530"


@EVERY_WORKLOAD
def test_secrets_of_pods_are_those_that_are_made_and_none_has_a_value_here(workload: dict[str, Any]) -> None:
    head = (KUBERNETES / "settings.yaml").read_text()
    for one in container(workload)["env"]:
        secret = one.get("valueFrom", {}).get("secretKeyRef")
        if secret:
            assert f"secret generic {secret['name']} " in head
            assert f"--from-literal={secret['key']}=" in head
        elif any(word in one["name"] for word in ("TOKEN", "KEY", "PASSWORD")):
            raise AssertionError(one)


def test_as_many_jobs_run_as_there_are_shards_and_only_what_may_pass_is_tried_again() -> None:
    job = named("Job", "delf-ingest")
    spec = job["spec"]
    shard = container(job)["args"][container(job)["args"].index("--shard") + 1]
    assert shard == f"$(JOB_COMPLETION_INDEX)/{spec['completions']}"
    assert (spec["completionMode"], pod(job)["restartPolicy"]) == ("Indexed", "Never")
    exits = {one.exit_code for one in classes(DelfMilvusError)}
    (final,) = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailIndex"]
    assert set(final["values"]) == exits - {DatabaseError.exit_code}
    assert final["containerName"] == container(job)["name"]


def classes(base: type[DelfMilvusError]) -> Iterator[type[DelfMilvusError]]:
    yield base
    for one in base.__subclasses__():
        yield from classes(one)


def test_probes_and_metrics_are_routes_of_the_service(tmp_path: Path, tiny_model: Path) -> None:
    own = container(named("Deployment", "delf-service"))
    monitor, adapter = (
        yaml.safe_load((KUBERNETES / "monitoring" / name).read_text())
        for name in ("servicemonitor.yaml", "prometheus-adapter.yaml")
    )
    (endpoint,) = monitor["spec"]["endpoints"]
    (wanted,) = named("HorizontalPodAutoscaler", "delf-service")["spec"]["metrics"]
    (rule,) = adapter["rules"]["custom"]

    async def main() -> str:
        async with serving(settings_of(tmp_path, tiny_model, read_keys=READ, write_keys=WRITE)) as (_, client):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                # A kubelet has no key.
                assert (await client.get(own[probe]["httpGet"]["path"])).status_code == 200
            assert (await client.get(endpoint["path"])).status_code == 401
            page = await client.get(endpoint["path"], headers={"Authorization": f"Bearer {READ}"})
            assert page.status_code == 200
            return page.text

    text = run(main)
    assert endpoint["authorization"]["type"] == "Bearer"
    metric = wanted["pods"]["metric"]["name"]
    assert f"\n{metric} 0.0\n" in text
    assert rule["seriesQuery"].startswith(metric + "{")
    assert rule["name"] == {"matches": f"^{metric}$", "as": metric}


def test_a_pod_that_ends_has_time_for_what_it_has_begun() -> None:
    deployment = named("Deployment", "delf-service")
    drain = float(environment(deployment)["DELF_MILVUS_SERVICE__DRAIN_SECONDS"])
    pause = container(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(deployment)["terminationGracePeriodSeconds"] > drain + pause


def test_ports_and_labels_lead_to_the_service() -> None:
    deployment, service = named("Deployment", "delf-service"), named("Service", "delf-service")
    own = container(deployment)
    (port,) = own["ports"]
    assert str(port["containerPort"]) == own["args"][own["args"].index("--port") + 1]
    (published,) = service["spec"]["ports"]
    probes = {own[name]["httpGet"]["port"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {published["targetPort"], *probes} == {port["name"]}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    allowed = named("NetworkPolicy", "delf-service")["spec"]
    assert [one["port"] for rule in allowed["ingress"] for one in rule["ports"]] == [port["containerPort"]]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        allowed["podSelector"]["matchLabels"],
        named("PodDisruptionBudget", "delf-service")["spec"]["selector"]["matchLabels"],
        named("NetworkPolicy", "delf-milvus")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    monitor = yaml.safe_load((KUBERNETES / "monitoring/servicemonitor.yaml").read_text())["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert [one["port"] for one in monitor["endpoints"]] == [published["name"]]
    target = named("HorizontalPodAutoscaler", "delf-service")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]


@EVERY_WORKLOAD
def test_every_pod_is_one_that_the_network_lets_reach_milvus(workload: dict[str, Any]) -> None:
    policy = named("NetworkPolicy", "delf-milvus")["spec"]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    ports = {one["port"] for rule in policy["egress"] for one in rule["ports"]}
    assert ports == {53, 19530}


@pytest.mark.parametrize(
    ("files", "millions"),
    [(("values.yaml",), 100), (("values.yaml", "values-10m.yaml"), 10), (("values.yaml", "values-1b.yaml"), 1000)],
    ids=["100 million", "10 million", "a billion"],
)
def test_clusters_hold_what_their_values_say(files: tuple[str, ...], millions: int) -> None:
    values: dict[str, Any] = {}
    for name in files:
        values = merged(values, yaml.safe_load((DEPLOY / "helm" / name).read_text()))
    text = (DEPLOY / "helm/values.yaml").read_text()
    in_memory, on_disk = (
        int(re.findall(rf"^#   {what} +(\d+) B$", text, re.M)[0]) for what in ("in memory", "on disk")
    )
    stored = int(re.findall(r"object store +(\d+) B x 2", text)[0])
    node, rows = values["queryNode"], millions * 1_000_000
    for bound in ("requests", "limits"):
        resources = node["resources"][bound]
        # Milvus stops loading at 90 % of a node's memory.
        assert 0.9 * node["replicas"] * bytes_of(resources["memory"]) >= 1.5 * in_memory * rows
        assert node["replicas"] * bytes_of(resources["ephemeral-storage"]) >= 2 * on_disk * rows
    assert bytes_of(values["minio"]["persistence"]["size"]) >= 2 * stored * rows
    # Some 5 million descriptors a segment, with a copy and what is packed beside it.
    segment = values_of_segment(values)
    assert bytes_of(values["dataNode"]["resources"]["limits"]["memory"]) >= 3 * segment


HELM = sorted((DEPLOY / "helm").glob("values*.yaml"))
ROLES = {"proxy", "mixCoordinator", "queryNode", "dataNode", "streamingNode"}
PARTS = ("cluster", "streaming", "woodpecker", "pulsar", "pulsarv3", "kafka", "indexNode")
CHART: dict[str, Any] = {
    **{name: {"enabled"} for name in PARTS},
    **{role: {"replicas", "resources", "extraEnv", "disk"} for role in ROLES},
    "image": {"all"},
    "extraConfigFiles": {"user.yaml"},
    "etcd": {"replicaCount", "persistence"},
    "minio": {"mode", "existingSecret", "persistence"},
    "service": {"type"},
}
"""Names of the chart zilliztech/milvus, version 5: Helm takes any other one without a word."""


@pytest.mark.parametrize("file", HELM, ids=lambda one: one.name)
def test_values_have_names_that_the_chart_knows(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    assert values.keys() <= CHART.keys()
    for name, given in values.items():
        assert given.keys() <= CHART[name], name


@pytest.mark.parametrize("more", HELM, ids=lambda one: one.name)
def test_pods_of_the_cluster_can_be_made_and_read_the_keys_of_its_object_store(more: Path) -> None:
    values = merged(yaml.safe_load((DEPLOY / "helm/values.yaml").read_text()), yaml.safe_load(more.read_text()))
    for role in ROLES:
        container = {"name": "milvus", "image": "x", "resources": values[role]["resources"]}
        container["env"] = values[role]["extraEnv"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        secrets = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"]}
        store = values["minio"]["existingSecret"]
        assert secrets["MINIO_ACCESS_KEY_ID"] == {"name": store, "key": "accesskey"}
        assert secrets["MINIO_SECRET_ACCESS_KEY"] == {"name": store, "key": "secretkey"}
        guide = (DEPLOY.parent / "examples/guides/scaling.md").read_text()
        for one in secrets.values():
            assert re.search(rf"secret generic {one['name']} .*--from-literal={one['key']}=", guide)


def test_a_task_of_slurm_takes_its_part_whichever_tasks_run(tmp_path: Path, tiny_model: Path) -> None:
    script = DEPLOY / "slurm/ingest.sbatch"
    text = script.read_text()
    shards = int(re.findall(r"^SHARDS=(\d+)$", text, re.M)[0])
    assert re.findall(r"^#SBATCH --array=0-(\d+)%\d+$", text, re.M) == [str(shards - 1)]
    names = [f"{seed}.png" for seed in range(6)]
    for seed, name in enumerate(names):
        save_photo(tmp_path / "my photos" / name, make_photo(seed, 160, 120))
    part = next(number for number in range(shards) if Shard(number, shards).takes(names[0]))
    # As of `sbatch --array=` with this task alone.
    given = {"SLURM_ARRAY_TASK_ID": str(part), "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_CPUS_PER_TASK": "1"}
    own = {"PHOTOS": "my photos", "DELF_MILVUS_MODEL": str(tiny_model), "DELF_MILVUS_EXTRACT__PRESET": "fast"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, **given, **own},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    expected = sum(Shard(part, shards).takes(name) for name in names)
    assert (report["added"], report["others"]) == (expected, len(names) - expected)


def values_of_segment(values: dict[str, Any]) -> int:
    """Bytes of a full segment."""
    found = yaml.safe_load(values["extraConfigFiles"]["user.yaml"])["dataCoord"]["segment"]["maxSize"]
    return int(found) << 20


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """As Helm does: mappings are merged, all else is replaced."""
    both = {
        name: merged(values[name], more[name])
        for name in values.keys() & more.keys()
        if isinstance(values[name], dict) and isinstance(more[name], dict)
    }
    return {**values, **more, **both}


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {"Mi": 20, "Gi": 30}[unit]
