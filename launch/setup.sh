#!/usr/bin/env bash
# Make the environment in .venv if it is missing or older than pyproject.toml, and print its path.
#   launch/setup.sh [EXTRA]      EXTRA: test, plot or dev; none is enough to train
#   PYTHON=python3.12 VENV=DIR launch/setup.sh
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
extra=${1:-}
case $extra in # the environments that are enough: each includes those before it
    '') serve=".distclip .distclip-plot .distclip-test .distclip-dev" ;;
    plot) serve=".distclip-plot .distclip-test .distclip-dev" ;;
    test) serve=".distclip-test .distclip-dev" ;;
    dev) serve=".distclip-dev" ;;
    *)
        echo "launch/setup.sh: $extra is not an environment: test, plot or dev; none is enough to train" >&2
        exit 2
        ;;
esac

find_python() {
    for python in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "distclip needs Python 3.10 or later: install it, or name one with PYTHON=/path/to/python3" >&2
    exit 1
}

# A stamp names the installed checkout. A checkout that was moved or copied, or whose kernel has changed, is installed
# again.
is_made() {
    for stamp in $serve; do
        stamp=$venv/$stamp
        if [ "$(cat "$stamp" 2>/dev/null)" = "$root" ] && [ ! "$root/pyproject.toml" -nt "$stamp" ] &&
            [ -z "$(find "$root/distclip/engine/native" \( -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt \) -newer "$stamp")" ]; then
            return 0
        fi
    done
    return 1
}

if ! is_made; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version) ..." >&2
    # There is no environment, or an unfinished one.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extra:+[$extra]}" >&2
    "$venv/bin/python" -c "from distclip.engine.native import load; load() or print(
        'Without the native kernel, which takes a C++20 compiler: MLX operations do its work, slower.')" >&2
    echo "$root" >"$venv/.distclip${extra:+-$extra}"
fi
echo "$venv"
