# Names, targets and sums of prebuilt libraries. To be sourced by a POSIX shell in the root folder.

library_manifest=native/prebuilt.sha256
library_version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# The interface to the VM: a VM that has this version or a later one can load the library.
library_nif_version=$(sed -n 's/.*"nif_version_\([0-9]*\)_\([0-9]*\)".*/\1.\2/p' native/erlmcp_nif/Cargo.toml)

# The file of a target triple.
library_name() {
    echo "erlmcp_nif-$library_version-nif-$library_nif_version-$1.so"
}

# The SHA-256 of a file, in hexadecimal.
library_sum() {
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum <"$1" | cut -c 1-64
    elif command -v shasum >/dev/null 2>&1; then
        shasum -a 256 <"$1" | cut -c 1-64
    elif command -v sha256 >/dev/null 2>&1; then
        sha256 -q "$1"
    else
        return 1
    fi
}

# The sum that the manifest has for a file name. Prints nothing if it has none.
library_expected_sum() {
    [ ! -f "$library_manifest" ] ||
        awk -v name="$1" 'length($1) == 64 && $2 == name { print $1; exit }' "$library_manifest"
}

# The target triple of the Erlang VM, which may differ from that of the kernel.
library_target() {
    if [ -n "${ERLMCP_NATIVE_TARGET:-}" ]; then
        echo "$ERLMCP_NATIVE_TARGET"
        return 0
    fi
    library_architecture=$(
        unset ERL_AFLAGS ERL_FLAGS ERL_ZFLAGS
        erl -noinput -boot start_clean -eval \
            'io:put_chars(erlang:system_info(system_architecture)), halt().' 2>/dev/null
    ) || return 1
    case ${library_architecture%%-*} in
    amd64) library_cpu=x86_64 ;;
    arm64) library_cpu=aarch64 ;;
    i[3-6]86) library_cpu=i686 ;;
    armv7*) library_cpu=armv7 ;;
    *) library_cpu=${library_architecture%%-*} ;;
    esac
    case $library_architecture in
    *-linux-*) echo "$library_cpu-unknown-linux-${library_architecture##*-}" ;;
    *-darwin*) echo "$library_cpu-apple-darwin" ;;
    *-freebsd*) echo "$library_cpu-unknown-freebsd" ;;
    *-netbsd*) echo "$library_cpu-unknown-netbsd" ;;
    *-openbsd*) echo "$library_cpu-unknown-openbsd" ;;
    *) echo "$library_architecture" ;;
    esac
}
