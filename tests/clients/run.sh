#!/usr/bin/env bash
# Real clients against `engine serve` on builtin:arith: curl, the openai packages of Python and npm, a fuzzer, and the page in Chromium.
# Environments go to target/clients. What cannot run here (no node, no browser) is named; a failure ends with a status that is not 0.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/clients work=target/clients
engine=${ENGINE_BIN:-target/release/engine}
mkdir -p "$work"
[ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
"$work/venv/bin/python" -c 'import openai' 2>/dev/null || "$work/venv/bin/pip" install -q 'openai>=1.40,<3'
log=$work/serve.log
"$engine" serve builtin:arith --port 0 --api-key test-key --served-model-name arith >"$log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true' EXIT
base=
for _ in $(seq 100); do
    base=$(grep -oE 'http://127\.0\.0\.1:[0-9]+' "$log" | head -1 || true)
    [ -n "$base" ] && curl -fs "$base/health" >/dev/null 2>&1 && break
    kill -0 $server || { cat "$log"; exit 1; }
    sleep 0.2
done
export BASE=$base API_KEY=test-key
echo "== curl"
"$here/curl.sh"
python=$work/venv/bin/python
for part in openai_client openai_errors fuzz openai_features; do
    echo "== $part.py"
    timeout 150 "$python" "$here/$part.py"
done
if command -v node >/dev/null && command -v npm >/dev/null; then
    if [ ! -d "$work/node_modules/openai" ] || [ ! -d "$work/node_modules/puppeteer-core" ]; then
        npm install --silent --ignore-scripts --no-audit --no-fund --prefix "$work" openai@6 puppeteer-core@24
    fi
    cp "$here"/*.mjs "$work/"
    echo "== openai_client.mjs"
    timeout 60 node "$work/openai_client.mjs"
    browser=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
    if [ -n "$browser" ]; then
        echo "== page.mjs in $browser"
        CHROMIUM=$browser timeout 90 node "$work/page.mjs"
        echo "== page_rl.mjs, the page of a run that learns"
        rm -rf "$work/rl"
        "$engine" rl --serve 127.0.0.1:0 --method grpo --model builtin:arith --train-files builtin:sum --output "$work/rl" \
            --set data.train_batch_size=8 --set rollout.n=4 --set data.max_response_length=12 --set trainer.total_steps=100000 \
            --set trainer.test_freq=0 --set trainer.save_freq=0 --set trainer.val_before_train=false >"$work/rl.log" 2>&1 &
        run=$!
        trap 'kill -9 $run 2>/dev/null || true; kill $server 2>/dev/null || true; wait $server 2>/dev/null || true' EXIT
        for _ in $(seq 100); do
            rl=$(grep -oE 'http://127\.0\.0\.1:[0-9]+' "$work/rl.log" | head -1 || true)
            [ -n "$rl" ] && break
            kill -0 $run || { cat "$work/rl.log"; exit 1; }
            sleep 0.2
        done
        BASE=$rl CHROMIUM=$browser timeout 90 node "$work/page_rl.mjs"
        kill -0 $run
        kill -9 $run
    else
        echo "left out: the page, no chromium or google-chrome on the path (set CHROMIUM)"
    fi
else
    echo "left out: the openai npm package and the page, no node or npm on the path"
fi
kill -0 $server
echo "clients: passed"
