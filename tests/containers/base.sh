#!/bin/sh
# Writes Debian with a Python and this machine's CAs as an archive: tests/containers/base.sh FOLDER PREFIX VERSION
#
# The Python is that of the tests, whose wheels the image gets: Debian's own, or one that is copied from PREFIX to
# /usr/local, without what Debian's would bring along.
set -eu
folder=$1 prefix=$2 python=python$3 root=$1/base certificates=usr/local/share/ca-certificates
packages=ca-certificates,libffi8,libssl3t64,libsqlite3-0,liblzma5,libbz2-1.0,zlib1g
[ "$prefix" != /usr ] || packages=$packages,python3,python3-venv,python3-dev
rm -rf "$root"
mmdebstrap --quiet --variant=minbase --include="$packages" --customize-hook="mkdir -p \"\$1/$certificates\" &&
    { cp /$certificates/*.crt \"\$1/$certificates/\" || true; } && chroot \"\$1\" update-ca-certificates" trixie "$root"
if [ "$prefix" != /usr ]; then
    tar -C "$prefix" -c --exclude="lib/$python/test" --exclude="lib/$python/config-*" \
        --exclude="lib/$python/site-packages/*" "bin/$python" bin/python3 bin/python lib include |
        tar -C "$root/usr/local" -x
    chroot "$root" ldconfig
fi
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
tar -C "$root" -c -f "$folder/base.tar" .
rm -rf "$root"
