"""What sets the stop flag: signals, a deadline, a metadata server that is a real one, and other processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from job.exits import BadRequestError
from job.processes import preemption
from job.processes.preemption import watch_for_preemption
from job.processes.ranks import Agreement
from job.stop import STOP_AT, STOP_SIGNALS, Stop, deadline, duration_seconds
from tests.job.command_line import environment
from tests.job.launching import eventually
from tests.job.metadata_server import MAINTENANCE, PREEMPTED, metadata_server, send

TERMINATE = "TERMINATE_ON_HOST_MAINTENANCE"


@pytest.fixture
def flag(monkeypatch):
    """Installs a flag; afterwards this process has its own signal handlers back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # The name of the machine that the tests run on must not decide.
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(preemption, "_PRODUCT", preemption.Path(os.devnull))
    yield lambda: Stop().install()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def server(monkeypatch):
    """The metadata server of this machine; its threads pause for as short as a test can bear."""
    monkeypatch.setattr(preemption, "_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(preemption, "_LONGEST_PAUSE_SECONDS", 0.05)
    with metadata_server() as server:
        yield server


@pytest.fixture
def watching(flag, server, monkeypatch):
    """A flag that watches the server."""

    def install() -> Stop:
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        stop = flag()
        watch_for_preemption(stop)
        return stop

    return install


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3600", 3600),
        ("45s", 45),
        ("90m", 5400),
        ("1h30m", 5400),
        ("2d", 172_800),
        ("1d2h3m4s", 93_784),
        ("1H", 3600),
        (" 5m ", 300),
        ("5m30", 330),
    ],
)
def test_durations(text, seconds):
    assert duration_seconds(text, "--stop-after") == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0h", "-5", "1.5h", "m", "90 m", "30m1h", "1h1h", "ten", "1e3", "inf", "1y", "9" * 400]
)
def test_what_is_no_duration_is_refused_with_an_example(text):
    with pytest.raises(BadRequestError, match="90m, 1h30m or 3600"):
        duration_seconds(text, "--stop-after")


def test_a_deadline_passes_on_to_later_flags_and_the_first_one_stays(flag):
    with deadline("2s"):
        set_at = os.environ[STOP_AT]
        with deadline("1h"):
            assert os.environ[STOP_AT] == set_at
        stop = flag()
        assert not stop()
        eventually(stop, 10)
        assert float(set_at) <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert stop.reason == "its deadline (--stop-after)"
    assert STOP_AT not in os.environ
    assert not flag()()


def test_no_deadline_sets_nothing(flag):
    with deadline(""):
        assert STOP_AT not in os.environ


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_first_signal_is_the_reason_and_a_second_one_is_not_now(flag, name):
    stop = flag()
    assert not stop()
    os.kill(os.getpid(), signal.Signals[name])
    assert stop()
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    assert stop()
    assert stop.reason == name


@pytest.mark.parametrize(("before", "reason"), [((), "SIGHUP"), (("nohup",), "SIGTERM")])
def test_sighup_stops_except_under_nohup(tmp_path, before, reason):
    program = """
    import os, signal, time
    from job.stop import Stop
    stop = Stop().install()
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop():
        time.sleep(0.01)
    open("reason", "w").write(stop.reason)
    """
    words = [*before, sys.executable, "-c", textwrap.dedent(program)]
    subprocess.run(words, cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, check=True, timeout=60)
    assert (tmp_path / "reason").read_text() == reason


def test_a_signal_on_the_way_out_does_not_change_the_exit_code(tmp_path):
    program = """
    import os, signal, sys
    from job.stop import Stop
    class Last:
        def __del__(self):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), number)
    Stop().install()
    sys.last = Last()
    sys.exit(75)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment(), check=False, timeout=60)
    assert done.returncode == 75


def test_a_preemption_notice_is_acted_on_as_soon_as_it_comes(watching, server):
    stop = watching()
    eventually(lambda: server.asked(PREEMPTED) == server.asked(MAINTENANCE) == 2, 20)
    assert server.requests[0].endswith("wait_for_change=true&last_etag=0&timeout_sec=60")
    asked = len(server.requests)
    time.sleep(0.2)
    assert len(server.requests) == asked, "it asks again although its request is not answered"
    assert not stop()
    told = time.monotonic()
    server.set(PREEMPTED, "TRUE")
    eventually(stop, 10)
    assert time.monotonic() - told < 1
    assert stop.reason == "the machine's notice instance/preempted=TRUE"


def test_a_machine_that_is_preempted_already_stops_at_once(watching, server):
    server.set(PREEMPTED, "TRUE")
    eventually(watching(), 10)


def test_a_maintenance_that_was_announced_before_leaves_the_time_until_then(watching, server):
    server.set(MAINTENANCE, TERMINATE)
    stop = watching()
    eventually(lambda: server.asked(MAINTENANCE) == 2, 20)
    assert not stop()
    server.set(MAINTENANCE, "NONE")
    eventually(lambda: server.asked(MAINTENANCE) == 3, 20)
    assert not stop()
    server.set(MAINTENANCE, TERMINATE)
    eventually(stop, 10)
    assert stop.reason == f"the machine's notice instance/maintenance-event={TERMINATE}"


def test_a_migration_of_the_machine_stops_nobody(watching, server):
    stop = watching()
    eventually(lambda: server.asked(MAINTENANCE) == 2, 20)
    server.set(MAINTENANCE, "MIGRATE_ON_HOST_MAINTENANCE")
    eventually(lambda: server.asked(MAINTENANCE) == 3, 20)
    assert not stop()


def close_without_answer(request):
    request.close_connection = True


def no_http(request):
    request.wfile.write(b"\x00\xff nonsense\r\n\r\n")
    request.close_connection = True


def cut_short(request):
    request.send_response(200)
    request.send_header("Content-Length", "9999")
    request.end_headers()
    request.wfile.write(b"TR")
    request.close_connection = True


def bad_chunk(request):
    request.protocol_version = "HTTP/1.1"
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"xyz\r\nTRUE\r\n")
    request.close_connection = True


@pytest.mark.parametrize(
    "odd",
    [
        lambda request: request.send_error(503),
        lambda request: request.send_error(404),
        lambda request: send(request, "TRUE", {"Location": "/elsewhere"}, 302),
        lambda request: send(request, "TRUE", {"ETag": "1"}, 203),
        lambda request: send(request, "<html>log in to the hotel's network</html>", {"ETag": "1"}),
        lambda request: send(request, "true", {"ETag": "ü weird \t&=?#"}),
        lambda request: send(request, "", {}),
        close_without_answer,
        no_http,
        cut_short,
        bad_chunk,
    ],
)
def test_no_answer_but_the_right_one_stops_anybody_or_ends_the_watch(watching, server, odd):
    server.odd = odd
    stop = watching()
    eventually(lambda: server.asked(PREEMPTED) > 3 and server.asked(MAINTENANCE) > 3, 20)
    assert not stop()
    server.odd = None
    server.set(PREEMPTED, "TRUE")
    eventually(stop, 10)


def test_without_etags_a_maintenance_that_was_there_before_is_still_none(watching, server):
    server.sends_etags = False
    server.set(MAINTENANCE, TERMINATE)
    stop = watching()
    eventually(lambda: server.asked(MAINTENANCE) > 5, 20)
    assert not stop()


@pytest.mark.parametrize("host", ["127.0.0.1:1", "not a host", "http://metadata", "nobody.invalid"])
def test_a_server_that_is_not_there_harms_nobody(flag, monkeypatch, host):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    stop = flag()
    watch_for_preemption(stop)
    time.sleep(0.1)
    assert not stop()
    assert errors == []
    assert {PREEMPTED, MAINTENANCE} <= {thread.name for thread in threading.enumerate()}
    # Ends the threads.
    os.kill(os.getpid(), signal.SIGTERM)


def test_elsewhere_than_on_compute_engine_nobody_is_asked(flag, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "_PRODUCT", tmp_path / "product_name")
    assert preemption._metadata_host() == ""
    (tmp_path / "product_name").write_text("Standard PC (Q35 + ICH9, 2009)\n")
    assert preemption._metadata_host() == ""
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    assert preemption._metadata_host() == "metadata.google.internal"


def test_two_processes_agree_one_step_late_and_at_the_same_step(tmp_path):
    """The flags of one process reach both, none waits for the other's next step, and an idle exchange says nothing."""
    program = """
    import json, sys, time
    from pathlib import Path
    import torch.distributed as dist
    from job.processes.ranks import Agreement
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meeting", rank=rank, world_size=2)
    agreement = Agreement(2, flags=2)
    said = [agreement.finish()]
    for step in range(6):
        said.append(agreement.exchange(rank == 1 and step == 2, rank == 0 and step >= 4))
    said += [agreement.finish(), agreement.finish()]
    # Who is ahead does not wait: the exchange of this step needs nobody yet.
    dist.barrier()
    if rank == 0:
        said.append(agreement.exchange(False, False))
        Path(f"{sys.argv[2]}/ahead").touch()
    else:
        while not Path(f"{sys.argv[2]}/ahead").exists():
            time.sleep(0.01)
        said.append(agreement.exchange(True, False))
    said.append(agreement.finish())
    print(json.dumps(said))
    dist.destroy_process_group()
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    ranks = [
        subprocess.Popen(
            [*words, str(rank), str(tmp_path)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    no, first, second = [False, False], [True, False], [False, True]
    expected = [no, no, no, no, first, no, second, second, no, no, first]
    assert [json.loads(out) for out, _ in outputs] == [expected, expected]


def test_one_process_agrees_with_itself_at_once():
    agreement = Agreement(1, flags=2)
    assert agreement.exchange(True, False) == (True, False)
    assert agreement.finish() == (False, False)
