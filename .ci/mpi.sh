#!/usr/bin/env bash
# Installs what the member `mpi` is built with and runs under, on Debian: MPI, and
# libclang for its bindings.
set -euo pipefail

packages=(libopenmpi-dev openmpi-bin libclang-dev)
if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
fi
mpirun --version | head -n 1
