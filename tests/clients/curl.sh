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
generate='{"token_ids":[5,6],"stream":true,"sampling_params":{"max_tokens":3,"ignore_eos":true,"temperature":0}}'
stream=$(curl -sN "${auth[@]}" "${json[@]}" -d "$generate" "$BASE/inference/v1/generate")
expect "$(tail -n1 <<<"$stream")" 'data: [DONE]' "end of token stream"
expect "$(grep -c '"token_ids":\[[0-9]' <<<"$stream")" 3 "events with a token"
expect "$(grep -c '"finish_reason":"length"' <<<"$stream")" 1 "end of a choice"
whole=$(curl -s "${auth[@]}" "${json[@]}" -d "${generate/true/false}" "$BASE/inference/v1/generate")
joined=$(grep -oE '"token_ids":\[[0-9]+' <<<"$stream" | grep -oE '[0-9]+$' | paste -sd,)
grep -qF "\"token_ids\":[$joined]" <<<"$whole" || { echo "streamed tokens $joined are not those of $whole"; exit 1; }
# An answer too long to wait for, ended from outside by the name it was given.
endless='{"prompt":"1+1=","n":64,"max_tokens":200,"ignore_eos":true}'
curl -s "${auth[@]}" "${json[@]}" -H 'x-request-id: curl-1' -d "$endless" "$BASE/v1/completions" >"${TMPDIR:-/tmp}/aborted.$$" &
answer=$!
for _ in $(seq 200); do
    aborted=$(curl -s "${auth[@]}" "${json[@]}" -d '{"request_ids":["curl-1","nobody"]}' "$BASE/inference/v1/abort_requests")
    [ "$aborted" = '{"aborted":["curl-1"]}' ] && break
    expect "$aborted" '{"aborted":[]}' abort
done
expect "$aborted" '{"aborted":["curl-1"]}' "abort by name"
wait $answer
grep -q '"finish_reason":"abort"' "${TMPDIR:-/tmp}/aborted.$$" || { head -c 300 "${TMPDIR:-/tmp}/aborted.$$"; exit 1; }
rm "${TMPDIR:-/tmp}/aborted.$$"
expect "$(code "${json[@]}" -d '{"request_ids":[]}' "$BASE/inference/v1/abort_requests")" 401 "abort without key"
expect "$(code "${auth[@]}" "$BASE/openapi.json")" 200 openapi
headers=$(curl -sI -X GET "$BASE/" | tr -d '\r')
grep -qi "^content-security-policy: default-src 'none'" <<<"$headers" || { echo "no policy"; exit 1; }
