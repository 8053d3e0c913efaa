#!/usr/bin/env bash
# foreign_root.sh - make a root file system for a machine of another architecture.
#
#   foreign_root.sh ARCH DIR PYTHON
#
# DIR gets a minimal Debian 12 of ARCH (arm64) with what srcip takes from Debian, unpacked and not
# configured, since its programs cannot run here; and in DIR/opt/python what it takes from PyPI.
# PYTHON is this machine's interpreter of a checkout (its .venv/bin/python), whose pip fetches that.
# Does nothing if DIR is there.
#
# NEEDS the packages mmdebstrap and make.
set -euo pipefail
[ $# = 3 ] || { sed -n '4s/^# */usage: /p' "$0" >&2; exit 97; }
arch=$1 dir=$2 python=$3 here=$(dirname "$(readlink -f "$0")")
[ ! -d "$dir" ] || exit 0
rm -rf "$dir.new"
packages=$(make -s --no-print-directory -C "$here/../.." print-debian | tr -s ' ' ,)
# The variant without configuring knows no essential packages.
essential=bash,coreutils,findutils,grep,sed,mawk,tar,gzip,hostname,libc-bin,mount,util-linux,procps
essential=$essential,kmod,busybox-static,python3,netbase,base-files,base-passwd
mmdebstrap --quiet --architectures="$arch" --variant=extract \
    --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
    --include="$packages,$essential" bookworm "$dir.new"
# What postinst scripts would have made.
for each in iptables ip6tables; do
    for command in $each $each-save $each-restore; do ln -s xtables-nft-multi "$dir.new/usr/sbin/$command"; done
done
for file in passwd group; do cp "$dir.new/usr/share/base-passwd/$file.master" "$dir.new/etc/$file"; done
echo "tcpdump:x:900:900::/nonexistent:/usr/sbin/nologin" >>"$dir.new/etc/passwd"
echo "tcpdump:x:900:" >>"$dir.new/etc/group"
ln -s mawk "$dir.new/usr/bin/awk"
ln -s gcc "$dir.new/usr/bin/cc"
case $arch in arm64) machine=aarch64 ;; *) machine=$arch ;; esac
wanted=$("$python" - <<'PY'
from importlib.metadata import requires
print(*[each.split(";")[0].replace(" ", "") for each in requires("srcip") if "extra ==" not in each])
print("pytest hypothesis trustme")
PY
)
# shellcheck disable=SC2086  # a list
"$python" -m pip install --quiet --target "$dir.new/opt/python" --only-binary=:all: \
    --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none \
    --platform any --platform "manylinux2014_$machine" --platform "manylinux_2_17_$machine" \
    --platform "manylinux_2_28_$machine" $wanted
mv "$dir.new" "$dir"
