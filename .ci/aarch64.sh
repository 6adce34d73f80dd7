#!/usr/bin/env bash
# Compiles the CPU kernel for aarch64 and checks it under an emulator. Needs g++ for aarch64 and qemu-user, and installs them where it may.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } > /dev/null; then
  as_root=()
  [[ $(id -u) == 0 ]] || as_root=(sudo)
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends g++-aarch64-linux-gnu qemu-user
fi

mkdir -p build/aarch64
# Whatever in csrc/cpu is free of ATen: the kernel, not the operators that call it.
mapfile -t sources < <(grep -LE '#include <(ATen|c10|torch)' csrc/cpu/*.cpp)
((${#sources[@]} > 0)) || { echo "csrc/cpu holds no source without ATen"; exit 1; }
echo "aarch64: ${sources[*]}"
aarch64-linux-gnu-g++ -std=c++17 -O3 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -static \
  tests/kernel/check_chunk_kernel.cpp "${sources[@]}" -o build/aarch64/check_chunk_kernel
qemu-aarch64 build/aarch64/check_chunk_kernel
