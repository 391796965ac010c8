#!/usr/bin/env bash
# Make the environment in .venv if it is missing or older than pyproject.toml, and print its path.
#   launch/setup.sh [EXTRA]      EXTRA: test, plot or dev; none is enough to train
#   PYTHON=python3.12 VENV=DIR launch/setup.sh
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
extra=${1:-}
stamp=$venv/.distclip${extra:+-$extra}

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

# A stamp names the checkout that was installed: one that was moved or copied is installed again, and one whose kernel
# has changed.
is_made() { # STAMP
    [ "$(cat "$1" 2>/dev/null)" = "$root" ] && [ ! "$root/pyproject.toml" -nt "$1" ] &&
        [ -z "$(find "$root/distclip/native" \( -name '*.cpp' -o -name '*.h' -o -name build.py \) -newer "$1")" ]
}

if ! is_made "$stamp" && ! is_made "$venv/.distclip-dev"; then # dev has all the others
    python=$(find_python)
    echo "Making $venv with $("$python" --version) ..." >&2
    # Nothing there, or something half made.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extra:+[$extra]}" >&2
    echo "$root" >"$stamp"
fi
echo "$venv"
