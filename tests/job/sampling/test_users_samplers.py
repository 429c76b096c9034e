"""A sampler of the user's: what it draws, and one line with its file and line if it fails in whatever way."""

from __future__ import annotations

import signal
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from job.exits import Exit
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.fuzzing import examples, search
from tests.job.command_line import ddpm, ddpm_here, refused, started, succeeded
from tests.job.launching import eventually

WALK = ("sample", "--run", "walk", "--seeds", "0-1", "--no-nearest", "--steps", 3)
HEAD = "def f(denoise, x, points, noise_at):\n"
MUST = "it must return finite numbers [1, 3, 16, 16], as x, and returned "
RING = "    a, b = OSError(), KeyError()\n    b.__context__ = a\n    a.__context__ = b\n    raise a\n"
# Its text, the line that is named, if one is, and the fault.
FAULTS = {
    "exits": (f"import sys\n{HEAD}    sys.exit(0)\n", 3, "SystemExit: 0"),
    "exits_at_import": ("import sys\n\nsys.exit(0)\n", 3, "SystemExit: 0"),
    "interrupts": (f"{HEAD}    raise KeyboardInterrupt\n", 2, "KeyboardInterrupt"),
    "divides": (f"{HEAD}    return x / (1 // 0)\n", 2, "ZeroDivisionError: integer"),
    "misuses": (f"{HEAD}\n    return denoise(x, None)\n", 3, "AttributeError: "),
    "allocates": (f"{HEAD}    return bytes(1 << 62)\n", 2, "MemoryError"),
    "goes_round": (HEAD + RING, 5, "OSError"),
    "imports": ("import os\nimport nothing_like_it\n", 2, "No module named 'nothing_like_it'"),
    "misspells": ("from numpy import\n", 1, "SyntaxError: "),
    "takes_two": ("\ndef f(denoise, x):\n    return x\n", 2, "takes 2 positional arguments but 4 were given"),
    "takes_five": ("def f(denoise, x, points, noise_at, more): ...\n", 1, "missing 1 required positional argument:"),
    "is_complex": (f"{HEAD}    return denoise(x, points[0]).to(dtype=__import__('torch').complex64)\n", 1, "complex64"),
    "is_none": (f"\n\n{HEAD}    pass\n", 3, f"{MUST}NoneType"),
    "is_smaller": (f"{HEAD}    return x[..., ::2, ::2]\n", 1, "as x, and returned [1, 3, 8, 8]"),
    "is_a_number": ("f = 3\n", None, "'int' object is not callable"),
    "lacks_it": ("number = 3\n", None, "no attribute 'f'"),
}


def pictures(bucket):
    return sorted(path.name for path in (bucket / "runs/walk/samples").iterdir())


@pytest.fixture
def own(bucket, tmp_path, monkeypatch):
    """Writes a module where the command runs; gives the words of a command that names its `f`."""
    monkeypatch.chdir(tmp_path)

    def own(name: str, text: str, *more: object) -> tuple[object, ...]:
        (tmp_path / f"{name}.py").write_text(text)
        return (*WALK, "--bucket", bucket, "--sampler", f"{name}:f", *more)

    return own


def test_it_draws_as_ours_does(own, bucket):
    text = f"from ddpm.samplers import ddim\n{HEAD}    assert x.shape[1:] == (3, 16, 16)\n"
    text += "    return ddim(denoise, x, points, noise_at, eta=0.5)\n"
    succeeded(ddpm_here(*own("mine", text)))
    succeeded(ddpm_here(*WALK, "--bucket", bucket, "--eta", 0.5))
    hashed = sha256(text.encode()).hexdigest()[:8]
    names = (f"epoch-0003-own-3-mine.f-{hashed}-seeds-0-1.png", "epoch-0003-ddim-3-eta-0.5-seeds-0-1.png")
    first, second = (np.asarray(Image.open(bucket / "runs/walk/samples" / name)) for name in names)
    assert np.array_equal(first[-100:, : 2 * 98], second[-100:, : 2 * 98])
    succeeded(ddpm_here(*own("mine", text, "--mode", "inpaint", "--image", 3)))
    succeeded(ddpm_here("sample", "--run", "walk", "--bucket", bucket, "--count", 4, "--sampler", "mine:f"))
    assert verify_run(open_store(str(bucket)), "walk").problems == []
    before = pictures(bucket)
    succeeded(ddpm_here(*own("mine", f"{text}# Another.")))
    assert len(pictures(bucket)) == len(before) + 1


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_reported_with_their_place(own, bucket, tmp_path, name):
    text, line, said = FAULTS[name]
    before = pictures(bucket)
    told = refused(ddpm_here(*own(name, text)), Exit.BAD_REQUEST)
    assert f"--sampler {name}:f" in told and said in told
    assert line is None or (str(tmp_path / f"{name}.py") in told and f"line {line}" in told)
    assert "micro_batch" not in told
    assert pictures(bucket) == before


@pytest.mark.parametrize("name", ["nothing_like_it:f", "own.py:f", "os:nothing"])
def test_unknown_functions_are_refused(bucket, name):
    told = refused(ddpm_here(*WALK, "--bucket", bucket, "--sampler", name), Exit.BAD_REQUEST)
    assert "name a function of a module that is installed or lies in the working folder" in told


def test_verbose_prints_the_traceback(own):
    text = f"def inner():\n    raise ValueError('why')\n{HEAD}    inner()\n"
    done = ddpm_here("-v", *own("verbose", text))
    assert done.returncode == Exit.BAD_REQUEST
    trace, _, told = done.stderr.rstrip("\n").rpartition("\n")
    assert told.startswith("ddpm: --sampler verbose:f: ValueError: why; see ") and told.endswith("verbose.py, line 2")
    assert "Traceback (most recent call last)" in trace and "    inner()" in trace


CATCHES = "    try:\n        denoise(x, points[0])\n    except BaseException:\n        raise ValueError from None\n"


@pytest.mark.parametrize("text", [CATCHES, "    denoise(x, points[0])\n"])
def test_a_stop_within_is_a_stop(own, text):
    kill = f"import os\n{HEAD}    if x.any():\n        os.kill(os.getpid(), 2)\n"
    done = ddpm_here(*own(f"stopped{len(text)}", f"{kill}{text}    return x\n"))
    assert "stopped while sampling" in refused(done, Exit.STOPPED)


def test_ctrl_c_ends_an_import(own, tmp_path):
    process = started(*own("slow", "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n"))
    eventually((tmp_path / "begun").exists)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=40)
    assert process.returncode == Exit.STOPPED, said
    assert "stopped by SIGINT" in said


@pytest.mark.slow
@pytest.mark.parametrize("varying", ["int(os.environ['RANK'])", "1 - int(os.environ['RANK'])"])
def test_varying_evaluations_keep_processes_in_step(own, bucket, varying):
    """Also where a process evaluates the network more often than at first, and another one as often."""
    text = f"import os\n{HEAD}    for _ in range(1 + 8 * {varying} * bool(x.any())):\n"
    words = own(f"uneven{len(varying)}", f"{text}        y = denoise(x, points[0])\n    return y\n")
    before = pictures(bucket)
    done = ddpm(*words, "--processes", 2, "--seeds", "0-7")
    assert done.returncode == Exit.FINISHED, done.stderr
    assert len(pictures(bucket)) == len(before) + 1


STATEMENTS = [
    *("pass", "import sys; sys.exit(0)", "raise SystemExit('why')", "raise KeyboardInterrupt", "raise GeneratorExit"),
    *("raise ValueError('\\x1b]0;\\n' * 99)", "raise type('E', (BaseException,), {'__str__': None})"),
    *("raise MemoryError", "raise StopIteration", "yield x"),
    *("import nothing", "def g(): return g()\n    g()", "eval('1 +')", "assert 0", "[][1]", "del x", "x *= 0"),
    *("x.resize_(0)", "x = x.double()", "x = x / 0", "denoise(x, points[0])", "x = denoise(x, points[-1])"),
    *("denoise()", "denoise(x[:0], points[0])", "denoise(x.int(), points[0])", "noise_at(-1)", "noise_at('a')"),
    *("points.clear()", "return", "return x", "return x.tolist()", "return denoise", "return x[..., :1]"),
]
ARGUMENTS = ["denoise, x, points, noise_at", "*all", "", "denoise, x", "self, denoise, x, points, noise_at"]
AT_IMPORT = ["", "", "", "import sys; sys.exit(0)", "raise KeyboardInterrupt", "0 / 0", "def (", "f = 3", "\\x00"]
BODIES = st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=4)


@examples(few=8, many=150)
def test_whatever_a_user_s_module_does(own, bucket, count):
    """Ends with 0 and a picture, or in a line."""
    number = iter(range(10**6))

    @search(count, BODIES, st.sampled_from([*[ARGUMENTS[0]] * 4, *ARGUMENTS]), st.sampled_from(AT_IMPORT))
    def check(statements: list[str], arguments: str, at_import: str) -> None:
        body = "".join(f"    {statement}\n" for statement in statements)
        text = f"def f({arguments}):\n{body}    return x\n{at_import}\n"
        before = pictures(bucket)
        done = ddpm_here(*own(f"fuzzed{next(number)}", text))
        made = [name for name in pictures(bucket) if name not in before]
        if done.returncode == Exit.FINISHED:
            assert made, text
        else:
            assert refused(done, Exit.BAD_REQUEST).isprintable()
            assert not made
