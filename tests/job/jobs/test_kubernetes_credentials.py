"""Which cluster, and as whom: kubeconfigs that are right, and those of which a person is told what is wrong."""

from __future__ import annotations

import json
import os

import pytest
import yaml

from job.exits import BadConfigError, MissingInputError, NoPermissionError
from job.jobs.backends.kubernetes import KubernetesBackend
from job.jobs.backends.kubernetes_api import configuration
from tests.job.jobs.answering import JsonHandler, serving
from tests.job.jobs.kubernetes_jobs import TARGET


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the kubeconfig that is used, and returns its path."""
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBERNETES_SERVICE_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)

    def write(content):
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def asked(context=""):
    return KubernetesBackend(TARGET.model_copy(update={"context": context})).jobs()


def test_kubeconfigs_that_are_right(server, write, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("right")
    write(server.kubeconfig(tokenFile=str(tmp_path / "token")))
    assert asked() == []
    # The context of the target, and what somebody else signs in with is nobody's business.
    config = server.kubeconfig(exec={"command": "other"})
    config["users"].append({"name": "right", "user": {"token": "right"}})
    config["contexts"].append({"name": "right", "context": {"cluster": "test", "user": "right"}})
    path = write(config)
    assert asked("right") == []
    # Several files are one.
    users = tmp_path / "users"
    users.write_text(yaml.safe_dump({"users": config.pop("users")}))
    write(config)
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, (tmp_path / "missing", path, users))))
    assert asked("right") == []
    # A proxy needs nobody to sign in.
    server.tokens.append("")
    config["contexts"].append({"name": "proxy", "context": {"cluster": "test"}})
    write(config)
    assert asked("proxy") == []


def test_what_is_wrong_with_a_kubeconfig_is_told_in_a_line(server, write, tmp_path):
    path = write(server.kubeconfig())
    path.unlink()
    with pytest.raises(MissingInputError, match=r"there is no kubeconfig at .*get-credentials"):
        asked()
    write(server.kubeconfig())
    with pytest.raises(BadConfigError, match=rf"{path} cannot be used: .* name prod in .*contexts.* `context:` of the"):
        asked("prod")
    write({**server.kubeconfig(), "current-context": ""})
    with pytest.raises(BadConfigError, match="kubeconfig"):
        asked()
    for text in ("", "a: [", "- a", "just words", "contexts: 5", "{}", "\x00"):
        write(text)
        with pytest.raises(BadConfigError, match=r"^the kubeconfig .* cannot be used: [^\n]+$"):
            asked()
    write(server.kubeconfig(token="two\nlines"))
    with pytest.raises(BadConfigError, match=r"a token that is not valid$"):
        asked()
    write(server.kubeconfig(token="wrong"))
    with pytest.raises(NoPermissionError, match="sign in again"):
        asked()


def test_a_pod_uses_its_account(write, monkeypatch, tmp_path):
    from kubernetes.config import incluster_config

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.1.2.3")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(BadConfigError, match="Service token file does not exist"):
        configuration("")
    for name in ("TOKEN", "CERT"):
        (tmp_path / name).write_text(name)
        monkeypatch.setattr(incluster_config, f"SERVICE_{name}_FILENAME", str(tmp_path / name))
    assert configuration("").host == "https://10.1.2.3:443"
    with pytest.raises(MissingInputError):
        configuration("named")


def program(name):
    """What a kubeconfig says of a program that must not be run, and is not there."""
    return {"apiVersion": "client.authentication.k8s.io/v1", "command": f"/nowhere/{name}", "interactiveMode": "Never"}


def test_a_program_of_a_kubeconfig_is_not_run(server, write):
    write(server.kubeconfig(exec=program("other")))
    with pytest.raises(BadConfigError, match=r"context 'test' signs in with '.*/other', which is not run here"):
        asked()
    write(server.kubeconfig(**{"auth-provider": {"name": "oidc", "config": {}}}))
    with pytest.raises(BadConfigError, match=r"signs in with 'oidc'"):
        asked()


def test_gke_is_signed_in_to_with_googles_default_credentials(server, write, monkeypatch, tmp_path):
    write(server.kubeconfig(exec=program("gke-gcloud-auth-plugin")))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    no_token = r"Google gives no token .*gcloud auth application-default login"
    with pytest.raises(NoPermissionError, match=no_token):
        asked()
    answers = [(200, {"access_token": "right", "expires_in": 3600}), (400, {"error": "invalid_grant"})]

    class Handler(JsonHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.say(*answers.pop(0))

    with serving(Handler) as google:
        user = {"type": "authorized_user", "client_id": "a", "client_secret": "b", "refresh_token": "c"}
        (tmp_path / "user.json").write_text(json.dumps(user))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "user.json"))
        monkeypatch.setattr("google.oauth2.credentials._GOOGLE_OAUTH2_TOKEN_ENDPOINT", google)
        assert asked() == []
        with pytest.raises(NoPermissionError, match=no_token):
            asked()
    assert not answers
