#!/usr/bin/env bash
# Trains the committed code on TPU slices of a GKE cluster, through xpk.
#   export CLUSTER=my-cluster TPU_TYPE=v5litepod-16 PROJECT=my-project ZONE=us-central1-a
#   launch/xpk.sh run unet-dice --config=experiments/unet_dice.py \
#       --workdir=gs://my-bucket/unet_dice \
#       --config.batch_size=16    # a multiple of the number of chips
#   launch/xpk.sh list
#   launch/xpk.sh stop unet-dice # saves, then exits; the same run command resumes
# NUM_SLICES=2 for more slices; IMAGE=... for an image that has the requirements already.
set -euo pipefail

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
[ $# -gt 0 ] || usage
: "${CLUSTER:?must be set to the name of the GKE cluster}"
: "${PROJECT:?must be set to the Google Cloud project}" "${ZONE:?must be set to its zone}"
where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")

command=$1
shift
# Without a name, xpk would delete every workload of the cluster.
[ "$command" = list ] || [[ ${1-} =~ ^[a-z0-9] ]] || usage
case $command in
    run)
        [ $# -gt 1 ] || usage
        : "${TPU_TYPE:?must be set to the type of the slices, such as v5litepod-16}"
        name=$1
        shift
        case " $*" in
            *" --workdir"[=\ ]/* | *" --workdir"[=\ ]gs://*) ;;
            *" --workdir"*)  # it would be gone with the pod
                echo "--workdir must be gs://..., or a folder that all pods share, absolute" >&2
                exit 2
                ;;
        esac
        args=$(printf ' %q' "$@")
        repository=$(cd "$(dirname "$0")/.." && pwd)
        [ -z "$(git -C "$repository" status --porcelain)" ] \
            || echo "note: only HEAD is shipped, not your edits" >&2
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        git -C "$repository" archive HEAD | tar -x -C "$folder"
        # exec: xpk sends SIGTERM to the command's own process only.
        # 75: preempted and saved. xpk adds 42 and 127 to 255, such as the end by JAX when another
        # host is gone; what is wrong with the config or the data exits with 1, and is not retried.
        xpk workload create "${where[@]}" --workload="$name" --tpu-type="$TPU_TYPE" \
            --num-slices="${NUM_SLICES:-1}" --base-docker-image="${IMAGE:-python:3.12}" \
            --script-dir="$folder" --max-restarts=100 --restart-on-exit-codes=75 \
            --termination-grace-period-seconds=180 \
            --command="pip install -q -r requirements.txt 'jax[tpu]' gcsfs && exec python -m dense_jax.main --multihost$args"
        ;;
    list) xpk workload list "${where[@]}" ;;
    stop)
        [ $# -eq 1 ] || usage
        xpk workload delete "${where[@]}" --workload="$1"
        ;;
    *) usage ;;
esac
