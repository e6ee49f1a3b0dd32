# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# Sourced by the other scripts. They set ME, the name that stands before what they say, and LOG, the file for what they run.

# A user's PATH on Debian has no sbin, where depmod and debootstrap are.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s: %s\n' "$ME" "$*"; }

fail() {
    printf "$ME: %s\\n" "$@" >&2
    exit 1
}

# logged WHAT COMMAND...: runs the command with its output in the log, and shows the output's end if it fails.
logged() {
    local what=$1 start
    shift
    start=$(($(wc -l <"$LOG") + 1))
    printf '$ %s\n' "$*" >>"$LOG"
    "$@" </dev/null >>"$LOG" 2>&1 && return
    printf '%s: this failed: %s\n' "$ME" "$*" >&2
    tail -n "+$start" "$LOG" | tail -n 20 | sed 's/^/    /' >&2
    fail "$what" "everything that it said is in $LOG; run this again when the cause is mended"
}

# Prints where a program is. bash's `command -v` alone names files too that cannot be executed.
find_program() {
    local path
    path=$(command -v "$1") && [[ -x $path ]] && echo "$path"
}

have() { find_program "$1" >/dev/null; }

as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    else
        sudo "$@"
    fi
}

# install_packages NAME...
install_packages() {
    local with=
    if [[ $EUID -ne 0 ]]; then
        have sudo || fail "Debian packages are missing, and there is neither root nor sudo to install them" \
            "as root: apt-get install --no-install-recommends $*"
        with=" with sudo"
    fi
    say "installing Debian packages$with: $*"
    [[ -n ${LISTS_ARE_NEW:-} ]] || logged "apt-get cannot read the lists of packages: is the network up?" as_root apt-get update
    LISTS_ARE_NEW=yes
    # A machine that has just started may hold the lock for its own updates: wait for it, at most 5 minutes.
    logged "apt-get cannot install $*: is the network up?" as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
}

# ---- roots

# As default_cache() in src/qrapd/guest; the XDG Base Directory Specification wants relative paths to be ignored.
cache_directory() {
    if [[ -n ${QRAPD_CACHE:-} ]]; then
        realpath -m -- "$QRAPD_CACHE"
    elif [[ ${XDG_CACHE_HOME:-} == /* ]]; then
        echo "$XDG_CACHE_HOME/qrapd"
    else
        echo ~/.cache/qrapd
    fi
}
