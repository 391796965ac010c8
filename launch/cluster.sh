#!/usr/bin/env bash
# Train on several hosts: check them, start one mpirun over ssh, and watch it to its end.
#   launch/cluster.sh --hostfile hosts.json                          launch/train.py on the hosts of MLX's hosts.json
#   launch/cluster.sh --hosts mac1,mac2 my_script.py --lr 0.1        another script, on hosts by name
#   launch/cluster.sh --hosts mac1:2,mac2:2 --dry-run                the mpirun line, with two ranks on each host
#   launch/cluster.sh --hostfile hosts.json --restarts 3 train.py    started again, with --resume, after a failure
# Options before the script are those of `distclip launch` (--help lists them); no shell reads a name or an argument.
# The exit code is 0 only when every rank has finished. It makes the environment on this host if it is missing; the
# other hosts need the same environment at the same path. MPIRUN_ARGS adds options for mpirun.
set -eu

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$("$here/setup.sh")

options=()
while [ $# -gt 0 ] && [[ $1 != *.py && $1 != -- ]]; do
    options+=("$1")
    shift
done
[ $# -gt 0 ] || set -- "$here/train.py"
exec "$venv/bin/distclip" launch ${options[@]+"${options[@]}"} "$@"
