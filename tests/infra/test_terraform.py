"""infra/ against the provider's schema, checkov, the program and itself, as far as that goes without Terraform."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from braceexpand import braceexpand

from job.jobs.backends.kubernetes import KubernetesTarget
from job.jobs.backends.kubernetes_objects import QUEUE_LABEL
from job.jobs.backends.vm import VmTarget
from job.jobs.spec import job_name
from job.jobs.targets import parse_targets
from tests.infra.configuration import FILES, FOLDER, IS_BLOCK, body_of, read
from tests.infra.provider_schema import struct_of, structs
from tests.job.command_line import ddpm_here, succeeded
from tests.job.jobs.submitting import KINDS

pytestmark = pytest.mark.infra
REFERENCE = re.compile(r"(?<![\w.])(var|local|(?:data\.)?google_\w+)\.(\w+)(?:\[[^]]*\])?(?:\.(\w+))?")
META = ("count", "for_each", "depends_on", "provider", "provisioner", "connection")
"""What Terraform itself takes in each resource."""
LITERALS = ((bool, "bool"), (int, "number"), (list, "list"), (dict, "map"))


def problems(texts: Mapping[str, str] = FILES) -> list[str]:
    """What the provider's schema says against the blocks, and references that lead nowhere."""
    declared, found = set[tuple[str, str]](), []
    for kind, labels, body in read(texts):
        if kind == "variable":
            declared.add(("var", labels[0]))
        elif kind == "locals":
            declared |= {("local", name) for name in body.keys() - {IS_BLOCK}}
        elif kind in ("resource", "data", "provider"):
            struct = struct_of(kind, labels[0])
            told = _against(body, struct, META) if struct in structs() else [f": the provider has no such {kind}"]
            found += [f"{'.'.join(labels)}{problem}" for problem in told]
            declared.add((f"data.{labels[0]}" if kind == "data" else labels[0], labels[-1]))
    references = [row for text in texts.values() for row in REFERENCE.findall(re.sub("#.*", "", text))]
    for root, name, attribute in references:
        if (root, name) not in declared:
            found.append(f"there is no {root}.{name}")
        elif attribute and root not in ("var", "local"):
            struct = struct_of("data" if root.startswith("data.") else "resource", root.removeprefix("data."))
            if attribute not in structs()[struct.removesuffix("Config")] | {"id": ""}:
                found.append(f"{root} has no {attribute}")
    unused = declared - {(root, name) for root, name, _ in references}
    return found + [f"nobody uses {'.'.join(row)}" for row in sorted(unused) if row[0] in ("var", "local")]


def _against(body: dict[str, Any], struct: str, others: tuple[str, ...] = ()) -> Iterator[str]:
    arguments = structs()[struct]
    left_out = {IS_BLOCK, "dynamic", "lifecycle", *others}
    given = {name: value for name, value in body.items() if name not in left_out}
    for dynamic in body.get("dynamic", []):
        given |= {name.strip('"'): made["content"] for name, made in dynamic.items()}
    yield from (f": {name} is missing" for name, (required, _) in arguments.items() if required and name not in given)
    yield from (f": unknown {name}" for name in given.keys() - arguments.keys())
    for name in given.keys() & arguments.keys():
        value, wanted = given[name], arguments[name][1]
        kind, *inner = [wanted] if isinstance(wanted, str) else wanted
        blocks = [item for item in value if isinstance(item, dict) and IS_BLOCK in item] if type(value) is list else []
        literal = next((word for python, word in LITERALS if isinstance(value, python)), kind)
        literal = "string" if isinstance(value, str) and value.startswith('"') else literal
        if (kind == "block") != bool(blocks):
            yield f": {name} is {'a block, not an argument' if kind == 'block' else 'an argument, not a block'}"
        elif not blocks and kind not in ("any", literal):
            yield f": {name} is a {literal} instead of a {kind}"
        elif len(blocks) > 1 and not inner[1]:
            yield f": there can be one {name} only"
        for block in blocks if kind == "block" else ():
            yield from (f".{name}{problem}" for problem in _against(block, inner[0]))


@pytest.mark.parametrize(
    ("file", "there", "mistake", "said"),
    [
        ("storage", "", "", None),
        ("storage", "public_access_prevention ", "public_acess_prevention", "unknown public_acess_prevention"),
        ("storage", "retention_duration_seconds = 0", 'retention_duration_seconds = "0"', "string instead of a number"),
        ("storage", 'action { type = "Delete" }', "", "lifecycle_rule: action is missing"),
        ("storage", 'action { type = "Delete" }', 'action = { type = "Delete" }', "action is a block, not"),
        ("storage", "location ", "location {}\n x", "location is an argument, not"),
        ("storage", '"google_storage_bucket" "runs"', '"google_storage_buckets" "runs"', "the provider has no such"),
        ("storage", "var.name", "var.nam", "there is no var.nam"),
        ("cluster", "google_compute_network.this.id", "google_compute_network.this.idd", "network has no idd"),
        ("versions", "  labels ", "  unused = 1\n  labels ", "nobody uses local.unused"),
        ("budget", "amount {", "amount {\n }\n amount {", "there can be one amount only"),
    ],
)
def test_nothing_is_wrong_and_planted_mistakes_are_noticed(file, there, mistake, said):
    assert there in FILES[f"{file}.tf"]
    found = problems({**FILES, f"{file}.tf": FILES[f"{file}.tf"].replace(there, mistake, 1)})
    assert any(said in problem for problem in found) if said else found == [], found


def test_variables_are_validated():
    variables = {block.labels[0]: block.body for block in read() if block.kind == "variable"}
    assert [name for name, body in variables.items() if "validation" not in body and body["type"] != "bool"] == []
    text = (FOLDER / "terraform.tfvars.example").read_text().replace("# ", "")
    assert set(re.findall(r"^(\w+) += ", text, re.MULTILINE)) <= variables.keys()
    for name, fields in re.findall(r"^(\w+) += \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        known = set(re.findall(r"(\w+) = optional", variables[name]["type"]))
        assert set(re.findall(r"^ *(\w+) += ", fields, re.MULTILINE)) <= known


def test_jobs_may_do_little_and_buckets_outlive_terraform():
    roles = {block.labels[1]: block.body["role"].strip('"') for block in read() if "role" in block.body}
    assert {name: role for name, role in roles.items() if role.startswith("roles/")} == {
        "job_writes_runs": "roles/storage.objectUser",
        "job_reads_data": "roles/storage.objectViewer",
        "pull": "roles/artifactregistry.reader",
        "pods_act_as_job": "roles/iam.workloadIdentityUser",
        "nodes": "roles/container.defaultNodeServiceAccount",
    }
    text = FILES["identity.tf"]
    assert 'toset(["roles/logging.logWriter", "roles/batch.agentReporter"])' in text
    assert 'permissions = ["compute.instances.delete"]' in text
    # A VM deletes itself by its name, which begins with what it does.
    named = re.findall(r'"(\w+)"', re.search(r"for verb in \[([^]]*)\]", text)[1])
    assert sorted(named) == sorted(KINDS)
    assert all(job_name(verb, "celeba").startswith(f"{verb}-") for verb in named)
    text = FILES["storage.tf"]
    runs = text.partition('"google_storage_bucket" "runs"')[2]
    assert "force_destroy" not in text and "soft_delete_policy { retention_duration_seconds = 0 }" in runs


CHECKOV = Path(__file__).parents[2] / ".venv/checkov/bin/checkov"
EVERYTHING = 'project = "my-project"\ngke = true\nbilling_account = "012345-6789AB-CDEF01"\n'


def test_checkov_finds_what_is_accepted_alone(tmp_path):
    """With a reason each in `accepted.txt`: what is new fails, and what is gone too."""
    accepted = Path(__file__).with_name("accepted.txt").read_text()
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "everything.tfvars").write_text(EVERYTHING)
    command = [CHECKOV, "-d", tmp_path, "--var-file", tmp_path / "everything.tfvars", "--framework", "terraform"]
    command += ["--quiet", "--compact", "--skip-download", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0 and report["summary"]["passed"] > 30
    found = {f"{check['check_id']} {check['resource']}" for check in report["results"]["failed_checks"]}
    assert found == {line.partition(": ")[0] for line in accepted.splitlines()}


VALUES = {
    "project": "my-project",
    "region": "us-central1",
    "zones": "us-central1-a, us-central1-b",
    "image": "us-central1-docker.pkg.dev/my-project/ddpm/ddpm:latest",
    "bucket": "gs://my-project-ddpm-runs",
    "job_account": "ddpm-job@my-project.iam.gserviceaccount.com",
    "network": "projects/my-project/global/networks/ddpm",
    "subnetwork": "projects/my-project/regions/us-central1/subnetworks/ddpm",
    "machine_type": "g2-standard-8",
    "gpu_type": "nvidia-l4",
    "gpus": "1",
    "gke": "true",
    "context": "gke_my-project_us-central1-a_ddpm",
    "namespace": "ddpm",
    "grace_seconds": "105",
}


def rendered(name: str, **changed: str) -> str:
    """A template as `templatefile` renders it, as far as ours use it: values, and `if … endif` with their line ends."""
    values, text = VALUES | changed, (FOLDER / name).read_text()
    parts = re.compile(r"%\{ if (\w+) ~\}\n(.*?)%\{ endif ~\}\n", re.DOTALL)
    text = parts.sub(lambda match: match[2] if values[match[1]] == "true" else "", text)
    text = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)
    assert "${" not in text and "%{" not in text
    return text


def test_templates_use_their_values():
    for output in ("targets", "kubernetes_account"):
        written = body_of("output", output)["value"]
        call = re.fullmatch(r'\$\{templatefile\("\$\{path\.module\}/(.+?)", \{(.*)\}\)\}', written)
        text = (FOLDER / call[1]).read_text()
        used = set(re.findall(r"\$\{(\w+)\}", text)) | set(re.findall(r"%\{ if (\w+)", text))
        assert set(re.findall(r"(?:^|, )(\w+) = ", call[2])) == used <= set(VALUES), output


def test_written_targets_take_jobs(tmp_path):
    text = rendered("targets.yaml.tftpl")
    made = parse_targets(text, "targets.yaml")
    assert list(made) == ["gke", "vm", "batch"]
    assert list(parse_targets(rendered("targets.yaml.tftpl", gke="false"), "targets.yaml")) == ["vm", "batch"]
    gke, vm = made["gke"], made["vm"]
    assert isinstance(gke, KubernetesTarget) and isinstance(vm, VmTarget)
    assert (gke.context, gke.namespace, gke.service_account) == (VALUES["context"], "ddpm", "ddpm")
    assert (gke.grace_seconds, gke.cluster, gke.spot) == (105, "gke", True)
    assert [*vm.zones] == ["us-central1-a", "us-central1-b"]
    assert {(target.bucket, target.image) for target in made.values()} == {(VALUES["bucket"], VALUES["image"])}

    (tmp_path / "targets.yaml").write_text(text)
    words = ("submit", "train", "--dataset", "celeba", "--on", "vm", "--targets", tmp_path / "targets.yaml")
    machine = yaml.safe_load(succeeded(ddpm_here(*words, "--dry-run")))
    [interface] = machine["networkInterfaces"]
    assert interface["network"] == VALUES["network"] and "accessConfigs" not in interface
    assert machine["serviceAccounts"][0]["email"] == VALUES["job_account"]


def test_cluster_gets_namespace_and_account():
    namespace, account = yaml.safe_load_all(rendered("service-account.yaml.tftpl"))
    for document in (namespace, account):
        kubernetes_validate.validate(document, "1.34", strict=True)
    assert namespace["metadata"]["name"] == account["metadata"]["namespace"] == "ddpm"
    assert account["metadata"]["annotations"] == {"iam.gke.io/gcp-service-account": VALUES["job_account"]}
    # What Terraform lets act as the job account is this very account.
    assert f"/{account['metadata']['name']}]" in FILES["identity.tf"]


OBJECTS = list(yaml.safe_load_all((FOLDER.parent / "kubernetes/kueue.yaml").read_text()))
API = "kueue.x-k8s.io/v1beta2"
# All keys that the objects have, as Kueue's reference spells them: another one is new, or a mistake. Kueue has no
# schema to be had without a cluster.
KEYS = {
    "ResourceFlavor": "nodeLabels tolerations{,.key,.operator,.value,.effect}",
    "ClusterQueue": """namespaceSelector queueingStrategy preemption{,.withinClusterQueue}
        resourceGroups{,.coveredResources,.flavors{,.name,.resources{,.name,.nominalQuota}}}""",
    "LocalQueue": "clusterQueue",
}


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    """The specifications of Kueue's objects of that kind by name."""
    return {thing["metadata"]["name"]: thing["spec"] for thing in OBJECTS if thing["kind"] == kind}


def keys(value: Any, before: str = "") -> Iterator[str]:
    """All keys in a specification, in dots; those of labels are anybody's."""
    for item in value if isinstance(value, list) else [value] if isinstance(value, dict) else []:
        for key, inner in item.items() if isinstance(item, dict) else ():
            yield f"{before}{key}"
            yield from keys(inner, f"{before}{key}.") if key != "nodeLabels" else ()


def test_kueues_objects_have_known_keys_and_queues_lead_to_flavours():
    for thing in OBJECTS:
        kind, metadata = thing["kind"], thing["metadata"]
        assert set(thing) == {"apiVersion", "kind", "metadata", "spec"} and thing["apiVersion"] == API
        assert set(metadata) == {"name", "labels", *(["namespace"] if kind == "LocalQueue" else [])}
        assert set(keys(thing["spec"])) <= {key for text in KEYS[kind].split() for key in braceexpand(text)}, kind
    assert QUEUE_LABEL.split("/")[0] == API.split("/")[0]
    [(name, queue)] = of_kind("ClusterQueue").items()
    assert queue["queueingStrategy"] in ("BestEffortFIFO", "StrictFIFO")
    assert queue["preemption"]["withinClusterQueue"] in ("Never", "LowerPriority", "LowerOrNewerEqualPriority")
    assert [spec["clusterQueue"] for spec in of_kind("LocalQueue").values()] == [name]
    [group] = queue["resourceGroups"]
    # What the Kubernetes backend writes as requests of the pods.
    assert {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"} == set(group["coveredResources"])
    assert [flavor["name"] for flavor in group["flavors"]] == list(of_kind("ResourceFlavor"))
    for flavor in group["flavors"]:
        assert [quota["name"] for quota in flavor["resources"]] == group["coveredResources"]
        assert all(re.fullmatch(r"\d+(Ki|Mi|Gi|Ti)?", str(quota["nominalQuota"])) for quota in flavor["resources"])
