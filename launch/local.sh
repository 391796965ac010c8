#!/usr/bin/env bash
# Train on this machine with several processes.
#   launch/local.sh                                    launch/train.py with 4 ranks
#   NP=2 launch/local.sh --parallel tp --steps 50      2 ranks, options for launch/train.py
#   NP=3 launch/local.sh my_script.py --lr 0.1         another script
# It makes the environment if it is missing. MPIRUN_ARGS adds options for mpirun.
set -eu

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NP=${NP:-4}
case $NP in
    '' | 0* | *[!0-9]*)
        echo "launch/local.sh: NP=$NP is not a number of processes" >&2
        exit 2
        ;;
esac
venv=$("$here/setup.sh")

case ${1:-} in
    *.py) script=$1 && shift ;;
    *) script=$here/train.py ;;
esac

# More ranks than cores must share them: do not pin ranks to cores, and sleep while waiting for the others.
options=(-n "$NP" --map-by ":OVERSUBSCRIBE" --bind-to none)
cores=$(getconf _NPROCESSORS_ONLN)
if [ "$NP" -gt "$cores" ]; then
    options+=(--mca mpi_yield_when_idle 1 --mca threads_pthreads_yield_strategy nanosleep)
fi
case ${MPIRUN_ARGS:-} in
    *output*) ;;
    *) options+=(--output :raw) ;; # else mpirun holds back what has no newline, such as a progress bar
esac
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
if [ -t 1 ]; then
    export DISTCLIP_TERMINAL=1 # mpirun gives every rank a terminal, wherever its output goes
fi
# shellcheck disable=SC2086  # MPIRUN_ARGS holds several words
exec "$venv/bin/mpirun" "${options[@]}" ${MPIRUN_ARGS:-} "$venv/bin/python" "$script" "$@"
