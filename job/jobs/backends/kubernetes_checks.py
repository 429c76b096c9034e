"""What of a cluster a job needs, looked at before anything is sent: rights, JobSets, a queue, an account, quota."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from job.exits import Exit, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.kubernetes_api import JOB, JOB_SET, LOCAL_QUEUES, Api
from job.jobs.backends.kubernetes_rules import GPU, quantity
from job.jobs.checks import Check, unchecked_image
from job.jobs.targets import KubernetesTarget

JOB_SET_HINT = (
    "kubectl apply --server-side -f https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml"
)
QUEUE_HINT = (
    "kubectl apply --server-side -f https://github.com/kubernetes-sigs/kueue/releases/latest/download/manifests.yaml"
)
GOOGLE_ACCOUNT = "iam.gke.io/gcp-service-account"
_RIGHTS = (
    ("create", "batch", "jobs", ""),
    ("delete", "batch", "jobs", ""),
    ("list", "", "pods", ""),
    ("get", "", "pods", "log"),
)


def require_job_sets(api: Api, nodes: int) -> None:
    """Returns if the cluster has JobSets.

    Raises:
        MissingInputError: it has not; the message says what installs them.
    """
    if not api.knows(JOB_SET):
        raise MissingInputError(f"{api.host} knows no JobSets, which --nodes {nodes} needs: {JOB_SET_HINT}")


def require_queue(api: Api, target: KubernetesTarget) -> None:
    """Returns if the target's queue is there, or nobody may know: one that is not there would never let a job go.

    Raises:
        MissingInputError: it is not there.
    """
    if not target.queue:
        return
    try:
        known = [kind for kind in LOCAL_QUEUES if api.knows(kind)]
        if not known:
            raise MissingInputError(f"{api.host} knows no queues, and target {target.name!r} names one: {QUEUE_HINT}")
        if api.get(known[0], target.queue) is None:
            raise MissingInputError(
                f"there is no LocalQueue {target.queue!r} in namespace {target.namespace!r}: `kubectl -n "
                f"{target.namespace} get localqueues` shows those there are"
            )
    except NoPermissionError:
        # Who may submit jobs need not be allowed to see queues.
        return


def cluster_checks(api: Api, target: KubernetesTarget) -> Iterator[Check]:
    """The checks of `ddpm doctor`; the rest is left out where the cluster does not answer."""
    api.hurry()
    try:
        jobs = api.all_with(JOB, "app=ddpm")
    except JobError as error:
        yield Check.of_error("cluster", error)
        return
    count = f"{len(jobs)} job{'s' * (len(jobs) != 1)}"
    yield Check("cluster", True, f"{api.host}, namespace {target.namespace!r} with {count} of this program")
    for name, look in (
        ("job rights", _rights),
        ("service account", _account),
        ("JobSets", _job_sets),
        ("queue", _queue),
        ("GPU quota", _quota),
    ):
        yield _looked(name, look, api, target)
    yield unchecked_image(target.image)


def _looked(name: str, look: Callable[[Api, KubernetesTarget], str], api: Api, target: KubernetesTarget) -> Check:
    try:
        return Check(name, True, look(api, target))
    except JobError as error:
        return Check.of_error(name, error)


def _rights(api: Api, target: KubernetesTarget) -> str:
    for verb, group, resource, part in _RIGHTS:
        if not api.may(verb, group, resource, part):
            what = f"{resource}/{part}" if part else resource
            raise NoPermissionError(
                f"these credentials may not {verb} {what} in namespace {target.namespace!r}: ask for the role "
                "`edit` there"
            )
    return "may create, follow and delete jobs"


def _account(api: Api, target: KubernetesTarget) -> str:
    account = api.service_account(target.service_account)
    if account is None:
        raise MissingInputError(
            f"there is no service account {target.service_account!r} in namespace {target.namespace!r}, so that no "
            f"pod would start: `kubectl -n {target.namespace} create serviceaccount {target.service_account}`"
        )
    bound = (account["metadata"].get("annotations") or {}).get(GOOGLE_ACCOUNT)
    if bound:
        return f"{target.service_account} acts as {bound}"
    return f"{target.service_account} is there; the bucket must be granted to it itself, as it acts as no other account"


def _job_sets(api: Api, target: KubernetesTarget) -> str:
    if not api.knows(JOB_SET):
        return f"not installed; only --nodes needs them ({JOB_SET_HINT})"
    if not api.may("create", JOB_SET.group, JOB_SET.plural, ""):
        return "installed, but these credentials may not create them, which only --nodes needs"
    return "installed"


def _queue(api: Api, target: KubernetesTarget) -> str:
    require_queue(api, target)
    return f"{target.queue} is there" if target.queue else "none is set"


def _quota(api: Api, target: KubernetesTarget) -> str:
    for quota in api.quotas():
        status = quota.get("status", {})
        for name in (f"requests.{GPU}", f"limits.{GPU}"):
            hard, used = (quantity((status.get(field) or {}).get(name)) for field in ("hard", "used"))
            if hard is not None and hard - (used or 0) < target.gpus:
                raise JobError(
                    f"{used or 0} of the {hard} GPUs of namespace {target.namespace!r} are taken, and a job asks for "
                    f"{target.gpus} ({name} of quota {quota['metadata']['name']!r}): wait, or ask for more",
                    Exit.BAD_REQUEST,
                )
    return "no ResourceQuota of the namespace stands in the way"
