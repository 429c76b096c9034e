"""What is sent to the engines: kept in files, judged by schemas that are not ours, and retried as the table says.

`DDPM_TEST_REWRITE_GOLDEN=1 pytest tests/job/jobs/test_manifests.py` writes the files anew.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from itertools import product

import pytest

from job.exits import Restart, restart_after
from job.jobs.spec import NAME_CHARACTERS, job_name
from job.jobs.submit import formatted
from job.processes.group import Group
from tests.job.jobs import admission
from tests.job.jobs.google_server import parsed
from tests.job.jobs.submitting import GOLDEN, assert_kept, assert_rows, sampling, spec, target

VERSIONS = ("1.31", "1.34", "1.37")
"""Of Kubernetes: the first where all fields are stable, one in the middle, and the newest that the schemas know."""
T4 = {"machine_type": "n1-standard-8", "gpu_type": "nvidia-tesla-t4", "service_account": ""}
EIGHT = {"machine_type": "g2-standard-96", "network": "ddpm", "subnetwork": "ddpm-us-central1"}
LARGE = {"cpus": "96", "memory": "800Gi", "scratch": "1Ti", "shared_memory": "64Gi"}
GOOGLES = {
    "one-gpu-spot": (spec(env={"NCCL_DEBUG": "INFO"}), {}),
    "eight-gpus": (spec(gpus=8, spot=False, max_hours=72.0), EIGHT),
    "slices-on-n1": (sampling(slices=2, gpus=2), T4),
}
ON_SLURM = {"bucket": "s3://b", "spot": False, "argv": ("train", "--dataset", "celeba", "--bucket", "s3://b")}
SAMPLING = {"verb": "sample", "argv": ("sample", "--run", "celeba", "--count", "50000", "--bucket", "s3://b")}
NODES = {"gpus": 4, "gpu_type": "a100", "nodes": 2, "reads": ("/data/a b",)}
VENV = {"backend": "slurm", "folder": "/shared/jobs", "venv": "/shared/.venv"}
SIF = {"backend": "slurm", "folder": "/shared/jobs", "image": "/shared/ddpm.sif", "scratch": "/lscratch/$SLURM_JOB_ID"}
FULL = {"partition": "gpu", "account": "lab", "qos": "long", "constraint": "a100|h100", "gres": "lscratch:200"}
CASES = {
    "kubernetes/one-gpu-spot": (target(), spec(env={"DDPM_GRACE_SECONDS": "1", "PRICE": "$(A) $5"})),
    "kubernetes/eight-gpus": (
        target("queued", **LARGE),
        spec(gpus=8, gpu_type="nvidia-h100-80gb", spot=False, max_hours=72.0),
    ),
    "kubernetes/two-nodes": (target(), spec(nodes=2, gpus=8)),
    "kubernetes/sampling-slices": (target(), sampling(slices=4)),
    **{f"vm/{case}": (target("vm", **keys), job) for case, (job, keys) in GOOGLES.items()},
    **{f"batch/{case}": (target("batch", **keys), job) for case, (job, keys) in GOOGLES.items()},
    "slurm/venv": (target(VENV), spec(**ON_SLURM, gpus=0)),
    "slurm/slices": (target(VENV, memory="64G"), spec(**ON_SLURM | SAMPLING, slices=4, max_hours=0.5)),
    "slurm/apptainer-nodes": (target(SIF, cpus=32, **FULL), spec(**ON_SLURM | NODES)),
    "slurm/pyxis": (target(SIF, image="registry#ddpm:1", container="pyxis"), spec(**ON_SLURM, env={"DDPM_GPUS": "1"})),
}
"""A case's name is its file's: the target and the job."""
CLUSTERS = [case for case in CASES if case.startswith("kubernetes")]


@pytest.mark.parametrize("case", CASES)
def test_requests_are_kept_and_valid(case):
    there, job = CASES[case]
    made, engine = there.render(job), case.partition("/")[0]
    for one in made:
        if engine == "kubernetes":
            assert [admission.schema_problems(one, version) for version in VERSIONS] == [[]] * len(VERSIONS)
        elif engine != "slurm":
            parsed(one, "compute_v1.Instance" if engine == "vm" else "batch_v1.Job")
        for item in one.get("metadata", {}).get("items", ()):
            if item["key"] == "startup-script" and case != "vm/one-gpu-spot":
                item["value"] = "as in one-gpu-spot.yaml"
    text = formatted(made)
    if engine == "slurm" and case != "slurm/venv":
        text = text.partition("\n# Runs a job's program")[0] + "\n# as in venv.yaml\n"
    assert_kept(f"{case}.yaml", text)


def test_kept_files_are_those_of_cases():
    engines = {case.partition("/")[0] for case in CASES}
    assert {f"{path.parent.name}/{path.stem}" for each in engines for path in (GOLDEN / each).iterdir()} == {*CASES}


def test_control_planes_take_all_manifests():
    longest, sliced = (job_name(verb, "r" * 63, words) for verb, words in (("train", ()), ("sample", ("words",))))
    assert len(longest) == len(sliced) == NAME_CHARACTERS
    places = [target(), target("queued"), target("queued", queue="team-a.gpus"), target(cluster="plain")]
    places.append(target(node_selector={"gpu": "l4"}, tolerations=[]))
    machines = ({"gpus": 0, "spot": False}, {"gpus": 8}, {"spot": False, "max_hours": 720.0}, {"max_hours": 0.017})
    for place, changes, retries in product(places, machines, (0, 4)):
        changes = changes | {"retries": retries}
        jobs = [spec(longest, nodes=nodes, **changes) for nodes in (2, 10, 11, 1000)]
        jobs += [spec("train-a-b", nodes=2, **changes), spec(longest, **changes | {"run": "r" * 63})]
        jobs += [sampling(sliced, slices, **changes) for slices in (1, 2, 1000)]
        for place, job in [*((place, job) for job in jobs), *(CASES[case] for case in CLUSTERS)]:
            assert admission.refusals(*place.render(job)) == [], job


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


def set_action(policy, action, message):
    """What a JobSet does about its failed Job: by the first rule that matches (jobset.sigs.k8s.io, failure policy)."""
    assert action == "FailJob"
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if "PodFailurePolicy" in rule["onJobFailureReasons"] and any(re.search(each, message) for each in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("case", CLUSTERS)
def test_exit_codes_are_retried_by_table(case):
    there, job = CASES[case]
    made = there.render(job)[0]["spec"]
    is_group = job.nodes > 1
    pods = made["replicatedJobs"][0]["template"]["spec"] if is_group else made
    for code in range(1, 256):
        rule = restart_after(code)
        action, message = ended_by(pods["podFailurePolicy"], code)
        taken = ended_by(pods["podFailurePolicy"], code, disrupted=True)
        if not is_group:
            # What is wrong with a slice may be wrong with its machine alone.
            never = "FailIndex" if job.slices else "FailJob"
            assert action == {Restart.NEVER: never, Restart.BOUNDED: "Count", Restart.ALWAYS: "Ignore"}[rule], code
            assert taken[0] == "Ignore"
            continue
        # There a failure of a pod is one of the Job, and the JobSet looks at the Job's message.
        if rule is Restart.ALWAYS:
            # A JobSet restarts at once. The Job pauses, and counts, also those that stop because another is taken away.
            assert (action, "backoffLimit" in pods) == ("Count", False)
        else:
            wanted = {Restart.NEVER: "FailJobSet", Restart.BOUNDED: "RestartJobSet"}[rule]
            assert set_action(made["failurePolicy"], action, message) == wanted, code
        assert set_action(made["failurePolicy"], *taken) == "RestartJobSetAndIgnoreMaxRestarts"


def test_other_jobs_differ_in_this():
    def told(case):
        on, keys = next(iter(case.items()))
        usual = formatted(target(on).render(spec())).splitlines()
        other = formatted(target(on, **keys).render(spec(**case.get("job", {})))).splitlines()
        lines = [*difflib.unified_diff(usual, other, n=0, lineterm="")][2:]
        return [f"{line[0]} {line[1:].strip()}" for line in lines if not line.startswith("@@")]

    assert_rows("requests.yaml", told)


def test_slices_and_nodes_know_their_number():
    (made,) = target().render(spec(nodes=2, gpus=8))
    pods = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    seen: dict[str, str] = {}
    for entry in pods["containers"][0]["env"]:
        # Kubernetes fills in only what stands before; the index comes from the pod itself.
        value = re.sub(r"\$\((\w+)\)", lambda match: seen[match[1]], entry.get("value", "1"))
        seen[entry["name"]] = value
    assert Group.of(8, seen) == Group(8, 2, 1, "train-celeba-node-0-0.train-celeba", 29500)


def known_of(job):
    """What a VM knows of its job, by key."""
    return {item["key"]: item["value"] for item in target("vm").render(job)[0]["metadata"]["items"]}


def test_user_values_are_literal(tmp_path):
    words = ("train", "--set", "a=$(touch x); `y` \"z\" 'w' # %n", "--dataset", " a  b ", "")
    job = spec(argv=words, env={"A": "$(x) 'y'", "TMPDIR": "/elsewhere"})
    known = known_of(job)
    assert tuple(known["ddpm-words"].split("\n")[-1 - len(words) : -1]) == words
    assert {"A=$(x) 'y'", "TMPDIR=/elsewhere"} <= {*known["ddpm-environment"].splitlines()}
    # They are part of no script.
    assert known["startup-script"] == known_of(spec())["startup-script"]

    def runnable(job):
        return target("batch").render(job)[0]["taskGroups"][0]["taskSpec"]["runnables"][0]

    assert tuple(runnable(job)["container"]["commands"]) == words
    assert runnable(job)["environment"]["variables"].items() >= job.env.items()
    # A shell fills in the number of a slice, and reads nothing else.
    (tmp_path / "ddpm").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (tmp_path / "ddpm").chmod(0o755)
    container = runnable(sampling(slices=2, argv=(*words, "--", "$BATCH_TASK_INDEX/2")))["container"]
    command = [container["entrypoint"], *container["commands"]]
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BATCH_TASK_INDEX": "1"}
    ran = subprocess.run(command, env=variables, capture_output=True, check=True)
    assert ran.stdout.decode().split("\0")[:-1] == [*words, "--slice", "1/2", "--", "$BATCH_TASK_INDEX/2"]
