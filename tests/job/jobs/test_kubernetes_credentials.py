"""Which cluster, and as whom: kubeconfigs that are right, and those of which a person is told what is wrong."""

from __future__ import annotations

import json
import os
import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml
from job.jobs.backends.kubernetes_credentials import configuration

from job.exits import BadConfigError, Exit, MissingInputError, NoPermissionError
from job.jobs.backends.kubernetes import KubernetesBackend
from tests.job.jobs.kubernetes_jobs import TARGET


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the kubeconfig that is used, and returns its path."""
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)

    def write(content):
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def asked(target=TARGET):
    return KubernetesBackend(target, ()).jobs()


def test_a_token_and_a_token_file(server, write, tmp_path):
    write(server.kubeconfig("right"))
    assert asked() == []
    (tmp_path / "token").write_text("right")
    write(server.kubeconfig(tokenFile=str(tmp_path / "token")))
    assert asked() == []


def test_the_context_of_a_target_is_used(server, write):
    config = server.kubeconfig("wrong")
    config["users"].append({"name": "right", "user": {"token": "right"}})
    config["contexts"].append({"name": "right", "context": {"cluster": "test", "user": "right"}})
    write(config)
    with pytest.raises(NoPermissionError):
        asked()
    assert asked(TARGET.model_copy(update={"context": "right"})) == []


def test_a_context_that_is_not_there(server, write):
    path = write(server.kubeconfig())
    with pytest.raises(MissingInputError) as caught:
        asked(TARGET.model_copy(update={"context": "prod"}))
    assert str(caught.value) == (
        f"{path} has no context 'prod' (there are: test): set `context:` of the target to one of them"
    )
    write({**server.kubeconfig(), "current-context": ""})
    with pytest.raises(MissingInputError, match=r"has no current context"):
        asked()


def test_several_files_are_one(server, write, monkeypatch, tmp_path):
    config = server.kubeconfig()
    path = write({key: value for key, value in config.items() if key != "users"})
    other = tmp_path / "users"
    other.write_text(yaml.safe_dump({"users": config["users"]}))
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/missing{os.pathsep}{path}{os.pathsep}{other}")
    assert asked() == []


def test_no_kubeconfig_says_what_writes_one(write):
    with pytest.raises(MissingInputError, match=r"there is no kubeconfig at .*get-credentials") as caught:
        asked()
    assert caught.value.exit_code == Exit.MISSING_INPUT


def test_a_pod_without_an_account_says_so(write, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with pytest.raises(MissingInputError, match=r"this pod has no account"):
        asked()


def test_a_pod_uses_its_account(write, monkeypatch, tmp_path):
    from kubernetes.config import incluster_config

    for name, text in (("TOKEN", "right"), ("CERT", "certificate")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(incluster_config, f"SERVICE_{name}_FILENAME", str(tmp_path / name))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.1.2.3")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    made = configuration("")
    assert made.host == "https://10.1.2.3:443"
    assert made.retries is False


@pytest.mark.parametrize("text", ["", "a: [", "- a", "just words", "contexts: 5", "{}", "\x00"])
def test_what_is_no_kubeconfig(write, text):
    write(text)
    with pytest.raises((BadConfigError, MissingInputError)) as caught:
        asked()
    assert "kubeconfig" in str(caught.value) and "\n" not in str(caught.value)


def test_a_program_of_a_kubeconfig_is_not_run(server, write, tmp_path):
    program, ran = tmp_path / "program", tmp_path / "ran"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(program), "interactiveMode": "Never"}
    write(server.kubeconfig(exec=plugin))
    with pytest.raises(BadConfigError, match=r"'somebody' signs in with '.*/program', which is not run here"):
        asked()
    write(server.kubeconfig(**{"auth-provider": {"name": "oidc", "config": {}}}))
    with pytest.raises(BadConfigError, match=r"signs in with 'oidc'"):
        asked()
    assert not ran.exists()
    # Whoever else may sign in with it is nobody's business.
    config = server.kubeconfig()
    config["users"].append({"name": "other", "user": {"exec": plugin}})
    write(config)
    assert asked() == []


GKE = {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": "gke-gcloud-auth-plugin"}


def test_gke_is_signed_in_to_with_googles_default_credentials(server, write, monkeypatch, tmp_path):
    with token_server() as (url, grants):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(service_account(tmp_path, url)))
        write(server.kubeconfig(exec=GKE))
        assert asked() == []
        assert len(grants) == 1
        grants.append("denied")
        with pytest.raises(NoPermissionError, match=r"Google gives no token .*application-default login"):
            asked()


def test_gke_without_googles_credentials_says_what_makes_them(server, write, monkeypatch):
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", os.environ["HOME"])
    write(server.kubeconfig(exec=GKE))
    with pytest.raises(MissingInputError, match=r"no Google credentials .*gcloud auth application-default login"):
        asked()


class token_server:
    """Google's token endpoint on this machine: the token is the one that the cluster knows."""

    def __enter__(self):
        grants = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                is_denied = "denied" in grants
                grants.append("asked")
                answer = {"error": "invalid_grant"} if is_denied else {"access_token": "right", "expires_in": 3600}
                data = json.dumps(answer).encode()
                self.send_response(400 if is_denied else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *words):
                pass

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._http.server_address[1]}/token", grants

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()


def service_account(folder, token_uri):
    """A key file such as `gcloud iam service-accounts keys create` writes."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "account.json"
    account = {"type": "service_account", "client_email": "a@b.iam.gserviceaccount.com", "token_uri": token_uri}
    path.write_text(json.dumps({**account, "private_key": key.decode(), "private_key_id": "1", "project_id": "p"}))
    return path
