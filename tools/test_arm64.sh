#!/usr/bin/env bash
# The runtime's tests on arm64, emulated: a Debian bookworm root with the real aarch64 wheels and no torch.
#
#   sudo tools/test_arm64.sh [PYTEST ARGUMENT ...]     builds what build/arm64/ lacks, then runs the tests
#   sudo tools/test_arm64.sh remote                    the root as a device that is reached by ssh: bench --on and the rest
#
# The first run makes the root (debootstrap) and the virtual environment in it; later ones reuse both, and only build
# this project's wheel anew, with the root's own gcc as on a Raspberry Pi, and install it. `rm -rf build/arm64` starts
# over. Bundles and what torch says about them are made on the host by tools/prebuild_bundles.py, because there is no
# torch in the root.
#
#   HOST_PYTHON     a Python with lime-edge[onnx,export] installed (default: .venv/bin/python, which `make test` makes)
#   DEBIAN_MIRROR   where debootstrap fetches Debian (default: the mirror in this machine's apt sources)
set -euo pipefail
cd "$(dirname "$0")/.."

SELF=$PWD/tools/test_arm64.sh
SUITE=bookworm
WORK=$PWD/build/arm64
ROOT=$WORK/root
HOST_PYTHON=${HOST_PYTHON:-.venv/bin/python}
BINFMT=/proc/sys/fs/binfmt_misc

# Processors that qemu plays, with their lines of /proc/cpuinfo: implementer's part number, then features. ONNX Runtime
# picks its kernels by them, and the host's x86 lines make it crash.
PI5=cortex-a76 PI4=cortex-a72
declare -A PART=([$PI5]="0x4 0xd0b" [$PI4]="0x0 0xd08") FEATURES=(
    [$PI5]="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
    [$PI4]="fp asimd evtstrm crc32 cpuid"
)
# What runs there, on a Raspberry Pi 5's processor; what compares numbers also on a Pi 4's, which has no dot products.
# Every other file of tests/ needs torch, transformers or the exporter, or checks the sources.
FILES=(test_experts.py test_bundle.py test_generate.py test_session.py test_golden.py test_operators_on_device.py
    test_examples.py test_cli.py)
PI4_FILES=(tests/test_golden.py tests/test_operators_on_device.py)
# Tests of those files that are left out, and why. The exporter is not part of a device:
EXPORTER_TESTS=(
    test_cli.py::test_export_then_run
    test_cli.py::test_bad_export_options_are_refused
    test_cli.py::test_an_unknown_fold_is_refused_before_the_model_is_read
    test_cli.py::test_what_is_no_adapter_is_named_in_one_message
    test_cli.py::test_an_adapter_for_another_model_is_refused
    test_cli.py::test_all_faults_of_a_model_are_reported_at_once
    test_cli.py::test_models_we_cannot_build_are_refused
    test_cli.py::test_a_missing_tokenizer_is_refused
    test_cli.py::test_a_full_disk_leaves_nothing
    test_cli.py::test_a_read_only_place_is_refused
    test_cli.py::test_an_encoder_is_exported_and_opened
)
# The process that the kernel measures is qemu, with the code it has translated so far, which grows for minutes:
MEMORY_TESTS=(
    test_session.py::test_ten_thousand_switches_keep_memory_flat
    test_session.py::test_a_hundred_experts_cost_their_bytes
)

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit "${2:-4}"; }

check_host() {
    [ "$(id -u)" = 0 ] || die "mounting and chroot need root: sudo tools/test_arm64.sh"
    local missing=()
    command -v debootstrap >/dev/null || missing+=(debootstrap)
    command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user-static)
    [ ${#missing[@]} = 0 ] || die "not installed: ${missing[*]}; apt-get install ${missing[*]}"
    command -v "$HOST_PYTHON" >/dev/null || die "$HOST_PYTHON: no such Python; run 'make test' first or set HOST_PYTHON"
}

# Mounts live in a mount namespace of this script's own: they end with it, however it ends.
enter_namespace() {
    [ -n "${LIME_EDGE_NAMESPACE:-}" ] && return
    LIME_EDGE_NAMESPACE=1 exec unshare --mount --propagation private "$SELF" "$@"
}
MOUNTED=()
mount_on() { mount "${@:2}" "$1"; MOUNTED+=("$1"); }
unmount() {
    local index
    for ((index = ${#MOUNTED[@]} - 1; index >= 0; index--)); do
        umount "${MOUNTED[index]}" || umount --lazy "${MOUNTED[index]}" || true
    done
    MOUNTED=()
}
trap unmount EXIT

# Flag F: the kernel keeps qemu open, so the root needs no copy of it. Where binfmt_misc was mounted already, what is
# registered stays registered, as after installing the package on a machine with systemd.
register_qemu() {
    [ -e $BINFMT/register ] || mount_on $BINFMT -t binfmt_misc binfmt_misc
    if [ ! -e $BINFMT/qemu-aarch64 ]; then
        say "register qemu-aarch64-static for arm64 programs"
        local magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
        local mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
        echo ":qemu-aarch64:M::$magic:$mask:$(command -v qemu-aarch64-static):F" >$BINFMT/register
    fi
    grep -q '^flags:.*F' $BINFMT/qemu-aarch64 ||
        die "qemu-aarch64 is registered without flag F; echo -1 > $BINFMT/qemu-aarch64 and run this again"
}

# A root that is half built has another name, so that it is never mistaken for a whole one; one without a compiler was
# made by an earlier version of this script.
build_root() {
    [ -x "$ROOT/usr/bin/gcc" ] && say "root: $ROOT (kept from an earlier run)" && return
    local mirror packages=python3,python3-venv,python3-pip,ca-certificates,gcc,libc6-dev
    mirror=$(tools/debian_mirror.sh) || die "no Debian mirror in the apt sources of this machine: set DEBIAN_MIRROR to one"
    say "debootstrap $SUITE arm64 into $ROOT (minutes; log: $WORK/debootstrap.log)"
    rm -rf --one-file-system "$ROOT" "$ROOT.part"
    debootstrap --arch=arm64 --variant=minbase --include=$packages $SUITE "$ROOT.part" "$mirror" \
        >"$WORK/debootstrap.log" 2>&1 ||
        die "debootstrap failed: $(tail -n 3 "$WORK/debootstrap.log")"
    mv "$ROOT.part" "$ROOT"
}

mount_root() {
    mount_on "$ROOT/proc" -t proc proc
    mount_on "$ROOT/sys" -t sysfs -o ro sysfs
    mount_on "$ROOT/dev" --bind /dev
    mount_on "$ROOT/tmp" -t tmpfs -o size=2g tmpfs
    : >"$WORK/cpuinfo"
    mount_on "$ROOT/proc/cpuinfo" --bind "$WORK/cpuinfo"
    choose_processor $PI5
    # What pip needs to reach the package index from inside as this machine does from outside.
    cp -L /etc/resolv.conf "$ROOT/etc/resolv.conf"
    cp -L /etc/ssl/certs/ca-certificates.crt "$ROOT/etc/ssl/certs/ca-certificates.crt"
}

choose_processor() {
    local index variant part
    read -r variant part <<<"${PART[$1]}"
    export QEMU_CPU=$1
    for ((index = 0; index < $(nproc --all); index++)); do
        printf 'processor\t: %d\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' "$index" "${FEATURES[$1]}"
        printf 'CPU variant\t: %s\nCPU part\t: %s\nCPU revision\t: 1\n\n' "$variant" "$part"
    done >"$WORK/cpuinfo"
}

in_root() {
    local variable keep=()
    for variable in HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do
        [ -n "${!variable:-}" ] && keep+=("$variable=${!variable}")
    done
    chroot "$ROOT" /usr/bin/env -i PATH=/venv/bin:/usr/bin:/bin HOME=/root LC_ALL=C.UTF-8 OMP_NUM_THREADS=1 \
        PIP_CERT=/etc/ssl/certs/ca-certificates.crt QEMU_CPU="$QEMU_CPU" "${keep[@]}" "$@"
}

install_packages() {
    [ -x "$ROOT/venv/bin/pip" ] || { say "make /venv in the root"; in_root python3 -m venv /venv; }
    say "build this project's wheel in the root"
    rm -rf "$ROOT/source" "$ROOT/wheel"
    mkdir -p "$ROOT/source"
    cp -r pyproject.toml README.md LICENSE lime_edge exporters runtimes "$ROOT/source"
    find "$ROOT/source" -name '*.so' -delete # the host's, of an editable install
    in_root pip wheel --quiet --no-deps --wheel-dir /wheel /source
    local wheel
    wheel=$(basename "$ROOT"/wheel/*.whl)
    mkdir -p dist
    cp "$ROOT/wheel/$wheel" dist/
    say "install $wheel with its [onnx] extra, pytest and psutil from the package index"
    in_root pip install --quiet --only-binary :all: "/wheel/$wheel[onnx]" 'pytest>=8' psutil
    in_root pip install --quiet --force-reinstall --no-deps "/wheel/$wheel" # the version may be the same
    in_root python -c 'import lime_edge.runtimes.onnx.operators as o; print("operators:", o.find_library() or exit(1))' ||
        die "the wheel has no operators: 'pip wheel -v /source' in the root shows what gcc says" 3
    in_root pip list --format freeze | tee "$WORK/packages.txt"
    say "what lime-edge doctor says in the root"
    in_root lime-edge doctor
    ! grep -qiE '^(torch|transformers|onnx)=' "$WORK/packages.txt" || die "torch, transformers or onnx came along" 3
}

copy_tests() {
    say "prebuild bundles and golden values on the host"
    rm -rf "$ROOT/project"
    mkdir -p "$ROOT/project"
    OMP_NUM_THREADS=1 "$HOST_PYTHON" tools/prebuild_bundles.py "$ROOT/project/prebuilt"
    cp -r tests examples pyproject.toml "$ROOT/project"
}

run_tests() {
    local name deselect=() files=()
    for name in "${EXPORTER_TESTS[@]}" "${MEMORY_TESTS[@]}"; do
        grep -q "^def ${name#*::}(" "tests/${name%::*}" || die "no such test: $name; correct the lists in $SELF" 3
        deselect+=(--deselect "tests/$name")
    done
    for name in "${FILES[@]}"; do files+=("tests/$name"); done
    say "run on $(in_root uname -m), $PI5: ${files[*]}"
    say "left out, because they run the exporter: ${EXPORTER_TESTS[*]}"
    say "left out, because qemu's own memory is counted: ${MEMORY_TESTS[*]}"
    run_pytest "${files[@]}" "${deselect[@]}" "$@"
    choose_processor $PI4
    say "run on $(in_root uname -m), $PI4: ${PI4_FILES[*]}"
    run_pytest "${PI4_FILES[@]}"
}
run_pytest() {
    in_root LIME_EDGE_PREBUILT=/project/prebuilt \
        sh -c 'cd /project && exec python -m pytest -rs --durations=5 "$@"' sh "$@"
}

check_host
enter_namespace "$@"
mkdir -p "$WORK"
register_qemu
build_root
mount_root
if [ "${1:-}" = remote ]; then # sshd runs here and logs in there; lime-edge makes its own environment in the root
    export LIME_EDGE_ARM64_ROOT=$ROOT
    "$HOST_PYTHON" -m pytest -q -rs -n0 -s tests/test_remote_arm64.py
    exit
fi
install_packages
copy_tests
run_tests "$@"
