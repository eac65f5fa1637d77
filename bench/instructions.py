"""Count the instructions that a compiled Triton kernel executes, from its machine code.

A thread executes an instruction as often as the loops around it turn. The loops are found in the
machine code; how often each of them turns is read from the Python source, which the compiler names
line by line: `for g in range(groups)` turns as often as the launch's argument `groups` says.

What stands under a condition counts as executed, on both sides of a branch, by every lane of a
warp, where nobody says better: the count is an upper bound. Code that is called counts once.
"""

from __future__ import annotations

import ast
import functools
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import networkx
import triton

# The lines of source that lead to an instruction, as file and number: its own line first, then the
# line of the call that was inlined, and so on up to the kernel.
Chain = tuple[tuple[str, int], ...]


class Instruction(NamedTuple):
    opcode: str
    chain: Chain
    target: int | None  # the index of the instruction that it may branch to
    falls_through: bool  # whether the next instruction may follow


class Loop(NamedTuple):
    body: set[int]  # indices of instructions
    latch: int  # the instruction that branches back


def count(kernel: Any, arguments: Mapping[str, Any], averages: Mapping[str, float]) -> Counter[str]:
    """Executed instructions per thread, by the class of the instruction (see `classify_sass`).

    `arguments` are the launch's, by name: the bounds of loops are evaluated with them. `averages`
    come before them: the turns of a loop by the text of its range's arguments, as in
    {"groups": 2.75} for `range(groups)`, and how often a branch is taken by the text of its
    condition, as in {"row < height": 0.75}; both as `ast.unparse` writes them.

    Raises:
        ValueError: where nothing says how often a loop turns, or a compiler unrolled it in part;
            for a GPU that is not NVIDIA's.
    """
    if "cubin" not in kernel.asm:
        raise ValueError("only NVIDIA's machine code is read")
    code = parse_sass(cuda_tool("nvdisasm", kernel.asm["cubin"], "-gi", "-c"))
    executions = [_share(instruction.chain, averages) for instruction in code]
    turns = functools.partial(_turns, arguments=arguments, averages=averages)
    sources: list[tuple[Loop, Block]] = []  # of the loops so far, the outer ones first
    for loop in sorted(find_loops(code), key=lambda loop: -len(loop.body)):
        if executions[loop.latch] == 0:  # nobody need know how often it turns
            continue
        outer = [source for known, source in sources if loop.body <= known.body]
        source = _source_loop(code, loop, outer)
        sources.append((loop, source))
        _refuse_unrolled(kernel, [code[index] for index in loop.body], source, turns)
        for index in loop.body:
            executions[index] *= turns(source)
    counts: Counter[str] = Counter()
    for instruction, times in zip(code, executions, strict=True):
        counts[classify_sass(instruction.opcode)] += times
    return counts


# ---------------------------------------------------------------- machine code


def cuda_tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the CUDA tools that come with Triton prints of a binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [getattr(triton.knobs.nvidia, name).path, *options, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_sass(text: str) -> list[Instruction]:
    """The code that `nvdisasm -gi -c` prints, in the order of addresses, without its padding.

    Its comments give the chain of the instructions that follow, one line for each level.
    """
    code: list[tuple[str, Chain, str | None, bool]] = []
    labels: dict[str, int] = {}
    chain: list[tuple[str, int]] = []
    chain_is_old = True
    for line in text.splitlines():
        if found := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
            if chain_is_old:
                chain, chain_is_old = [], False
            chain.append((found[1], int(found[2])))
        elif found := re.match(r"([.$][\w$.]+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?\w+ )?\s*([A-Z][\w.]*)(.*?) ?;", line):
            chain_is_old = True
            predicate, opcode, operands = found.groups()
            base, label = opcode.split(".")[0], re.search(r"`\((\.\S*?)\)", operands)
            # A call of a label with a dot is a far branch; those that come back have a dollar sign.
            branches = base in ("BRA", "CALL") and label is not None
            always = predicate is None and (
                operands.strip().startswith("`") if branches else base in ("EXIT", "RET")
            )
            if opcode != "NOP":
                target = label[1] if branches else None
                code.append((opcode, tuple(chain), target, not always))
    if code and labels.get(code[-1][2]) == len(code) - 1:
        code.pop()  # what follows the end of a program is a branch to itself
    return [
        Instruction(opcode, chain, labels[target] if target else None, falls_through)
        for opcode, chain, target, falls_through in code
    ]


def find_loops(code: list[Instruction]) -> list[Loop]:
    """The natural loops, one for each instruction that is branched back to. A branch to a lower
    address is no loop if the code there can be left out on the way to the branch: the assembler
    puts cold code behind the rest."""
    graph = networkx.DiGraph()
    for index, instruction in enumerate(code):
        if instruction.falls_through and index + 1 < len(code):
            graph.add_edge(index, index + 1)
        if instruction.target is not None:
            graph.add_edge(index, instruction.target)
    # From each instruction to the last of those that every way to it leads through.
    dominators = networkx.DiGraph(networkx.immediate_dominators(graph, 0).items())
    graph.remove_nodes_from(set(graph) - set(dominators))  # subroutines
    loops = []
    for header in [index for index in graph if graph.in_degree(index) > 1]:
        dominated = networkx.ancestors(dominators, header) | {header}
        if latches := dominated.intersection(graph.predecessors(header)):
            inside = networkx.restricted_view(graph, [header], [])
            before = [networkx.ancestors(inside, latch) for latch in latches if latch != header]
            loops.append(Loop({header, *latches}.union(*before), max(latches)))
    return loops


# ---------------------------------------------------------------- source


class Block(NamedTuple):
    """Lines that are executed more or less often than what is around them."""

    kind: str  # "for", over a range that the compiler may keep, "if" or "else"
    text: str  # the range's arguments or the condition, as `ast.unparse` writes them
    lines: range


@functools.cache
def read_source(file: str) -> list[Block]:
    """The blocks of a source file, inner ones first."""
    # A binary from Triton's cache, which goes by what the source says and not by where it lies, may
    # name another checkout's file.
    ending = PurePosixPath(file).parts[-2:]
    loaded = [Path(m.__file__) for m in [*sys.modules.values()] if getattr(m, "__file__", None)]
    path = next((path for path in loaded if path.parts[-2:] == ending), Path(file))
    blocks = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts: list[tuple[str, list[ast.expr], list[ast.stmt]]] = []
        match node:
            case ast.For(iter=ast.Call(ast.Name("range") | ast.Attribute(attr="range"), bounds)):
                parts = [("for", bounds, [node])]
            case ast.If(condition, body, otherwise):
                parts = [("if", [condition], body), ("else", [condition], otherwise)]
        for kind, said, body in parts:
            if body:
                lines = range(body[0].lineno, body[-1].end_lineno + 1)
                blocks.append(Block(kind, ", ".join(map(ast.unparse, said)), lines))
    return sorted(blocks, key=lambda block: -block.lines.start)


@functools.cache
def _around(chain: Chain) -> list[Block]:
    """The blocks around an instruction, from the innermost outwards."""
    return [block for file, line in chain for block in read_source(file) if line in block.lines]


def _share(chain: Chain, averages: Mapping[str, float]) -> float:
    """How often an instruction is executed in one turn of the loops around it."""
    known = [block for block in _around(chain) if block.kind != "for" and block.text in averages]
    return math.prod(
        averages[block.text] if block.kind == "if" else 1 - averages[block.text] for block in known
    )


def _source_loop(code: list[Instruction], loop: Loop, outer: list[Block]) -> Block:
    """The `for` that a loop of the machine code comes from; not one of `outer`, which the machine
    loops around it come from.

    The branch back nearly always stands on the line of its `for`. Should it not, as for sm_120, the
    `for` that holds most of the loop's instructions is taken, the innermost of several.
    """
    latch = code[loop.latch].chain
    around = [block for i in sorted(loop.body) for block in _around(code[i].chain)]
    votes = Counter(block for block in around if block.kind == "for" and block not in outer)
    if not votes:
        raise ValueError(f"a loop of the machine code is no `for`; it ends at {latch}")
    named = [b for b in _around(latch[:1]) if b in votes and b.lines.start == latch[0][1]]
    return named[0] if named else votes.most_common(1)[0][0]


def _turns(loop: Block, arguments: Mapping[str, Any], averages: Mapping[str, float]) -> float:
    """How often a source loop turns: the number of elements of its range."""
    if loop.text in averages:
        return averages[loop.text]
    # Integers, and what a kernel is compiled for.
    numbers = {key: value for key, value in arguments.items() if isinstance(value, (int, str))}
    try:
        bounds = eval(f"[{loop.text}]", {"__builtins__": {}}, numbers)
        return len(range(*map(int, bounds)))
    except (NameError, TypeError) as error:
        raise ValueError(
            f"nothing says how often the loop on line {loop.lines.start} turns: {error}; give an "
            f"average for {loop.text!r}"
        ) from None


def _refuse_unrolled(
    kernel: Any, inside: list[Instruction], source: Block, turns: Callable[[Block], float]
) -> None:
    """Raise ValueError where one turn of a machine loop, `inside`, is several turns of the source
    loop, as far as can be seen.

    LLVM names what it makes for the turns that unrolling leaves over. The assembler is found out
    by its copies: more accesses to memory on a line than the PTX has there, even with the loops
    inside this one unrolled.
    """
    # What stands between the PTX's file names and lines.
    _, *parts = re.split(r"\.loc\s.*// (\S+:\d+):\d+", kernel.asm["ptx"])
    given: Counter[str] = Counter()  # accesses by file name and line
    for place, text in zip(parts[::2], parts[1::2], strict=True):
        given[place] += len(re.findall(r"\b(?:ld|st|atom|red)\.(?:\w+\.)*global", text))
    accesses = re.compile(r"(LDG?|STG?|ATOMG?|RED)\b")
    found = Counter(i.chain for i in inside if i.chain and accesses.match(i.opcode))
    unrolled = "%xtraiter" in kernel.asm["llir"]
    for chain, copies in found.items():
        around = [block for block in _around(chain) if block.kind == "for"]
        inner = around[: around.index(source)] if source in around else []
        place = f"{PurePosixPath(chain[0][0]).name}:{chain[0][1]}"
        # Of a line that has none there, the PTX says nothing.
        unrolled |= copies > (given[place] or copies) * math.prod(map(turns, inner))
    if unrolled:
        raise ValueError(
            f"the loop on line {source.lines.start}, over range({source.text}), was unrolled in "
            "part, so its turns are not the machine loop's"
        )


# ---------------------------------------------------------------- classes of instructions

# The unit that executes each SASS opcode, up to its first dot; model.py has what is known of
# them. What is not here works on integers, bits and predicates, or compares or selects: FSEL,
# FSETP, FMNMX, SEL, LOP3, SHF, IADD3, ISETP, PRMT, LEA, MOV and so on, on the "alu".
_SASS = {
    "fp32": "FADD FADD32I FMUL FMUL32I FFMA FFMA32I FADD2 FMUL2 FFMA2",
    # HADD2.F32 is how a half is read as fp32; FHADD does that and adds.
    "half": "HADD2 HADD2_32I HMUL2 HMUL2_32I HFMA2 HFMA2_32I HSETP2 HSET2 FHADD FHFMA",
    "imad": "IMAD IMAD32I IMUL IMUL32I IDP IDP4A",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    # F2FP and I2FP, the fast conversions, are the alu's.
    "conversion": "F2F F2I I2F I2I FRND MUFU POPC FLO BREV REDUX FCHK",
    "lsu": "LD LDG LDS LDSM LDL ST STG STS STL ATOM ATOMG ATOMS RED SHFL MATCH",
    # Branches, barriers and constants: nothing but their issue is known.
    "other": (
        "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BMOV BAR WARPSYNC NANOSLEEP YIELD RPCMOV MEMBAR"
        " DEPBAR ERRBAR CCTL ACQBULK LDC S2R CS2R"
    ),
}
_CLASS_OF_SASS = {opcode: unit for unit, opcodes in _SASS.items() for opcode in opcodes.split()}


def classify_sass(opcode: str) -> str:
    """The class of an NVIDIA instruction. "uniform" ones are a warp's, not a thread's."""
    base = opcode.split(".")[0]
    if base in ("S2UR", "R2UR", "LDCU") or base.startswith("U"):
        return "uniform"
    unit = _CLASS_OF_SASS.get(base, "alu")
    if unit == "conversion" and base != "MUFU" and "64" in opcode:
        return "conversion64"
    return unit
