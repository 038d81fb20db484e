#!/usr/bin/env bash
# Trains on this machine in several processes. From the root of the repository, in an environment
# where `python` has the requirements:
#   launch/local.sh 8 --config=experiments/unet_dice.py --workdir=runs/unet_dice
# Process K takes GPU K of those visible; without GPUs, each is one device on the same processors.
# Every line begins with the number of its process. Ctrl-C saves and exits with 75, after which the
# same command resumes; again, it kills. If one process fails, the others are ended.
set -euo pipefail

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 403)) || { echo "needs bash 4.3 or newer" >&2; exit 2; }
[[ $# -gt 1 && $1 =~ ^[1-9][0-9]*$ ]] || usage
num_processes=$1
shift
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

pids=()
signal=TERM
# shellcheck disable=SC2317,SC2329  # called by the trap
stop() {
    interrupted=1
    kill -s "$signal" "${pids[@]}" 2>/dev/null || true
    signal=KILL
}
trap stop TERM
# A terminal sends these to all of us, but until they train the processes save on TERM only.
trap '' INT HUP

for ((k = 0; k < num_processes; k++)); do
    JAX_LOCAL_DEVICE_IDS=$k python -m dense_jax.main --coordinator="localhost:$port" \
        --num_processes="$num_processes" --process_id="$k" "$@" > >(sed -u "s/^/[$k] /") 2>&1 &
    pids+=($!)
done
trap stop INT HUP

status=0
for _ in "${pids[@]}"; do
    while interrupted='' code=0; wait -n || code=$?; [ -n "$interrupted" ]; do
        :  # a signal ended that wait, not a process
    done
    case $code in
        0) ;;
        75) status=75 ;;  # saved, and not yet finished
        *)
            kill -s KILL "${pids[@]}" 2>/dev/null || true
            wait
            exit "$code"
            ;;
    esac
done
exit "$status"
