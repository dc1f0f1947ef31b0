#!/usr/bin/env bash
# The routes as curl sees them: statuses, headers, a stream.
set -euo pipefail
auth=(-H "authorization: Bearer $API_KEY")
json=(-H 'content-type: application/json')
expect() { [ "$1" = "$2" ] || { echo "$3: got $1, expected $2"; exit 1; }; }
code() { curl -s -o /dev/null -w '%{http_code}' "$@"; }
expect "$(code "$BASE/health")" 200 health
expect "$(code "$BASE/")" 200 page
expect "$(code "$BASE/engine/state")" 401 "state without key"
expect "$(code "${auth[@]}" "$BASE/engine/state")" 200 state
expect "$(code "${auth[@]}" "$BASE/v1/models")" 200 models
expect "$(code "${auth[@]}" "$BASE/nothing")" 404 "unknown route"
expect "$(code "${auth[@]}" "$BASE/v1/completions")" 405 method
expect "$(code "${auth[@]}" -H 'content-type: text/plain' -d '{}' "$BASE/v1/completions")" 415 type
chat='{"model":"arith","messages":[{"role":"user","content":"2+3="}],"temperature":0,"stream":true}'
stream=$(curl -sN "${auth[@]}" "${json[@]}" -d "$chat" "$BASE/v1/chat/completions")
expect "$(tail -n1 <<<"$stream")" 'data: [DONE]' "end of stream"
headers=$(curl -sI -X GET "$BASE/" | tr -d '\r')
grep -qi "^content-security-policy: default-src 'none'" <<<"$headers" || { echo "no policy"; exit 1; }
