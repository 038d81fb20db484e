#!/usr/bin/env bash
# Trains the committed code on every host of one TPU VM slice.
#   export TPU=my-v5e-16 ZONE=us-central1-a
#   launch/tpu_vm.sh setup       # ships HEAD; again after each commit
#   launch/tpu_vm.sh run --config=experiments/unet_dice.py --workdir=gs://my-bucket/unet_dice \
#       --config.batch_size=16    # a multiple of the number of chips
#   launch/tpu_vm.sh logs        # host 0; WORKER=3 for another
#   launch/tpu_vm.sh stop        # waits until all have saved; the same run command resumes
set -euo pipefail

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
[ $# -gt 0 ] || usage
: "${TPU:?must be set to the name of the TPU VM}" "${ZONE:?must be set to the zone of the TPU VM}"

on_hosts() {  # $1: which workers, $2: shell command
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

# Defines `training` on a host. A number in train.pid may be another process's after a reboot.
training="training() { grep -qs dense_jax.main \"/proc/\$(cat train.pid 2>/dev/null)/cmdline\"; }"
not_twice="$training
    if training; then
        echo 'already training; launch/tpu_vm.sh stop first' >&2; exit 1
    fi"

command=$1
shift
case $command in
    setup)
        repository=$(cd "$(dirname "$0")/.." && pwd)
        [ -z "$(git -C "$repository" status --porcelain)" ] \
            || echo "note: only HEAD is shipped, not your edits" >&2
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        git -C "$repository" archive --format=tar.gz --output="$folder/dense_jax.tar.gz" HEAD
        gcloud compute tpus tpu-vm scp "$folder/dense_jax.tar.gz" "$TPU:dense_jax.tar.gz" \
            --zone="$ZONE" --worker=all
        # uv brings a Python: the VM's own may be older than 3.11.
        on_hosts all "$not_twice"'
            set -e
            rm -rf dense_jax && mkdir dense_jax && tar -xzf dense_jax.tar.gz -C dense_jax
            python3 -m pip install --quiet --user uv
            python3 -m uv venv --quiet --allow-existing --python=3.12 venv
            python3 -m uv pip install --quiet --python=venv \
                -r dense_jax/requirements.txt "jax[tpu]" gcsfs'
        ;;
    run)
        [ $# -gt 0 ] || usage
        case " $*" in
            *" --workdir"[=\ ]/* | *" --workdir"[=\ ]gs://*) ;;
            *" --workdir"*)  # it would be in the code's folder, which setup removes
                echo "--workdir must be gs://..., or a folder that all hosts share, absolute" >&2
                exit 2
                ;;
        esac
        args=$(printf ' %q' "$@")
        # In the background: --worker=all would show nothing before every host is done.
        on_hosts all "$not_twice
            cd dense_jax || exit
            nohup ../venv/bin/python -m dense_jax.main --multihost$args \
                >../train.log 2>&1 </dev/null & echo \$! >../train.pid"
        ;;
    logs) on_hosts "${WORKER:-0}" 'tail -n 100 -F train.log' ;;
    stop)
        on_hosts all "$training
            if ! training; then echo 'not training' >&2; exit; fi
            kill -TERM \$(cat train.pid)
            while training; do sleep 1; done"
        ;;
    *) usage ;;
esac
