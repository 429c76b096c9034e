#!/bin/sh
# Installs what the container tests need, on Debian and Ubuntu.
set -eu
missing=""
for tool in podman runc mmdebstrap; do command -v "$tool" >/dev/null || missing="$missing $tool"; done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "test-containers: as root, install$missing" >&2
    exit 66
fi
apt-get update --quiet --quiet
DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet podman buildah runc
DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet --no-install-recommends mmdebstrap
