#!/usr/bin/env bash
# vmrun.sh - run a command as root under another Linux kernel, in a throw-away qemu VM.
#
#   vmrun.sh [OPTIONS] KERNEL -- COMMAND [ARG...]
#   vmrun.sh --fetch-only KERNEL...      fill the cache, boot nothing
#
# KERNEL is a version or the beginning of one, such as 6.12: the newest Debian kernel whose version
# begins so, from the suite that suite_for() names. Its packages are downloaded and extracted into
# the cache; nothing is installed. The VM's root is this machine's, shared read-only under a tmpfs:
# every program and checkout is at its usual path, and nothing that the command writes survives. It
# has no network but its own loopback.
#
# OPTIONS
#   --mem SIZE      memory, as qemu writes it                 (default 2G)
#   --timeout SEC   kill the VM after that long; exit 124     (default 300)
#   --env NAME=V    set an environment variable (may be given several times)
#   --modules "A B" modprobe these first
#   --arch ARCH     amd64 (default), or arm64; then with --root
#   --root DIR      the root file system in place of this machine's, such as foreign_root.sh makes
#   --share DIR     this machine's DIR at its own path in that root (may be given several times)
#   --stats         print the times on stderr
#
# EXIT STATUS: the command's; 124 timed out; 96 the VM ended without one (the end of its console is
# printed); 97 bad usage, or a kernel that can't be had; 98 the kernel log has a BUG, WARNING or Oops.
#
# ENVIRONMENT: VMRUN_CACHE, the cache's directory (default ${XDG_CACHE_HOME:-~/.cache}/vmrun);
# VMRUN_MIRROR and VMRUN_MIRROR_SECURITY, the Debian archives (default: this machine's).
#
# NEEDS the packages qemu-system-x86 (or qemu-system-arm) seabios busybox-static cpio kmod xz-utils
# zstd.
set -euo pipefail

VMRUN_CACHE=${VMRUN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vmrun}
INITRD_FORMAT=srcip-2        # another one when the initramfs below changes

say() { printf 'vmrun: %s\n' "$*" >&2; }
die() { say "$*"; exit 97; }
usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; }

# --- which Debian suite has which kernel (2026-11) ---------------------------
suite_for() {
    case $1 in
        5.10*) echo bullseye-security ;;
        6.1|6.1.*) echo bookworm-security ;;
        6.12*) echo bookworm-security ;;
        *) echo trixie-backports ;;       # 6.16 6.17 6.18 6.19 7.0 7.1 7.2 ...
    esac
}

# --- apt, with a state directory of its own ----------------------------------
# Neither root nor the machine's own package lists nor its dpkg lock are needed.
mirror_for() {                              # SUITE -> archive address
    local want re
    case $1 in
        *-security) want=${VMRUN_MIRROR_SECURITY:-} re='Debian-Security$' ;;
        *)          want=${VMRUN_MIRROR:-}          re='Debian$' ;;
    esac
    [ -n "$want" ] || want=$(apt-get indextargets --format '$(REPO_URI) $(LABEL)' \
        'Created-By: Packages' 'Origin: Debian' | grep -E " $re" | head -n1 | cut -d' ' -f1)
    [ -n "$want" ] || die "no Debian archive known for $1: set VMRUN_MIRROR (or VMRUN_MIRROR_SECURITY)"
    printf '%s\n' "$want"
}

apt_dir() { printf '%s/apt/%s-%s\n' "$VMRUN_CACHE" "$1" "$ARCH"; }

apt_do() {                                  # SUITE PROGRAM ARGS...
    local dir; dir=$(apt_dir "$1"); shift
    local prog=$1; shift
    "$prog" -q -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State="$dir/state" -o Dir::State::lists="$dir/lists" \
        -o Dir::State::status=/dev/null -o Dir::Cache="$dir/cache" \
        -o APT::Sandbox::User=root -o APT::Architecture="$ARCH" "$@"
}

apt_refresh() {                             # SUITE: update its lists, at most daily
    local dir; dir=$(apt_dir "$1")
    mkdir -p "$dir/lists/partial" "$dir/state" "$dir/cache/archives/partial"
    [ -z "$(find "$dir/stamp" -mmin -1440 2>/dev/null)" ] || return 0
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
        "$(mirror_for "$1")" "$1" >"$dir/sources.list"
    apt_do "$1" apt-get update >"$dir/log" 2>&1 || { cat "$dir/log" >&2; die "apt-get update failed for $1"; }
    touch "$dir/stamp"
}

# The versions (uname -r) of a suite's kernels, oldest first.
suite_kernels() {                           # SUITE
    apt_do "$1" apt-cache search --names-only "^linux-image-[0-9]+[.][0-9]+[.][0-9].*-$ARCH\$" |
        awk '{print $1}' | sed 's/^linux-image-//' | grep -v -e -cloud- -e -rt- -e -16k- | sort -V -u
}

# The packages that PKG needs of its kernel, itself included. (From 7.2 on Debian's linux-image is
# split into linux-base, linux-binary and linux-modules.)
linux_closure() {                           # SUITE PKG
    local suite=$1 todo=$2 seen=" " p
    while [ -n "${todo// /}" ]; do
        set -- $todo; p=$1; shift; todo="$*"
        case $seen in *" $p "*) continue ;; esac
        seen="$seen$p "; printf '%s\n' "$p"
        todo="$todo $(apt_do "$suite" apt-cache depends "$p" 2>/dev/null |
            sed -n 's/^ *|\{0,1\}Depends: <\{0,1\}\([^>]*\).*/\1/p' |
            grep -E '^linux-(base-[0-9]|binary|modules)' | tr '\n' ' ' || true)"
    done
}

# --- the cache: $VMRUN_CACHE/kernels/UNAME-R/ --------------------------------
#   root/     what the packages hold, stacked over the machine's root in the VM
#   vmlinux   the kernel, uncompressed: it starts sooner; or vmlinuz where that fails
#   packages  what it was made of
extract_vmlinux() {                         # VMLINUZ OUT
    python3 - "$1" "$2" <<'PY'
import lzma, subprocess, sys, zlib
data = open(sys.argv[1], "rb").read()
def xz(d): return lzma.LZMADecompressor().decompress(d)
def zst(d): return subprocess.run(["zstd", "-dcq"], input=d, stdout=-1, stderr=-3).stdout
def gz(d): return zlib.decompressobj(31).decompress(d)
def lz4(d): return subprocess.run(["lz4", "-dcq"], input=d, stdout=-1, stderr=-3).stdout
for magic, fn in ((b"\xfd7zXZ\0", xz), (b"\x28\xb5\x2f\xfd", zst), (b"\x1f\x8b\x08", gz), (b"\x02\x21\x4c\x18", lz4)):
    at = -1
    while (at := data.find(magic, at + 1)) >= 0:
        try: out = fn(data[at:])
        except Exception: continue
        if out[:4] == b"\x7fELF" and len(out) > 1 << 20:
            open(sys.argv[2], "wb").write(out); sys.exit(0)
sys.exit(1)
PY
}

kernel_dir=''                               # set by fetch_kernel
fetch_kernel() {                            # KERNEL
    local spec=$1 suite kver tmp pkgs p alias vmlinuz
    alias=$VMRUN_CACHE/alias/$spec-$ARCH
    if [ -s "$alias" ] && [ -e "$VMRUN_CACHE/kernels/$(<"$alias")/packages" ]; then
        kernel_dir=$VMRUN_CACHE/kernels/$(<"$alias"); return
    fi
    mkdir -p "$VMRUN_CACHE/alias" "$VMRUN_CACHE/kernels" "$VMRUN_CACHE/tmp"
    exec 9>"$VMRUN_CACHE/lock"; flock 9
    suite=$(suite_for "$spec")
    apt_refresh "$suite"
    kver=$(suite_kernels "$suite" | awk -v p="$spec" \
        'index($0, p) == 1 && substr($0, length(p) + 1, 1) !~ /[0-9]/' | tail -n1)
    [ -n "$kver" ] || die "suite $suite has no kernel $spec (it has: $(suite_kernels "$suite" | tr '\n' ' '))"
    kernel_dir=$VMRUN_CACHE/kernels/$kver
    if [ ! -e "$kernel_dir/packages" ]; then
        say "fetching $kver from $suite"
        tmp=$(mktemp -d "$VMRUN_CACHE/tmp/XXXXXX")
        pkgs=$(linux_closure "$suite" "linux-image-$kver")
        (cd "$tmp" && apt_do "$suite" apt-get download $pkgs >log 2>&1) ||
            { cat "$tmp/log" >&2; die "$suite no longer has all of" $pkgs; }
        mkdir -p "$tmp/k/root"
        for p in "$tmp"/*.deb; do
            dpkg-deb -x "$p" "$tmp/k/root"
            dpkg-deb -W --showformat='${Package} ${Version}\n' "$p" >>"$tmp/k/packages"
            rm "$p"
        done
        # the machine's /lib is a link to /usr/lib, so must it be here
        if [ -d "$tmp/k/root/lib" ]; then
            mkdir -p "$tmp/k/root/usr/lib"
            cp -al "$tmp/k/root/lib/." "$tmp/k/root/usr/lib/"; rm -r "$tmp/k/root/lib"
        fi
        ln -s usr/lib "$tmp/k/root/lib"
        vmlinuz=$(find "$tmp/k/root" -name "vmlinuz-$kver" -o -path "*/modules/$kver/vmlinuz" | head -n1)
        [ -n "$vmlinuz" ] || die "no vmlinuz in $pkgs"
        # arm64 kernels are started by their own boot header, not as ELF
        [ "$ARCH" != amd64 ] || extract_vmlinux "$vmlinuz" "$tmp/k/vmlinux" ||
            say "could not uncompress $vmlinuz: slower start"
        cp "$vmlinuz" "$tmp/k/vmlinuz"
        depmod -b "$tmp/k/root" "$kver"
        # a directory must not hide the machine's; the VM needs none of these
        rm -rf "$tmp/k/root/usr/share"
        rm -rf "$kernel_dir"; mv "$tmp/k" "$kernel_dir"; rm -rf "$tmp"
    fi
    printf '%s\n' "$kver" >"$alias"
    flock -u 9; exec 9>&-
}

kernel_release() { ls "$kernel_dir/root/usr/lib/modules" | head -n1; }

# --- the initramfs: static busybox, the few modules, one script --------------
make_initrd() {                             # -> $kernel_dir/initrd-FORMAT
    local kver dir out m; kver=$(kernel_release)
    out=$kernel_dir/initrd-$INITRD_FORMAT
    [ ! -s "$out" ] || return 0
    dir=$(mktemp -d); mkdir -p "$dir"/{bin,mod,proc,sys,dev,new,low,tmp}
    if [ "$ROOT" = / ]; then cp "$(command -v busybox)" "$dir/bin/"; else cp "$ROOT/bin/busybox" "$dir/bin/"; fi
    for m in virtio_pci virtio_console overlay 9pnet_virtio 9p; do
        modprobe -S "$kver" -d "$kernel_dir/root" --show-depends "$m" 2>/dev/null |
            sed -n 's/^insmod \([^ ]*\).*/\1/p'
    done | awk '!seen[$0]++' | while read -r m; do
        # busybox' insmod doesn't decompress
        case $m in
            *.xz)  xz -dc "$m" >"$dir/mod/$(basename "$m" .xz)"; m=${m%.xz} ;;
            *.zst) zstd -dcq "$m" >"$dir/mod/$(basename "$m" .zst)"; m=${m%.zst} ;;
            *)     cp "$m" "$dir/mod/" ;;
        esac
        basename "$m" >>"$dir/mod/order"
    done
    cat >"$dir/init" <<'INIT'
#!/bin/busybox sh
# stage 1: mount the shared root, put an overlay on it, switch to it
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
fail() { echo "vmrun-init: $*" >/dev/console; sleep 0.2; poweroff -f; }
[ ! -e /mod/order ] || while read -r m; do insmod /mod/$m || echo "vmrun-init: insmod $m failed" >/dev/console; done </mod/order
share() { # TAG DIR
    mkdir -p "$2"
    mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,access=any,cache=loose "$1" "$2" ||
        fail "cannot mount share $1"
}
mount -t tmpfs -o mode=755,size=75% low /low
share kroot /low/k
share hroot /low/h
mkdir -p /low/up /low/wk
mount -t overlay -o lowerdir=/low/k:/low/h,upperdir=/low/up,workdir=/low/wk root /new || fail "cannot mount the overlay"
mkdir -p /new/proc /new/sys /new/dev /new/run /new/tmp
n=0
while read -r d; do share "share$n" "/new$d"; n=$((n + 1)); done </vmrun/shares
mount --move /proc /new/proc; mount --move /sys /new/sys; mount --move /dev /new/dev
mount -t tmpfs -o mode=755 run /new/run
cp -a /vmrun /new/run/vmrun; cp /bin/busybox /new/run/vmrun/busybox
exec switch_root /new /run/vmrun/busybox sh /run/vmrun/stage2
fail "switch_root failed"
INIT
    chmod +x "$dir/init"
    (cd "$dir" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) | gzip -1 >"$out.new.$$"
    mv "$out.new.$$" "$out"; rm -rf "$dir"
}

# --- one run -------------------------------------------------------------------
run_dir=''; pids=()
cleanup() {
    local p
    for p in ${pids[@]+"${pids[@]}"}; do kill "$p" 2>/dev/null || true; done
    [ -z "$run_dir" ] || rm -rf "$run_dir"
}

run_vm() {
    local rc n d
    make_initrd
    run_dir=$(mktemp -d /tmp/vmrun.XXXXXX); trap cleanup EXIT; trap 'exit 130' INT TERM

    # stage 2 and the command travel in a second cpio archive after the first
    mkdir -p "$run_dir/i/vmrun"
    {
        printf 'cd %q || exit 97\n' "$PWD"
        printf 'exec'; printf ' %q' "$@"; printf '\n'
    } >"$run_dir/i/vmrun/command"
    : >"$run_dir/i/vmrun/shares"
    [ ${#SHARES[@]} = 0 ] || printf '%s\n' "${SHARES[@]}" >"$run_dir/i/vmrun/shares"
    cat >"$run_dir/i/vmrun/stage2" <<'STAGE2'
# stage 2, process 1 of the VM: the usual mounts, the command, power off
bb=/run/vmrun/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root TERM=dumb LANG=C.UTF-8
$bb mkdir -p /dev/pts /dev/shm /run/lock /run/netns
$bb mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
$bb mount -t tmpfs -o mode=1777 shm /dev/shm
$bb mount -t cgroup2 cgroup2 /sys/fs/cgroup
$bb mount -t bpf bpf /sys/fs/bpf
$bb mount -t debugfs debugfs /sys/kernel/debug
$bb mount -t tracefs tracefs /sys/kernel/tracing
$bb mount -t securityfs securityfs /sys/kernel/security 2>/dev/null
$bb ln -sfn /proc/self/fd /dev/fd; $bb ln -sfn fd/0 /dev/stdin; $bb ln -sfn fd/1 /dev/stdout; $bb ln -sfn fd/2 /dev/stderr
$bb hostname vmrun; $bb ip link set lo up
ulimit -l unlimited
port() { # the virtio port named $1
    for p in /sys/class/virtio-ports/*; do
        read -r n <$p/name && [ "$n" = "$1" ] && echo /dev/${p##*/} && return
    done
    echo /dev/console
}
. /run/vmrun/env
for m in $VMRUN_MODULES; do modprobe "$m" || echo "vmrun: modprobe $m failed" >/dev/console; done
read -r up idle </proc/uptime; echo "start $up" >$(port vmrun.ctl)
# Pipes, not the ports themselves: a port can be opened only once, and programs
# do open /dev/stdout and /dev/stderr again.
$bb mkfifo /run/vmrun/o /run/vmrun/e
$bb cat /run/vmrun/o >$(port vmrun.out) & o=$!
$bb cat /run/vmrun/e >$(port vmrun.err) & e=$!
$bb setsid /bin/bash /run/vmrun/command </dev/null >/run/vmrun/o 2>/run/vmrun/e
rc=$?
# what the command left running must not keep the VM: give the pipes a second
( $bb sleep 2; kill $o $e 2>/dev/null ) & wait $o $e
read -r up idle </proc/uptime
$bb dmesg >$(port vmrun.dmesg)
printf 'end %s\nrc %s\n' "$up" "$rc" >$(port vmrun.ctl)
$bb sync; $bb poweroff -f
STAGE2
    {
        printf 'VMRUN_MODULES=%q\n' "$MODULES"
        for d in ${ENVS[@]+"${ENVS[@]}"}; do printf 'export %s=%q\n' "${d%%=*}" "${d#*=}"; done
    } >"$run_dir/i/vmrun/env"
    # each member of a concatenated initramfs must start on a 4-byte boundary
    cp "$kernel_dir/initrd-$INITRD_FORMAT" "$run_dir/initrd"
    truncate -s %512 "$run_dir/initrd"
    (cd "$run_dir/i" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >>"$run_dir/initrd"

    # thread=single: with a thread per CPU (qemu's default) the guest dies of "Oops: int3" when the
    # kernel patches its own text - static keys, kprobes - while another CPU runs there. la57:
    # five-level page tables only make the emulated page walks longer.
    # pauth-impdef: a signature that is cheap to emulate.
    local machine console=ttyS0
    case $ARCH in
        amd64) machine=(qemu-system-x86_64 -cpu "max,la57=off") ;;
        arm64) machine=(qemu-system-aarch64 -machine virt -cpu "max,pauth-impdef=on") console=ttyAMA0 ;;
    esac
    local q=("${machine[@]}" -name vmrun -nodefaults -no-user-config -display none -no-reboot -nic none
        -accel "tcg,thread=single,tb-size=512" -smp 2 -m "$MEM" -rtc base=utc,clock=host
        -initrd "$run_dir/initrd"
        -append "console=$console quiet panic=-1 oops=panic mitigations=off nokaslr rdinit=/init"
        -serial "file:$run_dir/console"
        -device virtio-serial-pci)
    if [ -s "$kernel_dir/vmlinux" ]; then q+=(-kernel "$kernel_dir/vmlinux"); else q+=(-kernel "$kernel_dir/vmlinuz"); fi
    mkfifo "$run_dir/out" "$run_dir/err"
    for n in out err ctl dmesg; do
        q+=(-chardev "file,id=$n,path=$run_dir/$n" -device "virtserialport,chardev=$n,name=vmrun.$n")
    done
    local shared=("kroot:$kernel_dir/root" "hroot:$ROOT")
    for d in "${!SHARES[@]}"; do shared+=("share$d:${SHARES[$d]}"); done
    for d in "${shared[@]}"; do
        n=${d%%:*}
        q+=(-fsdev "local,id=$n,path=${d#*:},security_model=none,multidevs=remap,readonly=on"
            -device "virtio-9p-pci,fsdev=$n,mount_tag=$n")
    done

    cat "$run_dir/out" & local cout=$!
    cat "$run_dir/err" >&2 & local cerr=$!
    pids+=("$cout" "$cerr")
    local qrc=0
    timeout --foreground -k 5 "$TIMEOUT" "${q[@]}" </dev/null >"$run_dir/qemu.log" 2>&1 || qrc=$?
    # qemu may have died before it opened the pipes
    : <>"$run_dir/out"; : <>"$run_dir/err"
    wait "$cout" "$cerr" || true

    rc=$(sed -n 's/^rc //p' "$run_dir/ctl" 2>/dev/null || true)
    [ -z "$STATS" ] || say "$(kernel_release): $(awk '/^start/ {s=$2} /^end/ {e=$2}
        END {printf "kernel to command %.1f s, command %.1f s", s, e-s}' "$run_dir/ctl")"
    if [ -z "$rc" ]; then
        if [ "$qrc" = 124 ] || [ "$qrc" = 137 ]; then
            say "timed out after $TIMEOUT s"; tail -n 15 "$run_dir/console" >&2 || true; return 124
        fi
        say "the VM gave no exit status (qemu: $qrc); the end of its console:"
        cat "$run_dir/qemu.log" >&2; tail -n 40 "$run_dir/console" >&2 || true
        return 96
    fi
    local splat='BUG:|WARNING: CPU|Oops|general protection|kernel BUG'
    if grep -qsE "$splat" "$run_dir/dmesg"; then
        say "the kernel log has:"; grep -E -A3 "$splat" "$run_dir/dmesg" | head -n 20 >&2
        return 98
    fi
    return "$rc"
}

# --- command line --------------------------------------------------------------
MEM=2G TIMEOUT=300 MODULES='' STATS='' FETCH_ONLY='' ENVS=() ARCH=amd64 ROOT=/ SHARES=()
while [ $# -gt 0 ]; do
    case $1 in
        --mem) MEM=$2; shift 2 ;;
        --timeout) TIMEOUT=$2; shift 2 ;;
        --env) ENVS+=("$2"); shift 2 ;;
        --modules) MODULES=$2; shift 2 ;;
        --arch) ARCH=$2; shift 2 ;;
        --root) ROOT=$2; shift 2 ;;
        --share) SHARES+=("$2"); shift 2 ;;
        --stats) STATS=1; shift ;;
        --fetch-only) FETCH_ONLY=1; shift ;;
        -h|--help) usage; exit 0 ;;
        -*) die "unknown option $1 (see --help)" ;;
        *) break ;;
    esac
done
if [ -n "$FETCH_ONLY" ]; then
    for k; do fetch_kernel "$k"; printf '%s %s\n' "$k" "$kernel_dir"; done
    exit 0
fi
[ $# -ge 3 ] && [ "$2" = -- ] || die "usage: vmrun.sh [OPTIONS] KERNEL -- COMMAND [ARG...] (see --help)"
KERNEL=$1; shift 2
case $ARCH in
    amd64) ;;
    arm64) [ "$ROOT" != / ] || die "--arch arm64 takes --root" ;;
    *) die "--arch $ARCH: there are amd64 and arm64" ;;
esac
fetch_kernel "$KERNEL"
rc=0; run_vm "$@" || rc=$?
exit "$rc"
