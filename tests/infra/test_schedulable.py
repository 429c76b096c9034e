"""Jobs as the program renders them, and the node pools of infra/terraform: each job finds nodes that take it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.utils import parse_quantity

from job.cli.submit import parsed
from job.jobs.backends.kubernetes_manifests import manifest
from job.jobs.backends.machines import Machine, gpus_of
from job.jobs.building import Resources, spec_of
from job.jobs.targets import KubernetesTarget, Target
from tests.infra.configuration import read_folder
from tests.infra.evaluated import attributes_of, blocks_of, defaults, value_of
from tests.infra.test_outputs import targets

pytestmark = pytest.mark.infra

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/terraform"
SPOT, ACCELERATOR, GPU = "cloud.google.com/gke-spot", "cloud.google.com/gke-accelerator", "nvidia.com/gpu"
GIB = 2**30
MACHINE_TYPES = [f"g2-standard-{cpus}" for cpus in (4, 8, 12, 16, 24, 32, 48, 96)]
MACHINE_TYPES += [
    f"{family}-{gpus}g" for family in ("a2-highgpu", "a2-ultragpu", "a3-highgpu") for gpus in (1, 2, 4, 8)
]
DEFAULTS = defaults((FOLDER / "variables.tf").read_text(), "gpu_pool")
Pod = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """What GKE makes of a node pool: labels, taints as (key, value), and what a node has for pods."""

    name: str
    labels: dict[str, str]
    taints: frozenset[tuple[str, str]]
    room: dict[str, float]


def allocatable(machine_type: str, disk_gigabytes: int) -> dict[str, float]:
    """What GKE leaves to pods (cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes)."""
    shape = Machine(machine_type).shape
    assert shape is not None
    cpus, gibibytes = shape[0], shape[1] / 1024 / 0.85
    steps = ((1, 0.06), (1, 0.01), (2, 0.005), (cpus, 0.0025))
    memory_steps = ((4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06), (gibibytes, 0.02))
    # The kernel itself keeps some of the memory, and the system's files some of the disk.
    memory, disk = 0.973 * gibibytes - 0.1, disk_gigabytes - 5.75
    return {
        "cpu": cpus - _stepwise(cpus, steps),
        "memory": (memory - _stepwise(gibibytes, memory_steps)) * GIB,
        "ephemeral-storage": (0.9 * disk - min(0.5 * disk_gigabytes, 6 + 0.35 * disk_gigabytes, 100)) * GIB,
    }


def _stepwise(amount: float, steps: tuple[tuple[float, float], ...]) -> float:
    reserved = 0.0
    for width, share in steps:
        reserved += share * max(min(width, amount), 0)
        amount -= width
    return reserved


SYSTEM = {"cpu": 0.5, "memory": 1 * GIB}
"""Requests of the pods that GKE has on each node: network, logs, metrics, metadata, disks, GPUs."""


def pools(**changed: Any) -> list[Pool]:
    """The node pools for jobs, with these fields of `gpu_pool` instead of the defaults."""
    gpu_pool = DEFAULTS | changed
    names: dict[str, Any] = {"var": {"gke": True, "long_shutdown": True, "gpu_pool": gpu_pool}, "local": {}}
    blocks = read_folder(FOLDER)
    for block in blocks:
        if block.kind == "locals" and block.path.startswith("cluster.tf"):
            for attribute in block.attributes:
                names["local"][attribute.name] = value_of(attribute.expression, names)
    [block] = [block for block in blocks if block.labels == ("google_container_node_pool", "jobs")]
    repeated = block.attribute("for_each")
    assert repeated is not None
    [config] = [child for child in block.blocks if child.kind == "node_config"]
    found = []
    for key, value in value_of(repeated.expression, names).items():
        own = names | {"each": {"key": key, "value": value}}
        given = attributes_of(config, own)
        taints = {(taint["key"], taint["value"]) for taint in blocks_of(config, "taint", own)}
        labels, room = dict(given["labels"]), allocatable(given["machine_type"], given["disk_size_gb"])
        if given["spot"]:
            labels[SPOT] = "true"
        for gpu in blocks_of(config, "guest_accelerator", own):
            labels[ACCELERATOR], room[GPU] = gpu["type"], gpu["count"]
            taints.add((GPU, "present"))
        found.append(Pool(key, labels, frozenset(taints), room))
    return found


def takes(pool: Pool, pod: Pod) -> bool:
    """Whether a pod of a job may be on a node of the pool, and has room on it beside those of the system."""
    if not pod.get("nodeSelector", {}).items() <= pool.labels.items():
        return False
    affinity = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    for term in affinity.get("nodeSelectorTerms", []):
        for expression in term["matchExpressions"]:
            assert expression["operator"] == "NotIn"
            if pool.labels.get(expression["key"]) in expression["values"]:
                return False
    for key, value in pool.taints:
        if not any(
            toleration.get("key") == key and (toleration["operator"] == "Exists" or toleration.get("value") == value)
            for toleration in pod.get("tolerations", [])
        ):
            return False
    [container] = pod["containers"]
    asked = container["resources"]["limits"]
    return all(
        float(parse_quantity(amount)) <= pool.room.get(name, 0) - SYSTEM.get(name, 0) for name, amount in asked.items()
    )


def rendered(words: str, gke: Target | None = None, **resources: Any) -> Pod:
    """The pod of `ddpm submit WORDS` on the target that setup.sh writes."""
    target = gke or targets()["gke"]
    assert isinstance(target, KubernetesTarget)
    verb, *rest = words.split()
    made = manifest(spec_of(parsed(verb, rest), target, Resources(**resources)), target)
    job = made if made["kind"] == "Job" else made["spec"]["replicatedJobs"][0]["template"]
    pod: Pod = job["spec"]["template"]["spec"]
    return pod


def where(pod: Pod, **changed: Any) -> list[str]:
    """The pools that take it."""
    return [pool.name for pool in pools(**changed) if takes(pool, pod)]


TRAIN, SAMPLE = "train --dataset celeba", "sample --run celeba --count 100"
PACK = "pack landscape-sample tiles --size 16"


def test_allocatable_is_what_google_s_documentation_shows_for_a_node_of_four_processors():
    room = allocatable("e2-standard-4", 100)
    assert round(1000 * room["cpu"]) == 3920
    assert room["memory"] == pytest.approx(13498416 * 1024, rel=0.001)
    assert room["ephemeral-storage"] == pytest.approx(47060071478, rel=0.001)


@pytest.mark.parametrize(
    ("words", "resources", "place"),
    [
        (TRAIN, {}, "gpu-spot"),
        (TRAIN, {"nodes": 2}, "gpu-spot"),
        (TRAIN, {"gpus": 0}, "cpu-spot"),
        (SAMPLE, {"slices": 4}, "gpu-spot"),
        (SAMPLE, {"gpus": 0}, "cpu-spot"),
        (SAMPLE, {"gpus": 0, "spot": False}, "cpu-on-demand"),
        (PACK, {}, "cpu-spot"),
        (PACK, {"spot": False}, "cpu-on-demand"),
    ],
)
def test_each_job_has_a_pool_as_setup_makes_it(words, resources, place):
    assert where(rendered(words, **resources)) == [place]


def test_on_demand_gpus_are_there_for_who_asks_for_such_nodes():
    pod = rendered(TRAIN, spot=False)
    assert where(pod) == []
    assert where(pod, on_demand_max_nodes=1) == ["gpu-on-demand"]
    assert where(rendered(TRAIN), on_demand_max_nodes=1, spot_max_nodes=0) == []


def test_gpu_pools_are_made_beside_the_pool_of_the_system():
    """Only then does GKE taint them, which the pools here are taken to be."""
    [block] = [block for block in read_folder(FOLDER) if block.labels == ("google_container_node_pool", "jobs")]
    depends_on = block.attribute("depends_on")
    assert depends_on is not None
    names = [str(token) for token in depends_on.expression.scan_values(lambda token: token.type == "NAME")]
    assert names == ["google_container_node_pool", "system"]


def test_in_a_queue_too():
    documents = list(yaml.safe_load_all((ROOT / "infra/kubernetes/kueue.yaml").read_text()))
    flavours = {thing["metadata"]["name"]: thing["spec"] for thing in documents if thing["kind"] == "ResourceFlavor"}
    for flavour, resources in (("gpu-spot", {}), ("gpu-on-demand", {"spot": False})):
        for words in (TRAIN, PACK):
            pod = rendered(words, **resources)
            # As Kueue does when it lets a job go.
            pod["nodeSelector"] = pod.get("nodeSelector", {}) | flavours[flavour]["nodeLabels"]
            pod["tolerations"] = [*pod.get("tolerations", []), *flavours[flavour]["tolerations"]]
            kind = "cpu" if words == PACK else "gpu"
            assert flavour.replace("gpu", kind) in where(pod, on_demand_max_nodes=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("disk_gigabytes", 120), ("gpus", 0), ("gpu_type", "nvidia-tesla-t4"), ("machine_type", "e2-standard-2")],
)
def test_nodes_that_do_not_fit_are_noticed(field, value):
    assert where(rendered(TRAIN), **{field: value}) == []


@pytest.mark.parametrize(
    ("machine_type", "gpu_type", "gpus"),
    [
        *((name, *reversed(found)) for name in MACHINE_TYPES if (found := gpus_of(name))),
        *(
            (f"n1-{kind}-{cpus}", "nvidia-tesla-t4", 1)
            for kind in ("standard", "highmem")
            for cpus in (2, 4, 8, 16, 32)
        ),
        ("n1-standard-16", "nvidia-tesla-t4", 4),
    ],
)
def test_jobs_fit_on_every_machine_type_that_terraform_takes(machine_type, gpu_type, gpus):
    chosen: dict[str, Any] = {"machine_type": machine_type, "gpu_type": gpu_type, "gpus": gpus}
    gke = targets(**{name: str(value) for name, value in chosen.items()})["gke"]
    assert where(rendered(TRAIN, gke), **chosen) == ["gpu-spot"]
    assert where(rendered(TRAIN, gke, gpus=1), **chosen) == ["gpu-spot"]
    assert where(rendered(PACK, gke), **chosen) == ["cpu-spot"]


def test_the_smallest_disk_that_is_allowed_suffices():
    text = (FOLDER / "variables.tf").read_text()
    assert "var.gpu_pool.disk_gigabytes >= 130" in text
    assert where(rendered(TRAIN), disk_gigabytes=130) == ["gpu-spot"]
    assert where(rendered(PACK), disk_gigabytes=130) == ["cpu-spot"]
