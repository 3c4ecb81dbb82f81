# What a script needs before it can begin. To be sourced by a POSIX shell.
#
#   require_all WHAT:PACKAGE...
#
# WHAT is a command, or the path of a file (it may be a pattern); PACKAGE is the Debian package that
# brings it. What is missing is named and installed with apt-get: by root directly, else with sudo.
# Nothing is asked, updated or installed where nothing is missing. Without apt-get only the commands
# are looked for, and the script ends with a message that names those missing.
#
#   require_cargo
#
# cargo comes from rustup and is not installed here.

# Whether the command or a file of the pattern is there.
require_is_there() {
    case $1 in
    /*)
        for require_file in $1; do
            [ -e "$require_file" ] && return 0
        done
        # Elsewhere headers and certificates have other places.
        ! command -v apt-get >/dev/null 2>&1
        ;;
    *)
        command -v "$1" >/dev/null 2>&1
        ;;
    esac
}

require_all() {
    require_packages=
    for require_pair in "$@"; do
        require_is_there "${require_pair%:*}" && continue
        require_package=${require_pair##*:}
        case " $require_packages " in
        *" $require_package "*) ;;
        *) require_packages="$require_packages $require_package" ;;
        esac
    done
    [ -z "$require_packages" ] && return 0

    require_install="apt-get install -y --no-install-recommends$require_packages"
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "missing:$require_packages (the names of Debian's packages); please install them" >&2
        return 1
    fi
    if [ "$(id -u)" -eq 0 ]; then
        require_sudo=
    elif command -v sudo >/dev/null 2>&1; then
        require_sudo=sudo
    else
        echo "missing:$require_packages; as root: apt-get update && $require_install" >&2
        return 1
    fi
    echo "missing:$require_packages; installing (apt-get update, then $require_install)" >&2
    # With sudo's environment: it may drop ours.
    require_quietly $require_sudo env DEBIAN_FRONTEND=noninteractive apt-get update &&
        require_quietly $require_sudo env DEBIAN_FRONTEND=noninteractive $require_install
}

require_cargo() {
    if ! command -v cargo >/dev/null 2>&1 && [ -x "$HOME/.cargo/bin/cargo" ]; then
        PATH=$HOME/.cargo/bin:$PATH
        export PATH
    fi
    if ! command -v cargo >/dev/null 2>&1; then
        echo "missing: cargo. Install Rust 1.91 or newer: https://rustup.rs" >&2
        return 1
    fi
}

# Runs a command. Shows what it printed only if it failed.
require_quietly() {
    require_log=$(mktemp)
    require_status=0
    "$@" >"$require_log" 2>&1 || require_status=$?
    if [ "$require_status" -ne 0 ]; then
        cat "$require_log" >&2
        echo "failed: $*" >&2
    fi
    rm -f "$require_log"
    return "$require_status"
}
