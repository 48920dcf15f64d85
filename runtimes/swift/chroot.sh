#!/usr/bin/env bash
# A Debian trixie with Swift in a folder, for Linux machines that have no Swift of their own.
#
#   runtimes/swift/chroot.sh make                       makes it where it is missing (2 minutes, 3.5 GB; root, debootstrap, network)
#   runtimes/swift/chroot.sh run COMMAND...             runs a command inside, in the same folder, without network
#
# The folder is LIME_EDGE_SWIFT_CHROOT, else build/swift-chroot; the mirror is DEBIAN_MIRROR, else that of this machine's apt sources. Mounts (this checkout, /proc, /dev) live in a namespace of
# the command's own and are gone with it: removing the folder removes nothing else.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
folder="${LIME_EDGE_SWIFT_CHROOT:-$root/build/swift-chroot}"
packages=(swiftlang swiftlang-dev libonnxruntime-dev libc6-dev libstdc++-14-dev)

fail() {
    echo "no Swift here: $1" >&2
    exit 4
}

make_chroot() {
    [ -e "$folder/.complete" ] && return
    [ "$(id -u)" = 0 ] || fail "the chroot ($folder) is missing and only root can make one (sudo $0 make)"
    command -v debootstrap >/dev/null || fail "debootstrap is missing (apt-get install debootstrap)"
    command -v unshare >/dev/null || fail "unshare is missing (apt-get install util-linux)"
    local mirror
    mirror="$("$root/tools/debian_mirror.sh")" || fail "no Debian mirror in the apt sources of this machine: set DEBIAN_MIRROR to one"
    mkdir -p "$(dirname "$folder")"
    rm -rf --one-file-system "$folder"
    echo "== a Debian trixie with Swift in $folder"
    debootstrap --variant=minbase trixie "$folder" "$mirror" >"$folder.log" 2>&1 || { tail -n 5 "$folder.log" >&2; fail "debootstrap failed, see $folder.log"; }
    inside "$folder" "export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && apt-get install -qq -y --no-install-recommends ${packages[*]} && apt-get clean" \
        >>"$folder.log" 2>&1 || { tail -n 5 "$folder.log" >&2; fail "apt-get failed in the chroot, see $folder.log"; }
    touch "$folder/.complete"
}

# inside FOLDER COMMAND [UNSHARE OPTION...]: a shell command in the chroot.
inside() {
    local place="$1" command="$2"
    shift 2
    mkdir -p "$folder$place"
    unshare --mount --propagation private "$@" bash -c '
        mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" || exit 4
        [ "$2" = "$1" ] || { mount --bind "$3" "$1$3" || exit 4; }
        [ "$2" = "$1" ] && cd / || cd "$2"
        [ "$2" = "$1" ] && set -- "$1" / "$3" "$4"
        exec chroot "$1" /bin/bash -c "cd \"\$1\" && eval \"\$2\"" bash "$2" "$4"' bash "$folder" "$place" "$root" "$command"
}

case "${1:-}" in
    make) make_chroot ;;
    run)
        shift
        [ -e "$folder/.complete" ] || fail "the chroot ($folder) is missing ($0 make)"
        [ "$(id -u)" = 0 ] || fail "only root can enter a chroot"
        mkdir -p "$folder$root"
        inside "$PWD" "$(printf '%q ' "$@")" --net
        ;;
    *) sed -n '2,8p' "$0"; exit 2 ;;
esac
