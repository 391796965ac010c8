#!/usr/bin/env bash
# The suite: alone (and beside that what depends on the engine once more by MLX operations, DISTCLIP_ENGINE=mlx, and what
# communicates over MLX's ring with 2 ranks), and under mpirun with 2, 3 and 4 ranks.
#   tests/run.sh                       everything
#   tests/run.sh tests/test_norm.py    some files, or any arguments of pytest
#   SIZES="alone 3" tests/run.sh       some sizes: alone, 2, 3, 4, ring, mlx, mlx-3 (mlx with 3 ranks)
#   SIZES=played-gpu tests/run.sh      the CPU plays a GPU: its kernels are emulated, or, played-mlx, MLX operations work
#   SIZES="apart-2 apart-4" tests/run.sh  leaves on another stream than the collectives, as on a GPU, with 2 and 4 ranks
#   SIZES=cluster tests/run.sh         on four hosts made of network namespaces: needs Linux, root, iproute2 and sshd
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
# What mx.compile has compiled stays there: once for all sizes, where the name of another run's folder is given.
ln -s "${DISTCLIP_TEST_COMPILED:-$TMPDIR/compiled}" "$TMPDIR/mlx"
mkdir -p "$TMPDIR/compiled"

# Most of the time that g++ takes for a function of mx.compile goes into one header of MLX, so compile that once for all.
header=$(python -c "import mlx.core as mx; print(mx.__file__.rpartition('/')[0])")/include/mlx/backend/cpu/compiled_preamble.h
if [ "$(uname)" = Linux ] && [ -f "$header" ] && [ ! -f "$header.gch" ] && command -v g++ >/dev/null; then
    g++ -std=c++17 -O3 -Wall -w -fPIC -I "${header%/mlx/backend/*}" -x c++-header "$header" -o "$TMPDIR/gch" &&
        mv "$TMPDIR/gch" "$header.gch"
fi

limit() { # macOS has no timeout command
    python tests/limit.py "${LIMIT_S:-1200}" "$@"
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
    for k in $(seq 1 $((n - 1))); do # each rank begins with what is compiled by now
        [ -d "$TMPDIR/of-rank-$k" ] || { mkdir "$TMPDIR/of-rank-$k" && cp -r "$TMPDIR/mlx/." "$TMPDIR/of-rank-$k/mlx"; }
    done
    run "$n" mpirun -n "$n" --map-by :OVERSUBSCRIBE --bind-to none --mca mpi_yield_when_idle 1 \
        --mca threads_pthreads_yield_strategy nanosleep "$venv/bin/python" -m pytest -x --with-mpi "$@"
}

# Tests that start processes mostly wait for them, so several lanes of tests run beside each other.
alone_in_lanes() {
    self=tests/$(basename "${BASH_SOURCE[0]}")
    {
        export DISTCLIP_TEST_COMPILED=$TMPDIR/compiled
        SIZES=alone "$self" -m "not launches" --ignore tests/integrations && # which 2 ranks run, too
            SIZES="mlx ring" "$self"
    } >"$TMPDIR/lane-1" 2>&1 &
    lanes=($!)
    set -- "tests/test_[a-c]*.py tests/test_[m-z]*.py tests/integrations" "tests/test_d*.py tests/bench tests/programs tests/trainers" \
        "tests/test_[e-l]*.py tests/cluster tests/records"
    for files in "$@"; do
        # shellcheck disable=SC2086  # several names and patterns
        SIZES=alone "$self" -m "launches and not cluster" $files >"$TMPDIR/lane-$((${#lanes[@]} + 1))" 2>&1 &
        lanes+=($!)
    done
    passed=yes
    for i in 1 2 3 4; do
        wait "${lanes[i - 1]}" || passed=no
        cat "$TMPDIR/lane-$i"
    done
    [ "$passed" = yes ]
}

for size in ${SIZES:-alone 2 3 4}; do
    echo "== tests: $size"
    case $size in
        alone) if [ $# -eq 0 ]; then alone_in_lanes; else run 1 python -m pytest "$@"; fi ;;
        cluster) run 1 python -m pytest -m cluster tests/cluster "$@" ;; # says so where no hosts can be made
        ring)
            some=(tests/engine/test_buckets.py tests/test_{norm,clip,average,check,clipper,door}.py)
            [ $# -eq 0 ] || some=("$@")
            run 2 mlx.launch -n 2 --starting-port 34000 --python "$venv/bin/python" -- -m pytest -x "${some[@]}"
            ;;
        mlx)
            some=(tests/engine/test_{kernels,buckets}.py tests/test_{norm,clip,average,clipper,door}.py)
            [ $# -eq 0 ] || some=("$@")
            DISTCLIP_ENGINE=mlx run 1 python -m pytest "${some[@]}"
            ;;
        played-*) # by the CPU, which cannot emulate kernels inside mx.compile, and whose MLX is less exact
            some=(tests/engine/test_{kernels,buckets}.py tests/test_{norm,clip,average,clipper,optimizer,door}.py)
            [ $# -eq 0 ] || some=("$@")
            unlike="compile or evaluated or drift or 64_million or threshold_may_be_an_input"
            [ "$size" = played-gpu ] || unlike="$unlike or kernels"
            PLAY_DEVICE=${size#played-} DISTCLIP_ENGINE=${size#played-} run 1 python -m pytest -k "not ($unlike)" "${some[@]}"
            ;;
        apart-2) PLAY_DEVICE=stream under_mpirun 2 --ignore tests/integrations/test_shard.py --ignore tests/integrations/test_lora.py --ignore tests/bench "$@" ;;
        apart-*) PLAY_DEVICE=stream under_mpirun "${size#apart-}" --ignore tests/integrations --ignore tests/bench "$@" ;;
        mlx-*)
            some=(tests/engine/test_buckets.py tests/test_{average,clipper}.py)
            [ $# -eq 0 ] || some=("$@")
            DISTCLIP_ENGINE=mlx under_mpirun "${size#mlx-}" "${some[@]}"
            ;;
        2) under_mpirun 2 "$@" ;;
        *)
            some=(--ignore tests/integrations) # of which more ranks show no more
            [ $# -eq 0 ] || some=("$@")
            under_mpirun "$size" "${some[@]}"
            ;;
    esac
done
