"""Count the instructions that a compiled Triton kernel executes, from its machine code.

A thread executes an instruction as often as the loops around it turn. The loops are found in the
machine code; how often each of them turns is read from the Python source, which the compiler names
line by line: `for g in range(groups)` turns as often as the launch's argument `groups` says.

What stands under a condition counts as executed, on both sides of a branch, by every lane of a
warp, where nobody says better: the count is an upper bound. Code that is called counts once. The
instructions of an AMD GPU are not sorted into classes: none is modelled.
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

# A line of source, and the lines that lead to an instruction: its own line first, then the line of
# the call that was inlined, and so on up to the kernel.
Line = tuple[str, int]
Chain = tuple[Line, ...]


class Instruction(NamedTuple):
    opcode: str
    chain: Chain
    target: str | None = None  # the label that it may branch to
    falls_through: bool = True  # whether the next instruction may follow


class Code(NamedTuple):
    instructions: list[Instruction]  # in the order of their addresses
    labels: dict[str, int]  # the index that each stands for


class Loop(NamedTuple):
    body: set[int]  # indices of instructions
    latch: int  # the instruction that branches back


def count(
    kernel: Any, arguments: Mapping[str, Any], averages: Mapping[str, float] | None = None
) -> Counter[str]:
    """Executed instructions per thread, by the class of the instruction (see `classify_sass`).

    `arguments` are the launch's, by name: the bounds of loops are evaluated with them. `averages`
    come before them: the turns of a loop by the text of its range's arguments, as in
    {"groups": 2.75} for `range(groups)`, and how often a branch is taken by the text of its
    condition, as in {"row < height": 0.75}; both as `ast.unparse` writes them.

    Raises:
        ValueError: where nothing says how often a loop turns, or a compiler unrolled it in part.
    """
    averages = averages or {}
    if "cubin" in kernel.asm:
        code = parse_sass(cuda_tool("nvdisasm", kernel.asm["cubin"], "-gi", "-c"))
        classify = classify_sass
    else:
        code, classify = parse_amd(kernel.asm["amdgcn"]), lambda _: "other"
    share = functools.cache(functools.partial(_share, averages=averages))
    executions = [share(instruction.chain) for instruction in code.instructions]
    turns = functools.partial(_turns, arguments=arguments, averages=averages)
    matched: list[tuple[Loop, ast.For]] = []
    for loop in sorted(find_loops(code), key=lambda loop: -len(loop.body)):
        if executions[loop.latch] == 0:  # nobody need know how often it turns
            continue
        outer = [statement for around, statement in matched if loop.body < around.body]
        statement = _source_loop(code, loop, outer)
        matched.append((loop, statement))
        if _unrolled_in_part(kernel, code, loop, statement, turns):
            text, _, _ = ast.unparse(statement).partition(":")
            raise ValueError(
                f"the loop on line {statement.lineno}, `{text}`, was unrolled in part, so its "
                "turns are not the machine loop's"
            )
        for index in loop.body:
            executions[index] *= turns(statement)
    counts: Counter[str] = Counter()
    for instruction, times in zip(code.instructions, executions, strict=True):
        counts[classify(instruction.opcode)] += times
    return counts


# ---------------------------------------------------------------- machine code


def cuda_tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the CUDA tools that come with Triton prints of a binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [getattr(triton.knobs.nvidia, name).path, *options, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_sass(text: str) -> Code:
    """The code that `nvdisasm -gi -c` prints, without its padding.

    Its comments give the chain of the instructions that follow, one line for each level.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    chain: list[Line] = []
    chain_is_old = True
    for line in text.splitlines():
        if found := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
            if chain_is_old:
                chain, chain_is_old = [], False
            chain.append((found[1], int(found[2])))
        elif found := re.match(r"([.$][\w$.]+):", line):
            labels[found[1]] = len(instructions)
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
                instructions.append(Instruction(opcode, tuple(chain), target, not always))
    if instructions and labels.get(instructions[-1].target or "") == len(instructions) - 1:
        instructions.pop()  # what follows the end of a program is a branch to itself
    return Code(instructions, labels)


def parse_amd(text: str) -> Code:
    """The assembly of an AMD kernel. The comment of a `.loc` nests the chain:
    `; standard.py:43:13 @[ launch.py:44:16 @[ launch.py:182:38 ] ]`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    # A chain may name a file before its `.file` directive comes.
    named = re.findall(r'\.file\s+\d+ "(.*?)" "(.*?)"', text)
    paths = {file: f"{folder}/{file}" for folder, file in named}
    chain: Chain = ()
    for line in text.splitlines():
        if re.match(r"\s+\.loc\s", line):
            named = re.findall(r"([^\s\[]+):(\d+):\d+", line.partition(";")[2])
            chain = tuple((paths.get(file, file), int(number)) for file, number in named)
        elif found := re.match(r"(\.LBB\w+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\t((?:[sv]|ds|global|buffer|flat|scratch)_\w+)(.*)", line):
            label = re.search(r"\.LBB\w+", found[2]) if "branch" in found[1] else None
            goes_on = found[1] not in ("s_branch", "s_endpgm")
            instructions.append(Instruction(found[1], chain, label[0] if label else None, goes_on))
    return Code(instructions, labels)


def find_loops(code: Code) -> list[Loop]:
    """The natural loops, one for each instruction that is branched back to. A branch to a lower
    address is no loop if the code there can be left out on the way to the branch: the assembler
    puts cold code behind the rest."""
    graph = networkx.DiGraph()
    for index, instruction in enumerate(code.instructions):
        if instruction.falls_through and index + 1 < len(code.instructions):
            graph.add_edge(index, index + 1)
        if instruction.target is not None:
            graph.add_edge(index, code.labels[instruction.target])
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


class Source(NamedTuple):
    loops: list[ast.For]  # over a range that the compiler may keep, inner ones first
    conditional: list[tuple[range, str, bool]]  # lines, and the condition that holds there, or not


@functools.cache
def read_source(file: str) -> Source:
    """What a source file says about how often its lines are executed."""
    # A binary from Triton's cache, which goes by what the source says and not by where it lies, may
    # name another checkout's file.
    ending = PurePosixPath(file).parts[-2:]
    loaded = [Path(m.__file__) for m in [*sys.modules.values()] if getattr(m, "__file__", None)]
    path = next((path for path in loaded if path.parts[-2:] == ending), Path(file))
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    loops = [node for node in nodes if isinstance(node, ast.For)]
    conditional = [
        (range(body[0].lineno, (body[-1].end_lineno or 0) + 1), ast.unparse(node.test), holds)
        for node in nodes
        if isinstance(node, ast.If)
        for body, holds in ((node.body, True), (node.orelse, False))
        if body
    ]
    loops = [loop for loop in loops if re.match(r"(tl\.)?range\(", ast.unparse(loop.iter))]
    return Source(sorted(loops, key=lambda loop: -loop.lineno), conditional)


def _share(chain: Chain, averages: Mapping[str, float]) -> float:
    """How often the code on these lines is executed for one execution of the loop's body."""
    return math.prod(
        averages[condition] if holds else 1 - averages[condition]
        for file, line in chain
        for lines, condition, holds in read_source(file).conditional
        if line in lines and condition in averages
    )


@functools.cache
def _loops_around(chain: Chain) -> list[ast.For]:
    """The source loops around an instruction, from the innermost outwards."""
    return [
        loop
        for file, line in chain
        for loop in read_source(file).loops
        if loop.lineno <= line <= (loop.end_lineno or line)
    ]


def _source_loop(code: Code, loop: Loop, outer: list[ast.For]) -> ast.For:
    """The `for` that a loop of the machine code comes from; not one of `outer`, which the machine
    loops around it come from.

    The branch back nearly always stands on the line of its `for`. Should it not, the `for` that
    holds most of the loop's instructions is taken, the innermost of several.
    """
    latch = code.instructions[loop.latch].chain
    votes = Counter(s for i in sorted(loop.body) for s in _loops_around(code.instructions[i].chain))
    found = [statement for statement, _ in votes.most_common() if statement not in outer]
    if not found:
        raise ValueError(f"a loop of the machine code is no `for`; it ends at {latch}")
    named = [s for s in _loops_around(latch[:1]) if s in found and s.lineno == latch[0][1]]
    return (named or found)[0]


def _turns(
    statement: ast.For, arguments: Mapping[str, Any], averages: Mapping[str, float]
) -> float:
    """How often a source loop turns: the number of elements of its range."""
    assert isinstance(statement.iter, ast.Call)
    text = ", ".join(map(ast.unparse, statement.iter.args))
    if text in averages:
        return averages[text]
    # Integers, and what a kernel is compiled for.
    numbers = {key: value for key, value in arguments.items() if isinstance(value, (int, str))}
    try:
        bounds = eval(f"[{text}]", {"__builtins__": {}}, numbers)
        return len(range(*map(int, bounds)))
    except (NameError, TypeError) as error:
        raise ValueError(
            f"nothing says how often the loop on line {statement.lineno} turns: {error}; give an "
            f"average for {text!r}"
        ) from None


def _unrolled_in_part(
    kernel: Any,
    code: Code,
    loop: Loop,
    statement: ast.For,
    turns: Callable[[ast.For], float],
) -> bool:
    """Whether one turn of a machine loop is several turns of the source loop, as far as can be
    seen.

    LLVM names what it makes for the turns that unrolling leaves over. The assembler is found out
    by its copies: more accesses to memory on a line than the PTX has there, even with the loops
    inside this one unrolled.
    """
    llir = kernel.asm["llir"]
    for place in re.findall(r"%xtraiter\S* = .*!dbg (!\d+)", llir):
        if re.search(rf"^{place} = !DILocation\(line: {statement.lineno}\b", llir, re.MULTILINE):
            return True
    # What stands between the PTX's file names and lines.
    _, *parts = re.split(r"\.loc\s.*// (\S+:\d+):\d+", kernel.asm.get("ptx", ""))
    given: Counter[str] = Counter()  # accesses by file name and line
    for place, text in zip(parts[::2], parts[1::2], strict=True):
        given[place] += len(re.findall(r"\b(?:ld|st|atom|red)\.(?:\w+\.)*global", text))
    inside = [code.instructions[index] for index in loop.body]
    accesses = re.compile(r"(LDG?|STG?|ATOMG?|RED)\b")
    copies = Counter(i.chain for i in inside if i.chain and accesses.match(i.opcode))
    for chain, copied in copies.items():
        around = _loops_around(chain)
        inner = around[: around.index(statement)] if statement in around else []
        place = f"{PurePosixPath(chain[0][0]).name}:{chain[0][1]}"
        # Of a line that has none there, the PTX says nothing.
        if copied > (given[place] or copied) * math.prod(map(turns, inner)):
            return True
    return False


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
