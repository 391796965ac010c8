#!/usr/bin/env bash
# The whole suite: alone (and beside that what depends on the engine once more by MLX operations, DISTCLIP_ENGINE=mlx,
# everything over MLX's ring with 2 ranks, and the kernel under sanitizers), and under mpirun with 2, 3 and 4 ranks.
#   tests/run.sh                       everything
#   tests/run.sh tests/test_norm.py    some files, or any arguments of pytest
#   SIZES="alone 3" tests/run.sh       some sizes: alone, 2, 3, 4, ring, mlx; mlx-3 is mlx with 3 ranks
# It makes the environment if it is missing, and ends at the first run that fails.
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$(launch/setup.sh test)
export PATH="$venv/bin:$PATH"
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
[ -t 1 ] || export NO_COLOR=1 # mpirun gives every rank a terminal, whatever is behind it
# A folder of its own: an mpirun that was killed leaves files named by its process number, which another one can get.
TMPDIR=$(mktemp -d /tmp/distclip.XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
marks=$TMPDIR/marks
mkdir "$marks"

limit() { # macOS has no timeout command
    python tests/limit.py "${LIMIT_S:-800}" "$@"
}

# Runs COMMAND and demands, beside its exit code, the mark of every one of RANKS ranks that its tests passed.
run() { # RANKS COMMAND...
    ranks=$1 && shift
    rm -f "$marks"/*
    DISTCLIP_TEST_MARKS=$marks limit "$@" </dev/null
    passed=$(find "$marks" -type f | wc -l)
    if [ "$passed" -ne "$ranks" ]; then
        echo "tests/run.sh: only $passed of $ranks ranks passed" >&2
        exit 1
    fi
}

under_mpirun() { # RANKS ARGUMENTS...
    n=$1 && shift
    run "$n" mpirun -n "$n" --map-by :OVERSUBSCRIBE --bind-to none --mca mpi_yield_when_idle 1 \
        --mca threads_pthreads_yield_strategy nanosleep "$venv/bin/python" -m pytest -x --with-mpi "$@"
}

# Tests that start processes mostly wait for them, so all else that takes one process runs beside them.
alone_in_two_lanes() {
    self=tests/$(basename "${BASH_SOURCE[0]}")
    {
        SIZES=alone "$self" -m "not launches" && SIZES="mlx ring" "$self" && tests/sanitize.sh
    } >"$TMPDIR/lane" 2>&1 &
    lane=$!
    passed=yes
    SIZES=alone "$self" -m launches || passed=no
    wait "$lane" || passed=no
    cat "$TMPDIR/lane"
    [ "$passed" = yes ]
}

for size in ${SIZES:-alone 2 3 4}; do
    echo "== tests: $size"
    case $size in
        alone) if [ $# -eq 0 ]; then alone_in_two_lanes; else run 1 python -m pytest "$@"; fi ;;
        ring) run 2 mlx.launch -n 2 --python "$venv/bin/python" -- -m pytest -x "$@" ;;
        mlx)
            some=(tests/test_{kernels,norm,clip,average,groups,clipper,optimizer}.py)
            [ $# -eq 0 ] || some=("$@")
            DISTCLIP_ENGINE=mlx run 1 python -m pytest "${some[@]}"
            ;;
        mlx-*)
            some=(tests/test_{average,clipper}.py)
            [ $# -eq 0 ] || some=("$@")
            DISTCLIP_ENGINE=mlx under_mpirun "${size#mlx-}" "${some[@]}"
            ;;
        2) under_mpirun 2 "$@" ;;
        *) under_mpirun "$size" --ignore tests/test_mlx_lm.py "$@" ;; # of which more ranks show no more
    esac
done
