"""``assembly.py OBJDUMP OBJECT``: the kernel's loops over dense memory must work on whole vector registers of arm64.

It reads the loop of each function that takes most bytes a turn; the loops for the values that are left over may be
scalar. OBJECT is what loops.cpp was compiled to.
"""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator

TYPES = ("F32", "F16", "BF16")
FUNCTIONS = [
    *(f"{name}<{t}>" for name in ("sum<squares>", "sum<magnitudes>", "largest", "count", "scale") for t in TYPES),
    *(f"convert<{a}, {b}>" for a, b in itertools.permutations(TYPES, 2)),  # into buckets and out of them
]
BYTES = {"q": 16, "d": 8, "s": 4, "h": 2, "b": 1, "x": 8, "w": 4}
Instruction = tuple[int, str, str]  # address, name, operands


def functions(assembly: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Each function's short name, such as ``sum<squares><F32>``, and its instructions."""
    for name, body in re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)+)", assembly, re.MULTILINE):
        name = re.sub(r"distclip::(?:baseline::)?|\(anonymous namespace\)::", "", name)
        name = re.sub(r"<\(Measure\)(\d), ", lambda m: f"<{('squares', 'magnitudes')[int(m[1])]}><", name)
        lines = re.findall(r"^ *([0-9a-f]+):\t(\S+)(?:\t(.*))?$", body, re.MULTILINE)
        short = re.sub(r"^(?:void|double|unsigned long) ", "", name.partition("(")[0])
        yield short, [(int(at, 16), op, operands) for at, op, operands in lines]


def innermost_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """What lies between a branch back and its target, where no other loop does."""
    spans = set()
    for at, op, operands in body:
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if target and re.fullmatch(r"b|b\..+|cbn?z|tbn?z", op) and body[0][0] <= int(target[1], 16) <= at:
            spans.add((int(target[1], 16), at))
    inner = [
        (begin, end)
        for begin, end in spans
        if not any((a, b) != (begin, end) and begin <= a and b <= end for a, b in spans)
    ]
    return [[line for line in body if begin <= line[0] <= end] for begin, end in inner]


def bytes_read(loop: list[Instruction]) -> int:
    total = 0
    for _, op, operands in loop:
        if op in ("ldr", "ldur", "ldp"):
            total += BYTES.get(operands[0], 0) * (2 if op == "ldp" else 1)
        elif re.match(r"ldu?rs?h", op):
            total += 2
        elif op.startswith("ld1"):
            total += 16 * operands.partition("}")[0].count("v")
    return total


def scalar_instructions(loop: list[Instruction]) -> list[str]:
    """Arithmetic on one floating value, and moves of single values into vectors and out of them."""
    one = re.compile(r"f\w+ [bhsdwx]\d|(?:umov|smov|ins) |mov .*\.[bhsd]\[")
    return [f"{op} {operands}" for _, op, operands in loop if one.match(f"{op} {operands}")]


def problem(body: list[Instruction]) -> str:
    """Why a function is not vectorised; or nothing."""
    loops = innermost_loops(body)
    most = max(map(bytes_read, loops), default=0)
    main = [loop for loop in loops if bytes_read(loop) == most > 0]
    if not main:
        return "no loop over memory was seen"
    scalar = min(map(scalar_instructions, main), key=len)
    if scalar:
        return f"{len(scalar)} scalar instructions, such as {scalar[0]}"
    if not any(re.search(r"\bv\d+\.(?:16b|8h|4s|2d)", operands) for loop in main for _, _, operands in loop):
        return "no instruction on a whole vector register"
    return ""


def main(objdump: str, file: str) -> int:
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", file]
    bodies = dict(functions(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    slow = {name: problem(bodies[name]) if name in bodies else "it is gone" for name in FUNCTIONS}
    slow = {name: why for name, why in slow.items() if why}
    for name, why in slow.items():
        print(f"{name} is not vectorised: {why}")
    print(f"assembly: {len(FUNCTIONS) - len(slow)} of {len(FUNCTIONS)} loops are vectorised")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
