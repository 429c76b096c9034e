"""What checkov has against infra/terraform is known, each with a reason: what is new fails, and what is gone too."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.infra

ROOT = Path(__file__).parents[2]
CHECKOV = ROOT / ".venv/checkov/bin/checkov"
EVERYTHING = 'project = "my-project"\ngke = true\nbilling_account = "012345-6789AB-CDEF01"\n'
TEMPORARY = "of the default pool, which is removed as soon as the cluster is there"
CLUSTER = "google_container_cluster.this[0]"
ACCEPTED = {
    ("CKV_GCP_62", "google_storage_bucket.data"): "access logs are kept by Cloud Audit Logs for who switches them on",
    (
        "CKV_GCP_62",
        "google_storage_bucket.runs",
    ): "as above; a log line for each shard that is read costs more than it tells",
    ("CKV_GCP_78", "google_storage_bucket.data"): "soft delete keeps a week of what was deleted",
    (
        "CKV_GCP_78",
        "google_storage_bucket.runs",
    ): "retired checkpoints would be paid for; the program never overwrites them",
    (
        "CKV_GCP_84",
        "google_artifact_registry_repository.images",
    ): "Google's own keys are enough for an image of public code",
    ("CKV_GCP_26", "google_compute_subnetwork.this"): "flow logs cost more than the network",
    ("CKV2_GCP_18", "google_compute_network.this"): "no rule is the tightest: nothing comes in",
    ("CKV_GCP_68", "google_container_node_pool.jobs"): "secure boot refuses GPU drivers that are not signed",
    ("CKV_GCP_68", CLUSTER): TEMPORARY,
    ("CKV_GCP_69", CLUSTER): TEMPORARY,
    ("CKV_GCP_12", CLUSTER): "Dataplane V2, which is switched on, brings network policies",
    ("CKV_GCP_13", CLUSTER): "client certificates are off unless asked for since Kubernetes 1.12",
    ("CKV_GCP_20", CLUSTER): "no address of the control plane is reachable; its name is judged by IAM",
    ("CKV_GCP_21", CLUSTER): "the provider's default_labels give labels to all",
    ("CKV_GCP_61", CLUSTER): "as the subnetwork's flow logs",
    ("CKV_GCP_65", CLUSTER): "needs a Google Workspace with groups of its own",
    ("CKV_GCP_66", CLUSTER): "images are built by hand; an attestor would need a pipeline of its own",
}


def failures(folder: Path, tmp_path: Path) -> set[tuple[str, str]]:
    variables = tmp_path / "everything.tfvars"
    variables.write_text(EVERYTHING)
    command = [str(CHECKOV), "-d", str(folder), "--var-file", str(variables), "--framework", "terraform"]
    done = subprocess.run(
        [*command, "--quiet", "--compact", "--skip-download", "-o", "json"], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 30
    return {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}


def test_nothing_but_what_is_accepted(tmp_path):
    assert failures(ROOT / "infra/terraform", tmp_path) == set(ACCEPTED)


@pytest.mark.parametrize(
    ("file", "there", "mistake", "check"),
    [
        ("storage.tf", '"enforced"', '"inherited"', "CKV_GCP_114"),
        ("storage.tf", "uniform_bucket_level_access = true", "uniform_bucket_level_access = false", "CKV_GCP_29"),
        ("network.tf", "private_ip_google_access = true", "private_ip_google_access = false", "CKV_GCP_74"),
        ("cluster.tf", "private_cluster_config { enable_private_nodes = true }", "", "CKV_GCP_25"),
        ("identity.tf", "roles/container.defaultNodeServiceAccount", "roles/editor", "CKV_GCP_117"),
    ],
)
def test_a_planted_mistake_is_noticed(tmp_path, file, there, mistake, check):
    copy = tmp_path / "terraform"
    copy.mkdir()
    for path in (ROOT / "infra/terraform").glob("*.tf"):
        text = path.read_text()
        assert path.name != file or there in text
        (copy / path.name).write_text(text.replace(there, mistake) if path.name == file else text)
    assert check in {name for name, _ in failures(copy, tmp_path) - set(ACCEPTED)}
