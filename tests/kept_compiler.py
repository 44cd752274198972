"""A C++ compiler that keeps its objects: python kept_compiler.py FOLDER COMPILER ARGUMENTS...

Several installations of one source tree then compile it once. An object is known by the sources, all of them, and by
the arguments but for the folders that they name.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(folder: Path, command: list[str]) -> int:
    if "-c" not in command:
        return subprocess.call(command)
    target = Path(command[command.index("-o") + 1])
    kept = folder / f"{digest(command, str(target))}.o"
    if not kept.exists():
        code = subprocess.call(command)
        if code:
            return code
        partial = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, partial)
        partial.rename(kept)
    shutil.copyfile(kept, target)
    return 0


def digest(command: list[str], target: str) -> str:
    found = hashlib.sha256()
    for argument in command:
        if argument != target and not argument.startswith("-I"):
            found.update(argument.encode() + b"\0")
    for path in sorted(Path("csrc").resolve().rglob("*.*")):
        if path.suffix in (".h", ".cpp"):
            found.update(path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
