"""A job as requests for VMs: what `instances.insert` takes (cloud.google.com/compute/docs/reference/rest/v1).

The VM runs Container-Optimized OS. Its cloud-init configuration, see `vm_cloud_init`, starts the container; it ends by
itself when the job is over, and Compute Engine deletes it at `maxRunDuration` whatever the machine does.
"""

from __future__ import annotations

from typing import Any

from job.exits import BadRequestError
from job.jobs.backends import google_container as container
from job.jobs.backends.base import Manifest
from job.jobs.backends.machines import Machine, machine_for
from job.jobs.backends.vm_cloud_init import cloud_init
from job.jobs.spec import JobSpec
from job.jobs.targets import VmTarget

IMAGE = "projects/cos-cloud/global/images/family/cos-stable"
MAX_SLICES = 100
SLICE_LABEL, SLICES_LABEL = "ddpm-slice", "ddpm-slices"


def instances(spec: JobSpec, target: VmTarget, zone: str) -> list[Manifest]:
    """One VM, or one for each slice of a sampling job. Pure.

    Raises:
        BadRequestError: no VM can run such a job; the message names the option.
    """
    container.check(spec, target)
    if spec.slices > MAX_SLICES:
        raise BadRequestError(
            f"--slices {spec.slices}: each is a VM of its own, and {MAX_SLICES} are the limit; use a batch target"
        )
    machine = machine_for(target.machine_type, spec.gpu_type or target.gpu_type, spec.gpus, spec.spot)
    return [_instance(spec, target, zone, machine, index) for index in range(spec.machines)]


def machine_names(name: str, slices: int) -> list[str]:
    """What the VMs of a job are called."""
    return [f"{name}-{index}" for index in range(slices)] if slices else [name]


def _instance(spec: JobSpec, target: VmTarget, zone: str, machine: Machine, index: int) -> Manifest:
    name = machine_names(spec.name, spec.slices)[index]
    slice_labels = {SLICE_LABEL: str(index), SLICES_LABEL: str(spec.slices)}
    user_data = cloud_init(spec, name, machine.gpus, index)
    accelerators = [
        {"acceleratorType": f"zones/{zone}/acceleratorTypes/{machine.gpu_type}", "acceleratorCount": machine.gpus}
    ]
    return {
        "name": name,
        "description": f"ddpm {spec.verb}, job {spec.name}",
        "machineType": f"zones/{zone}/machineTypes/{machine.machine_type}",
        "labels": {**container.labels(spec), **slice_labels},
        "scheduling": _scheduling(spec),
        **({"guestAccelerators": accelerators} if machine.extra else {}),
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "initializeParams": {
                    "sourceImage": IMAGE,
                    "diskSizeGb": str(target.boot_disk_gigabytes),
                    "diskType": f"zones/{zone}/diskTypes/{machine.disk_type}",
                    "labels": container.labels(spec),
                },
            }
        ],
        "networkInterfaces": [_network_interface(target, zone)],
        "serviceAccounts": [{"email": target.service_account or "default", "scopes": [*container.SCOPES]}],
        "shieldedInstanceConfig": {
            "enableSecureBoot": True,
            "enableVtpm": True,
            "enableIntegrityMonitoring": True,
        },
        "metadata": {
            "items": [
                {"key": "user-data", "value": user_data},
                # Where the machine says how far it is.
                {"key": "enable-guest-attributes", "value": "TRUE"},
                {"key": "block-project-ssh-keys", "value": "TRUE"},
                # An update would restart the machine in the middle of a job.
                {"key": "cos-update-strategy", "value": "update_disabled"},
            ]
        },
    }


def _scheduling(spec: JobSpec) -> dict[str, Any]:
    return {
        "provisioningModel": "SPOT" if spec.spot else "STANDARD",
        # A stopped machine's disk would cost money for as long as nobody looks.
        "instanceTerminationAction": "DELETE",
        # Machines with GPUs cannot move.
        "onHostMaintenance": "TERMINATE",
        "automaticRestart": False,
        "maxRunDuration": {"seconds": str(spec.max_seconds)},
    }


def _network_interface(target: VmTarget, zone: str) -> dict[str, Any]:
    # Who names a network has one that reaches Google without external addresses; the default one does not.
    if not (target.network or target.subnetwork):
        return {
            "network": "global/networks/default",
            "nicType": "GVNIC",
            "accessConfigs": [{"type": "ONE_TO_ONE_NAT", "name": "External NAT"}],
        }
    network = target.network if "/" in target.network else f"global/networks/{target.network}"
    region = zone.rsplit("-", 1)[0]
    subnetwork = target.subnetwork if "/" in target.subnetwork else f"regions/{region}/subnetworks/{target.subnetwork}"
    return {
        **({"network": network} if target.network else {}),
        **({"subnetwork": subnetwork} if target.subnetwork else {}),
        "nicType": "GVNIC",
    }
