#!/bin/sh
# Puts the native library into priv/. Run by the compile hook of rebar.config; costs about 0.1 s when nothing
# has changed.
#
#   ERLMCP_NATIVE_BUILD=1        build with cargo, and fail without it
#   ERLMCP_NATIVE_BUILD=0        never build with cargo
#   ERLMCP_NATIVE_PREBUILT=FROM  take a prebuilt library from FROM, a folder (an absolute path) or an
#                                address (http or https)
#   ERLMCP_NATIVE_TARGET=TRIPLE  the target of the prebuilt library; by default that of the Erlang VM
#
# A prebuilt library is taken only if native/prebuilt.sha256 has its sum. If none is taken, cargo builds the
# library. Without cargo the application is compiled without the library, and runs its pure-Erlang registry.
# A library in priv/ from other sources is removed then.
#
# A new library is complete and verified before it is renamed into place. A node that has the old one mapped
# keeps it.
set -eu

cd "$(dirname "$0")/.."
. native/library.sh

# Mix names the folder in which it expects the compiled application.
application=${REBAR_BARE_COMPILER_OUTPUT_DIR:-.}
# The VM looks for .so on every Unix.
library=$application/priv/erlmcp_nif.so
# A sum of the sources that the library in priv/ is for.
stamp=$application/priv/erlmcp_nif.source
new=

say() {
    echo "erlmcp_native: $*" >&2
}

source_sum() {
    find Cargo.toml Cargo.lock .cargo native -type f \( -name '*.rs' -o -name '*.toml' -o -name Cargo.lock \) |
        LC_ALL=C sort | xargs cat | cksum
}

# Names a new file on the file system of priv/, which may be a link, and outside of it.
begin_new() {
    mkdir -p "$application/priv"
    new=$(dirname "$(cd "$application/priv" && pwd -P)")/.erlmcp_nif.so.$$
    trap 'rm -f "$new" "$new.source"' EXIT
    rm -f "$new"
    trap 'exit 1' HUP INT TERM
}

install_new() {
    chmod 755 "$new"
    # Until the new stamp is in place, the library counts as one of other sources.
    source_sum >"$new.source"
    cmp -s "$new.source" "$stamp" || : >"$stamp"
    mv -f "$new" "$library"
    mv -f "$new.source" "$stamp"
}

# Writes the file at an address to $new. Sets $reason on failure. BusyBox's wget verifies no certificates, so
# without curl OTP's client is used.
download() {
    if command -v curl >/dev/null 2>&1; then
        protocols='=http,https'
        [ "${1#https:}" = "$1" ] || protocols='=https'
        errors=$(curl --fail --silent --show-error --location --proto "$protocols" --proto-redir "$protocols" \
            --connect-timeout 30 --speed-limit 1 --speed-time 30 --output "$new" "$1" 2>&1) && return 0
    else
        errors=$(escript native/download.escript "$1" "$new" 2>&1) && return 0
    fi
    reason=$(echo "$errors" | head -n 1)
    return 1
}

# Puts the prebuilt library of this target into priv/. Sets $reason on failure.
take_prebuilt() {
    if ! library_sum /dev/null >/dev/null; then
        reason="neither sha256sum, shasum nor sha256 is on the PATH"
        return 1
    fi
    if ! target=$(library_target); then
        reason="erl does not tell the target of this machine"
        return 1
    fi
    name=$(library_name "$target")
    expected=$(library_expected_sum "$name")
    if [ -z "$expected" ]; then
        reason="$library_manifest has no sum for $name"
        return 1
    fi
    if [ -f "$library" ] && [ "$(library_sum "$library")" = "$expected" ]; then
        source_sum | cmp -s - "$stamp" || source_sum >"$stamp"
        return 0
    fi

    begin_new
    # Without a password that the address may contain.
    from=$(echo "${ERLMCP_NATIVE_PREBUILT%/}/$name" | sed 's|^\([a-z]*://\)[^/@]*@|\1|')
    case $ERLMCP_NATIVE_PREBUILT in
    http://* | https://*)
        if ! download "${ERLMCP_NATIVE_PREBUILT%/}/$name"; then
            reason="$reason ($from)"
            return 1
        fi
        ;;
    /*)
        if ! errors=$(cp "$ERLMCP_NATIVE_PREBUILT/$name" "$new" 2>&1); then
            reason=$(echo "$errors" | head -n 1)
            return 1
        fi
        ;;
    *)
        reason="ERLMCP_NATIVE_PREBUILT is neither an absolute path nor an http(s) address: $ERLMCP_NATIVE_PREBUILT"
        return 1
        ;;
    esac
    sum=$(library_sum "$new")
    if [ "$sum" != "$expected" ]; then
        reason="$from has the SHA-256 $sum, but $library_manifest says $expected"
        return 1
    fi
    install_new
    say "took the prebuilt library $from; its SHA-256 is that of $library_manifest"
}

# Cargo itself says where the library is: right for any target directory, triple and profile.
build() {
    if ! messages=$(cargo build --locked --release -p erlmcp_nif --message-format=json-render-diagnostics); then
        say "cargo could not build the native library. Rust 1.91 or newer is needed (https://rustup.rs);" \
            "ERLMCP_NATIVE_BUILD=0 compiles without the library"
        exit 1
    fi
    built=$(printf '%s\n' "$messages" |
        sed -n '/"reason":"compiler-artifact".*"name":"erlmcp_nif"/s/.*"filenames":\["\([^"]*\)".*/\1/p' |
        tail -n 1)
    if [ ! -f "$built" ]; then
        say "cargo built no library for erlmcp_nif"
        exit 1
    fi
    if ! cmp -s "$built" "$library" || ! source_sum | cmp -s - "$stamp"; then
        begin_new
        cp "$built" "$new"
        install_new
    fi
}

# $1: why cargo does not build it.
do_without() {
    if [ -f "$library" ] && [ ! -f "$stamp" ]; then
        say "$1; keeps $library, which was put there by hand"
        return 0
    fi
    if [ -f "$library" ] && source_sum | cmp -s - "$stamp"; then
        say "$1; keeps $library, which is for these sources"
        return 0
    fi
    removed=
    if [ -f "$library" ]; then
        removed=" The library of other sources in priv/ was removed."
        rm -f "$library" "$stamp"
    fi
    say "compiled without the native library, because $1.$removed The application runs the pure-Erlang registry" \
        "(mode current): one gen_server, without connections, limits and admission control. To get the library," \
        "install Rust 1.91 or newer (https://rustup.rs) or set ERLMCP_NATIVE_PREBUILT, then: rebar3 clean -a," \
        "rebar3 compile (with Mix: mix deps.compile --force erlmcp_native)"
}

case ${ERLMCP_NATIVE_BUILD:-} in
'' | 0) ;;
1)
    if ! command -v cargo >/dev/null 2>&1; then
        say "ERLMCP_NATIVE_BUILD is 1, but cargo is not on the PATH. Install Rust 1.91 or newer" \
            "(https://rustup.rs), then compile again"
        exit 1
    fi
    build
    exit 0
    ;;
*)
    say "ERLMCP_NATIVE_BUILD is $ERLMCP_NATIVE_BUILD; expected 1 (build with cargo), 0 (do not), or nothing"
    exit 1
    ;;
esac

if [ -n "${ERLMCP_NATIVE_PREBUILT:-}" ]; then
    take_prebuilt && exit 0
    say "no prebuilt library: $reason"
fi
if [ "${ERLMCP_NATIVE_BUILD:-}" = 0 ]; then
    do_without "ERLMCP_NATIVE_BUILD is 0"
elif ! command -v cargo >/dev/null 2>&1; then
    do_without "cargo is not on the PATH"
else
    build
fi
