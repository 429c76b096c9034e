"""Which cluster, and as whom: kubeconfigs that are right, and those of which a person is told what is wrong."""

from __future__ import annotations

import pytest
import yaml

from job.exits import BadConfigError, MissingInputError, NoPermissionError
from tests.job.jobs.kubernetes_jobs import cluster


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the kubeconfig that is used, and returns its path."""
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)

    def write(content):
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def asked(context=""):
    return cluster(context=context).jobs()


def test_wrong_kubeconfigs_are_refused(server, write, tmp_path):
    path = write(server.kubeconfig())
    path.unlink()
    with pytest.raises(MissingInputError, match=r"the kubeconfig .* is missing: .*get-credentials"):
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
