"""infra/terraform against the provider's schema and itself; each check must notice a mistake of its kind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.infra.checks import FUNCTIONS, problems
from tests.infra.configuration import Block, read, read_folder, string_value
from tests.infra.provider_schema import PROVIDER_VERSION, schema

pytestmark = pytest.mark.infra

FOLDER = Path(__file__).parents[2] / "infra/terraform"
FILES = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.tf"))}


def configuration(**changed: str) -> list[Block]:
    texts = {**FILES, **{f"{name}.tf": text for name, text in changed.items()}}
    return [block for name, text in texts.items() for block in read(text, name)]


def test_nothing_is_wrong():
    assert problems(read_folder(FOLDER), schema()) == []


def test_it_stays_small():
    assert len(FILES) <= 9
    assert sum(len(text.splitlines()) for text in FILES.values()) < 500


def test_versions_are_ranges_that_hold_the_schema_that_is_compared_with():
    versions = FILES["versions.tf"]
    low, high = re.search(r'google"\n +version += ">= ([\d.]+), < ([\d.]+)"', versions).groups()
    assert tuple(map(int, low.split("."))) <= PROVIDER_VERSION < tuple(map(int, high.split(".")))
    assert re.search(r'required_version += ">= [\d.]+, < [\d.]+"', versions)


def test_every_variable_that_a_person_types_as_text_is_validated():
    variables = [block for block in read_folder(FOLDER) if block.kind == "variable"]
    free = {"bool"}
    for block in variables:
        kind = block.attribute("type")
        assert kind is not None
        typed = "".join(str(token) for token in kind.expression.scan_values(lambda _: True))
        assert typed in free or any(child.kind == "validation" for child in block.blocks), block.path


def test_the_example_sets_what_can_be_set():
    text = (FOLDER / "terraform.tfvars.example").read_text().replace("# ", "")
    declared = {block.labels[0]: block for block in read_folder(FOLDER) if block.kind == "variable"}
    assert set(re.findall(r"^(\w+) += ", text, re.MULTILINE)) <= set(declared)
    for name, fields in re.findall(r"^(\w+) += \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        kind = declared[name].attribute("type")
        assert kind is not None
        known = {str(token) for token in kind.expression.scan_values(lambda _: True)}
        assert set(re.findall(r"^ *(\w+) += ", fields, re.MULTILINE)) <= known


MISTAKES = [
    # file, what is there, the mistake, what the check says
    ("storage", 'public_access_prevention    = "enforced"', 'public_acess_prevention = "enforced"', "unknown argument"),
    ("storage", "location                    = var.region", "", "location is missing"),
    ("storage", "soft_delete_policy {", "soft_delet_policy {", "unknown block"),
    ("storage", "lifecycle_rule {", "lifecycle_rules {", "unknown block"),
    ("storage", "age            = 1", "age = true", "age is a bool instead of a number"),
    ("storage", "age            = 1", "age = 1\n age = 2", "age is given twice"),
    ("storage", "retention_duration_seconds = 0", 'retention_duration_seconds = "0"', "string instead of a number"),
    ("storage", '["doctor/", "probe/", "tmp/"]', '"doctor/"', "string instead of a list"),
    ("storage", '"google_storage_bucket" "runs"', '"google_storage_bucket" "data"', "is declared twice"),
    ("storage", '"google_storage_bucket" "runs"', '"google_storage_buckets" "runs"', "the provider has no resource"),
    ("storage", "var.region", "var.regoin", "there is no such variable"),
    ("storage", 'action { type = "Delete" }', 'action = { type = "Delete" }', "is a block, not an argument"),
    ("storage", 'action { type = "Delete" }', "", "action is missing"),
    ("versions", "default_labels = local.labels", "default_labels { app = 1 }", "is an argument, not a block"),
    ("versions", "local.labels", "local.label", "there is no such local value"),
    ("versions", "google_storage_bucket.runs.name", "google_storage_bucket.run.name", "there is nothing of this name"),
    (
        "versions",
        "google_storage_bucket.runs.name",
        "google_storage_bucket.runs.nam",
        "google_storage_bucket has no nam",
    ),
    ("versions", "one(", "onn(", "there is no function onn"),
    ("versions", "  labels ", "  unused = 1\n  labels ", "nobody uses it"),
    ("network", "each.value", "each.values", "the block has no each.values"),
    ("network", "data.google_compute_zones.up.names", "data.google_compute_zones.on.names", "nothing of this name"),
    ("cluster", "kubelet_config.value", "kubelet_config.val", "an iterator has a key and a value"),
    ("cluster", 'dynamic "kubelet_config"', 'dynamic "kubelet_configs"', "unknown block"),
    ("cluster", "shutdown_grace_period_seconds ", "shutdown_grace_seconds ", "unknown argument"),
    ("cluster", "node_config {", "node_configs {", "unknown block"),
    ("identity", 'role   = "roles/storage.objectViewer"', "", "role is missing"),
    ("budget", "data.google_project.this.number", "data.google_project.this.numbers", "google_project has no numbers"),
    ("budget", "amount {", "amount {\n }\n amount {", "there can be one only"),
    ("outputs", 'description = "For archives', 'descriptoin = "For archives', "unknown argument descriptoin"),
    ("outputs", 'output "image"', 'outputs "image"', "there are no blocks of this kind"),
    ("outputs", 'output "image"', 'output "bucket"', "output bucket is declared twice"),
    ("variables", "error_message", "error_mesage", "error_message is missing"),
    (
        "variables",
        'variable "nat"',
        'variable "unused" {\n description = ""\n type = bool\n}\nvariable "nat"',
        "nobody uses it",
    ),
    ("variables", 'variable "nat"', 'variable "natt"', "there is no such variable"),
]


@pytest.mark.parametrize(("file", "there", "mistake", "said"), MISTAKES, ids=lambda value: str(value)[:40])
def test_each_planted_mistake_is_noticed(file, there, mistake, said):
    assert there in FILES[f"{file}.tf"]
    found = problems(configuration(**{file: FILES[f"{file}.tf"].replace(there, mistake, 1)}), schema())
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize("broken", ['resource "a" "b" {', 'locals { a = "b }', "locals { a = [1, }", "locals { = 1 }"])
def test_what_is_no_hcl_is_refused(broken):
    with pytest.raises(Exception, match=r"Unexpected|unexpected|Token"):
        read(broken, "broken.tf")


def test_functions_are_names_that_terraform_has():
    # All of them are older than 1.9, which is asked for.
    assert {"startswith", "one", "alltrue", "templatefile"} <= FUNCTIONS


def resource(kind: str, name: str) -> Block:
    [block] = [block for block in read_folder(FOLDER) if block.labels == (kind, name)]
    return block


def granted() -> dict[str, str]:
    """Role by the name of the resource that grants it, where it is written out."""
    found = {}
    for block in read_folder(FOLDER):
        role = block.attribute("role")
        if block.kind == "resource" and role is not None and string_value(role.expression).startswith("roles/"):
            found[block.labels[1]] = string_value(role.expression)
    return found


def test_jobs_may_do_little():
    assert granted() == {
        "job_writes_runs": "roles/storage.objectUser",
        "job_reads_data": "roles/storage.objectViewer",
        "pull": "roles/artifactregistry.reader",
        "pods_act_as_job": "roles/iam.workloadIdentityUser",
        "nodes": "roles/container.defaultNodeServiceAccount",
    }
    text = FILES["identity.tf"]
    assert 'toset(["roles/logging.logWriter", "roles/batch.agentReporter"])' in text
    assert 'permissions = ["compute.instances.delete"]' in text
    assert not re.search(r"roles/(owner|editor|viewer|storage\.admin|[a-z]+\.admin)\b", text)


def test_a_vm_may_delete_what_jobs_are_called():
    from typing import get_args

    from job.jobs.spec import Verb, job_name

    verbs = re.search(r"for verb in \[([^]]*)\]", FILES["identity.tf"])
    assert verbs is not None
    named = re.findall(r'"(\w+)"', verbs[1])
    assert sorted(named) == sorted(get_args(Verb))
    assert all(job_name(verb, "celeba").startswith(f"{verb}-") for verb in named)


@pytest.mark.parametrize("name", ["data", "runs"])
def test_nobody_else_reads_the_buckets(name):
    block = resource("google_storage_bucket", name)
    prevention, uniform = block.attribute("public_access_prevention"), block.attribute("uniform_bucket_level_access")
    assert prevention is not None and string_value(prevention.expression) == "enforced"
    assert uniform is not None and list(uniform.expression.scan_values(lambda token: str(token) == "true"))
    assert block.attribute("force_destroy") is None


def test_retired_checkpoints_are_not_paid_for():
    text = FILES["storage.tf"]
    runs = text[text.index('"google_storage_bucket" "runs"') :]
    assert "soft_delete_policy { retention_duration_seconds = 0 }" in runs
