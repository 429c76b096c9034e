"""What a job on Google's machines would need, for `ddpm doctor`: the API, and the quota of its GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from job.exits import Exit, JobError, NoPermissionError
from job.jobs.backends.google import GoogleApis
from job.jobs.backends.machines import machine_for
from job.jobs.checks import Check, unchecked_image
from job.jobs.targets import GoogleTarget

_GPU = re.compile(r"nvidia-(?:tesla-)?([a-z0-9-]+?)")
_QUOTA = "GPU quota"
_ACCOUNT = "service account"


def checks(
    apis: GoogleApis, target: GoogleTarget, api: str, regions: Sequence[str], look: Callable[[], Sequence[Any]]
) -> Iterator[Check]:
    """Whether the target's API answers, and its machine exists and may be had.

    Args:
        apis: of the target's project.
        target: whose job it would be.
        api: name of the engine.
        regions: where it would run, each once.
        look: asks the engine for the jobs there are.
    """
    apis.hurry()
    try:
        jobs = look()
    except JobError as error:
        yield Check.of_error(api, error)
        return
    yield Check(api, True, f"project {target.project} answers; {len(jobs)} jobs")
    try:
        machine = machine_for(target.machine_type, target.gpu_type, target.gpus, target.spot)
    except JobError as error:
        yield Check.of_error("machine type", error)
        return
    if machine.gpus:
        yield _quota(apis, machine.gpu_type, machine.gpus, target.spot, regions)
        yield _quota_everywhere(apis, machine.gpus)
    yield _account(apis, target)
    yield unchecked_image(target.image)


def _account(apis: GoogleApis, target: GoogleTarget) -> Check:
    email = target.service_account
    if not email:
        return Check(_ACCOUNT, True, "none is named: machines act as the project's default account")
    try:
        apis.service_account(email)
    except NoPermissionError:
        return Check(_ACCOUNT, True, f"{email}: these credentials may not look whether it is there")
    except JobError as error:
        return Check.of_error(_ACCOUNT, error)
    return Check(_ACCOUNT, True, f"{email} is there")


def _quota_everywhere(apis: GoogleApis, gpus: int) -> Check:
    """A project has a quota over all regions besides that of each: 0 in a new one."""
    name, metric = f"{_QUOTA}, everywhere", "GPUS_ALL_REGIONS"
    try:
        found = apis.ask(f"project {apis.project}", apis.projects.get, {"project": apis.project})
    except JobError as error:
        return Check.of_error(name, error)
    own = next((quota for quota in found.quotas if quota.metric == metric), None)
    if own is None:
        return Check(name, True, f"{metric}: not known before a job asks")
    free = own.limit - own.usage
    message = f"{metric}: {free:g} of {own.limit:g} free; a job takes {gpus}"
    return Check(name, free >= gpus, message, f"ask for more at {_where(apis)}", Exit.BAD_REQUEST)


def _quota(apis: GoogleApis, gpu_type: str, gpus: int, spot: bool, regions: Sequence[str]) -> Check:
    metric, said, fits = metric_of(gpu_type, spot), [], False
    for region in regions:
        request = {"project": apis.project, "region": region}
        try:
            found = apis.ask(f"region {region}", apis.regions.get, request)
        except JobError as error:
            return Check.of_error(_QUOTA, error)
        own = next((quota for quota in found.quotas if quota.metric == metric), None)
        if own is None:
            # Some GPUs have a quota that this API does not tell.
            return Check(_QUOTA, True, f"{metric} in {region}: not known before a job asks")
        free = own.limit - own.usage
        fits = fits or free >= gpus
        said.append(f"{region} {free:g} of {own.limit:g} free")
    message = f"{metric}: {', '.join(said)}; a job takes {gpus}"
    return Check(_QUOTA, fits, message, f"ask for more at {_where(apis)}", Exit.BAD_REQUEST)


def _where(apis: GoogleApis) -> str:
    return f"https://console.cloud.google.com/iam-admin/quotas?project={apis.project}"


def metric_of(gpu_type: str, spot: bool) -> str:
    """The name under which Compute Engine counts these GPUs: `PREEMPTIBLE_NVIDIA_L4_GPUS`."""
    match = _GPU.fullmatch(gpu_type)
    kind = (match[1] if match else gpu_type).upper().replace("-", "_")
    # The first H100s are counted without the size of their memory, and A100s of 40 GB as well.
    kind = {"H100_80GB": "H100"}.get(kind, kind)
    return f"{'PREEMPTIBLE_' if spot else ''}NVIDIA_{kind}_GPUS"
