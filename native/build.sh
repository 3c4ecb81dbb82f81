#!/bin/sh
# Builds the NIF with cargo and puts it into priv/ of this application, renamed into place so that a
# node that has the old library mapped keeps it. Run by the compile hook of rebar.config; costs
# about 0.1 s when nothing has changed.
set -eu

cd "$(dirname "$0")/.."

if ! command -v cargo >/dev/null 2>&1; then
    echo "erlmcp_native: cargo is not on the PATH. The NIF is written in Rust: install Rust 1.91 or" >&2
    echo "newer (https://rustup.rs), then compile again." >&2
    exit 1
fi

# Cargo itself says where the library is: right for any target directory, triple and profile.
messages=$(cargo build --locked --release -p erlmcp_nif --message-format=json-render-diagnostics)
library=$(printf '%s\n' "$messages" |
    sed -n '/"reason":"compiler-artifact".*"name":"erlmcp_nif"/s/.*"filenames":\["\([^"]*\)".*/\1/p' |
    tail -n 1)
if [ ! -f "$library" ]; then
    echo "erlmcp_native: cargo built no library for erlmcp_nif" >&2
    exit 1
fi

# The VM looks for .so on every Unix.
target=priv/erlmcp_nif.so
mkdir -p priv
if ! cmp -s "$library" "$target"; then
    cp "$library" "$target.$$"
    mv -f "$target.$$" "$target"
fi
