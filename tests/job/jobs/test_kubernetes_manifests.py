"""What is sent to Kubernetes: kept in files, judged by Kubernetes' own schemas, and retried as the table says.

`DDPM_TEST_REWRITE_GOLDEN=1 pytest tests/job/jobs/test_kubernetes_manifests.py` writes the files anew.
"""

from __future__ import annotations

import re
from itertools import product

import pytest

from job.exits import BadRequestError, Restart, restart_after
from job.jobs.backends.kubernetes_objects import manifest
from job.jobs.spec import NAME_CHARACTERS, job_name
from job.processes.group import Group
from job.stop import GRACE_VARIABLE as GRACE
from tests.job.jobs import admission
from tests.job.jobs.kubernetes_jobs import QUEUED, TARGET, sampling, schema_problems, spec
from tests.job.jobs.submitting import assert_kept

VERSIONS = ("1.31", "1.34", "1.37")
"""Of Kubernetes: the first where all fields are stable, one in the middle, and the newest that the schemas know."""
CASES = {
    "one-gpu-spot": (spec(), TARGET),
    "eight-gpus": (
        spec(gpus=8, gpu_type="nvidia-h100-80gb", spot=False, max_hours=72.0),
        QUEUED.model_copy(update={"cpus": "96", "memory": "800Gi", "scratch": "1Ti", "shared_memory": "64Gi"}),
    ),
    "two-nodes": (spec(nodes=2, gpus=8), TARGET),
    "sampling-slices": (sampling(), TARGET),
}
"""What is kept: the case's name is its file's."""


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_kept_and_valid(case):
    job, target = CASES[case]
    made = manifest(job, target)
    assert_kept("kubernetes", case, [made], CASES)
    assert [schema_problems(made, version) for version in VERSIONS] == [[]] * len(VERSIONS)


def test_control_planes_take_all_manifests():
    longest, sliced = (job_name(verb, "r" * 63, words) for verb, words in (("train", ()), ("sample", ("words",))))
    assert len(longest) == len(sliced) == NAME_CHARACTERS
    places = (
        TARGET,
        QUEUED,
        QUEUED.model_copy(update={"queue": "team-a.gpus"}),
        TARGET.model_copy(update={"cluster": "plain"}),
        TARGET.model_copy(update={"node_selector": {"gpu": "l4"}, "tolerations": []}),
    )
    machines = ({"gpus": 0, "spot": False}, {"gpus": 8}, {"spot": False, "max_hours": 720.0}, {"max_hours": 0.017})
    for place, changes, retries in product(places, machines, (0, 4)):
        changes = changes | {"retries": retries}
        made = [spec(longest, nodes=nodes, **changes) for nodes in (2, 10, 11, 1000)]
        made += [spec("train-a-b", nodes=2, **changes), spec(longest, run="r" * 63, **changes)]
        made += [sampling(sliced, slices, **changes) for slices in (1, 2, 1000)]
        for job in made:
            assert admission.refusals(manifest(job, place)) == [], job
    assert [admission.refusals(manifest(*case)) for case in CASES.values()] == [[]] * len(CASES)


def job_of(made):
    return made["spec"] if made["kind"] == "Job" else made["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(made):
    return job_of(made)["template"]["spec"]


def container_of(made):
    return pod_of(made)["containers"][0]


def variables_of(made):
    return {entry["name"]: entry.get("value") for entry in container_of(made)["env"]}


def ended_by(policy, code, disrupted=False):
    """The action of the first rule that matches, and the Job's message about it (kubernetes.io, pod failure policy)."""
    for rule in policy["rules"]:
        codes = rule.get("onExitCodes")
        if codes and (code in codes["values"]) is (codes["operator"] == "In"):
            return rule["action"], f"Container ddpm for pod a/b failed with exit code {code} matching FailJob rule at 1"
        conditions = [(condition["type"], condition["status"]) for condition in rule.get("onPodConditions", ())]
        if disrupted and ("DisruptionTarget", "True") in conditions:
            return rule["action"], "Pod a/b has condition DisruptionTarget matching FailJob rule at index 0"
    return "Count", ""


@pytest.mark.parametrize("case", CASES)
def test_exit_codes_are_retried_by_table(case):
    job = job_of(manifest(*CASES[case]))
    for code in range(1, 256):
        rule = restart_after(code)
        action, message = ended_by(job["podFailurePolicy"], code)
        if case != "two-nodes":
            # What is wrong with a slice may be wrong with its machine alone.
            never = "FailIndex" if case == "sampling-slices" else "FailJob"
            assert action == {Restart.NEVER: never, Restart.BOUNDED: "Count", Restart.ALWAYS: "Ignore"}[rule], code
            assert ended_by(job["podFailurePolicy"], code, disrupted=True)[0] == "Ignore"
            continue
        # There a failure of a pod is one of the Job, and the JobSet looks at the Job's message.
        if rule is Restart.ALWAYS:
            # A JobSet restarts at once. The Job pauses, and counts, also those that stop because another is taken away.
            assert (action, "backoffLimit" in job) == ("Count", False)
        else:
            assert (
                set_action(action, message) == {Restart.NEVER: "FailJobSet", Restart.BOUNDED: "RestartJobSet"}[rule]
            ), code
        taken_away = ended_by(job["podFailurePolicy"], code, disrupted=True)
        assert set_action(*taken_away) == "RestartJobSetAndIgnoreMaxRestarts"


def set_action(action, message, reason="PodFailurePolicy"):
    """What a JobSet does about its failed Job: by the first rule that matches (jobset.sigs.k8s.io, failure policy)."""
    policy = manifest(*CASES["two-nodes"])["spec"]["failurePolicy"]
    assert action == "FailJob"
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_job_sets_fail_for_other_reasons():
    assert set_action("FailJob", "Job was active longer than specified deadline", "DeadlineExceeded") == "FailJobSet"
    # One pod has stopped by itself too often: the others can only wait for it.
    assert job_of(manifest(*CASES["two-nodes"]))["maxFailedIndexes"] == 0
    assert set_action("FailJob", "Job has exceeded", "MaxFailedIndexesExceeded") == "RestartJobSet"
    # Should a later Kubernetes word its message otherwise, no job is lost, and none goes on for ever.
    assert set_action("FailJob", "in other words") == "RestartJobSet"


def test_program_knows_the_pod_s_grace():
    for job in (spec(), spec(env={GRACE: "600"})):
        made = manifest(job, QUEUED)
        assert (pod_of(made)["terminationGracePeriodSeconds"], variables_of(made)[GRACE]) == (105, "105")


def test_words_and_values_are_literal():
    for word in ("$(HOME)", "$$(HOME)", "$HOME", "a$$b$", "`x`", "a b;c"):
        made = manifest(spec(argv=("train", "--set", word), env={"A": word}), TARGET)
        # As the kubelet has it (kubernetes.io/docs/reference/kubernetes-api, `args`).
        for text in (container_of(made)["args"][2], variables_of(made)["A"]):
            expanded = re.sub(r"\$(\$|\(\w+\))?", lambda m: "$" if m[0] in ("$$", "$") else "?", text)
            assert expanded == word


SPOT, GPU_TYPE = "cloud.google.com/gke-spot", "cloud.google.com/gke-accelerator"


def test_where_a_job_runs():
    other = pod_of(manifest(spec(gpu_type="nvidia-tesla-t4"), TARGET))
    assert other["nodeSelector"] == {GPU_TYPE: "nvidia-tesla-t4", SPOT: "true"}
    # Of infra/terraform's own nodes without GPUs, which pods of the system are kept away from.
    without = pod_of(manifest(spec(gpus=0, spot=False), TARGET))
    taint = {"key": "ddpm-capacity", "operator": "Equal", "value": "on-demand", "effect": "NoSchedule"}
    assert "nodeSelector" not in without and without["tolerations"] == [taint]
    assert "google" not in str(pod_of(manifest(spec(), TARGET.model_copy(update={"cluster": "plain"}))))
    own = [{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}]
    assert pod_of(manifest(spec(), TARGET.model_copy(update={"tolerations": own})))["tolerations"] == own


def test_unknown_gpus_are_refused():
    for gpu_type, hint in (("nvidia-l40000", "there are nvidia-a100-80gb, "), ("h100", "nvidia-h100-80gb")):
        with pytest.raises(BadRequestError, match=re.escape(hint)):
            manifest(spec(gpu_type=gpu_type), TARGET)
        manifest(spec(gpu_type=gpu_type), TARGET.model_copy(update={"cluster": "plain"}))
        own = TARGET.model_copy(update={"node_selector": {GPU_TYPE: gpu_type}})
        assert pod_of(manifest(spec(gpu_type=gpu_type), own))["nodeSelector"] == own.node_selector


def test_changing_images_are_always_pulled():
    for image, policy in (("r/ddpm:latest", "Always"), (TARGET.image, "IfNotPresent"), ("localhost/d", "IfNotPresent")):
        assert container_of(manifest(spec(image=image), TARGET))["imagePullPolicy"] == policy


def test_jobs_request_their_share():
    own = {"machine_type": "custom-x", "cpus": "7", "memory": "9Gi", "shared_memory": "1Gi"}
    for target, job, asked in (
        ({}, {"gpus": 0}, ("4", "16Gi", "2Gi")),
        ({"machine_type": "g2-standard-4"}, {}, ("3000m", "10Gi", "2Gi")),
        ({"machine_type": "g2-standard-8"}, {"gpus": 0}, ("4", "16Gi", "2Gi")),
        ({"machine_type": "g2-standard-96"}, {"gpus": 8}, ("93000m", "244Gi", "16Gi")),
        ({"machine_type": "g2-standard-96"}, {"gpus": 1}, ("11625m", "30Gi", "2Gi")),
        ({"machine_type": "n1-standard-4", "gpu_type": "nvidia-tesla-t4", "gpus": 2}, {}, ("1500m", "4Gi", "2Gi")),
        ({"machine_type": "g2-standard-8"}, {"gpu_type": "nvidia-h100-80gb", "gpus": 8}, ("32", "128Gi", "16Gi")),
        (own, {}, ("7", "9Gi", "1Gi")),
        ({"machine_type": "g2-standard-4", "cpus": "1"}, {}, ("1", "10Gi", "2Gi")),
    ):
        made = manifest(spec(**job), TARGET.model_copy(update=target))
        requests = container_of(made)["resources"]["requests"]
        shared = pod_of(made)["volumes"][0]["emptyDir"]["sizeLimit"]
        assert (requests["cpu"], requests["memory"], shared) == asked, (target, job)


def test_what_could_not_run_is_refused():
    small, unknown = "g2-standard-8", "n1-custom-8-16384"
    for job, target, said in [
        (spec(gpus=8), {"machine_type": small}, "--gpus 8: nodes of target 'gke' are g2-standard-8, with 1: use fewer"),
        (spec(), {"machine_type": unknown}, "are n1-custom-8-16384, whose room for jobs is not known here"),
        (spec(), {"machine_type": "n1-standard-1"}, "set cpus and memory"),
    ]:
        with pytest.raises(BadRequestError, match=re.escape(said)):
            manifest(job, TARGET.model_copy(update=target))
    with pytest.raises(BadRequestError, match="use a letter and up to 45 lower-case letters"):
        spec("t" * 47)


def test_slices_and_nodes_know_their_number():
    assert container_of(manifest(sampling(), TARGET))["args"][-2:] == ["--slice", "$(JOB_COMPLETION_INDEX)/4"]
    variables = variables_of(manifest(spec(nodes=2, gpus=8), TARGET))
    seen: dict[str, str] = {}
    for name, value in variables.items():
        # Kubernetes fills in only what stands before; the index comes from the pod itself.
        seen[name] = re.sub(r"\$\((\w+)\)", lambda match: seen[match[1]], value) if value else "1"
    assert Group.of(8, seen) == Group(8, 2, 1, "train-celeba-node-0-0.train-celeba", 29500)
