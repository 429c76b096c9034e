"""A job as a request for Google Batch: the `Job` that `jobs.create` takes (cloud.google.com/batch/docs/reference/rest).

Batch has one policy about exit codes, of one action: it retries the listed codes alone (RETRY_TASK), or all but the
listed ones (FAIL_TASK). This program has every code retried that it does not know, which only the second one says.
"""

from __future__ import annotations

from typing import Any

from job.exits import BadRequestError
from job.jobs.backends import google_container as container
from job.jobs.backends.base import Manifest
from job.jobs.backends.machines import Machine, machine_for
from job.jobs.spec import JobSpec
from job.jobs.targets import BatchTarget
from job.requests import BATCH_TASK_INDEX

MAX_RETRIES = 10
"""The most that Batch takes; it counts preemptions like everything else, and so `--watch` goes on where it stops."""
MAX_SLICES = 1000
UNRESPONSIVE, OVER_TIME = 50004, 50005
FAILING_CODES = (*container.NEVER_RETRIED, UNRESPONSIVE, OVER_TIME)
"""Of the program, and of Batch itself (batch/docs/troubleshooting#reserved-exit-codes): a task that could not be ended,
and one that ran longer than `maxRunDuration`. Retried are preemption (50001), a machine that was lost (50002),
restarted (50003) or recreated (50006), and what Batch does not explain (50000)."""


def job(spec: JobSpec, target: BatchTarget, region: str) -> Manifest:
    """One job in one region. Pure.

    Raises:
        BadRequestError: Batch cannot run such a job; the message names the option.
    """
    container.check(spec, target)
    if spec.slices > MAX_SLICES:
        raise BadRequestError(f"--slices {spec.slices}: {MAX_SLICES} are the limit")
    if spec.max_hours > 14 * 24:
        raise BadRequestError(f"--max-hours {spec.max_hours:g}: Batch runs nothing for longer than 336 hours")
    machine = machine_for(target.machine_type, spec.gpu_type or target.gpu_type, spec.gpus, spec.spot)
    return {
        "labels": container.labels(spec),
        "taskGroups": [
            {
                "taskCount": str(spec.machines),
                "parallelism": str(spec.machines),
                "taskCountPerNode": "1",
                "runAsNonRoot": True,
                "taskSpec": _task(spec, machine),
            }
        ],
        "allocationPolicy": _allocation(spec, target, region, machine),
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
    }


def _task(spec: JobSpec, machine: Machine) -> dict[str, Any]:
    resources = {}
    if machine.shape:
        cpus, memory_mib = machine.shape
        resources = {"computeResource": {"cpuMilli": str(1000 * cpus), "memoryMib": str(memory_mib)}}
    return {
        "maxRetryCount": MAX_RETRIES,
        "maxRunDuration": f"{spec.max_seconds}s",
        **resources,
        "lifecyclePolicies": [{"action": "FAIL_TASK", "actionCondition": {"exitCodes": [*FAILING_CODES]}}],
        "runnables": [
            {
                "displayName": spec.verb,
                "container": {
                    "imageUri": spec.image,
                    "commands": [*spec.argv_of_slice(BATCH_TASK_INDEX)],
                    # All constants: Batch takes these apart at the spaces.
                    "options": " ".join(
                        [
                            *container.confinement(),
                            # Docker makes it, with the rights that it has in the image, and removes it.
                            f"--mount=type=volume,target={container.SCRATCH}",
                            *(["--gpus=all"] if machine.gpus else []),
                        ]
                    ),
                },
                "environment": {"variables": container.variables(spec)},
            }
        ],
    }


def _allocation(spec: JobSpec, target: BatchTarget, region: str, machine: Machine) -> dict[str, Any]:
    accelerators = [{"type": machine.gpu_type, "count": str(machine.gpus)}]
    return {
        "location": {"allowedLocations": [f"regions/{region}"]},
        "instances": [
            {
                "policy": {
                    "machineType": machine.machine_type,
                    "provisioningModel": "SPOT" if spec.spot else "STANDARD",
                    **({"accelerators": accelerators} if machine.extra else {}),
                    "bootDisk": {
                        # Its docker knows `--gpus`; that of batch-cos does not.
                        "image": "batch-debian",
                        "type": machine.disk_type,
                        "sizeGb": str(target.boot_disk_gigabytes),
                    },
                },
                **({"installGpuDrivers": True} if machine.gpus else {}),
                "blockProjectSshKeys": True,
            }
        ],
        **(
            {"serviceAccount": {"email": target.service_account, "scopes": [*container.SCOPES]}}
            if target.service_account
            else {}
        ),
        **({"network": _network(target, region)} if target.network or target.subnetwork else {}),
        "labels": container.labels(spec),
    }


def _network(target: BatchTarget, region: str) -> dict[str, Any]:
    # Who names a network has one that reaches Google without external addresses.
    home = f"projects/{target.project}"
    network = target.network if "/" in target.network else f"{home}/global/networks/{target.network}"
    subnetwork = target.subnetwork
    if "/" not in subnetwork:
        subnetwork = f"{home}/regions/{region}/subnetworks/{target.subnetwork}"
    return {
        "networkInterfaces": [
            {
                **({"network": network} if target.network else {}),
                **({"subnetwork": subnetwork} if target.subnetwork else {}),
                "noExternalIpAddress": True,
            }
        ]
    }
