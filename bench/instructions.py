"""Count the instructions that a compiled Triton kernel executes, from its machine code.

A thread executes an instruction as often as the loops around it turn. The loops are found in the
machine code; how often each of them turns is read from the Python source, which the compiler names
line by line. What the source has to say about it:

    for g in range(groups):      turns as often as the launch's argument `groups` says
    if tl.max(worst) > 0:  # rare
                                 the body counts as never executed; the condition does count
    helper(a, b)  # rare         and so does the whole statement

Whatever else stands under a condition counts as executed, on both sides of a branch, by every lane
of a warp: the count is an upper bound.
"""

from __future__ import annotations

import ast
import functools
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import triton

# A line of source, and the lines that lead to an instruction: its own line first, then the line of
# the call that was inlined, and so on up to the kernel.
Line = tuple[str, int]
Chain = tuple[Line, ...]
Statement = tuple[str, ast.For]  # and the file that it stands in


@dataclass(frozen=True)
class Instruction:
    opcode: str
    chain: Chain
    target: str | None = None  # the label that it may branch to
    falls_through: bool = True  # whether the next instruction may follow
    call: str | None = None  # the subroutine that it calls and comes back from


@dataclass(frozen=True)
class Code:
    """The instructions in the order of their addresses, and the index that each label stands for.
    `subroutines` are the labels of code that is called, which follows the kernel's own."""

    instructions: list[Instruction]
    labels: dict[str, int]
    subroutines: list[str]


@dataclass(frozen=True)
class Loop:
    header: int
    body: frozenset[int]  # indices of instructions
    latch: int  # the instruction that branches back


def count(
    kernel: Any, arguments: Mapping[str, Any], averages: Mapping[str, float] | None = None
) -> Counter[str]:
    """Executed instructions per thread, by the class of the instruction (see `classify`).

    `arguments` are the launch's, by name: the bounds of loops are evaluated with them. `averages`
    come before them: the turns of a loop by the text of its range's arguments, as in
    {"groups": 2.75} for `range(groups)`, and how often a branch is taken by the text of its
    condition, as in {"row < height": 0.75}.
    """
    averages = {_normal(text): value for text, value in (averages or {}).items()}
    name = kernel.metadata.name
    if "cubin" in kernel.asm:
        code, classify = parse_sass(_disassembly(kernel.asm["cubin"])), classify_sass
    else:
        code, classify = parse_amd(kernel.asm["amdgcn"]), classify_amd
    shares = {chain: _share(chain, averages) for chain in {i.chain for i in code.instructions}}
    executions = [shares[i.chain] for i in code.instructions]
    turns = functools.partial(_turns, name, arguments, averages)
    matched: list[tuple[Loop, Statement]] = []
    for loop in sorted(find_loops(code), key=lambda loop: -len(loop.body)):
        if executions[loop.latch] == 0:  # in rare code: nobody need know how often it turns
            continue
        outer = {statement for around, statement in matched if loop.body < around.body}
        statement = _source_loop(kernel, code, loop, outer, turns)
        matched.append((loop, statement))
        for index in loop.body:
            executions[index] *= turns(statement)
    _count_subroutines(code, executions)
    counts: Counter[str] = Counter()
    for instruction, times in zip(code.instructions, executions, strict=True):
        counts[classify(instruction.opcode)] += times
    return counts


# ---------------------------------------------------------------- machine code


def parse_sass(text: str) -> Code:
    """The code that `nvdisasm -gi -c` prints, without its padding.

    Its comments give the chain of the instructions that follow, one line for each level.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    subroutines: list[str] = []
    chain: list[Line] = []
    chain_is_old = True
    for line in text.splitlines():
        if found := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
            if chain_is_old:
                chain, chain_is_old = [], False
            chain.append((found[1], int(found[2])))
        elif found := re.match(r"([.$][\w$.]+):", line):
            labels[found[1]] = len(instructions)
            if found[1].startswith("$"):
                subroutines.append(found[1])
                chain = []  # the compiler's own: it stands on no line
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?\w+ )?\s*([A-Z][\w.]*)(.*?) ?;", line):
            chain_is_old = True
            if found[2] != "NOP":
                instructions.append(_sass_instruction(found[1], found[2], found[3], tuple(chain)))
    last = instructions[-1] if instructions else None
    if last and last.opcode == "BRA" and labels.get(last.target or "") == len(instructions) - 1:
        instructions.pop()  # what follows the end of a program is a branch to itself
    return Code(instructions, labels, subroutines)


def _sass_instruction(
    predicate: str | None, opcode: str, operands: str, chain: Chain
) -> Instruction:
    label = re.search(r"`\((.*?)\)", operands)
    base = opcode.split(".")[0]
    if base == "CALL" and label and label[1].startswith("$"):
        return Instruction(opcode, chain, call=label[1])
    if base in ("BRA", "CALL") and label:  # a call of a label without `$` is a far branch
        always = predicate is None and operands.strip().startswith("`")
        return Instruction(opcode, chain, target=label[1], falls_through=not always)
    ends = base in ("EXIT", "RET") and predicate is None
    return Instruction(opcode, chain, falls_through=not ends)


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
            instructions.append(
                Instruction(
                    found[1], chain,
                    target=label[0] if label else None,
                    falls_through=found[1] not in ("s_branch", "s_endpgm"),
                )
            )  # fmt: skip
    return Code(instructions, labels, [])


def _disassembly(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.nvdisasm.path
        command = [tool, "-gi", "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---------------------------------------------------------------- loops


def find_loops(code: Code) -> list[Loop]:
    """The natural loops of the kernel's own code, one for each instruction that is branched back
    to. A branch to a lower address is no loop if the code there can be left out on the way to the
    branch: the assembler puts cold code behind the rest."""
    starts, successors = _blocks(code)
    dominators = _dominators(successors)
    predecessors = defaultdict(set)
    for block, following in successors.items():
        for next_block in following:
            predecessors[next_block].add(block)
    latches = defaultdict(list)
    for block in dominators:
        for header in successors[block] & dominators[block]:
            latches[header].append(block)
    ends = dict(zip(starts, [*starts[1:], _own_length(code)], strict=True))
    loops = []
    for header, sources in latches.items():
        blocks, waiting = {header}, list(sources)
        while waiting:
            block = waiting.pop()
            if block not in blocks:
                blocks.add(block)
                waiting.extend(predecessors[block] & dominators.keys())
        body = frozenset(index for block in blocks for index in range(block, ends[block]))
        loops.append(Loop(header, body, max(ends[block] - 1 for block in sources)))
    return loops


def _own_length(code: Code) -> int:
    return min((code.labels[name] for name in code.subroutines), default=len(code.instructions))


def _blocks(code: Code) -> tuple[list[int], dict[int, set[int]]]:
    """The basic blocks, each named by its first instruction, and the blocks that may follow it."""
    length = _own_length(code)
    own = code.instructions[:length]
    starts = {0} | {code.labels[i.target] for i in own if i.target is not None}
    starts |= {n + 1 for n, i in enumerate(own) if i.target is not None or not i.falls_through}
    ordered = sorted(start for start in starts if start < length)
    successors: dict[int, set[int]] = {}
    for start, end in zip(ordered, [*ordered[1:], length], strict=True):
        last = own[end - 1]
        following = {end} if last.falls_through else set()
        if last.target is not None:
            following.add(code.labels[last.target])
        successors[start] = {block for block in following if block < length}
    return ordered, successors


def _dominators(successors: Mapping[int, set[int]]) -> dict[int, set[int]]:
    """For every block that can be reached, the blocks that every way to it leads through."""
    dominators: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(successors):
            if block not in dominators:
                continue
            for following in successors[block]:
                through = dominators[block] | {following}
                if following in dominators:
                    through = (dominators[following] & through) | {following}
                if dominators.get(following) != through:
                    dominators[following] = through
                    changed = True
    return dominators


def _turns(
    name: str, arguments: Mapping[str, Any], averages: Mapping[str, float], statement: Statement
) -> float:
    """How often a source loop turns: the number of elements of its range."""
    file, loop = statement
    call = cast(ast.Call, loop.iter)
    text = ", ".join(ast.unparse(argument) for argument in call.args)
    if text in averages:
        return averages[text]
    # Integers, and what a kernel is compiled for.
    numbers = {key: value for key, value in arguments.items() if isinstance(value, (int, str))}
    try:
        bounds = [
            int(
                eval(compile(ast.Expression(argument), file, "eval"), {"__builtins__": {}}, numbers)
            )
            for argument in call.args
        ]
        return len(range(*bounds))
    except (NameError, TypeError) as error:
        raise ValueError(
            f"{name}: nothing says how often the loop on line {loop.lineno} of {file} turns,"
            f" `for {ast.unparse(loop.target)} in {ast.unparse(call)}`: {error};"
            f" give an average for {text!r}"
        ) from None


def _source_loop(
    kernel: Any,
    code: Code,
    loop: Loop,
    outer: set[Statement],
    turns: Callable[[Statement], float],
) -> Statement:
    """The `for` that a loop of the machine code comes from; not one of `outer`, which the machine
    loops around it come from.

    The branch back nearly always stands on the line of its `for`. Should it not, or should that be
    a loop that was unrolled inside this one, the `for` that holds most of the loop's instructions
    is taken, the innermost of several.
    """
    name, latch = kernel.metadata.name, code.instructions[loop.latch].chain
    votes: Counter[Statement] = Counter()
    for index in sorted(loop.body):
        votes.update(_loops_around(code.instructions[index].chain))
    found = [statement for statement, _ in votes.most_common() if statement not in outer]
    found.sort(key=lambda statement: (statement[0], statement[1].lineno) not in latch[:1])
    if not found:
        raise ValueError(f"{name}: a loop of the machine code is no `for`; it ends at {latch}")
    whole = [s for s in found if _turns_alike(kernel, code, loop, s, turns)]
    if not whole:
        raise ValueError(
            f"{name}: the loop on line {found[0][1].lineno} of {found[0][0]} was unrolled in part,"
            " so its turns are not the machine loop's"
        )
    return whole[0]


@functools.cache
def _loops_around(chain: Chain) -> list[Statement]:
    """The source loops around an instruction, from the innermost outwards."""
    return [
        (file, statement)
        for file, line in chain
        for statement in reversed(read_source(file).loops)  # an inner loop starts later
        if statement.lineno <= line <= (statement.end_lineno or line)
    ]


def _turns_alike(
    kernel: Any,
    code: Code,
    loop: Loop,
    statement: Statement,
    turns: Callable[[Statement], float],
) -> bool:
    """Whether one turn of a machine loop is one turn of the source loop, as far as can be seen.

    LLVM names what it makes for the turns that unrolling leaves over. The assembler is found out
    by its copies: more accesses to memory on a line than the PTX has there, even with the loops
    inside this one unrolled.
    """
    if statement[1].lineno in _unrolled_by_llvm(kernel.asm["llir"]):
        return False
    copies = Counter(
        code.instructions[index].chain
        for index in loop.body
        if re.match(r"(LDG?|STG?|ATOMG?|RED)\b", code.instructions[index].opcode)
    )
    given = _memory_accesses(kernel.asm.get("ptx", ""))
    for chain, copied in copies.items():
        around = _loops_around(chain)
        inside = around[: around.index(statement)] if statement in around else []
        line = (PurePosixPath(chain[0][0]).name, chain[0][1]) if chain else None
        if copied > given.get(line, copied) * math.prod(turns(inner) for inner in inside):
            return False
    return True


def _unrolled_by_llvm(llir: str) -> set[int]:
    """The lines of the loops that it unrolled in part."""
    places = set(re.findall(r"%xtraiter\S* = .*!dbg (!\d+)", llir))
    lines = re.findall(r"^(!\d+) = !DILocation\(line: (\d+)", llir, re.MULTILINE)
    return {int(line) for place, line in lines if place in places}


def _memory_accesses(ptx: str) -> Counter[Line]:
    """How many of them each line of the source has, by the file's name."""
    accesses: Counter[Line] = Counter()
    line = ("", 0)
    for text in ptx.splitlines():
        if found := re.search(r"\.loc\s.*// (\S+):(\d+):\d+", text):
            line = (found[1], int(found[2]))
        elif re.search(r"\b(ld|st|atom|red)\.(\w+\.)*global", text):
            accesses[line] += 1
    return accesses


def _count_subroutines(code: Code, executions: list[float]) -> None:
    """Code that is called, such as a double precision division's slow path, is executed once for
    each execution of each call."""
    starts = [*(code.labels[name] for name in code.subroutines), len(code.instructions)]
    for name, start, end in zip(code.subroutines, starts[:-1], starts[1:], strict=True):
        calls = sum(
            times
            for instruction, times in zip(code.instructions, executions, strict=True)
            if instruction.call == name
        )
        for index in range(start, end):
            executions[index] = calls


# ---------------------------------------------------------------- source


@dataclass(frozen=True)
class Source:
    loops: list[ast.For]  # over a range that the compiler may keep, by their first lines
    branches: list[tuple[str, ast.If]]  # with the text of their conditions
    rare: list[tuple[int, int]]  # first and last line


@functools.cache
def read_source(file: str) -> Source:
    """What a source file says about how often its lines are executed."""
    text = _present(file).read_text(encoding="utf-8")
    rare_lines = {
        number for number, line in enumerate(text.splitlines(), 1) if re.search(r"# rare$", line)
    }
    loops, branches, rare = [], [], []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
            if not ast.unparse(node.iter.func).endswith("static_range"):
                loops.append(node)
        elif isinstance(node, ast.If):
            branches.append((ast.unparse(node.test), node))
            first, last = _body_lines(node.body)
            if rare_lines & set(range(node.lineno, first)):
                rare.append((first, last))
        elif isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign)):
            last = node.end_lineno or node.lineno
            if rare_lines & set(range(node.lineno, last + 1)):
                rare.append((node.lineno, last))
    return Source(sorted(loops, key=lambda loop: loop.lineno), branches, rare)


def _present(file: str) -> Path:
    """The file as it lies here. A binary from Triton's cache, which goes by what the source says
    and not by where it lies, may name another checkout's."""
    ending = PurePosixPath(file).parts[-2:]
    for module in list(sys.modules.values()):
        loaded = getattr(module, "__file__", None)
        if loaded and Path(loaded).parts[-len(ending) :] == ending:
            return Path(loaded)
    return Path(file)


def _share(chain: Chain, averages: Mapping[str, float]) -> float:
    """How often the code on these lines is executed for one execution of the loop's body."""
    share = 1.0
    for file, line in chain:
        source = read_source(file)
        if any(first <= line <= last for first, last in source.rare):
            return 0.0
        for condition, branch in source.branches if averages else ():
            taken = averages.get(condition)
            if taken is not None:
                share *= _share_of_branch(branch, line, taken)
    return share


def _share_of_branch(branch: ast.If, line: int, taken: float) -> float:
    for body, share in ((branch.body, taken), (branch.orelse, 1 - taken)):
        if body:
            first, last = _body_lines(body)
            if first <= line <= last:
                return share
    return 1.0


def _body_lines(body: list[ast.stmt]) -> tuple[int, int]:
    return body[0].lineno, body[-1].end_lineno or body[-1].lineno


def _normal(text: str) -> str:
    """The text as `ast.unparse` writes it, so that spaces do not matter."""
    call = ast.parse(f"range({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return ", ".join(ast.unparse(argument) for argument in call.args)


# ---------------------------------------------------------------- classes of instructions

# The unit that executes each SASS opcode, up to its first dot; see model.py for what is known of
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
    "control": (
        "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BMOV BAR WARPSYNC NANOSLEEP YIELD"
        " RPCMOV MEMBAR DEPBAR ERRBAR CCTL ACQBULK"
    ),
    "other": "LDC S2R CS2R",
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


def classify_amd(opcode: str) -> str:
    """The class of an AMD instruction. "uniform" ones are a wave's, not a thread's."""
    if opcode.startswith(("s_cbranch", "s_branch", "s_endpgm", "s_barrier", "s_waitcnt", "s_nop")):
        return "control"
    if opcode.startswith("s_"):
        return "uniform"
    if not opcode.startswith("v_"):
        return "lsu"
    if opcode.startswith("v_cvt"):
        return "conversion64" if "f64" in opcode else "conversion"
    if re.match(r"v_(rcp|rsq|sqrt|exp|log|sin|cos)_", opcode):
        return "conversion"
    if re.match(r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|mad|div_\w+)(_mix)?_f", opcode):
        return "fp64" if "f64" in opcode else "fp32"
    return "alu"
