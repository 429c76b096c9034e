"""What is sent to Kubernetes: kept in files, judged by Kubernetes' own schemas, and refused where it could not run.

`DDPM_REWRITE_GOLDEN=1 pytest tests/job/jobs/test_kubernetes_manifests.py` writes the files anew.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import yaml

from job.exits import BadRequestError, Exit
from job.jobs.backends.kubernetes_manifests import USER, manifest
from job.jobs.building import wait_seconds
from job.runs.lease import EXPIRE_SECONDS
from job.stop import GRACE_VARIABLE as GRACE
from tests.job.jobs.kubernetes_jobs import CASES, GOLDEN, QUEUED, TARGET, judged, sampling, spec

REWRITE = "DDPM_REWRITE_GOLDEN"


@pytest.mark.parametrize("case", CASES)
def test_a_manifest_is_what_is_kept(case):
    made = manifest(*CASES[case])
    path = GOLDEN / f"{case}.yaml"
    if os.environ.get(REWRITE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(made, sort_keys=False, width=120))
    assert yaml.safe_load(path.read_text()) == made, f"{REWRITE}=1 writes {path} anew, if that is meant"


def test_nothing_is_kept_that_is_not_made():
    assert sorted(path.stem for path in GOLDEN.glob("*")) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_schemas_and_rules_take_it(case):
    assert judged(yaml.safe_load((GOLDEN / f"{case}.yaml").read_text())) == []


@pytest.mark.parametrize("case", CASES)
def test_equal_jobs_give_equal_manifests_and_others_another_hash(case):
    job, target = CASES[case]
    made = manifest(job, target)
    assert made == manifest(replace(job), target.model_copy())
    other = manifest(replace(job, max_hours=1.5), target)
    assert other["metadata"]["annotations"]["ddpm-manifest"] != made["metadata"]["annotations"]["ddpm-manifest"]


def pod_of(made):
    job = made["spec"] if made["kind"] == "Job" else made["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]


def container_of(made):
    return pod_of(made)["containers"][0]


def variables_of(made):
    return {entry["name"]: entry.get("value") for entry in container_of(made)["env"]}


def test_a_container_may_write_where_it_needs_to_and_nowhere_else():
    made = manifest(spec(), TARGET)
    mounts = {mount["mountPath"] for mount in container_of(made)["volumeMounts"]}
    assert mounts == {"/dev/shm", "/scratch", "/tmp"}
    assert container_of(made)["securityContext"]["readOnlyRootFilesystem"] is True
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "DDPM_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert variables_of(made)[name].startswith(("/tmp", "/scratch")), name
    assert pod_of(made)["securityContext"]["runAsUser"] == pod_of(made)["securityContext"]["fsGroup"] == USER


def test_the_program_is_told_the_grace_that_the_pod_has():
    made = manifest(spec(), QUEUED)
    assert pod_of(made)["terminationGracePeriodSeconds"] == 105
    assert variables_of(made)[GRACE] == "105"
    # Also where somebody sets it otherwise.
    assert variables_of(manifest(spec(env={GRACE: "600"}), QUEUED))[GRACE] == "105"


def test_training_waits_longer_than_a_dead_predecessor_holds_the_lease():
    made = manifest(spec(argv=("train", "--dataset", "celeba")), QUEUED)
    words = container_of(made)["args"]
    assert float(words[words.index("--wait") + 1]) == wait_seconds(QUEUED) > EXPIRE_SECONDS + QUEUED.grace_seconds
    for said in (["--wait", "700"], ["--wait=700"]):
        assert container_of(manifest(spec(argv=("train", *said)), QUEUED))["args"] == ["train", *said]
    for verb, argv in (("sample", ("sample", "--run", "a")), ("pack", ("data", "pack", "gs://a", "b"))):
        assert "--wait" not in container_of(manifest(spec(verb=verb, argv=argv), TARGET))["args"]


@pytest.mark.parametrize("word", ["$(HOME)", "$$(HOME)", "$HOME", "a$$b$", "`x`", "a b;c"])
def test_words_and_values_stay_what_they_are(word):
    made = manifest(spec(argv=("train", "--set", word), env={"A": word}), TARGET)
    assert expanded(container_of(made)["args"][2]) == word
    assert expanded(variables_of(made)["A"]) == word
    assert "command" not in container_of(made), "the entry point of the image is the program, and no shell"


def expanded(text: str) -> str:
    """What the kubelet makes of a word (kubernetes.io/docs/reference/kubernetes-api, `args`), without variables."""
    return re.sub(r"\$(\$|\([A-Za-z0-9_]+\))?", lambda m: "$" if m[0] == "$$" else "?" if m[1] else "$", text)


def test_gke_selects_and_tolerates_as_it_labels_and_taints():
    pod = pod_of(manifest(spec(), TARGET))
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-l4",
        "cloud.google.com/gke-spot": "true",
    }
    assert {toleration["key"] for toleration in pod["tolerations"]} == {"cloud.google.com/gke-spot", "nvidia.com/gpu"}
    on_demand = pod_of(manifest(spec(spot=False), TARGET))
    assert "cloud.google.com/gke-spot" not in str(on_demand["nodeSelector"]) + str(on_demand["tolerations"])
    (term,) = on_demand["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term["matchExpressions"] == [{"key": "cloud.google.com/gke-spot", "operator": "NotIn", "values": ["true"]}]
    assert "affinity" not in pod
    other = pod_of(manifest(spec(gpu_type="nvidia-tesla-t4"), TARGET))
    assert other["nodeSelector"]["cloud.google.com/gke-accelerator"] == "nvidia-tesla-t4"
    without = pod_of(manifest(spec(gpus=0, spot=False), TARGET))
    # Of infra/terraform's own nodes without GPUs, which pods of the system are kept away from.
    taint = {"key": "ddpm-capacity", "operator": "Equal", "value": "on-demand", "effect": "NoSchedule"}
    assert "nodeSelector" not in without and without["tolerations"] == [taint]
    assert "nvidia.com/gpu" not in container_of(manifest(spec(gpus=0), TARGET))["resources"]["limits"]


def test_a_gpu_that_gke_does_not_have_is_refused_and_not_waited_for():
    for gpu_type, hint in (("nvidia-l40000", "did you mean nvidia-l4?"), ("h100", "nvidia-h100-80gb")):
        with pytest.raises(BadRequestError, match=re.escape(hint)) as caught:
            manifest(spec(gpu_type=gpu_type), TARGET)
        assert caught.value.exit_code == Exit.BAD_REQUEST
        manifest(spec(gpu_type=gpu_type), TARGET.model_copy(update={"cluster": "plain"}))
        own = TARGET.model_copy(update={"node_selector": {"cloud.google.com/gke-accelerator": gpu_type}})
        assert pod_of(manifest(spec(gpu_type=gpu_type), own))["nodeSelector"] == own.node_selector
    with pytest.raises(BadRequestError, match="nvidia-l5"):
        manifest(spec(), TARGET.model_copy(update={"gpu_type": "nvidia-l5"}))


def test_a_plain_cluster_and_the_targets_own_selectors_replace_them():
    plain = TARGET.model_copy(update={"cluster": "plain"})
    assert "google" not in str(pod_of(manifest(spec(), plain)))
    own = TARGET.model_copy(update={"node_selector": {"pool": "gpu"}, "tolerations": [{"operator": "Exists"}]})
    pod = pod_of(manifest(spec(), own))
    assert pod["nodeSelector"] == {"pool": "gpu"} and pod["tolerations"] == [{"operator": "Exists"}]


def test_a_queue_gets_a_job_that_waits_for_it():
    for job in (spec(), spec(nodes=2)):
        made = manifest(job, QUEUED)
        assert made["spec"]["suspend"] is True
        assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
        assert made["metadata"]["labels"]["kueue.x-k8s.io/max-exec-time-seconds"] == str(24 * 3600)
        assert "suspend" not in manifest(job, TARGET)["spec"]


def test_an_image_that_may_change_is_asked_for_each_time():
    for image, policy in (("r/ddpm:latest", "Always"), (TARGET.image, "IfNotPresent"), ("localhost/d", "IfNotPresent")):
        assert container_of(manifest(spec(image=image), TARGET))["imagePullPolicy"] == policy


def asked_of(made):
    (shared,) = [volume["emptyDir"] for volume in pod_of(made)["volumes"] if volume["name"] == "dshm"]
    requests = container_of(made)["resources"]["requests"]
    return requests["cpu"], requests["memory"], shared["sizeLimit"]


@pytest.mark.parametrize(
    ("target", "job", "asked"),
    [
        ({}, {}, ("4", "16Gi", "2Gi")),
        ({}, {"gpus": 8}, ("32", "128Gi", "16Gi")),
        ({}, {"gpus": 0}, ("4", "16Gi", "2Gi")),
        ({"machine_type": "g2-standard-4"}, {}, ("3", "10Gi", "2Gi")),
        ({"machine_type": "g2-standard-8"}, {"gpus": 0}, ("4", "16Gi", "2Gi")),
        ({"machine_type": "g2-standard-96"}, {"gpus": 8}, ("93", "244Gi", "16Gi")),
        ({"machine_type": "g2-standard-96"}, {"gpus": 1}, ("11625m", "30Gi", "2Gi")),
        ({"machine_type": "n1-standard-4", "gpu_type": "nvidia-tesla-t4"}, {}, ("3", "9Gi", "2Gi")),
        ({"machine_type": "n1-standard-4", "gpu_type": "nvidia-tesla-t4", "gpus": 2}, {}, ("1500m", "4Gi", "2Gi")),
        ({"machine_type": "g2-standard-8"}, {"gpu_type": "nvidia-h100-80gb", "gpus": 8}, ("32", "128Gi", "16Gi")),
        ({"machine_type": "g2-standard-96", "cpus": "7", "memory": "9Gi"}, {"gpus": 8}, ("7", "9Gi", "1Gi")),
        ({"machine_type": "custom-x", "cpus": "7", "memory": "9Gi"}, {}, ("7", "9Gi", "1Gi")),
        ({"machine_type": "g2-standard-4", "cpus": "1"}, {}, ("1", "10Gi", "2Gi")),
    ],
)
def test_a_job_asks_for_its_share_of_a_node(target, job, asked):
    if asked[-1] == "1Gi":
        target = {**target, "shared_memory": "1Gi"}
    assert asked_of(manifest(spec(**job), TARGET.model_copy(update=target))) == asked


@pytest.mark.parametrize(
    ("machine_type", "gpus", "said"),
    [
        ("g2-standard-8", 8, "--gpus 8: nodes of target 'gke' are g2-standard-8, with 1: ask for at most so many"),
        ("n1-custom-8-16384", 1, "nodes of target 'gke' are n1-custom-8-16384, whose room for jobs is not known here"),
        ("n1-standard-1", 1, "set cpus and memory"),
    ],
)
def test_what_no_node_of_the_target_has_room_for_is_refused(machine_type, gpus, said):
    with pytest.raises(BadRequestError, match=re.escape(said)):
        manifest(spec(gpus=gpus), TARGET.model_copy(update={"machine_type": machine_type}))


def test_slices_are_indexes_that_fail_on_their_own():
    made = manifest(sampling(slices=5), TARGET)
    assert made["spec"]["completions"] == made["spec"]["parallelism"] == 5
    assert (made["spec"]["backoffLimitPerIndex"], made["spec"]["maxFailedIndexes"]) == (4, 2)
    assert container_of(made)["args"][-2:] == ["--slice", "$(JOB_COMPLETION_INDEX)/5"]
    names = [entry["name"] for entry in container_of(made)["env"]]
    assert "JOB_COMPLETION_INDEX" in names


def test_nodes_meet_at_the_first_one():
    made = manifest(spec(nodes=3), TARGET)
    variables = variables_of(made)
    assert variables["NNODES"] == variables["PET_NNODES"] == "3"
    assert variables["MASTER_ADDR"] == "train-celeba-node-0-0.train-celeba"
    names = [entry["name"] for entry in container_of(made)["env"]]
    assert names.index("JOB_COMPLETION_INDEX") < names.index("NODE_RANK"), "Kubernetes looks only at what stands before"


def test_our_launcher_understands_what_the_nodes_are_told():
    from job.processes.group import Group

    variables = variables_of(manifest(spec(nodes=2, gpus=8), TARGET))
    seen = {name: value.replace("$(JOB_COMPLETION_INDEX)", "1") for name, value in variables.items() if value}
    assert Group.of(8, seen) == Group(8, 2, 1, "train-celeba-node-0-0.train-celeba", 29500)


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (spec(image=""), "has no image"),
        (spec(image="a b"), "no image"),
        (spec(name="t" * 52, nodes=2), "63 is the most"),
        (sampling(name="s" * 52, slices=100_000), "63 is the most"),
        (sampling(argv=("sample", "--run", "celeba")), "--count"),
        (sampling(argv=("sample", "--run", "celeba", "--count=9", "--slice=0/4")), "leave --slice out"),
        (spec(labels={"team": "a b"}), "no label"),
        (spec(env={"HF_TOKEN": "hf_x"}), "looks like a secret"),
    ],
)
def test_what_could_not_run_is_refused(job, said):
    with pytest.raises(BadRequestError, match=said) as caught:
        manifest(job, TARGET)
    assert caught.value.exit_code == Exit.BAD_REQUEST


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scratch": "fifty"}, "scratch"),
        ({"memory": "16 GB"}, "no quantity"),
        ({"cpus": "-1"}, "no quantity"),
        ({"memory": "2Gi"}, "count against memory"),
        ({"tolerations": [{"operator": "Exist"}]}, "operator of a toleration"),
        ({"tolerations": [{"key": "a", "value": 1}]}, "value of a toleration is 1, which is no text"),
        ({"tolerations": [{"key": "a", "tolerationSeconds": 60}]}, "goes with effect NoExecute"),
        ({"tolerations": [{"key": "a", "effect": "NoExecute", "tolerationSeconds": "60"}]}, "is a whole number"),
        ({"tolerations": [{"keys": "a", "operator": "Exists"}]}, "'keys' is no field of a toleration"),
        ({"node_selector": {"a b": "c"}}, "no label"),
    ],
)
def test_what_a_target_says_wrongly_is_refused(change, said):
    with pytest.raises(BadRequestError, match=said):
        manifest(spec(), TARGET.model_copy(update=change))


def test_jobs_that_fit_are_not_refused():
    manifest(spec(name="t" * 48, nodes=10), TARGET)
    manifest(sampling(name="s" * 52, slices=9999), TARGET)
    manifest(spec(env={"GOOGLE_APPLICATION_CREDENTIALS": "/x"}), TARGET)
