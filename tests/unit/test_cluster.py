"""What lies in cluster/ is what its readers accept: KubeRay, Ray Serve, Ray's launcher, the shell; with the versions that the project pins."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from translora_ray import kit
from translora_ray.config import EngineKind
from translora_ray.fleet.groups import grouped
from translora_ray.fleet.manifest import load_fleet
from translora_ray.placement import fit_beside
from translora_ray.storage import RunStore
from translora_ray.workflow import Checked

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT.parent / "shared" / "kuberay"
MANIFESTS = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml", "kueue-raycluster.yaml", "kueue-rayjob.yaml"]
CLUSTERS = {"RayCluster": [], "RayJob": ["rayClusterSpec"], "RayService": ["rayClusterConfig"]}
"""Where the cluster is in the spec of each kind."""


def manifest(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / name).read_text()))


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    for key in CLUSTERS[manifest["kind"]]:
        spec = spec[key]
    return dict(spec)


def ray_pin() -> str:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = [match[1] for name in dependencies if (match := re.fullmatch(r"ray\[.*\]==(.*)", name))]
    return pin


def strict(schema: Any) -> Any:
    """The schema with unknown keys refused, as `kubectl` does, wherever it names the keys."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def validator(kind: str) -> jsonschema.Draft202012Validator:
    path = SCHEMAS / f"ray.io_v1_{kind.lower()}.schema.json"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS}")
    schema = json.loads(path.read_text())
    schema["properties"] = {key: strict(part) if key == "spec" else part for key, part in schema["properties"].items()}
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_accepts_the_manifest(name: str) -> None:
    found = manifest(name)
    assert (found["apiVersion"], found["kind"] in CLUSTERS) == ("ray.io/v1", True)
    errors = [f"{error.json_path}: {error.message}" for error in validator(found["kind"]).iter_errors(found)]
    assert not errors
    cluster_of(found)["headGroupSpec"]["rayStartParam"] = {}  # and would not, were a key misspelt
    assert any("rayStartParam" in error.message for error in validator(found["kind"]).iter_errors(found))


def test_every_manifest_is_looked_at() -> None:
    assert {path.name for path in CLUSTER.glob("*.yaml")} == {*MANIFESTS, "volume.yaml", "fleet.yaml", "aws.yaml"}
    described = (CLUSTER / "README.md").read_text()
    assert [path.name for path in CLUSTER.iterdir() if path.name != "README.md" and f"`{path.name}`" not in described] == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_head_has_no_work_and_groups_ask_for_what_they_are_for(name: str) -> None:
    spec = cluster_of(manifest(name))
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"]["mode"] == "token"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    for group_name, group in groups.items():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        asked, most = container["resources"]["requests"], container["resources"]["limits"]
        assert asked == most  # Ray counts limits, Kubernetes places by requests
        assert {"cpu", "memory"} <= set(most)
        assert most.get("nvidia.com/gpu") == ("1" if group_name == "gpu" else None)
        keys = {toleration["key"] for toleration in pod["tolerations"]}
        assert "translora/spot" in keys and ("nvidia.com/gpu" in keys) == (group_name == "gpu")
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert not any("gpu" in key for part in head["resources"].values() for key in part)


@pytest.mark.parametrize("name", MANIFESTS)
def test_one_grows_from_nothing_and_one_has_a_fixed_size_that_kueue_admits(name: str) -> None:
    found = manifest(name)
    spec = cluster_of(found)
    sizes = [(group["minReplicas"], group["replicas"], group["maxReplicas"]) for group in spec["workerGroupSpecs"]]
    if name.startswith("kueue-"):
        assert found["spec"]["suspend"] is True
        assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        assert not {"enableInTreeAutoscaling", "autoscalerOptions"} & set(spec)
        assert all(least == now == most > 0 for least, now, most in sizes)
    else:
        assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
        assert all(least == now == 0 < most for least, now, most in sizes)
        assert {group["template"]["spec"]["restartPolicy"] for group in spec["workerGroupSpecs"]} == {"Never"}  # autoscaler v2 wants it


@pytest.mark.parametrize("name", ["rayjob.yaml", "kueue-rayjob.yaml"])
def test_the_job_submits_a_fleet_and_cleans_up(name: str) -> None:
    spec = manifest(name)["spec"]
    python, script, fleet, *rest = spec["entrypoint"].split()
    assert (python, rest) == ("python", ["--resume"])
    assert Path(script).parts[-2:] == ("jobs", "fleet.py")
    assert f"WORKDIR {Path(script).parents[1]}\n" in (CLUSTER / "Dockerfile").read_text()
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert str(Path(fleet).parent) in [mount["mountPath"] for mount in head["volumeMounts"]]
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] == 1 and spec["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name != "rayservice.yaml"])
def test_every_pod_mounts_the_volume_and_the_head_lets_stopped_jobs_commit(name: str) -> None:
    spec = cluster_of(manifest(name))
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        claims = {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert claims[mounts["/translora"]] == manifest("volume.yaml")["metadata"]["name"]
        assert set(mounts.values()) == set(claims)
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert {each["name"]: int(each["value"]) for each in head["env"]} == {"RAY_JOB_STOP_WAIT_TIME_S": 600}
    assert "RAY_JOB_STOP_WAIT_TIME_S" in manifest("aws.yaml")["head_start_ray_commands"][-1]
    assert "RAY_JOB_STOP_WAIT_TIME_S" in (CLUSTER / "local.sh").read_text()


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_fleet_fits_the_clusters_when_they_have_no_node_yet(tmp_path: Path, tiny_kit: Path, tiny_gemma: str, engine: EngineKind) -> None:
    (tmp_path / "kits").mkdir()
    (tmp_path / "kits" / "colours").symlink_to(tiny_kit)
    text = (CLUSTER / "fleet.yaml").read_text()
    assert "\n  - /translora/kits/*" in text
    (tmp_path / "fleet.yaml").write_text(text.replace("/translora/", f"{tmp_path}/"))
    fleet, (wanted,) = load_fleet(str(tmp_path / "fleet.yaml"))
    groups = {group["groupName"]: group for group in cluster_of(manifest("rayjob.yaml"))["workerGroupSpecs"]}
    assert fleet.cluster.expect
    sizes = [(groups[name]["maxReplicas"], 8, gpus) for name, gpus in (("cpu", 0), ("gpu", 1))]
    assert [(nodes.nodes, nodes.CPU, nodes.GPU) for nodes in fleet.cluster.expect] == sizes
    checked = Checked(kit.load(tiny_kit), tiny_gemma, wanted.config, engine, RunStore(str(tmp_path / "run")), {"target": ""})
    ((transfer,),), unplanned = grouped([(wanted, checked)], local=False)
    assert not unplanned and (transfer.plan.engine_gpus, transfer.worker.gpus) == (1, 1)
    assert fit_beside(transfer.plan, transfer.worker, fleet.trainings), "the first adapters train while the others stream"


def test_serve_accepts_what_the_service_deploys() -> None:
    from ray.serve.schema import ServeDeploySchema

    from translora_ray.serving.app import Service

    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest("rayservice.yaml")["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "translora_ray.serving.app:build"
    ports = cluster_of(manifest("rayservice.yaml"))["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert config.http_options.port in [port["containerPort"] for port in ports]
    service = Service.model_validate(application.args)
    assert service.keys and not service.open, "nobody is let in without a key"
    spec = cluster_of(manifest("rayservice.yaml"))
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:  # the gateway runs anywhere
        pod = group["template"]["spec"]
        secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert secrets[mounts[str(Path(service.keys).parent)]] == "translora-keys"
    (gpu,) = [group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu"]
    assert isinstance(service.replicas, tuple) and service.replicas[1] == gpu["maxReplicas"]
    assert service.cpus < int(gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) and service.gpus == 1


def test_the_launcher_accepts_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(manifest("aws.yaml"))
    validate_config(config)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0} and types[config["head_node_type"]]["max_workers"] == 0
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= config["max_workers"]
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in workers.values())
    assert [name for name, kind in workers.items() if "GPU" in kind["resources"]] == ["gpu"]
    start = config["head_start_ray_commands"][-1]
    assert "RAY_AUTH_MODE=token" in start and "--num-cpus=0" in start and "--autoscaling-config" in start
    config["idle_timeout_minute"] = 1  # and would not, were a key misspelt
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(config)


def images(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in {"image", "head_image", "worker_image"}:
                yield value
            else:
                yield from images(value)
    elif isinstance(tree, list):
        for part in tree:
            yield from images(part)


def test_versions_are_those_of_the_project() -> None:
    pin = ray_pin()
    constraints = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    assert f"ray=={pin}" in constraints
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"ARG RAY={pin}\n" in dockerfile
    assert "FROM rayproject/ray:${RAY}-py311${VARIANT}\n" in dockerfile
    for name in MANIFESTS:
        assert cluster_of(manifest(name))["rayVersion"] == pin
    for name in [*MANIFESTS, "aws.yaml"]:
        found = list(images(manifest(name)))
        assert found and {image.split(":")[1] for image in found} <= {f"{pin}-gpu", f"{pin}-cpu"}


def test_the_image_installs_pinned_versions_but_those_that_vllm_brings() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    (left_out,) = re.findall(r"grep -vE '\^\(([a-z_|]+)\)=='", dockerfile)
    pinned = {line.split("==")[0] for line in (ROOT / "requirements" / "constraints.txt").read_text().splitlines() if "==" in line}
    assert set(left_out.split("|")) <= pinned
    assert "ray" not in left_out.split("|")  # all nodes must run the same Ray
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = re.findall(r"'\.\[(.*)\]'", dockerfile)
    assert set(installed.split(",")) <= set(extras)


def test_the_script_is_sound_shell() -> None:
    script = str(CLUSTER / "local.sh")
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    refused = subprocess.run([script, "launch"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (2, "local.sh: use start, submit or stop.\n")
