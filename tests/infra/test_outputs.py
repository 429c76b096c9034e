"""What Terraform's outputs become: a targets.yaml that the program accepts, and an account that Kubernetes accepts."""

from __future__ import annotations

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from job.jobs.targets import KubernetesTarget, Target, VmTarget, parse_targets
from tests.infra.configuration import Block, object_items, read_folder, string_value

pytestmark = pytest.mark.infra

FOLDER = Path(__file__).parents[2] / "infra/terraform"
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


def rendered(name: str, values: dict[str, str]) -> str:
    """A template as `templatefile` renders it, as far as ours use it: values, and `if … endif` with their line ends."""
    text = (FOLDER / name).read_text()

    def branch(match: re.Match[str]) -> str:
        return match[2] if values[match[1]] == "true" else ""

    text = re.sub(r"%\{ if (\w+) ~\}\n(.*?)%\{ endif ~\}\n", branch, text, flags=re.DOTALL)
    text = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)
    assert "${" not in text and "%{" not in text
    return text


def targets(**changed: str) -> dict[str, Target]:
    return parse_targets(rendered("targets.yaml.tftpl", VALUES | changed), "targets.yaml")


def output(name: str) -> Block:
    [block] = [block for block in read_folder(FOLDER) if block.kind == "output" and block.labels == (name,)]
    return block


@pytest.mark.parametrize("name", ["targets", "kubernetes_account"])
def test_templates_use_what_they_are_given_and_are_given_what_they_use(name):
    value = output(name).attribute("value")
    assert value is not None
    # The outermost call: others are among its arguments.
    call = max(value.expression.find_data("arguments"), key=lambda tree: len(list(tree.iter_subtrees())))
    path, given = [child for child in call.children if hasattr(child, "data") and child.data == "expr_term"]
    template = string_value(path).rsplit("/", 1)[-1].removesuffix("}")
    text = (FOLDER / template).read_text()
    used = set(re.findall(r"\$\{(\w+)\}", text)) | set(re.findall(r"%\{ if (\w+)", text))
    assert set(object_items(given)) == used
    assert used <= set(VALUES)


def test_targets_with_a_cluster():
    made = targets()
    assert list(made) == ["gke", "vm", "batch"]
    gke, vm = made["gke"], made["vm"]
    assert isinstance(gke, KubernetesTarget) and isinstance(vm, VmTarget)
    assert (gke.context, gke.namespace, gke.service_account) == (VALUES["context"], "ddpm", "ddpm")
    assert (gke.grace_seconds, gke.cluster, gke.spot) == (105, "gke", True)
    assert vm.zones == ("us-central1-a", "us-central1-b")
    assert {target.bucket for target in made.values()} == {VALUES["bucket"]}
    assert {target.image for target in made.values()} == {VALUES["image"]}


def test_targets_without_a_cluster():
    assert list(targets(gke="false")) == ["vm", "batch"]


def test_jobs_can_be_rendered_for_each_target():
    from job.jobs.backends.vm import vm_instances
    from job.jobs.spec import JobSpec

    made = targets()
    vm = made["vm"]
    assert isinstance(vm, VmTarget)
    spec = JobSpec("train-celeba", "train", ("train",), vm.image, vm.bucket, "celeba", gpu_type="nvidia-l4")
    [machine] = vm_instances(spec, vm, "us-central1-a")
    [interface] = machine["networkInterfaces"]
    assert interface["network"] == VALUES["network"] and "accessConfigs" not in interface
    assert machine["serviceAccounts"][0]["email"] == ACCOUNT


def test_the_cluster_gets_a_namespace_and_an_account_bound_to_googles():
    namespace, account = yaml.safe_load_all(rendered("service-account.yaml.tftpl", VALUES))
    for document in (namespace, account):
        kubernetes_validate.validate(document, "1.34", strict=True)
    assert namespace["metadata"]["name"] == account["metadata"]["namespace"] == "ddpm"
    assert account["metadata"]["annotations"] == {"iam.gke.io/gcp-service-account": ACCOUNT}
    # What Terraform lets act as the job account is this very account.
    assert f"/{account['metadata']['name']}]" in (FOLDER / "identity.tf").read_text()
