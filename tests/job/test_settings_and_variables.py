"""What a person may write after `--set`, and what a shell or a launcher may leave in variables: whatever it is, the
command goes on with something sensible, or says in one line what is wrong, soon and with a code of the table.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from job.config import draft, known_keys, parse_sets
from job.exits import Exit, JobError, ending_of
from job.store import open_store
from tests.fuzzing import examples, search
from tests.job.command_line import ddpm_here, refused

ODD_NUMBERS = ["1e300", "1.0e+300", "5e-324", "-0.0", ".inf", "1:1:1", "0b1", "1_", "0x" + "f" * 5000, "9" * 5000]
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from(ODD_NUMBERS)).map(str)
WORDS = [
    *("on", "no", "true", "null", "~", "linear", "fp32", "[on, 1]", "{a: b}", "[[]]", "- 1", "!!int x", "&a [*a]"),
    *("2020-99-99", "!!python/object:os.system x", "!!binary QQ==", "[" * 500, "1," * 500),
]
LISTS = st.lists(NUMBERS, max_size=20).map(",".join)
VALUES = st.one_of(NUMBERS, st.one_of(st.sampled_from(WORDS), st.text(max_size=20)), LISTS)
KEYS = st.one_of(st.sampled_from(known_keys()), st.text(max_size=12))
ASSIGNMENTS = st.lists(st.one_of(st.tuples(KEYS, VALUES).map("=".join), st.text(max_size=12)), min_size=1, max_size=3)


def in_one_line(error: JobError, codes: set[int]) -> str:
    code, said = ending_of(error)
    assert code in codes
    assert said.isprintable() and 20 < len(said) < 20_000, said
    return said


@examples(few=100, many=2_000)
def test_whatever_is_set(count):
    @search(count, ASSIGNMENTS)
    def check(assignments):
        try:
            config = draft("landscape-sample", parse_sets(assignments))
        except JobError as error:
            in_one_line(error, {Exit.BAD_CONFIG})
        else:
            for key, value in config.flat().items():
                for number in value if isinstance(value, list) else [value]:
                    # What no tensor can hold, or no sum of bytes, ends in a traceback later.
                    if isinstance(number, int | float) and key != "train.seed":
                        assert torch.isfinite(torch.tensor(number * 1e9, dtype=torch.float32)), (key, number)


def test_a_wrong_list_names_one_element():
    with pytest.raises(JobError) as error:
        draft("landscape-sample", parse_sets(["ema.stds=" + "1," * 5_000]))
    said = in_one_line(error.value, {Exit.BAD_CONFIG})
    assert "ema.stds.0: " in said and "ema.stds.1:" not in said


WRONG = [
    ("MASTER_ADDR=a RANK=0 WORLD_SIZE=x", "WORLD_SIZE='x'"),
    ("MASTER_ADDR=a RANK=0 WORLD_SIZE=-1", "WORLD_SIZE='-1'"),
    ("MASTER_ADDR=a RANK=a WORLD_SIZE=1", "RANK='a'"),
    ("MASTER_ADDR=a RANK=2 WORLD_SIZE=2", "RANK='2'"),
    ("MASTER_ADDR=a RANK=0 WORLD_SIZE=2 LOCAL_RANK=abc", "LOCAL_RANK='abc'"),
    ("MASTER_ADDR=a RANK=0 WORLD_SIZE=2 MASTER_PORT=x", "MASTER_PORT='x'"),
    ("NNODES=2 NODE_RANK=0 MASTER_ADDR=a MASTER_PORT=66000", "MASTER_PORT=66000"),
    ("DDPM_STOP_AT=x", "DDPM_STOP_AT='x'"),
    ("DDPM_STOP_AT=nan", "DDPM_STOP_AT='nan'"),
]


@pytest.mark.parametrize(("variables", "named"), WRONG)
def test_variables_that_mean_nothing(tmp_path, variables, named):
    chosen = dict(one.split("=") for one in variables.split())
    done = ddpm_here("train", "--dataset", "a", "--bucket", tmp_path, DDPM_LAUNCHED=None, **chosen)
    assert named in refused(done, Exit.BAD_REQUEST)


VARIABLES = [
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK"),
    *("DDPM_LAUNCHED", "DDPM_HEARTBEATS", "DDPM_STOP_AT", "DDPM_GPUS", "DDPM_GRACE_SECONDS", "DDPM_AWAY_SECONDS"),
    *("DDPM_JOB", "DDPM_BUCKET", "DDPM_CACHE", "DDPM_TARGETS", "XDG_CACHE_HOME", "HOME", "TMPDIR", "TERM", "TORCH"),
    *("KUBECONFIG", "CLOUDSDK_CONFIG", "GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST", "GCE_METADATA_HOST"),
    *("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS"),
]
TEXTS = st.one_of(
    st.integers(-2, 70_000).map(str),
    NUMBERS,
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    st.sampled_from(["", " ", "abc", "1_0", "²", "nan", "/dev/null", "/proc/self/mem", "~nobody/x", "s3://", "["]),
)
COMMANDS = [
    *("train --dataset nothing", "sample --run nothing", "sample --run n --count 4 --slice 1/4"),
    *("data list", "runs list", "data pack {bucket}/no.zip a --size 8", "jobs list --on local", "data ensure celeba"),
    *("submit train --dataset a --on local --dry-run", "submit train --dataset a --on container --dry-run"),
]


@examples(few=30, many=200)
def test_whatever_variables_hold(count, tmp_path, monkeypatch):
    """Each command ends before it begins its work, for there is none."""
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "bucket"
    there.mkdir()

    @search(count, st.sampled_from(COMMANDS), st.dictionaries(st.sampled_from(VARIABLES), TEXTS, max_size=4))
    def check(command, variables):
        chosen = {"DDPM_LAUNCHED": None, "DDPM_BUCKET": str(there), "DDPM_CACHE": str(tmp_path / "cache"), **variables}
        done = ddpm_here(*command.format(bucket=there).split(), **chosen)
        assert done.returncode in set(Exit) and "Traceback" not in done.stderr, (done.returncode, done.stderr)
        last = done.stderr.splitlines()[-1:] if done.returncode else ["a line that is long enough"]
        assert 20 < len(last[0]) < 20_000, done.stderr
        remote = {"AWS": "s3://nothing", "STO": "gs://nothing", "GOO": "gs://nothing"}
        for uri in {remote[name[:3]] for name in variables if name[:3] in remote}:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in {"STORAGE_EMULATOR_HOST": "", **variables}.items():
                    patch.setenv(name, value)
                try:
                    open_store(uri)
                except JobError as error:
                    in_one_line(error, set(Exit))
