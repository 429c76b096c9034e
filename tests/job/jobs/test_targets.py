"""`targets.yaml`: what is valid, what is refused and how, and the example that comes with the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.exits import BadConfigError, BadRequestError, MissingInputError, State
from job.jobs.backends import JobStatus
from job.jobs.backends.kubernetes import KubernetesTarget
from job.jobs.backends.kubernetes_objects import size_bytes
from job.jobs.backends.local import LocalTarget
from job.jobs.targets import BACKENDS, load_targets, parse_targets
from tests.job.command_line import ddpm_here, refused

GKE = "gke: {backend: kubernetes, image: i, bucket: gs://bucket"
VM = "backend: vm, project: my-project, zones: [us-east1-b]"


pytestmark = pytest.mark.usefixtures("folder")


def test_option_variable_then_working_folder(tmp_path, monkeypatch):
    for name, folder in (("here", "."), ("there", "a"), ("elsewhere", "b")):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "targets.yaml").write_text(GKE.replace("gke", name) + "}")
    assert list(load_targets()) == ["local", "container", "here"]
    monkeypatch.setenv("DDPM_TARGETS", "a/targets.yaml")
    assert list(load_targets()) == ["local", "container", "there"]
    assert list(load_targets(Path("b/targets.yaml"))) == ["local", "container", "elsewhere"]


def test_named_files_must_exist(monkeypatch):
    with pytest.raises(MissingInputError, match=r"--targets no\.yaml: No such file"):
        load_targets(Path("no.yaml"))
    Path("b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadConfigError, match="is not valid YAML"):
        load_targets(Path("b"))
    with pytest.raises(BadConfigError, match="/dev/zero is larger than 256 KiB: is it the right file"):
        load_targets(Path("/dev/zero"))
    Path("f").mkdir()
    with pytest.raises(BadRequestError, match="f: Is a directory"):
        load_targets(Path("f"))
    monkeypatch.setenv("DDPM_TARGETS", "neither.yaml")
    with pytest.raises(MissingInputError, match=r"DDPM_TARGETS neither\.yaml: No such file"):
        load_targets()


REFUSED = [
    (GKE, ["not valid YAML"]),
    ("[gke]", ["must be a mapping of names to targets"]),
    ("gke: kubernetes", ["target 'gke' must be a mapping of keys"]),
    ("gke: {image: i}", [f"`backend:` must be one of {', '.join(BACKENDS)} (got '')"]),
    (GKE + ", namspace: a}", ["target 'gke'", "unknown key 'namspace'; did you mean 'namespace'?"]),
    (GKE + ", name: a}", ["unknown key 'name'"]),
    (GKE + ", '': a}", ["target 'gke': unknown key ''"]),
    (GKE + ", gpus: many}", ["gpus: Input should be a valid integer", "(got 'many')"]),
    (GKE + ", max_hours: 0}", ["max_hours: Input should be greater than or equal to 0.017"]),
    (GKE + ", price_per_hour: .inf}", ["price_per_hour"]),
    (GKE + ", spot: 1}", ["spot: Input should be a valid boolean"]),
    (GKE + ", namespace: My_Space}", ["namespace: String should match pattern", "'My_Space'"]),
    (GKE + ", cluster: eks}", ["cluster: Input should be 'gke' or 'plain'"]),
    (GKE + ", env: {lower: a}}", ["env.lower", "should match pattern"]),
    (GKE + ", env: {HF_TOKEN: a}}", ["HF_TOKEN looks like a secret", "service account"]),
    (GKE + ", env: {A: 1}}", ["env.A: Input should be a valid string"]),
    ("gke: {backend: kubernetes, bucket: 'hdfs://x/y'}", ["bucket:", "hdfs:// is not supported"]),
    ("gke: {backend: kubernetes, bucket: 'gs:/bucket'}", ["bucket:", "'gs:/bucket' is a folder of this machine"]),
    ("gke: {backend: kubernetes, image: 'a b'}", ["image: String should match pattern", "'a b'"]),
    ("Big_One: {backend: local}", ["target 'Big_One': name: String should match pattern"]),
    ("local: {backend: kubernetes}", ["target 'local' is always the local backend"]),
    ("vm: {backend: vm, project: my-project}", ["zones: Field required"]),
    ("vm: {backend: vm, project: my-project, zones: [us-east1]}", ["zones.0: String should match pattern"]),
    ("b: {backend: batch, project: P, regions: [us-east1]}", ["project: String should match pattern"]),
    (GKE + ", tolerations: [{key: [a]}]}", ["tolerations.0.key"]),
    (GKE + ", node_selector: {a: b c}}", ["node_selector.a"]),
    *[
        (f"{GKE}, queue: '{queue}'}}", ["queue: String should "])
        for queue in ("a b", "Team", "a_b", "a-", "a..b", "q" * 64)
    ],
    (GKE + ", scratch: fifty}", ["scratch: String should match pattern", "'fifty'"]),
    (GKE + ", cpus: '-1'}", ["cpus: String should match pattern"]),
    ("c: {backend: container, image: --privileged}", ["image: String should match pattern", "'--privileged'"]),
    *[
        (f"c: {{backend: container, {key}: '--privileged'}}", [f"{key}: String should match pattern"])
        for key in ("memory", "network", "gpu_type")
    ],
    *[
        (f"v: {{{VM}, {key}: ../../x}}", [f"{key}: String should match pattern"])
        for key in ("network", "subnetwork", "service_account", "machine_type", "gpu_type")
    ],
    (GKE + ', env: {A: "a\\0b"}}', ["env.A: String should match pattern", r"(got 'a\x00b')"]),
    (GKE + ', context: "\\e[31m"}', ["context: String should match pattern", r"(got '\x1b[31m')"]),
    (GKE + ", env: {2020-01-01: a}}", ["env.datetime.date(2020, 1, 1).[key]: Input should be a valid string"]),
    (GKE + ", node_selector: {1: a}}", ["node_selector.1.[key]: Input should be a valid string"]),
    (GKE + ", tolerations: [{1: a}]}", ["tolerations.0.1.[key]: Input should be a valid string"]),
]


def test_refusals_name_target_and_key():
    for text, parts in REFUSED:
        with pytest.raises(BadConfigError) as refused:
            parse_targets(text, "targets.yaml", text.partition(":")[0])
        assert str(refused.value).startswith("targets.yaml"), text
        assert all(part in str(refused.value) for part in parts), refused.value
        assert refused.value.exit_code == 78
    for secret in ("gs://somebody:hunter2@bucket", "s3://KEY:hunter2@bucket/folder"):
        with pytest.raises(BadConfigError) as refused:
            parse_targets(f"gke: {{backend: kubernetes, bucket: '{secret}'}}", "targets.yaml", "gke")
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "code", "begin"),
    [
        (("submit", "train", "--dataset", "a", "--on", "gke", "--dry-run"), 0, "left out"),
        (("doctor", "--on", "local", "--no-bucket"), 0, "left out"),
        (("jobs", "list"), 0, "left out"),
        (("jobs", "status", "train-none"), 66, "left out"),
        (("submit", "train", "--dataset", "a", "--on", "old", "--dry-run"), 78, "ddpm"),
        (("jobs", "list", "--on", "old"), 78, "ddpm"),
    ],
)
def test_a_target_that_is_not_valid_blocks_no_other(words, code, begin, monkeypatch):
    monkeypatch.setattr(KubernetesTarget, "jobs", lambda self: [])
    monkeypatch.setattr(KubernetesTarget, "alive", lambda self, name: JobStatus(name, State.GONE))
    monkeypatch.setattr(LocalTarget, "checks", lambda self, bucket: ())
    Path("targets.yaml").write_text(f"{GKE}, gpu_type: nvidia-l4}}\nold: {{backend: kubernetes, zone: a}}\n")
    done = ddpm_here(*words)
    assert done.returncode == code, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "targets.yaml" in line)
    assert line.startswith(f"{begin}: targets.yaml: target 'old': unknown key 'zone'")


def test_sizes_are_those_of_kubernetes():
    for text, size in (("16Gi", 16 * 2**30), ("1.5G", 15 * 10**8), ("1Ti", 2**40), ("2k", 2000), ("0.1Ki", 103)):
        assert size_bytes(text) == size


SECRETS = ["PGPASSWORD", "APIKEY", "WANDB_CREDENTIALS", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"]
SECRETS += ["HF_TOKEN", "GITHUBTOKEN", "MYSQL_PWD", "SSHPASSWD", "GPG_PASSPHRASE", "CLIENTSECRET", "PRIVATE_KEYS"]
SECRETS += ["FSSPEC_GS", "FSSPEC_S3_KEY", "FSSPEC_HTTPS_HEADERS", "FSSPEC_S3_CLIENT_KWARGS", "FSSPEC_SFTP_PASS"]
HARMLESS = ["TOKENIZERS_PARALLELISM", "GOOGLE_APPLICATION_CREDENTIALS", "KEYBOARD", "AWS_WEB_IDENTITY_TOKEN_FILE"]
HARMLESS += ["HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "PWD", "NCCL_DEBUG", "XDG_CACHE_HOME"]
HARMLESS += ["FSSPEC_GS_REQUESTER_PAYS", "FSSPEC_S3_ENDPOINT_URL"]


def test_secret_variables_are_refused():
    for name in SECRETS:
        with pytest.raises(BadConfigError, match=f"{name} looks like a secret"):
            parse_targets(GKE + f", env: {{{name}: x}}}}", "f", "gke")
    target = parse_targets(GKE + f", env: {{{', '.join(f'{name}: /a' for name in HARMLESS)}}}}}", "f")["gke"]
    assert list(target.env) == HARMLESS


@pytest.mark.parametrize(
    "typed",
    [
        "train --dataset mine",
        "data ensure mine",
        "data ensure mine --on container",
        "data show mine",
        "runs show walk",
        "sample --run walk",
        "submit train --dataset mine",
        "submit sample --run walk --on container",
    ],
)
def test_bucket_of_option_variable_or_target(folder, typed):
    def looked_in(*words, **variable):
        line = refused(ddpm_here(*typed.split(), *words, **variable), 66)
        return [name for name in ("/bucket", "of-target", "of-variable", "of-option") if name in line]

    assert looked_in() == ["/bucket"]
    (folder / "targets.yaml").write_text("local: {bucket: of-target}\ncontainer: {bucket: of-target, image: i}")
    assert looked_in() == ["of-target"]
    assert looked_in(DDPM_BUCKET="of-variable") == ["of-variable"]
    assert looked_in("--bucket", "of-option", DDPM_BUCKET="of-variable") == ["of-option"]
