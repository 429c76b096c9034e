"""A login node: a real sshd on loopback, and ssh as a person with a key has it set up."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.servers import free_port

SERVER = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv {variables} HOME={folder}
"""
CLIENT = """
Host login
  HostName 127.0.0.1
  Port {port}
  User root
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking accept-new
Host stranger
  HostName 127.0.0.1
  Port {port}
  User root
  IdentityFile {folder}/none
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
Host nobody
  HostName 127.0.0.1
  Port 9
"""


@contextmanager
def login_node(folder: Path, variables: Mapping[str, str]) -> Iterator[Path]:
    """A folder with the `ssh` that knows the host `login`, while that one answers."""
    port = free_port()
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    said = " ".join(f"{name}={value}" for name, value in variables.items())
    (folder / "sshd_config").write_text(SERVER.format(port=port, folder=folder, variables=said))
    (folder / "ssh_config").write_text(CLIENT.format(port=port, folder=folder))
    (folder / ".bash_profile").write_text("echo welcome\n")
    (ssh := folder / "bin/ssh").parent.mkdir()
    # The real one, with these settings for a person's own.
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F "{folder}/ssh_config" "$@"\n')
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    with subprocess.Popen(
        ["/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL
    ) as server:
        try:
            yield ssh.parent
        finally:
            server.terminate()
