"""What checkov has against infra/terraform is known, each with a reason: what is new fails, and what is gone too."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.infra.configuration import FILES

pytestmark = pytest.mark.infra

CHECKOV = Path(__file__).parents[2] / ".venv/checkov/bin/checkov"
EVERYTHING = 'project = "my-project"\ngke = true\nbilling_account = "012345-6789AB-CDEF01"\n'
TEMPORARY = "of the default pool, which is removed as soon as the cluster is there"
CLUSTER, NODES = "google_container_cluster.this[0]", "google_container_node_pool.jobs"
DATA, RUNS = "google_storage_bucket.data", "google_storage_bucket.runs"
ACCEPTED = {
    ("CKV_GCP_62", DATA): "access logs are kept by Cloud Audit Logs for who switches them on",
    ("CKV_GCP_62", RUNS): "as above; a log line for each shard that is read costs more than it tells",
    ("CKV_GCP_78", DATA): "soft delete keeps a week of what was deleted",
    ("CKV_GCP_78", RUNS): "retired checkpoints would be paid for; the program never overwrites them",
    ("CKV_GCP_84", "google_artifact_registry_repository.images"): "Google's own keys suffice for public code",
    ("CKV_GCP_26", "google_compute_subnetwork.this"): "flow logs cost more than the network",
    ("CKV2_GCP_18", "google_compute_network.this"): "no rule is the tightest: nothing comes in",
    ("CKV_GCP_68", NODES): "secure boot refuses GPU drivers that are not signed",
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


def test_nothing_but_what_is_accepted(tmp_path):
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "everything.tfvars").write_text(EVERYTHING)
    command = [CHECKOV, "-d", tmp_path, "--var-file", tmp_path / "everything.tfvars", "--framework", "terraform"]
    command += ["--quiet", "--compact", "--skip-download", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0 and report["summary"]["passed"] > 30
    assert {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]} == set(ACCEPTED)
