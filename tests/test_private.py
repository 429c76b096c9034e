"""Tests see nothing of whoever runs them: what `tests/conftest.py` leaves of an environment and a working folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

THEIRS = (
    "RANK LOCAL_RANK WORLD_SIZE NNODES NODE_RANK MASTER_ADDR MASTER_PORT KUBECONFIG AWS_PROFILE AWS_ENDPOINT_URL_S3 "
    "GOOGLE_APPLICATION_CREDENTIALS STORAGE_EMULATOR_HOST CLOUDSDK_CONFIG GCE_METADATA_HOST XDG_CACHE_HOME DDPM_BUCKET "
    "DDPM_CACHE DDPM_JOB DDPM_STOP_AT MAKEFLAGS MAKELEVEL ARGS https_proxy"
)
LOOK = """
import json, os
import tests.conftest
from job.jobs.targets import load_targets
targets = {name: target.bucket for name, target in load_targets().items()}
print(json.dumps([targets, dict(os.environ), os.path.expanduser("~")]))
"""


@pytest.mark.slow
def test_tests_see_nothing_of_their_user(tmp_path):
    (tmp_path / "targets.yaml").write_text("local: {bucket: gs://theirs}\ngke: {backend: kubernetes, image: i}\n")
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(tmp_path)}
    variables |= dict.fromkeys(THEIRS.split(), "theirs") | {
        "DDPM_TARGETS": "targets.yaml",
        "DDPM_TEST_CONTAINERS": "kept",
    }
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=tmp_path, env=variables, capture_output=True, check=True)
    targets, left, home = json.loads(done.stdout)
    assert targets == {"local": "", "container": ""}
    assert (sorted(left.keys() & set(THEIRS.split())), left["DDPM_TEST_CONTAINERS"]) == ([], "kept")
    assert home != str(tmp_path) and not Path(home).exists()
