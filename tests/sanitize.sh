#!/usr/bin/env bash
# The kernel's tests while AddressSanitizer and UndefinedBehaviorSanitizer watch its memory and its arithmetic.
#   tests/sanitize.sh                  tests/engine/test_native.py and tests/engine/test_kernels.py, by every instruction set
#   tests/sanitize.sh -k bit_patterns  with any arguments of pytest
# The kernel is built in a temporary folder; the checkout's own stays as it is. Needs Linux and g++, else it is left out.
set -eu

if [ "$(uname)" != Linux ] || ! command -v g++ >/dev/null; then
    echo "tests/sanitize.sh: left out, no g++ on Linux here (clang's sanitizers enter Python in other ways)"
    exit 0
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$("$root/launch/setup.sh" test)
export PATH="$venv/bin:$PATH"
folder=$(mktemp -d "${TMPDIR:-/tmp}/sanitize.XXXXXX")
trap 'rm -rf "$folder"' EXIT
limit() { # SECONDS COMMAND...
    python "$root/tests/limit.py" "$@"
}

mkdir "$folder/source"
cd "$root"
cp -R distclip pyproject.toml README.md LICENSE "$folder/source"
cd "$folder"
export DISTCLIP_ENGINE=native # without a kernel the build fails, and so do the tests
sanitizers=-fsanitize=address,undefined
CC=gcc CXX=g++ LDFLAGS=$sanitizers \
    DISTCLIP_CXXFLAGS="$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1" \
    limit 300 python -m pip install --quiet --disable-pip-version-check --no-deps --target installed ./source

# An environment with all that this one has, but for the editable install of distclip, which would come first.
python -m venv --without-pip plain
python -c "import sysconfig; print(sysconfig.get_path('platlib'))" \
    >"$(plain/bin/python -c "import sysconfig; print(sysconfig.get_path('platlib'))")/all.pth"
export PATH="$folder/plain/bin:$PATH"

# Python itself is not built with them, so they are loaded before it, with libstdc++, whose exceptions they watch.
# Python and MLX free little of what they hold at exit, so leaks are not looked for.
watched() { # SECONDS COMMAND...
    seconds=$1 && shift
    limit "$seconds" env LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0:malloc_context_size=5 PYTHONPATH="$folder/installed" "$@" </dev/null
}
cd installed # the first place where Python looks
watched 60 python -c "
from distclip.engine.native import load
assert load().__file__.startswith('$folder'), load().__file__"

# The tests of 64 million values only take long here: smaller leaves are cut in the same way. The report of an error is
# written as the process ends, so pytest must not hold standard error back.
tests() {
    watched 400 python -m pytest --quiet --capture=sys -p no:cacheprovider --deselect \
        "$root/tests/engine/test_kernels.py::test_one_leaf_of_64_million_values" "$@"
}
tests "$root/tests/engine/test_native.py" "$root/tests/engine/test_kernels.py" "$@"
if [ "$(uname -m)" = x86_64 ]; then
    for instructions in baseline avx2; do # the best there is has run; they differ in the loops over dense memory
        echo "== $instructions"
        DISTCLIP_ISA=$instructions tests "$root/tests/engine/test_native.py" -k "size or pattern or product or wherever" "$@"
    done
fi
