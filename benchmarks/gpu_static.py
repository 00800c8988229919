"""What the Triton kernels compile to, counted: no GPU is needed.

Compiles every kernel for every target, finds the main loop in the machine code, and prints its warp
instructions per 1024 weights, those of its two busiest pipes, registers, stack and shared memory.
`--json FILE` writes the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from pcdvq_kernels.arguments import LayoutFields
from pcdvq_kernels.trellis import CODE_BITS
from pcdvq_kernels.triton import dequantize, hadamard, linear, moe, vptq
from pcdvq_kernels.triton.format import TILE_COLUMNS, TILE_ROWS, format_of
from pcdvq_kernels.triton.tuning import Device, m_tile_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LAYOUTS = {
    **{f"trellis-{bits / 2:g}": LayoutFields(512, 2, bits, 0, 64) for bits in CODE_BITS},
    "trellis-2, chains of 16 rows": LayoutFields(512, 2, 4, 0, 16),
    "stored": LayoutFields(512, 1, 8, 0, 0),
}
# Those whose other kernels are compiled too.
DENSE_CODECS = ("trellis-2", "trellis-3", "stored")
CLASSES = {
    "load": r"LD[GS]?|LDSM|LDGSTS|(global|buffer|flat)_load.*|ds_read.*|s_load.*|ds_bpermute.*",
    "store": r"ST[GS]?|STSM|RED|ATOMG?|(global|buffer|flat)_store.*|ds_write.*",
    "spill": r"LDL|STL|scratch_.*",
    "shuffle": r"SHFL|.*_dpp",
    "barrier": r"BAR|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP|SYNCS|MEMBAR|s_barrier|s_waitcnt",
    "mma": r"[HIQOF]M+A|[HIQ]GMMA|UTC.*MMA|v_mfma.*",
    "permute": r"PRMT|v_perm_b32",
    "logic": r"P?LOP3|SHF|SGXT|BMSK|v_(and|or|xor|not|lsh|ash|bf).*",
    "integer": r"IMAD|IDP|IADD3?|LEA|ISETP|SEL|VIADD|VIMNMX|IMNMX|v_(add|sub|mul|mad)_?.*[iu]\d+.*",
    "float": r"F(FMA|MUL|ADD|SEL|SETP|MNMX)|HFMA2|I2F|F2I|I2FP|F2FP|F2F|I2I|v_cvt.*|v_.*f(16|32).*",
    "move": r"MOV|CS2R|S2R|S2UR|R2UR|UMOV|v_mov.*|v_accvgpr.*",
    "uniform": r"U[A-Z0-9]+|s_.*",
    "control": r"BRA|BSSY|BSYNC|EXIT|NOP|CALL|RET|YIELD",
}


# Half of a scheduler's lanes each, so a warp's instruction takes them two cycles.
PIPES = {
    "alu": r"PRMT|P?LOP3|SHF|SGXT|BMSK|IADD3?|LEA|ISETP|SEL|VIADD|VIMNMX|IMNMX|FSEL|FSETP|FMNMX",
    "fma": r"IMAD|IDP|FFMA|FMUL|FADD",
}


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile.

    Attributes:
        name, codec: what it is called in the table.
        function: the jitted function.
        signature: Triton types of its tensors and scalars.
        constants: its compile-time arguments.
        warps: per program.
        loop_weights: weights a warp decodes in one turn of the main loop; None without a loop.
    """

    name: str
    codec: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 1
    loop_weights: int | None = None


@dataclass(frozen=True)
class Count:
    """What a kernel compiled to; instructions are those of a warp in one turn of the main loop.

    `pipes` has those of each of `PIPES` per 1024 weights, `mma` every kind of tensor-core
    instruction and how many there are per 1024 weights.
    """

    target: str
    kernel: str
    codec: str
    instructions: int | None
    per_1024_weights: float | None
    classes: dict[str, int]
    pipes: dict[str, float]
    mma: dict[str, float]
    registers: int
    stack_bytes: int
    shared_bytes: int


# Of the weights of a product and of its activations.
PRODUCT_SIGNATURE = {
    **{"words": "*i32", "row_scale": "*fp32", "tiles": "i32", "N": "i32"},
    **{"x": "*i32", "scales": "*fp32", "padded": "i32"},
}


def linear_kernel(codec: str, m_tile: int = 8, split: bool = False) -> Kernel:
    fmt = format_of(LAYOUTS[codec])
    return Kernel(
        f"linear {m_tile} tokens" + ", split" * split,
        codec,
        linear.linear_kernel,
        {
            **PRODUCT_SIGNATURE,
            "bias": "*bf16",
            "out": "*fp32" if split else "*bf16",
            "M": "i32",
            "split_tiles": "i32",
        },
        {"M_TILE": m_tile, "SPLIT": split, "BIAS": True, "FMT": fmt},
        loop_weights=TILE_ROWS * TILE_COLUMNS,
    )


def moe_kernel(codec: str) -> Kernel:
    fmt = format_of(LAYOUTS[codec])
    return Kernel(
        "moe 16 tokens",
        codec,
        moe.moe_kernel,
        {
            **PRODUCT_SIGNATURE,
            "out": "*bf16",
            **dict.fromkeys(("sorted_ids", "expert_ids", "used"), "*i32"),
            "assignments": "i32",
        },
        {"M_TILE": 16, "TOP_K": 8, "FMT": fmt},
        loop_weights=TILE_ROWS * TILE_COLUMNS,
    )


def dense_kernels(codec: str) -> list[Kernel]:
    fmt = format_of(LAYOUTS[codec])
    weight = {"words": "*i32", "out": "*bf16", **dict.fromkeys(("tiles", "N", "K"), "i32")}
    rows = {**weight, "row_scale": "*fp32", "ids": "*i64", "signs": "*u8"}
    return [
        Kernel(
            "levels",
            codec,
            dequantize.levels_kernel,
            weight,
            {"FMT": fmt, "UNIT": 1 / dequantize.UNITS},
        ),
        Kernel(
            "embedding",
            codec,
            dequantize.embedding_kernel,
            rows,
            {"FMT": fmt, "COLUMNS": 512, "BLOCK": 512, "LOG": 9},
            warps=hadamard.warps_for(512),
        ),
    ]


def rotation_kernels(block: int) -> list[Kernel]:
    sizes = {"COLUMNS": max(block, 128), "BLOCK": block, "LOG": block.bit_length() - 1}
    warps = hadamard.warps_for(sizes["COLUMNS"])
    given = {"x": "*bf16", "signs": "*u8", "K": "i32"}
    quantized = {"out": "*i8", "scales": "*fp32", "M": "i32", "tiles": "i32", "padded": "i32"}
    return [
        Kernel(
            f"rotate {block}", "", hadamard.rotate_kernel, {**given, "out": "*bf16"}, sizes, warps
        ),
        Kernel(
            f"rotate and quantize {block}",
            "",
            hadamard.rotate_quantize_kernel,
            {**given, **quantized},
            sizes,
            warps,
        ),
    ]


def sum_kernel() -> Kernel:
    signature = {"parts": "*fp32", "row_scale": "*fp32", "bias": "*bf16", "out": "*bf16"}
    sizes = dict.fromkeys(("M", "N", "SPLITS"), "i32")
    constants = {"BIAS": True, "BLOCK": 512}
    return Kernel(
        "sum of splits", "", linear.sum_splits_kernel, {**signature, **sizes}, constants, 4
    )


def vptq_kernel(length: int, residual_bits: int) -> Kernel:
    sizes = ("M", "N", "skip", "K", "start", "stride", "row_words", "split_columns")
    tensors = {"x": "*fp32", "words": "*i32", "table": "*bf16", "out": "*fp32"}
    constants = {
        "BLOCKS": vptq.TILE_ROWS // length,
        "LENGTH": length,
        "PADDED": length,
        "INDEX_BITS": 16,
        "RESIDUAL_BITS": residual_bits,
        "COLUMNS": vptq.TILE_COLUMNS,
        "TOKENS": vptq.TILE_TOKENS,
    }
    return Kernel(
        f"vptq v{length}, {residual_bits} residual bits",
        "",
        vptq.vptq_kernel,
        {**tensors, **dict.fromkeys(sizes, "i32")},
        constants,
        vptq.WARPS,
    )


def all_kernels(target: str) -> list[Kernel]:
    """Every kernel that serves on `target`, the products for every codec."""
    device = Device("", target, 1)
    m_tiles = sorted({m_tile_for(tokens, device) for tokens in (1, 16)})
    products = [linear_kernel(codec, m_tile) for codec in LAYOUTS for m_tile in m_tiles]
    rotations = [kernel for block in (64, 512, 4096) for kernel in rotation_kernels(block)]
    return [
        *products,
        linear_kernel("trellis-2", m_tiles[0], split=True),
        moe_kernel("trellis-2"),
        *(
            kernel
            for codec in ("trellis-2", "trellis-3", "stored")
            for kernel in dense_kernels(codec)
        ),
        *rotations,
        sum_kernel(),
        *(vptq_kernel(length, bits) for length, bits in ((8, 0), (8, 8), (16, 16))),
    ]


def compile_kernel(kernel: Kernel, target: GPUTarget) -> Any:
    """The compiled kernel, all pointers and integers divisible by 16 as torch's are."""
    constants = dict(kernel.constants)
    names = kernel.function.arg_names
    if "ASM" in names:
        constants["ASM"] = target.backend == "cuda"
    signature = {name: kernel.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=kernel.function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, type in kernel.signature.items()
            if type.startswith("*")
        },
    )
    return triton.compile(source, target=target, options={"num_warps": kernel.warps})


def _run(tool: str, path: str, *options: str) -> str:
    command = [str(TOOLS / tool), *options, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(compiled: Any) -> tuple[list[str], int, int]:
    """Lines of assembly, registers and stack bytes."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        return text.splitlines(), registers, stack
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _run("nvdisasm", file.name, "-c")
        usage = _run("cuobjdump", file.name, "-res-usage")
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return text.splitlines(), int(found["REG"]), int(found["STACK"])


def main_loop(lines: list[str]) -> list[str]:
    """Instructions of the longest loop that has no loop inside; [] without loops."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in lines:
        label = re.match(r"\s*(\.L[\w.$]*):", line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        code = re.sub(r"/\*.*?\*/|\s;.*$|//.*$", "", line).strip().rstrip(" ;")
        if not re.match(r"(@!?U?P\w+\s+)?[A-Za-z][\w.]*(\s|$)", code) or code.endswith(":"):
            continue
        instructions.append(code)
        jump = re.match(r".*\b(?:BRA|s_cbranch_\w+|s_branch)\b.*?(\.L[\w.$]*)", code)
        # A jump to itself is the padding after the end.
        if jump and labels.get(jump[1], len(instructions)) < len(instructions) - 1:
            loops.append((labels[jump[1]], len(instructions)))
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return instructions[start:end]


def names_of(instructions: list[str]) -> Counter[str]:
    """Names of instructions, with their suffixes."""
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", each).split()[0] for each in instructions)


def classify(names: Counter[str], classes: dict[str, str]) -> Counter[str]:
    """Counts by class."""
    counts: Counter[str] = Counter()
    for name, count in names.items():
        head = name.split(".")[0]
        matching = (c for c, heads in classes.items() if re.fullmatch(heads, head))
        counts[next(matching, "other")] += count
    return counts


def count(kernel: Kernel, target: str) -> Count:
    compiled = compile_kernel(kernel, TARGETS[target])
    lines, registers, stack = disassemble(compiled)
    loop = main_loop(lines) if kernel.loop_weights else []
    names = names_of(loop)
    per_1024 = 1024 / (kernel.loop_weights or 1024)
    pipes = classify(names, PIPES)
    matrix = {n: c for n, c in names.items() if re.fullmatch(CLASSES["mma"], n.split(".")[0])}
    return Count(
        target=target,
        kernel=kernel.name,
        codec=kernel.codec,
        instructions=len(loop) or None,
        per_1024_weights=round(len(loop) * per_1024, 1) if loop else None,
        classes=dict(classify(names, CLASSES)),
        pipes={pipe: round(pipes[pipe] * per_1024, 1) for pipe in PIPES if pipes[pipe]},
        mma={name: round(n * per_1024, 1) for name, n in matrix.items()},
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
    )


def table(counts: list[Count]) -> str:
    """Markdown, a row per kernel and codec, and per target: instructions per 1024 weights."""
    lines = [
        "| target | kernel | codec | per 1024 weights | ALU | FMA | mma "
        "| registers | stack | shared |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in counts:
        per = "" if c.per_1024_weights is None else f"{c.per_1024_weights:g}"
        matrix = ", ".join(f"{n:g} {name}" for name, n in c.mma.items())
        lines.append(
            f"| {c.target} | {c.kernel} | {c.codec} | {per} | {c.pipes.get('alu', '')} "
            f"| {c.pipes.get('fma', '')} | {matrix} "
            f"| {c.registers} | {c.stack_bytes} | {c.shared_bytes} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts, by class too")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--codec", nargs="+", choices=["", *LAYOUTS], help="default: all")
    parser.add_argument("--kernel", default="", metavar="PREFIX", help="of the names of kernels")
    args = parser.parse_args()
    counts = [
        count(kernel, target)
        for target in args.target
        for kernel in all_kernels(target)
        if (args.codec is None or kernel.codec in args.codec)
        and kernel.name.startswith(args.kernel)
    ]
    print(table(counts))
    if args.json:
        args.json.write_text(json.dumps([asdict(c) for c in counts], indent=1) + "\n")


if __name__ == "__main__":
    main()
