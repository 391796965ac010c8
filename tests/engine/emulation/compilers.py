"""What real compilers say to the kernels: clang, with Metal's address spaces, and nvcc."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import mlx.core as mx

from distclip.engine.gpu.source import Source

from .generated import Kinds, generated

HERE = Path(__file__).parent
NVCC_PRELUDE = """
#include <cuda/std/array>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace mlx::core::cu {
using Strides = cuda::std::array<int64_t, 10>;
struct complex64_t { float real, imag; };
}
"""


def inputs_of(source: Source, dtype: mx.Dtype) -> Kinds:
    """The kinds of the arrays that a kernel takes for leaves of a dtype."""
    others = {"table": mx.int64, "factors": mx.float32, "finite": mx.bool_}
    return tuple((others.get(name, dtype), False, False) for name in source.inputs)


def clang_errors(source: Source, dtype: mx.Dtype, mistake: tuple[str, str] = ("", "")) -> list[str]:
    """What clang refuses in a kernel for Metal."""
    import clang.cindex as clang  # type: ignore[import-untyped, import-not-found, unused-ignore]

    outputs = (dtype if "scale" in source.name else mx.float32,) * len(source.outputs)
    text, _ = generated(source, inputs_of(source, dtype), outputs, "metal")
    assert mistake[0] in text
    text = re.sub(r"^  threadgroup ", "  static threadgroup ", text.replace(*mistake), flags=re.M)
    program = f'#include "{HERE}/spaces.h"\n{text}\n'
    unit = clang.Index.create().parse(
        "kernel.cpp", ["-std=c++17", "-Wno-unknown-attributes"], [("kernel.cpp", program)]
    )
    return [d.spelling for d in unit.diagnostics if d.severity >= clang.Diagnostic.Error]


def nvcc_reports(sources: list[tuple[Source, mx.Dtype]], folder: Path) -> str:
    """What ptxas says of kernels: how many registers each takes, and what it had to spill."""
    paths = []
    for source, dtype in sources:
        outputs = (dtype if "scale" in source.name else mx.float32,) * len(source.outputs)
        text, _ = generated(source, inputs_of(source, dtype), outputs, "cuda")
        paths.append(folder / f"{source.name}.cu")
        paths[-1].write_text(NVCC_PRELUDE + text)
    options = ["-std=c++17", "-arch=sm_80", "-cubin", "-t0", "-Xptxas", "-v", "-odir", str(folder)]
    done = subprocess.run(["nvcc", *options, *map(str, paths)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stderr
