"""`ddpm doctor`: what it finds on real buckets and on this machine, and what a job finds by itself before it begins."""

from __future__ import annotations

import json

import pytest

from job.data import pack
from job.exits import Exit
from job.jobs import doctor
from job.jobs.backends import Check
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, refused, settings, succeeded


def test_each_kind_of_bucket_passes(bucket_uri, monkeypatch):
    checks = list(doctor.bucket_checks(bucket_uri))
    assert [check.name for check in checks if not check.passed] == []
    assert [check.name for check in checks] == ["credentials", "bucket write", "bucket list"]
    assert checks[2].message == "runs found: 0"
    if "://" in bucket_uri:
        assert not list(open_store(bucket_uri).list("doctor"))


def test_doctor_looks_at_the_bucket(folder, monkeypatch):
    looked: list[str] = []
    monkeypatch.setattr(doctor, "checks_of", lambda target, uri: looked.append(uri) or ())
    (folder / "targets.yaml").write_text("gke: {backend: kubernetes, image: i, bucket: gs://mine}")
    for words in ("", "--on gke", "--on gke --bucket gs://third", "--no-bucket"):
        succeeded(ddpm_here("doctor", *words.split()))
    succeeded(ddpm_here("doctor", "--on", "gke", DDPM_BUCKET="gs://other"))
    assert looked == ["./bucket", "gs://mine", "gs://third", "", "gs://other"]


def test_jobs_find_missing_rights_first(seaweedfs_bucket, monkeypatch):
    succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", seaweedfs_bucket))
    done = ddpm("train", "--dataset", "tiles", "--bucket", seaweedfs_bucket, *settings(), AWS_ACCESS_KEY_ID="reader")
    assert f"{seaweedfs_bucket}/runs/tiles/" in refused(done, 77)
    # No process of the run was started, which takes PyTorch's seconds.
    assert "rank" not in done.stderr
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    checks = {check.name: check for check in doctor.bucket_checks(seaweedfs_bucket)}
    assert (checks["bucket write"].passed, checks["bucket write"].exit_code) == (False, Exit.NO_PERMISSION)
    assert seaweedfs_bucket in checks["bucket write"].message and checks["bucket list"].passed
    # Nor is an image prepared of a dataset that cannot be written.
    monkeypatch.setattr(pack, "prepare", lambda *image: pytest.fail("an image was prepared"))
    words = ("data", "pack", "landscape-sample", "mine", "--size", 16, "--bucket", seaweedfs_bucket)
    assert f"{seaweedfs_bucket}/datasets/mine-16/pieces/" in refused(ddpm_here(*words), 77)


def test_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "not/yet"))
    found = json.loads(succeeded(ddpm_here("doctor", "--bucket", tmp_path / "bucket", "--json")))
    names = "credentials, bucket write, bucket list, GPUs, shared memory, disk, temporary files, all-reduce"
    assert [(check["name"], check["passed"]) for check in found] == [(name, True) for name in names.split(", ")]
    assert not (tmp_path / "bucket").exists() or not [*(tmp_path / "bucket").iterdir()]


def test_small_disks_and_memory_fail(small_disk, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    # Where Python would silently take another.
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(doctor, "SHARED_MEMORY_BYTES", 1 << 60)
    monkeypatch.setattr(doctor, "_sum_over_processes", lambda gpus: f"{gpus} of them")
    # Shared memory matters with several GPUs.
    for gpus, shared_memory in ((1, (True, Exit.MISSING_INPUT)), (2, (False, Exit.DISK_FULL))):
        monkeypatch.setattr(doctor, "local_gpus", lambda: gpus)  # noqa: B023
        found = {check.name: check for check in doctor.machine_checks()}
        assert (found["shared memory"].passed, found["shared memory"].exit_code) == shared_memory
    assert (found["disk"].passed, found["disk"].exit_code) == (False, Exit.BAD_REQUEST)
    assert (found["temporary files"].passed, found["temporary files"].exit_code) == (False, Exit.DISK_FULL)
    assert f"{small_disk}, which TMPDIR moves: No space left" in found["temporary files"].message
    assert found["GPUs"].message == "2 by NVIDIA's driver"


def test_first_failure_gives_the_code(capsys):
    checks = [Check("a", True, "fine", "nothing to do"), Check("b", False, "no", "ask", Exit.NO_PERMISSION)]
    checks.append(Check("c", False, "gone"))
    assert doctor.report(checks, as_json=False) is Exit.NO_PERMISSION
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "FAIL", "FAIL"]
    assert doctor.report(checks[:1], as_json=True) is Exit.FINISHED
    assert json.loads(capsys.readouterr().out)[0].items() >= {"name": "a", "passed": True, "message": "fine"}.items()
