"""infra/kubernetes: no misspelt key, no name that leads nowhere. Kueue has no schema to be had without a cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.test_schedulable import pools

pytestmark = pytest.mark.infra

ROOT = Path(__file__).parents[2]
FILE = ROOT / "infra/kubernetes/kueue.yaml"
API = "kueue.x-k8s.io/v1beta2"
# The keys of each kind that this project uses, `[]` for a list of such things: anything else is a mistake.
TOLERATION = {"key": str, "operator": str, "value": str, "effect": str}
QUOTAS = {"name": str, "resources": [{"name": str, "nominalQuota": (int, str)}]}
SPECS: dict[str, dict[str, Any]] = {
    "ResourceFlavor": {"nodeLabels": dict, "tolerations": [TOLERATION]},
    "ClusterQueue": {
        "namespaceSelector": dict,
        "queueingStrategy": ("BestEffortFIFO", "StrictFIFO"),
        "preemption": {"withinClusterQueue": ("Never", "LowerPriority", "LowerOrNewerEqualPriority")},
        "resourceGroups": [{"coveredResources": [str], "flavors": [QUOTAS]}],
    },
    "LocalQueue": {"clusterQueue": str},
}
QUANTITY = re.compile(r"\d+(Ki|Mi|Gi|Ti)?")


def documents() -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(FILE.read_text()) if document]


def problems(objects: list[dict[str, Any]]) -> list[str]:
    found = []
    for thing in objects:
        kind, name = thing.get("kind"), thing.get("metadata", {}).get("name")
        if (
            thing.get("apiVersion") != API
            or kind not in SPECS
            or set(thing) != {"apiVersion", "kind", "metadata", "spec"}
        ):
            found.append(f"{kind} {name}: not an object of {API}")
            continue
        found += [f"{kind} {name}: {problem}" for problem in _against(thing["spec"], SPECS[kind], "spec")]
        unknown = set(thing["metadata"]) - {"name", "namespace", "labels"}
        found += [f"{kind} {name}: unknown key {key}" for key in unknown]
        if ("namespace" in thing["metadata"]) != (kind == "LocalQueue"):
            found.append(f"{kind} {name}: only local queues lie in a namespace")
    return found or _between(objects)


def _against(value: Any, wanted: Any, where: str) -> list[str]:
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return [f"{where} is no mapping"]
        found = [f"{where}: unknown key {key}" for key in value if key not in wanted]
        return found + [
            p for key in value if key in wanted for p in _against(value[key], wanted[key], f"{where}.{key}")
        ]
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [problem for item in value for problem in _against(item, wanted[0], where)]
    if isinstance(wanted, tuple) and isinstance(wanted[0], str):
        return [] if value in wanted else [f"{where}: {value} is none of {', '.join(wanted)}"]
    return (
        []
        if isinstance(value, wanted) and not isinstance(value, bool)
        else [f"{where}: {value!r} is of the wrong type"]
    )


def _between(objects: list[dict[str, Any]]) -> list[str]:
    """Names that lead nowhere, quotas that miss a resource."""
    names = {(thing["kind"], thing["metadata"]["name"]): thing["spec"] for thing in objects}
    found = []
    for (kind, name), spec in names.items():
        if kind == "LocalQueue" and ("ClusterQueue", spec.get("clusterQueue")) not in names:
            found.append(f"LocalQueue {name}: there is no such cluster queue")
        for group in spec.get("resourceGroups", ()):
            for flavor in group["flavors"]:
                if ("ResourceFlavor", flavor["name"]) not in names:
                    found.append(f"ClusterQueue {name}: there is no flavour {flavor['name']}")
                if [quota["name"] for quota in flavor["resources"]] != group["coveredResources"]:
                    found.append(
                        f"ClusterQueue {name}: {flavor['name']} has no quota for each covered resource, in order"
                    )
                if not all(QUANTITY.fullmatch(str(quota["nominalQuota"])) for quota in flavor["resources"]):
                    found.append(f"ClusterQueue {name}: a quota of {flavor['name']} is no quantity")
    return found


def test_nothing_is_wrong():
    assert problems(documents()) == []


def test_flavours_are_the_node_pools_of_terraform():
    made = {pool.name: pool.labels for pool in pools(spot_max_nodes=1, on_demand_max_nodes=1)}
    flavours = [thing["spec"]["nodeLabels"] for thing in documents() if thing["kind"] == "ResourceFlavor"]
    capacities = [labels["ddpm-capacity"] for labels in flavours]
    assert sorted(made) == sorted(f"{kind}-{capacity}" for kind in ("gpu", "cpu") for capacity in capacities)
    for labels in flavours:
        for kind in ("gpu", "cpu"):
            assert labels.items() <= made[f"{kind}-{labels['ddpm-capacity']}"].items()


def test_all_that_jobs_ask_for_is_covered():
    from job.jobs.backends.kubernetes_manifests import QUEUE_LABEL

    [queue] = [thing for thing in documents() if thing["kind"] == "ClusterQueue"]
    [group] = queue["spec"]["resourceGroups"]
    # Requests of the pods, as the Kubernetes backend writes them.
    assert {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"} == set(group["coveredResources"])
    assert QUEUE_LABEL.split("/")[0] == API.split("/")[0]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in [(*path, key), *_paths(value[key], (*path, key))]]


FREE = {"namespaceSelector", "labels", "nodeLabels", "tolerations"}


@pytest.mark.parametrize(
    "path", [p for p in _paths(documents()) if isinstance(p[-1], str) and not FREE & set(p[:-1])], ids=str
)
def test_a_misspelt_key_is_noticed(path):
    objects = deepcopy(documents())
    parent: Any = objects
    for key in path[:-1]:
        parent = parent[key]
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    assert problems(objects)


@pytest.mark.parametrize("path", ["infra/kubernetes/kueue.yaml", "job/jobs/targets.example.yaml"])
def test_yamllint(path):
    rules = (
        "{extends: default, rules: {line-length: {max: 120}, document-start: disable, "
        "comments: {min-spaces-from-content: 1}}}"
    )
    words = [sys.executable, "-m", "yamllint", "--strict", "-d", rules, str(ROOT / path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
