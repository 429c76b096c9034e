"""Each rule about manifests, one by one: what it is to notice, done to a manifest that is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import kubernetes_validate
import pytest

from job.jobs.backends.kubernetes_manifests import manifest
from job.jobs.backends.kubernetes_rules import RULES, problems, quantity
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET, sampling, spec

Job = dict[str, Any]


@pytest.fixture
def job() -> Job:
    return manifest(spec(), TARGET)


def pod(job: Job) -> Job:
    return job["spec"]["template"]["spec"]


def container(job: Job) -> Job:
    return pod(job)["containers"][0]


def rules(job: Job) -> list[Job]:
    return job["spec"]["podFailurePolicy"]["rules"]


def change(what: Callable[[Job], Job], **values: Any) -> Callable[[Job], None]:
    return lambda job: what(job).update(values)


def drop(what: Callable[[Job], Job], key: str) -> Callable[[Job], None]:
    return lambda job: what(job).pop(key)


def append(what: Callable[[Job], list[Any]], value: Any) -> Callable[[Job], None]:
    return lambda job: what(job).append(value)


def limits(job: Job) -> Job:
    return container(job)["resources"]["limits"]


def requests(job: Job) -> Job:
    return container(job)["resources"]["requests"]


def codes(job: Job) -> Job:
    return rules(job)[2]["onExitCodes"]


def job_spec(job: Job) -> Job:
    return job["spec"]


def labels(job: Job) -> Job:
    return job["metadata"]["labels"]


def toleration(job: Job) -> Job:
    return pod(job)["tolerations"][0]


def env(job: Job) -> list[Job]:
    return container(job)["env"]


MISTAKES: list[tuple[str, str, Callable[[Job], None]]] = [
    ("restart", "restartPolicy of a Job is 'Nevr'", change(pod, restartPolicy="Nevr")),
    ("restart", "restartPolicy of a Job is 'Always'", change(pod, restartPolicy="Always")),
    ("restart", "needs restartPolicy Never", change(pod, restartPolicy="OnFailure")),
    ("indexes", "completionMode is 'Idx'", change(job_spec, completionMode="Idx")),
    ("indexes", "needs completions", drop(job_spec, "completions")),
    ("indexes", "know which node or slice", change(job_spec, completionMode="NonIndexed")),
    ("indexes", "maxFailedIndexes needs", change(job_spec, maxFailedIndexes=1)),
    ("indexes", "without maxFailedIndexes", change(job_spec, backoffLimitPerIndex=1)),
    ("indexes", "is more than completions", change(job_spec, backoffLimitPerIndex=1, maxFailedIndexes=9)),
    ("indexes", "backoffLimit is negative", change(job_spec, backoffLimit=-1)),
    ("failure policy", "without a podFailurePolicy", drop(job_spec, "podFailurePolicy")),
    ("failure policy", "action is 'Nope'", lambda job: rules(job)[0].update(action="Nope")),
    ("failure policy", "FailIndex needs", lambda job: rules(job)[0].update(action="FailIndex")),
    ("failure policy", "either onExitCodes or", lambda job: rules(job)[0].pop("onPodConditions")),
    ("failure policy", "status of a condition", lambda job: rules(job)[0]["onPodConditions"][0].update(status="true")),
    ("failure policy", "has a type", lambda job: rules(job)[0]["onPodConditions"][0].update(type="")),
    ("failure policy", "podReplacementPolicy", change(job_spec, podReplacementPolicy="TerminatingOrFailed")),
    ("exit codes", "operator is 'Bad'", change(codes, operator="Bad")),
    ("exit codes", "0 is no failure", change(codes, values=[0, 2])),
    ("exit codes", "1 to 255 different", change(codes, values=[2, 2])),
    ("exit codes", "1 to 255 different", change(codes, values=[64, 2])),
    ("exit codes", "1 to 255 different", change(codes, values=[])),
    ("exit codes", "is no container", change(codes, containerName="trian")),
    ("exit codes", "without containerName", drop(codes, "containerName")),
    ("resources", "no quantity", change(limits, memory="16 GB")),
    ("resources", "no quantity", change(requests, cpu="four")),
    ("resources", "no limit or no request", drop(limits, "memory")),
    ("resources", "is requested than", change(requests, memory="17Gi")),
    ("resources", "differ", change(requests, **{"nvidia.com/gpu": "2"})),
    ("resources", "differ", lambda job: requests(job).update({"nvidia.com/gpu": limits(job).pop("nvidia.com/gpu")})),
    ("resources", "no whole number", change(limits, **{"nvidia.com/gpu": "0.5"})),
    ("resources", "no resource that", change(limits, **{"nvidia.com/gpus": "1"})),
    ("memory", "medium of an emptyDir", lambda job: pod(job)["volumes"][0]["emptyDir"].update(medium="memory")),
    ("memory", "no sizeLimit", lambda job: pod(job)["volumes"][1]["emptyDir"].pop("sizeLimit")),
    ("memory", "no emptyDir", lambda job: pod(job)["volumes"][1].pop("emptyDir")),
    ("memory", "against memory", lambda job: pod(job)["volumes"][0]["emptyDir"].update(sizeLimit="16Gi")),
    ("memory", "against ephemeral", lambda job: pod(job)["volumes"][1]["emptyDir"].update(sizeLimit="1Ti")),
    ("names", "no DNS label", lambda job: job["metadata"].update(name="Celeba")),
    ("names", "63 is the most", lambda job: job["metadata"].update(name="a" * 60)),
    ("names", "is no label", change(labels, team="a b")),
    ("names", "is no label", change(labels, **{"a b": "c"})),
    ("names", "is no label", lambda job: pod(job)["nodeSelector"].update(pool="x" * 64)),
    ("names", "cannot name", change(container, name="Train")),
    ("names", "without a namespace", lambda job: job["metadata"].pop("namespace")),
    ("labels", "is not on both", lambda job: job["spec"]["template"]["metadata"]["labels"].pop("ddpm-job")),
    ("labels", "is not on both", change(labels, app="ddpmm")),
    ("queue", "begins suspended", change(labels, **{"kueue.x-k8s.io/queue-name": "gpus"})),
    ("containers", "no container", lambda job: pod(job).update(containers=[])),
    ("containers", "one name", lambda job: pod(job)["containers"].append(copy.deepcopy(container(job)))),
    ("containers", "is no image", change(container, image="")),
    ("containers", "no words", change(container, args=[])),
    ("containers", "imagePullPolicy", change(container, imagePullPolicy="Allways")),
    ("containers", "terminationMessagePolicy", change(container, terminationMessagePolicy="Log")),
    ("volumes", "one name", lambda job: pod(job)["volumes"].append(copy.deepcopy(pod(job)["volumes"][0]))),
    ("volumes", "different absolute", lambda job: container(job)["volumeMounts"][0].update(mountPath="tmp")),
    ("volumes", "is no volume", lambda job: container(job)["volumeMounts"][0].update(name="shm")),
    ("volumes", "mounted nowhere", lambda job: container(job)["volumeMounts"].pop()),
    ("volumes", "nothing is mounted at /tmp", lambda job: container(job)["volumeMounts"][2].update(mountPath="/temp")),
    ("environment", "cannot be a variable", append(env, {"name": "A-B", "value": "c"})),
    ("environment", "is there twice", append(env, {"name": "HOME", "value": "/"})),
    ("environment", "either a value or", append(env, {"name": "A"})),
    ("environment", "no field of the pod", append(env, {"name": "A", "valueFrom": {}})),
    ("environment", "looks like a secret", append(env, {"name": "WANDB_API_KEY", "value": "x"})),
    ("environment", "names no variable", append(env, {"name": "A", "value": "$(LATER)"})),
    ("environment", "names no variable", lambda job: container(job)["args"].append("$(JOB_COMPLETION_INDEX)")),
    ("place", "operator of a toleration", change(toleration, operator="Equals")),
    ("place", "effect of a toleration", change(toleration, effect="NoShedule")),
    ("place", "has no value", change(toleration, operator="Exists")),
    ("place", "has a key", drop(toleration, "key")),
    ("rights", "may run as root", lambda job: pod(job)["securityContext"].update(runAsNonRoot=False)),
    ("rights", "may run as root", lambda job: pod(job)["securityContext"].update(runAsUser=0)),
    ("rights", "without fsGroup", lambda job: pod(job)["securityContext"].pop("fsGroup")),
    ("rights", "seccomp", lambda job: pod(job)["securityContext"].update(seccompProfile={"type": "Unconfined"})),
    ("rights", "default account", drop(pod, "serviceAccountName")),
    ("rights", "gets a token", drop(pod, "automountServiceAccountToken")),
    ("rights", "may gain rights", lambda job: container(job)["securityContext"].pop("allowPrivilegeEscalation")),
    ("rights", "write to its image", lambda job: container(job)["securityContext"].pop("readOnlyRootFilesystem")),
    ("rights", "keeps capabilities", lambda job: container(job)["securityContext"].update(capabilities={})),
    ("end", "money for ever", drop(job_spec, "activeDeadlineSeconds")),
    ("end", "how often a crash", drop(job_spec, "backoffLimit")),
    ("end", "stays for ever", drop(job_spec, "ttlSecondsAfterFinished")),
    ("end", "no time to save", drop(pod, "terminationGracePeriodSeconds")),
    ("end", "another DDPM_GRACE_SECONDS", change(pod, terminationGracePeriodSeconds=600)),
]


@pytest.mark.parametrize(("rule", "said", "mistake"), MISTAKES, ids=[f"{rule}: {said}" for rule, said, _ in MISTAKES])
def test_a_rule_notices(job, rule, said, mistake):
    assert problems(job) == []
    mistake(job)
    assert any(text.startswith(f"{rule}: ") and said in text for text in problems(job)), problems(job)


def test_every_rule_has_a_mistake_that_it_notices():
    assert {rule for rule, _, _ in MISTAKES} == {*RULES, "queue"}


def test_most_of_them_pass_by_the_schema():
    """That is why there are rules: these are the mistakes that Kubernetes' own schema lets through."""
    passed = 0
    for _, _, mistake in MISTAKES:
        wrong = manifest(spec(), TARGET)
        mistake(wrong)
        try:
            kubernetes_validate.validate(wrong, "1.34", strict=True)
            passed += 1
        except kubernetes_validate.ValidationError:
            continue
    assert passed > len(MISTAKES) * 0.8


def job_set() -> Job:
    return manifest(spec(nodes=2), TARGET)


def part(made: Job) -> Job:
    return made["spec"]["replicatedJobs"][0]


def policy(made: Job) -> Job:
    return made["spec"]["failurePolicy"]


def node_env(made: Job, name: str) -> Job:
    entries = part(made)["template"]["spec"]["template"]["spec"]["containers"][0]["env"]
    return next(entry for entry in entries if entry["name"] == name)


JOB_SET_MISTAKES: list[tuple[str, Callable[[Job], None]]] = [
    ("cannot name a JobSet", lambda made: made["metadata"].update(name="1-celeba")),
    ("there is at least one", lambda made: made["spec"].update(replicatedJobs=[])),
    ("one job has an index", lambda made: part(made).update(replicas=2)),
    ("would replace one pod", lambda made: part(made)["template"]["spec"].update(backoffLimit=3)),
    ("find each other by names", lambda made: made["spec"]["network"].update(enableDNSHostnames=False)),
    ("find each other by names", lambda made: made["spec"]["network"].update(publishNotReadyAddresses=False)),
    ("is no DNS label", lambda made: made["spec"]["network"].update(subdomain="a.b")),
    ("none of its jobs", lambda made: made["spec"]["coordinator"].update(replicatedJob="nodes")),
    ("rank 0 is where", lambda made: made["spec"]["coordinator"].update(podIndex=1)),
    ("there are 2 pods", lambda made: node_env(made, "NNODES").update(value="3")),
    ("is not the pod's index", lambda made: node_env(made, "PET_NODE_RANK").update(value="0")),
    ("is no port", lambda made: node_env(made, "MASTER_PORT").update(value="")),
    ("where the coordinator is", lambda made: node_env(made, "MASTER_ADDR").update(value="localhost")),
    ("how often a crash", lambda made: policy(made).pop("maxRestarts")),
    ("restartStrategy is 'Rekreate'", lambda made: policy(made).update(restartStrategy="Rekreate")),
    ("have different names", lambda made: policy(made)["rules"][1].update(name="stopped")),
    ("have different names", lambda made: policy(made)["rules"][1].update(name="a-b")),
    ("action is 'FailJob'", lambda made: policy(made)["rules"][1].update(action="FailJob")),
    ("no reason for which", lambda made: policy(made)["rules"][1].update(onJobFailureReasons=["Policy"])),
    ("no reason for which", lambda made: policy(made)["rules"][1].pop("onJobFailureReasons")),
    ("does not compile", lambda made: policy(made)["rules"][1].update(onJobFailureMessagePatterns=["("])),
    ("restart: ", lambda made: part(made)["template"]["spec"]["template"]["spec"].update(restartPolicy="Always")),
    ("63 is the most", lambda made: made["metadata"].update(name="a" * 50)),
]


@pytest.mark.parametrize(("said", "mistake"), JOB_SET_MISTAKES, ids=[said for said, _ in JOB_SET_MISTAKES])
def test_a_rule_about_jobsets_notices(said, mistake):
    made = job_set()
    assert problems(made) == []
    mistake(made)
    assert any(said in text for text in problems(made)), problems(made)


def test_right_manifests_pass():
    for made in (manifest(sampling(), TARGET), manifest(spec(nodes=9), QUEUED), manifest(spec(gpus=0), QUEUED)):
        assert problems(made) == []


@pytest.mark.parametrize("made", [{}, {"kind": "Pod", "apiVersion": "v1"}, {"kind": "Job", "apiVersion": "batch/v2"}])
def test_other_kinds_are_no_jobs(made):
    assert problems(made)[0].startswith("kind: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("500m", Decimal("0.5")), ("16Gi", 16 * 2**30), ("1.5G", 15 * 10**8), ("1Ti", 2**40), ("2k", 2000)],
)
def test_quantities(text, value):
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "16 Gi", "16GB", "-1", "1e3", "Gi", 5, None])
def test_what_is_no_quantity(text):
    assert quantity(text) is None
