#!/bin/sh
# Installs the named tools where they are missing, on Debian and Ubuntu: tests/install.sh podman zsh
set -eu
missing=""
for tool; do command -v "$tool" >/dev/null || missing="$missing $tool"; done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests: as root, install$missing" >&2
    exit 66
fi
apt-get update --quiet --quiet
# What Podman recommends (its network and its own runtime) is needed; what mmdebstrap recommends is not.
case $missing in *podman*) DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet podman buildah;; esac
# Packages whose names are not those of their tools.
missing=$(echo "$missing" | sed -e 's/ sbatch/ slurm-client/' -e 's/ munged/ munge/' -e 's/ sshd/ openssh-server/')
# shellcheck disable=SC2086  # one word per tool
DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet --no-install-recommends $missing
