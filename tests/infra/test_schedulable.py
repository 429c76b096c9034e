"""Jobs as a dry run prints them, and the node pools of infra/terraform: each job finds nodes that take it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from kubernetes.utils import parse_quantity

from job.jobs.machines import Machine, gpus_of
from tests.infra.configuration import body_of, read, value_of
from tests.infra.test_terraform import of_kind, rendered
from tests.job.command_line import ddpm_here, succeeded

pytestmark = pytest.mark.infra

SPOT, ACCELERATOR, GPU = "cloud.google.com/gke-spot", "cloud.google.com/gke-accelerator", "nvidia.com/gpu"
GIB = 2**30
SYSTEM = {"cpu": 0.5, "memory": 1 * GIB}
"""Requests of the pods that GKE has on each node: network, logs, metrics, metadata, disks, GPUs."""
BUNDLED = [f"g2-standard-{cpus}" for cpus in (4, 8, 12, 16, 24, 32, 48, 96)]
BUNDLED += [f"{family}-{gpus}g" for family in ("a2-highgpu", "a2-ultragpu", "a3-highgpu") for gpus in (1, 2, 4, 8)]
T4 = [f"n1-{kind}-{cpus}" for kind in ("standard", "highmem") for cpus in (2, 4, 8, 16, 32)]
TRAIN, SAMPLE = "train --dataset celeba", "sample --run celeba --count 100"
PACK = "pack landscape-sample tiles --size 16"


class Pool(NamedTuple):
    """What GKE makes of a node pool: labels, taints as (key, value), and what a node has for pods."""

    name: str
    labels: dict[str, str]
    taints: set[tuple[str, str]]
    room: dict[str, float]

    def takes(self, pod: dict[str, Any]) -> bool:
        """Whether a pod of a job may be on a node of the pool, and has room on it beside those of the system."""
        required = "requiredDuringSchedulingIgnoredDuringExecution"
        terms = pod.get("affinity", {}).get("nodeAffinity", {}).get(required, {}).get("nodeSelectorTerms", [])
        unwanted = [each for term in terms for each in term["matchExpressions"]]
        assert all(each["operator"] == "NotIn" for each in unwanted)
        tolerated = {(toleration.get("key"), toleration.get("value", "")) for toleration in pod.get("tolerations", [])}
        free = {name: amount - SYSTEM.get(name, 0) for name, amount in self.room.items()}
        asked = pod["containers"][0]["resources"]["limits"]
        return (
            pod.get("nodeSelector", {}).items() <= self.labels.items()
            and not any(self.labels.get(each["key"]) in each["values"] for each in unwanted)
            and all({(key, value), (key, "")} & tolerated for key, value in self.taints)
            and all(float(parse_quantity(amount)) <= free.get(name, 0) for name, amount in asked.items())
        )


def allocatable(machine_type: str, disk_gigabytes: int) -> dict[str, float]:
    """What GKE leaves to pods (cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes)."""
    shape = Machine(machine_type).shape
    cpus, gibibytes = shape[0], shape[1] / 1024 / 0.85
    memory_steps = ((4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06), (gibibytes, 0.02))
    # The kernel itself keeps some of the memory, and the system's files some of the disk.
    memory, disk = 0.973 * gibibytes - 0.1, disk_gigabytes - 5.75
    return {
        "cpu": cpus - _reserved(cpus, ((1, 0.06), (1, 0.01), (2, 0.005), (cpus, 0.0025))),
        "memory": (memory - _reserved(gibibytes, memory_steps)) * GIB,
        "ephemeral-storage": (0.9 * disk - min(0.5 * disk_gigabytes, 6 + 0.35 * disk_gigabytes, 100)) * GIB,
    }


def _reserved(amount: float, steps: tuple[tuple[float, float], ...]) -> float:
    reserved = 0.0
    for width, share in steps:
        reserved += share * max(min(width, amount), 0)
        amount -= width
    return reserved


def pools(**changed: Any) -> list[Pool]:
    """The node pools for jobs, with these fields of `gpu_pool` instead of the defaults."""
    fields = re.findall(r"(\w+) = optional\(\w+, ([^)]*)\)", body_of("variable", "gpu_pool")["type"])
    gpu_pool = {name: json.loads(value) for name, value in fields} | changed
    names: dict[str, Any] = {"var": {"gke": True, "long_shutdown": True, "gpu_pool": gpu_pool}, "local": {}}
    [local] = [block.body for block in read() if block.kind == "locals" and "gpu_pools" in block.body]
    for name in ("max_nodes", "gpu_pools", "cpu_pools"):
        names["local"][name] = value_of(local[name], names)
    pool = body_of("resource", "google_container_node_pool", "jobs")
    [config] = pool["node_config"]
    found = []
    for key, value in value_of(pool["for_each"], names).items():
        own = names | {"each": {"key": key, "value": value}}
        room = allocatable(*(value_of(config[name], own) for name in ("machine_type", "disk_size_gb")))
        labels = {name.strip('"'): text for name, text in value_of(config["labels"], own).items()}
        taints = {(taint["key"], taint["value"]) for taint in _repeated(config, "taint", own)}
        if value_of(config["spot"], own):
            labels[SPOT] = "true"
        # GKE taints GPU nodes by itself, beside a pool without GPUs.
        for gpu in _repeated(config, "guest_accelerator", own):
            labels[ACCELERATOR], room[GPU] = gpu["type"], gpu["count"]
            taints.add((GPU, "present"))
        found.append(Pool(key, labels, taints, room))
    return found


def _repeated(body: dict[str, Any], kind: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks that a `dynamic` block of that kind makes."""
    [dynamic] = [made[f'"{kind}"'] for made in body["dynamic"] if f'"{kind}"' in made]
    [content] = dynamic["content"]
    return [value_of(content, {**names, kind: {"value": item}}) for item in value_of(dynamic["for_each"], names)]


def where(pod: dict[str, Any], **changed: Any) -> list[str]:
    """The pools that take it."""
    return [pool.name for pool in pools(**changed) if pool.takes(pod)]


@pytest.fixture
def pod(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The pod of `ddpm submit WORDS` on the target that setup.sh writes, with these values of Terraform's."""

    def printed(words: str, **values: str) -> dict[str, Any]:
        targets = tmp_path / "targets.yaml"
        targets.write_text(rendered("targets.yaml.tftpl", **values))
        job = ddpm_here("submit", *words.split(), "--on", "gke", "--targets", str(targets), "--dry-run")
        made = yaml.safe_load(succeeded(job))
        made = made if made["kind"] == "Job" else made["spec"]["replicatedJobs"][0]["template"]
        return dict(made["spec"]["template"]["spec"])

    return printed


@pytest.mark.parametrize(
    ("words", "place", "changed"),
    [
        (TRAIN, "gpu-spot", {}),
        (f"{TRAIN} --nodes 2", "gpu-spot", {}),
        (f"{TRAIN} --gpus 0", "cpu-spot", {}),
        (f"{SAMPLE} --slices 4", "gpu-spot", {}),
        (f"{SAMPLE} --gpus 0", "cpu-spot", {}),
        (f"{SAMPLE} --gpus 0 --on-demand", "cpu-on-demand", {}),
        (PACK, "cpu-spot", {}),
        (f"{PACK} --on-demand", "cpu-on-demand", {}),
        (f"{TRAIN} --on-demand", "", {}),
        (f"{TRAIN} --on-demand", "gpu-on-demand", {"on_demand_max_nodes": 1}),
        (TRAIN, "", {"on_demand_max_nodes": 1, "spot_max_nodes": 0}),
        # The smallest disk that a variable's validation allows.
        (TRAIN, "gpu-spot", {"disk_gigabytes": 130}),
        (PACK, "cpu-spot", {"disk_gigabytes": 130}),
    ],
)
def test_each_job_has_a_pool(pod, words, place, changed):
    assert where(pod(words), **changed) == [*filter(None, [place])]
    assert "var.gpu_pool.disk_gigabytes >= 130" in body_of("variable", "gpu_pool")["validation"][1]["condition"]


def test_in_a_queue_too(pod):
    made = {pool.name: pool.labels for pool in pools(spot_max_nodes=1, on_demand_max_nodes=1)}
    capacities = [flavour.removeprefix("gpu-") for flavour in of_kind("ResourceFlavor")]
    assert sorted(made) == sorted(f"{kind}-{capacity}" for kind in ("gpu", "cpu") for capacity in capacities)
    for (flavour, spec), more in zip(of_kind("ResourceFlavor").items(), ("", " --on-demand"), strict=True):
        for words, name in ((TRAIN, flavour), (PACK, flavour.replace("gpu", "cpu"))):
            assert spec["nodeLabels"].items() <= made[name].items()
            # As Kueue does when it lets a job go.
            job = pod(words + more)
            job["nodeSelector"] = job.get("nodeSelector", {}) | spec["nodeLabels"]
            job["tolerations"] = [*job.get("tolerations", []), *spec.get("tolerations", [])]
            assert where(job, on_demand_max_nodes=1) == [name], (flavour, words)


def test_jobs_fit_on_every_machine_type(pod):
    bundled = [(name, kind, gpus) for name in BUNDLED for gpus, kind in [gpus_of(name)]]
    t4 = [(name, "nvidia-tesla-t4", 1) for name in T4]
    for machine_type, gpu_type, gpus in (*bundled, *t4, ("n1-standard-16", "nvidia-tesla-t4", 4)):
        chosen: dict[str, Any] = {"machine_type": machine_type, "gpu_type": gpu_type, "gpus": gpus}
        values = {name: str(value) for name, value in chosen.items()}
        for words, place in ((TRAIN, "gpu-spot"), (f"{TRAIN} --gpus 1", "gpu-spot"), (PACK, "cpu-spot")):
            assert where(pod(words, **values), **chosen) == [place], chosen
