"""The processes of one job: what each is told, what they tell each other, and that launchers and nodes learn alike."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job import platform
from job.exits import BadRequestError, JobError, MissingInputError, Restart, restart_after
from job.processes import group
from job.processes.group import Group
from job.processes.ranks import Agreement
from job.runs.checkpoints import RUN_CONFIG, list_checkpoints, load_manifest
from job.runs.metric_rows import read_rows
from job.runs.records import load_attempt, read_status
from tests.job.command_line import raised, settings
from tests.job.hooked import hooked
from tests.job.launching import ended, eventually, start
from tests.job.processes.conftest import ON_AND_ON

TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0.job", "MASTER_PORT": "1234"}


def test_the_environment_describes_the_group():
    group = Group.of(4, TWO)
    assert group == Group(4, nodes=2, node=1, address="node-0.job", port=1234)
    place = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert group.environment(1).items() >= (place | {"MASTER_ADDR": "node-0.job", "MASTER_PORT": "1234"}).items()
    # A machine that is alone is told of no others.
    alone = Group.of(1, {"NODE_RANK": "7", "MASTER_ADDR": "elsewhere"}).environment(0)
    assert alone.keys() == {"OMP_NUM_THREADS", "GOMP_SPINCOUNT"}
    assert Group.of(2, {}).address == "127.0.0.1"
    for named, wrong in {
        **{f"('{name}')": {key: TWO[key] for key in TWO if key != name} for name in TWO if name[0] != "N"},
        "('NODE_RANK')": {"NNODES": "2"},
        "(NODE_RANK=2, NNODES=2, MASTER_PORT=1234)": TWO | {"NODE_RANK": "2"},
        "'two')": {"NNODES": "two"},
    }.items():
        raised(BadRequestError, f"invalid group .*{re.escape(named)}: with NNODES, set NODE_RANK", Group.of, 1, wrong)


def test_threads_follow_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(platform, "CPU_LIMIT", tmp_path / "cpu.max")
    limits = [("", 2, 32), ("max 100000", 1, 64), ("850000 100000", 2, 4), ("50000 100000", 1, 1)]
    for limit, processes, threads in limits:
        (tmp_path / "cpu.max").write_text(limit)
        environment = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000"}
        assert Group(processes).environment(0).items() >= environment.items()
    # A person knows better.
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert Group(2).environment(1)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("asks_for_cpu", "found"), [("true", (1, 0.0)), ("false", (2, 80.0))])
def test_a_cpu_that_is_asked_for_leaves_the_gpus_alone(monkeypatch, asks_for_cpu, found):
    monkeypatch.setattr(group, "_cuda", lambda: ("13.0", 2, 80.0))
    monkeypatch.setenv("ACCELERATE_USE_CPU", asks_for_cpu)
    assert (group.default_processes(), group.gpu_gib()) == found


def test_missing_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(group, "DRIVERS", (tmp_path / "none", tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(group, "_cuda", lambda: ("13.0", 1, 80.0))
        for given in ("", "0", "1"):
            monkeypatch.setenv(group.GPUS, given)
            group.check_gpus()
        monkeypatch.setenv(group.GPUS, "8")
        # Another machine may have what this one lost.
        said = "was given 8 GPUs, and PyTorch sees 1: a GPU failed, or the driver is too old"
        with pytest.raises(JobError, match=said) as lost:
            group.check_gpus()
        assert restart_after(lost.value.exit_code) is Restart.BOUNDED
    # No machine would have these.
    monkeypatch.setenv(group.GPUS, "1")
    group._cuda.cache_clear()
    said = "was given 1 GPU, and PyTorch sees 0: this is a PyTorch for CPUs; `make image TORCH=cuda`"
    raised(MissingInputError, said, group.check_gpus)
    group._cuda.cache_clear()


RANK = """
import torch.distributed as dist
from job.exits import BucketAwayError
from job.processes.ranks import Agreement, meet
from job.stop import Stop

class CountingStop(Stop):
    asked = 0
    def __call__(self):
        self.asked += 1
        return super().__call__()
class Unspeakable(Exception):
    def __init__(self, what):
        super().__init__(what)
        self.lock = threading.Lock()
def fail(error):
    raise error
def heard(error):
    try:
        ranks.on_main(lambda: fail(error))
    except Exception as error:
        return type(error).__name__, str(error)
def slow():
    time.sleep(1)
    return ranks.rank, list(range(1000))

# A result reaches all.
stop = CountingStop()
ranks = meet(stop)
assert (ranks.rank, ranks.world_size, ranks.is_main) == (rank, 2, rank == 0)
assert ranks.sum(10 + rank, 1) == (21, 2)
stop.asked = 0
assert ranks.on_main(slow) == (0, list(range(1000)))
# Who waits asks for a stop at every fiftieth of a second; a busy machine gets round to fewer.
assert rank == 0 or stop.asked > 20
# An error reaches all, and one that cannot be sent leaves nobody waiting.
assert heard(BucketAwayError("the bucket is away")) == ("BucketAwayError", "the bucket is away")
name, said = heard(Unspeakable("a lock cannot be sent"))
unsent = "RuntimeError", True
assert (name, "has a result that cannot be sent" in said) == (unsent if rank else ("Unspeakable", False)), said
assert rank or said == "a lock cannot be sent"
assert ranks.on_main(lambda: ranks.rank) == 0
# Two processes agree one step late.
agreement = Agreement(2, flags=2)
agreed = [agreement.finish()]
for step in range(6):
    agreed.append(agreement.exchange(rank == 1 and step == 2, rank == 0 and step >= 4))
agreed += [agreement.finish(), agreement.finish()]
# Who is ahead does not wait: the exchange of this step needs nobody yet.
dist.barrier()
if rank == 0:
    agreed.append(agreement.exchange(False, False))
    Path("ahead").touch()
else:
    while not Path("ahead").exists():
        time.sleep(0.01)
    agreed.append(agreement.exchange(True, False))
agreed.append(agreement.finish())
no, first, second = (False, False), (True, False), (False, True)
assert agreed == [no, no, no, no, first, no, second, second, no, no, first], agreed
# As the program ends: at a normal exit the threads of gloo may abort the process.
os._exit(0)
"""


def test_ranks_tell_each_other(tmp_path):
    """Two real ones, over gloo, under the launcher."""
    code, _, err = ended(start(tmp_path, RANK), 120)
    assert code == 0, err
    alone = Agreement(1, flags=2)
    assert (alone.exchange(True, False), alone.finish()) == ((True, False), (False, False))


# --- other launchers and several nodes, here launchers of one machine

TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2", "-m", "--", "job")
"""Without `--` torchrun takes `--run` for an abbreviation of an option of its own."""
ACCELERATE = (
    *(str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "job"),
)


@pytest.fixture
def together(place):
    """Starts a run on two nodes of one process each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])

    def together(run, *words, **more):
        variables = more | TWO | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [place.started(run, *words, **variables | {"NODE_RANK": str(node)}) for node in range(2)]

    return together


def check_ends(*expected, of):
    """Checks how processes end, and returns what the first one said."""
    said = [process.communicate(timeout=150)[0] for process in of]
    assert [process.returncode for process in of] == [*expected], said[0]
    return said[0]


@pytest.mark.slow
def test_all_launchers_share_a_run(place, together):
    """Begun by torchrun, gone on with on two nodes, of which one is preempted, and ended by accelerate."""
    run, ours = place.run("shared"), place.run("ours")

    def newest(run):
        manifest = load_manifest(run, max(list_checkpoints(run)))
        assert load_attempt(run, manifest.fence).world_size == 2
        return manifest

    process = place.begun("shared", program=TORCHRUN)
    process.terminate()
    # torchrun flattens the exit codes.
    said = check_ends(1, of=[process])
    assert said.count("everything is saved, and the same command goes on from there") == 1
    assert (read_status(run).state, read_status(run).images_seen) == ("stopped", newest(run).images_seen)
    before = newest(run)
    nodes = together("shared", *ON_AND_ON)
    eventually(lambda: newest(run).fence > before.fence, 200)
    nodes[1].send_signal(signal.SIGTERM)
    check_ends(75, 75, of=nodes)
    assert newest(run).images_seen > before.images_seen

    epochs = newest(run).images_seen // 299 + 2
    alone = place.started("ours", "--epochs", epochs, "--processes", 2)
    check_ends(0, 0, of=[place.started("shared", "--epochs", epochs, program=ACCELERATE), alone])
    assert read_status(run).state == "finished"
    there, wanted = ({file.name: file.sha256 for file in newest(each).files} for each in (run, ours))
    # The runs began with different epochs.
    assert there | {RUN_CONFIG: ""} == wanted | {RUN_CONFIG: ""}

    # A node that dies ends the others.
    finished = newest(run)
    nodes = together("shared", *ON_AND_ON)
    eventually(lambda: newest(run).fence > finished.fence, 200)
    nodes[1].kill()
    said, _ = nodes[0].communicate(timeout=150)
    assert nodes[0].returncode not in (0, 75), said


@pytest.mark.slow
def test_an_error_of_other_launchers_is_code_1(place):
    for program in (TORCHRUN, ACCELERATE):
        said = check_ends(1, of=[place.started("refused", "--set", "train.batch_size=1", program=program)])
        refusal = r"^ddpm(?: \(rank 1\))?: 2 processes cannot share train\.batch_size=1 images"
        assert re.search(refusal, said, re.MULTILINE)
        assert "ddpm/" not in said, "a traceback of ours"


OPENS_SLOWLY = """
import os
def slowly(bucket, index, budget_bytes, stop, opened=open_cache):
    stop.sleep(24 * int(os.environ["NODE_RANK"]))
    return opened(bucket, index, budget_bytes, stop)

open_cache = slowly
"""


@pytest.mark.slow
def test_a_slow_node_is_waited_for(together, tmp_path):
    hooks = hooked(tmp_path / "hooks", job__data__reading__cache=OPENS_SLOWLY)
    check_ends(0, 0, of=together("decodes", "--epochs", 1, "--hang-after", 12, PYTHONPATH=hooks))


@pytest.mark.slow
def test_a_waiting_node_can_be_stopped(place, together):
    (waiting, other) = together("waits", "--epochs", 2)
    other.kill()
    # Long enough to have begun to wait.
    time.sleep(8)
    assert waiting.poll() is None, waiting.communicate()
    waiting.terminate()
    check_ends(75, of=[waiting])
    assert not place.run("waits").exists("lease.json")
    began = time.monotonic()
    (waiting, other) = together("waits", "--epochs", 2, "--stop-after", "40s", "--hang-after", 20)
    other.kill()
    said = check_ends(75, of=[waiting])
    assert time.monotonic() - began >= 40
    assert "stopped by its deadline (--stop-after) before it began" in said


# --- a run that changes its processes, micro-batches and cache learns what an undisturbed one does

STAGES = (
    (2, 80, ()),
    (1, 620, ("--set", "train.micro_batch_size=3", "--set", "data.cache_gigabytes=0.0001")),
    (3, 1150, ("--set", "train.micro_batch_size=null", "--set", "data.cache_gigabytes=1")),
)
"""Processes; at which image they are asked to stop; what else is different. All images together take 230 kB."""
ALL_THAT_IS_DRAWN = {"data__augment": "0.3", "data__crop_scale": "0.6,1", "ema__stds": "0.1"}
ALL_THAT_IS_DRAWN |= {"model__label_dropout": "0.3", "diffusion__self_conditioning": "true"}
ALL_THAT_IS_DRAWN |= {"diffusion__offset_noise": "0.1", "log__every_images": "10", "train__batch_size": "10"}
STOPS_AT = """
import os, signal
training_noise_of = randomness.training_noise

def training_noise(seed, image_numbers, *how):
    if image_numbers[0] >= int(os.environ["STOP_AT_IMAGE"]):
        os.kill(os.getpid(), int(os.environ.get("KILL", signal.SIGTERM)))
    return training_noise_of(seed, image_numbers, *how)

randomness.training_noise = training_noise
"""
LATE = """
import time
add = HostEMA._add

def late(*how):
    time.sleep(0.05)
    add(*how)

HostEMA._add = late
"""
OVERFLOWS = "INITIAL_SCALE, GROWTH_STEPS = 2.0**30, 3"
HOLDS = """
import hashlib
resumes = TrainingAttempt._restore

def held(attempt):
    resumes(attempt)
    with open(f"{os.environ['HOLDS']}-{os.getpid()}", "w") as file:
        for group, named in attempt.state.tensors().items():
            tensors = b"".join(tensor.numpy().tobytes() for tensor in named.values())
            print(group, hashlib.sha256(tensors).hexdigest(), file=file)

import os
TrainingAttempt._restore = held
"""
OVERFLOWS_ON_RANK_1 = """
losses = MicroBatch.losses

def overflowing(images, *others):
    return losses(images, *others) * (torch.inf if 241 in images.image_numbers else 1)

MicroBatch.losses = overflowing
"""
SCALES = """
import os
takes_step, INITIAL_SCALE, GROWTH_STEPS = LossScale.takes_step, 64.0, 4

def written(scale, norm):
    taken = takes_step(scale, norm)
    with open(os.environ["SCALES"] + os.environ["RANK"], "a") as file:
        print(int(scale.values[0]), file=file)
    return taken

LossScale.takes_step = written
"""


@pytest.fixture
def started(place, tmp_path):
    """Starts a command whose processes stop themselves at an image."""
    folder = hooked(tmp_path / "hooks", ddpm__training=STOPS_AT, ddpm__precision=OVERFLOWS, ddpm__ema=LATE)

    def started(run, precision, processes, stop_at_image, *options, **variables):
        network = settings(train__precision=precision, **ALL_THAT_IS_DRAWN)
        words = ("--epochs", 99, "--processes", processes, *network, *options)
        return place.started(run, *words, PYTHONPATH=folder, STOP_AT_IMAGE=str(stop_at_image), **variables)

    return started


def stopped(child):
    """Waits until it has saved everything and ended."""
    err, _ = child.communicate(timeout=250)
    assert child.returncode == 75, err


def losses_of(run):
    """The number of processes of the last attempt, and the loss of each step by the images seen."""
    manifest = load_manifest(run, max(list_checkpoints(run)))
    rows = read_rows(run, manifest.metrics, pytest.fail)
    return load_attempt(run, manifest.fence).world_size, {row["images_seen"]: row["loss"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        *("train.precision=fp32", "train.precision=fp16", "train.optimizer=adamw8bit", "ema.device=cpu"),
        "train.shard_optimizer=true",
        *("diffusion.objective=consistency", "consistency.guidance=2"),
    ],
)
def test_killed_and_moved_processes_leave_the_same_bits(place, started, setting):
    """Five slots on 1 process; or on 2 that are asked to stop, 1 that is killed, 3 that die together, and 4.

    Averages in host memory have the bits of those on the device. So have moments and averages that processes divide, in
    some attempts or in all.
    """
    whole_run, moved_run = (f"{name}-{setting.partition('=')[2]}" for name in ("stayed", "parted"))
    precision = setting.removeprefix("train.precision=") if "precision" in setting else "fp32"
    words = ("--epochs", 2, "--set", "train.slots=5", "--set", "model.dropout=0.1", "--set", "sample.images=10")
    words += ("--set", "checkpoint.every_minutes=0.001", "--set", "train.exact=true", "--set", setting)
    # That compares two estimates of the network, and shows it none.
    is_guided = setting.startswith("consistency")
    words += ("--set", f"diffusion.self_conditioning={not is_guided and 'objective' not in setting}")
    if is_guided:
        assert started("teacher", precision, 1, 10**9, *words[:-4], *words[-2:], "--epochs", 1).wait(250) == 0
        words += ("--set", "diffusion.objective=consistency", "--from", "teacher")
    usual = {"ema.device=cpu": "ema.device=null", "train.shard_optimizer=true": "train.shard_optimizer=false"}
    without = ("--set", usual.get(setting, setting))
    ended = started(whole_run, precision, 1, 10**9, *words, *without)
    stopped(started(moved_run, precision, 2, 130, *words))
    assert started(moved_run, precision, 1, 250, *words, *without, KILL="9").wait(250) == 137
    assert started(moved_run, precision, 3, 400, *words, KILL="9").wait(250) not in (0, 75)
    moved = started(moved_run, precision, 4, 10**9, *words)
    said, _ = moved.communicate(timeout=250)
    assert moved.returncode == ended.wait(250) == 0
    assert "rounding differs" not in said

    def result(name):
        run = place.run(name)
        ref = max(list_checkpoints(run))
        manifest = load_manifest(run, ref)
        losses = [(row.get("loss"), row.get("loss_scale")) for row in read_rows(run, manifest.metrics, pytest.fail)]
        assert manifest.groups == ("model", "ema", "ema-0.1", *(["teacher"] if is_guided else []), "optimizer")
        # The configuration names where averages and moments lie.
        hashes = {file.sha256 for file in manifest.files if setting not in usual or RUN_CONFIG not in file.key}
        (grid,) = place.bucket.glob(f"runs/{name}/samples/epoch-0002*.png")
        return ref.fence, losses, hashes, np.array(Image.open(grid))

    (*whole, drawn), (*parted, drawn_again) = result(whole_run), result(moved_run)
    assert (whole[0], parted[0]) == (1, 4)
    # Steps are left out before and after the kills, and the scale grows between them.
    scales = {scale for _, scale in whole[1]}
    assert (len(scales) > 3) == (precision == "fp16")
    assert whole[1:] == parted[1:]
    # The title above the pictures has the name of the run.
    assert not (drawn != drawn_again)[len(drawn) // 4 :].any()


@pytest.mark.slow
def test_all_processes_of_ddp_leave_the_same_step_out(place, tmp_path):
    """Image 241 overflows in the eleventh step, on one of them."""
    folder = hooked(tmp_path / "hooks", ddpm__training=OVERFLOWS_ON_RANK_1, ddpm__precision=SCALES)
    words = ("--epochs", 1, "--processes", 2, "--set", "train.exact=false", "--set", "train.precision=fp16")
    child = place.started("overflows", *words, PYTHONPATH=folder, SCALES=str(tmp_path / "rank-"))
    assert child.wait(250) == 0, child.communicate()
    expected = [64] * 3 + [128] * 4 + [256] * 3 + [128] * 3
    found = [[*map(int, path.read_text().split())] for path in tmp_path.glob("rank-?")]
    assert found == [expected, expected]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound", "stages"), [("fp32", 1e-5, STAGES), ("bf16", 1e-2, STAGES[:2])])
def test_changing_processes_learn_the_same(place, started, precision, bound, stages):
    """Each loss is that of the same images, noise and points: a step that was left in its midst taught nothing."""
    alone = started(f"alone-{precision}", precision, 1, stages[-1][1] + 50)
    for processes, stop_at_image, options in stages:
        stopped(started(name := f"moving-{precision}", precision, processes, stop_at_image, *options))
        world_size, found = losses_of(run := place.run(name))
        assert (world_size, max(found)) == (processes, max(list_checkpoints(run)).images_seen)
    stopped(alone)
    _, expected = losses_of(place.run(f"alone-{precision}"))
    assert [*found] == [*range(10, max(found) + 1, 10)]
    assert found == pytest.approx({images: expected[images] for images in found}, rel=bound)


@pytest.mark.slow
def test_all_processes_begin_with_the_weights_of_the_parent(place, tmp_path):
    """Averages too, divided or not, with which each of them draws and validates; and several learn what one does."""
    more, folder = ("--set", "ema.stds=0.1", "--epochs", 1), hooked(tmp_path / "hooks", job__training__attempt=HOLDS)
    assert place.started("parent", *more).wait(250) == 0
    begins = (*more, "--from", "parent", "--processes")
    for name, processes in (("alone", 1), ("together", 2)):
        child = place.started(name, *begins, processes, PYTHONPATH=folder, HOLDS=str(tmp_path / name))
        assert child.wait(250) == 0
        held = {path.read_text() for path in tmp_path.glob("*-*")}
        assert len([*tmp_path.glob(f"{name}-*")]) == processes
    divided = ("--set", "train.exact=true", "--set", "train.shard_optimizer=true")
    assert place.started("apart", *begins, 2, *divided).wait(250) == 0
    runs = [place.run(name) for name in ("together", "apart")]
    files = [load_manifest(run, max(list_checkpoints(run))).files for run in runs]
    assert len({frozenset(file.sha256 for file in each if RUN_CONFIG not in file.key) for each in files}) == 1
    (groups,) = held
    by_group = dict(line.split() for line in groups.splitlines())
    assert by_group["model"] == by_group["ema"] == by_group["ema-0.1"] != by_group["optimizer"]

    together, alone, parent = ([*losses_of(place.run(name))[1].values()] for name in ("together", "alone", "parent"))
    assert together == pytest.approx(alone, rel=1e-5)
    assert alone[0] < parent[0]
