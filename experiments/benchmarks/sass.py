"""How many bytes a thread asks for before it waits, read from machine code (SASS).

ptxas decides that, not the source: it may put each load right before its first use, and does so with loads
under a mask.
"""

import pathlib
import re
import subprocess

_LOAD = re.compile(r"LDG\S* R(\d+),")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def disassemble(cubin: pathlib.Path, nvdisasm: pathlib.Path) -> str:
    """The machine code of a file.  Raises RuntimeError where nvdisasm refuses."""
    ran = subprocess.run([str(nvdisasm), "-c", str(cubin)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"nvdisasm refused: {(ran.stderr or ran.stdout).strip().splitlines()[0]}")
    return ran.stdout


def under_way(sass: str) -> dict[str, int]:
    """The most bytes that a thread of each kernel has asked for while it used none of them, by its loads.

    Between two labels: what a turn of a loop asks for the next one does not count.  Nor do copies to shared
    memory that a kernel waits for later (LDGSTS), whose room its launch asks for.
    """
    found: dict[str, int] = {}
    name, waiting = "", dict[int, int]()
    for line in sass.splitlines():
        if section := re.match(r"\.text\.(\w+):", line.strip()):
            name, waiting = section[1], {}
            found[name] = 0
        elif re.match(r"\.L_\w+:", line.strip()):
            waiting = {}
        elif code := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(.*?);", line):
            _step(code[1], waiting)
            found[name] = max(found.get(name, 0), sum(waiting.values()))
    return found


def _step(code: str, waiting: dict[int, int]) -> None:
    """One instruction: what it loads is waited for, and what it reads no longer is."""
    opcode, _, operands = code.partition(" ")
    load = _LOAD.match(code)
    written = re.match(r"R(\d+)", operands) if not opcode.startswith(("ST", "RED", "ATOM")) else None
    read = operands[written.end() :] if written else operands
    used = {int(number) for number in re.findall(r"\bR(\d+)", read)}
    for first, size in list(waiting.items()):
        registers = range(first, first + max(1, size // 4))
        if used & set(registers) or (written and int(written[1]) in registers):
            del waiting[first]
    if load:
        width = next((size for part, size in _BYTES.items() if part in opcode.split(".")), 4)
        waiting[int(load[1])] = width
