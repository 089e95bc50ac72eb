#!/usr/bin/env bash
# The C++ core under the address and undefined-behaviour sanitizers, and its threads under the thread sanitizer.
# Usage: csrc/sanitize.sh [PYTHON]; with a PYTHON that has pybind11 and numpy, the bindings too. Under two minutes.
set -euo pipefail
cd "$(dirname "$0")"
python=${1:-}
cxx=${CXX:-g++}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
warnings=(-Wall -Wextra -Wshadow -Wconversion -Werror)
common=(-std=c++17 -O1 -g1 -fno-omit-frame-pointer -ffp-contract=off -I. -pthread)
memory=(-fsanitize=address,undefined -fno-sanitize-recover=all)

builds=()
"$cxx" "${common[@]}" "${warnings[@]}" "${memory[@]}" tests/test_core.cpp -o "$out/memory" & builds+=($!)
"$cxx" "${common[@]}" -fsanitize=thread tests/test_core.cpp -o "$out/threads" & builds+=($!)
if [[ -n $python ]]; then
    includes=$("$python" -c 'import pybind11, sysconfig; print("-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include"))')
    # shellcheck disable=SC2086
    "$cxx" "${common[@]}" "${memory[@]}" $includes -fvisibility=hidden -shared -fPIC bindings.cpp -o "$out/_C.so" &
    builds+=($!)
fi
for build in "${builds[@]}"; do wait "$build"; done

ASAN_OPTIONS=detect_stack_use_after_return=1 "$out/memory"
ORZ_AVX2=1 "$out/memory"
ORZ_SCALAR=1 "$out/memory"
"$out/threads"
if [[ -n $python ]]; then
    # The interpreter is not instrumented: its sanitizer must come first, and what it leaks at exit is its own.
    LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0 "$python" tests/drive_bindings.py "$out/_C.so"
fi
