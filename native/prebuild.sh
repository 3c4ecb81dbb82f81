#!/bin/sh
# Builds the libraries that native/build.sh takes where ERLMCP_NATIVE_PREBUILT is set.
set -eu

usage() {
    cat <<'END'
usage: native/prebuild.sh [TARGET]...

Builds the native library for each target triple, by default for the machine's own, puts it into
target/prebuilt, and writes its SHA-256 into native/prebuilt.sha256, where it takes the place of those of
other versions. Publish the files of target/prebuilt in one folder, and the manifest with the sources: it
decides which libraries are trusted.

Run it on every platform, or where rustup has the target and there is a linker for it. A library for
Linux needs the C library of the machine that built it, or a later one: use the oldest.
END
}

case ${1-} in
-h | --help)
    usage
    exit 0
    ;;
esac

cd "$(dirname "$0")/.."
. native/require.sh
. native/library.sh
require_cargo
library_sum /dev/null >/dev/null || {
    echo "missing: sha256sum, shasum or sha256" >&2
    exit 1
}

host=$(rustc -vV | sed -n 's/^host: //p')
[ $# -gt 0 ] || set -- "$host"
mkdir -p target/prebuilt

status=0
for target in "$@"; do
    if [ ! -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
        echo "$target is not installed: rustup target add $target" >&2
        status=1
        continue
    fi
    # The machine's own library may have been built already, by the compile hook.
    folder=target/release
    set --
    if [ "$target" != "$host" ]; then
        folder=target/$target/release
        set -- --target "$target"
    fi
    if ! CARGO_TARGET_DIR=target cargo build --locked --release -p erlmcp_nif "$@"; then
        echo "cargo could not build for $target; it may need a linker for that target" >&2
        status=1
        continue
    fi
    case $target in
    *-apple-*) built=$folder/liberlmcp_nif.dylib ;;
    *) built=$folder/liberlmcp_nif.so ;;
    esac
    name=$(library_name "$target")
    cp "$built" "target/prebuilt/$name.$$"
    mv -f "target/prebuilt/$name.$$" "target/prebuilt/$name"

    # Comments, the other targets of this version and NIF version, and this one.
    sum=$(library_sum "target/prebuilt/$name")
    prefix=$(library_name "")
    {
        sed -n '/^#/p' "$library_manifest"
        {
            awk -v name="$name" -v prefix="${prefix%.so}" \
                '!/^#/ && index($2, prefix) == 1 && $2 != name' "$library_manifest"
            echo "$sum  $name"
        } | LC_ALL=C sort -k 2
    } >"$library_manifest.$$"
    mv -f "$library_manifest.$$" "$library_manifest"
    echo "target/prebuilt/$name $sum"
done
exit "$status"
