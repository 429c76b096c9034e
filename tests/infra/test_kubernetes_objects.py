"""infra/kubernetes: no misspelt key, no name that leads nowhere. Kueue has no schema to be had without a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.jobs.backends.kubernetes_objects import QUEUE_LABEL

pytestmark = pytest.mark.infra

ROOT = Path(__file__).parents[2]
OBJECTS = list(yaml.safe_load_all((ROOT / "infra/kubernetes/kueue.yaml").read_text()))
API = "kueue.x-k8s.io/v1beta2"
# All keys that the objects have, as Kueue's reference spells them: another one is new, or a mistake.
TOLERATION = ("tolerations", *(f"tolerations.{key}" for key in ("key", "operator", "value", "effect")))
FLAVORS = "resourceGroups.flavors"
QUOTAS = ("name", "resources", "resources.name", "resources.nominalQuota")
KEYS = {
    "ResourceFlavor": {"nodeLabels", *TOLERATION},
    "ClusterQueue": {
        *("namespaceSelector", "queueingStrategy", "preemption", "preemption.withinClusterQueue"),
        *("resourceGroups", "resourceGroups.coveredResources", FLAVORS, *(f"{FLAVORS}.{key}" for key in QUOTAS)),
    },
    "LocalQueue": {"clusterQueue"},
}
STRATEGY, PREEMPTION = ("BestEffortFIFO", "StrictFIFO"), ("Never", "LowerPriority", "LowerOrNewerEqualPriority")


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    """The specifications of that kind by name."""
    return {thing["metadata"]["name"]: thing["spec"] for thing in OBJECTS if thing["kind"] == kind}


def keys(value: Any, before: str = "") -> Iterator[str]:
    """All keys in a specification, in dots; those of labels are anybody's."""
    for item in value if isinstance(value, list) else [value] if isinstance(value, dict) else []:
        for key, inner in item.items() if isinstance(item, dict) else ():
            yield f"{before}{key}"
            yield from keys(inner, f"{before}{key}.") if key != "nodeLabels" else ()


def test_objects_have_known_keys():
    for thing in OBJECTS:
        kind, metadata = thing["kind"], thing["metadata"]
        assert set(thing) == {"apiVersion", "kind", "metadata", "spec"} and thing["apiVersion"] == API
        assert set(metadata) == {"name", "labels", *(["namespace"] if kind == "LocalQueue" else [])}
        assert set(keys(thing["spec"])) <= KEYS[kind], kind
    assert QUEUE_LABEL.split("/")[0] == API.split("/")[0]


def test_queues_lead_to_flavours():
    [(name, queue)] = of_kind("ClusterQueue").items()
    assert queue["queueingStrategy"] in STRATEGY and queue["preemption"]["withinClusterQueue"] in PREEMPTION
    assert [spec["clusterQueue"] for spec in of_kind("LocalQueue").values()] == [name]
    [group] = queue["resourceGroups"]
    # What the Kubernetes backend writes as requests of the pods.
    assert {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"} == set(group["coveredResources"])
    assert [flavor["name"] for flavor in group["flavors"]] == list(of_kind("ResourceFlavor"))
    for flavor in group["flavors"]:
        assert [quota["name"] for quota in flavor["resources"]] == group["coveredResources"]
        assert all(re.fullmatch(r"\d+(Ki|Mi|Gi|Ti)?", str(quota["nominalQuota"])) for quota in flavor["resources"])
