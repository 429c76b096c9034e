"""What Terraform's outputs become: a targets.yaml that the program accepts, and an account that Kubernetes accepts."""

from __future__ import annotations

import re

import kubernetes_validate
import pytest
import yaml

from job.jobs.backends.kubernetes import KubernetesTarget
from job.jobs.backends.vm import VmTarget
from job.jobs.targets import parse_targets
from tests.infra.configuration import FILES, FOLDER, body_of
from tests.job.command_line import ddpm_here, succeeded

pytestmark = pytest.mark.infra

ACCOUNT = "ddpm-job@my-project.iam.gserviceaccount.com"
VALUES = {
    "project": "my-project",
    "region": "us-central1",
    "zones": "us-central1-a, us-central1-b",
    "image": "us-central1-docker.pkg.dev/my-project/ddpm/ddpm:latest",
    "bucket": "gs://my-project-ddpm-runs",
    "job_account": ACCOUNT,
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
    values = VALUES | changed
    text = (FOLDER / name).read_text()
    parts = re.compile(r"%\{ if (\w+) ~\}\n(.*?)%\{ endif ~\}\n", re.DOTALL)
    text = parts.sub(lambda match: match[2] if values[match[1]] == "true" else "", text)
    text = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)
    assert "${" not in text and "%{" not in text
    return text


def test_templates_use_their_values():
    for output in ("targets", "kubernetes_account"):
        call = re.fullmatch(
            r'\$\{templatefile\("\$\{path\.module\}/(.+?)", \{(.*)\}\)\}', body_of("output", output)["value"]
        )
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
    assert machine["serviceAccounts"][0]["email"] == ACCOUNT


def test_cluster_gets_namespace_and_account():
    namespace, account = yaml.safe_load_all(rendered("service-account.yaml.tftpl"))
    for document in (namespace, account):
        kubernetes_validate.validate(document, "1.34", strict=True)
    assert namespace["metadata"]["name"] == account["metadata"]["namespace"] == "ddpm"
    assert account["metadata"]["annotations"] == {"iam.gke.io/gcp-service-account": ACCOUNT}
    # What Terraform lets act as the job account is this very account.
    assert f"/{account['metadata']['name']}]" in FILES["identity.tf"]
