"""Which cluster, and as whom: the kubeconfig, or the account of the pod that this process is in.

No program that a kubeconfig names is run. Google's own one, gke-gcloud-auth-plugin, is stood in for by the application
default credentials, which `gs://` needs anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.exits import BadConfigError, MissingInputError, NoPermissionError

VARIABLE = "KUBECONFIG"
DEFAULT = "~/.kube/config"
GOOGLE_PLUGIN = "gke-gcloud-auth-plugin"
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_HINT = (
    "`gcloud container clusters get-credentials CLUSTER --location LOCATION` writes one for GKE, and KUBECONFIG names "
    "another file"
)


def configuration(context: str) -> Any:
    """A `kubernetes.client.Configuration` for a context of the kubeconfig; empty is its current one.

    Raises:
        MissingInputError: there is no kubeconfig, no such context in it, or no credentials.
        NoPermissionError: the credentials are no longer valid.
        BadConfigError: the kubeconfig is not valid, or needs a program to be run.
        ImportError: the client is not installed.
    """
    from kubernetes import client, config

    made = client.Configuration()
    # Retries are ours: the client's own would send a POST again without telling whether the first one arrived.
    made.retries = False
    paths = [path for path in os.environ.get(VARIABLE, DEFAULT).split(os.pathsep) if path]
    if any(Path(path).expanduser().is_file() for path in paths):
        _load(os.pathsep.join(paths), context, made)
        return made
    if "KUBERNETES_SERVICE_HOST" in os.environ and not context:
        try:
            config.load_incluster_config(client_configuration=made)
        except config.ConfigException as error:
            raise MissingInputError(
                f"this pod has no account that may use the cluster ({error}): give it a service account with "
                "automountServiceAccountToken, or a kubeconfig"
            ) from None
        return made
    raise MissingInputError(f"there is no kubeconfig at {os.pathsep.join(paths)}: {_HINT}")


def _load(paths: str, context: str, into: Any) -> None:
    import yaml
    from kubernetes.config.config_exception import ConfigException
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

    try:
        merged = KubeConfigMerger(paths).config
        contexts = [entry["name"] for entry in merged.value.get("contexts", [])]
        chosen = context or merged.value.get("current-context") or ""
        if chosen not in contexts:
            which = f"no context {chosen!r}" if chosen else "no current context"
            raise MissingInputError(
                f"{paths} has {which} (there are: {', '.join(contexts) or 'none'}): set `context:` of the target to "
                "one of them"
            )
        is_google = _without_programs(merged, chosen, paths)
        KubeConfigLoader(merged, active_context=chosen, config_base_path=None).load_and_set(into)
    except (ConfigException, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadConfigError(f"{paths} is no valid kubeconfig: {' '.join(str(error).split())}; {_HINT}") from None
    except PermissionError:
        raise NoPermissionError(f"{paths} may not be read: give this user access") from None
    if is_google:
        renew = _google_token(into.host)
        into.refresh_api_key_hook = renew
        renew(into)


def _without_programs(merged: Any, context: str, paths: str) -> bool:
    """Takes away what would run a program, and says whether Google's credentials stand in for it."""
    user_name = next(c for c in merged.value["contexts"] if c["name"] == context)["context"].safe_get("user")
    for entry in merged.value.get("users", []):
        if entry["name"] != user_name:
            continue
        user = entry["user"].value if hasattr(entry["user"], "value") else entry["user"]
        provider = user.pop("auth-provider", None) or {}
        command = (user.pop("exec", None) or {}).get("command", "")
        if Path(command).name.removesuffix(".exe") == GOOGLE_PLUGIN or provider.get("name") == "gcp":
            return True
        if command or provider:
            raise BadConfigError(
                f"{paths}: the user {user_name!r} signs in with {command or provider.get('name')!r}, which is not run "
                "here: use a token or a client certificate, or `kubectl proxy` and a context for its address"
            )
    return False


def _google_token(host: str) -> Callable[[Any], None]:
    try:
        import google.auth
        import google.auth.transport.requests
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    except ImportError as error:
        raise MissingInputError(f"GKE needs more than is installed ({error}): pip install 'ddpm-job[gs]'") from None
    how = "run `gcloud auth application-default login`"
    try:
        credentials, _ = google.auth.default(scopes=[_SCOPE])
    except DefaultCredentialsError:
        raise MissingInputError(f"there are no Google credentials for {host}: {how}") from None

    def renew(into: Any) -> None:
        try:
            if not credentials.valid:
                credentials.refresh(google.auth.transport.requests.Request())
        except GoogleAuthError as error:
            raise NoPermissionError(f"Google gives no token for {host} ({str(error)[:200]}): {how}") from None
        into.api_key["authorization"] = f"Bearer {credentials.token}"

    return renew
