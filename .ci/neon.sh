#!/usr/bin/env bash
# Checks that the crate compiles for AArch64, and runs the tests of the SIMD layer
# there under QEMU, on Debian for x86-64. Installs what is missing; needs cargo.
set -euo pipefail
cd "$(dirname "$0")/.."

# Debian's second compiler is the one that has an arm64 standard library. The
# emulated program uses the C library of libc6:arm64, not the one for
# cross-linking: together the two hang.
packages=(
    rustc-web libstd-rust-web-dev:arm64 libc6:arm64
    gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
)
if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    dpkg --add-architecture arm64
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
fi

# Flags meant for the host's CPU do not fit here.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
export RUSTC=/usr/bin/rustc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64-static
# Many tests panic on purpose, and a backtrace takes the emulator seconds.
export RUST_BACKTRACE=0
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/neon
cargo check --locked --lib --target aarch64-unknown-linux-gnu
# Above the SIMD layer nothing depends on the CPU: it is built alone.
cargo test --locked --package simd-alone --target aarch64-unknown-linux-gnu
