#!/usr/bin/env bash
# Builds the crate for WebAssembly with its SIMD instructions and holds some kernels
# against their definitions there, under Node. Installs what is missing; needs rustup.
set -euo pipefail
cd "$(dirname "$0")/.."

target=wasm32-unknown-unknown
if ! rustup target list --installed | grep -qx "$target" && ! rustup target add "$target"; then
    echo "NOT RUN: rustup cannot fetch $target here"
    exit 0
fi
if ! command -v node >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends nodejs >/dev/null
fi

# Flags meant for the host's CPU do not fit here. What counts is that it runs: the
# library builds in a fraction of the time without optimisation.
unset CARGO_ENCODED_RUSTFLAGS
export CARGO_PROFILE_DEV_OPT_LEVEL=0 CARGO_PROFILE_DEV_DEBUG=false
RUSTFLAGS="-C target-feature=+simd128" cargo build --locked --target "$target" --package wasm-alone
node - "${CARGO_TARGET_DIR:-target}/$target/debug/wasm_alone.wasm" <<'JS'
const bytes = require("fs").readFileSync(process.argv[2]);
WebAssembly.instantiate(bytes, {}).then(({ instance }) => {
    const kernels = Object.entries(instance.exports).filter(([, kernel]) => typeof kernel === "function");
    const found = kernels.filter(([name]) => !name.startsWith("__")).map(([name, kernel]) => {
        const off = kernel();
        console.log(`${name}: off by a share of ${off.toExponential(1)}`);
        return off < 1e-5;
    });
    if (found.length !== 4 || found.includes(false)) process.exit(1);
});
JS
