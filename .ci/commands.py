"""Do the shell commands of README, pages and results exist, and do the short ones run?

    python .ci/commands.py          checks all, and runs the short ones, in a copy
    python .ci/commands.py check    checks all

Commands are the lines of blocks of ``sh``, and code in a sentence that begins with one
of the programs below. Of each, the module, the options, the extras or the tests must
exist.
"""

import concurrent.futures
import fnmatch
import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "*/README.md",
    "*/results/**/*.md",
)
PROGRAMS = ("python", "pytest", "pip", "pre-commit", "srun", ".ci/run")

TRAINS = "trains for minutes or hours; the tests of its room run it smaller"
TIMES = "times for minutes, on a machine that does nothing else"
# What is not run here, by pattern, and why.
LONG = {
    ".ci/run*": "runs this",
    "pip install *": "the parts of .ci/run install what they need",
    "pre-commit *": "changes the checkout; the part checks runs the hooks",
    "pytest": "the library's tests; parts of .ci/run by Python's version",
    "pytest -m *": "the parts clients, compiled and slow",
    "pytest * -m *": "the part slow",
    "pytest examples*": "the part rooms",
    "pytest experiments": "the part rooms",
    "pytest benchmarks": "the part rooms",
    "python -m examples.warmup_free_transformer --seeds *": TRAINS,
    "python -m experiments.*": TRAINS,
    "python -m benchmarks.gpu*": "tests and times for minutes; its test runs it small",
    "python -m benchmarks.compiled*": "compiles for minutes; the part compiled",
    "python -m benchmarks.step_time*": TIMES,
    "python -m benchmarks.train_step*": TIMES,
    "python -m benchmarks.whole_step*": "compiles for a minute; its test runs it small",
}


def commands(text: str) -> Iterator[str]:
    """Yields the commands of a page, one for each program that it starts."""
    blocks = r"^```(\w*)[^\n]*\n(.*?)^```"
    found = [
        line.strip()
        for language, block in re.findall(blocks, text, re.DOTALL | re.MULTILINE)
        if language == "sh"
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    prose = re.sub(blocks, "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`+([^`]+)`+", prose):
        words = code.split()
        if words and words[0] in PROGRAMS and code not in ("python", "pip"):
            found.append(" ".join(words))
    for line in found:
        for command in line.split(" && "):
            yield shlex.join(shlex.split(command, comments=True))


def all_commands() -> dict[str, str]:
    """Returns the commands of all pages, and the first page that each is on."""
    found: dict[str, str] = {}
    for pattern in TEXTS:
        for path in sorted(ROOT.glob(pattern)):
            for command in commands(path.read_text()):
                found.setdefault(command, str(path.relative_to(ROOT)))
    return found


def problem(command: str) -> str | None:
    """Returns what is wrong with a command, before it runs."""
    program, *words = shlex.split(command)
    if program == "srun":
        program, *words = words
    if program == "python" and words[:1] == ["-m"]:
        return problem_of_module(words[1], words[2:])
    if program == "pytest" and "clients" in words:  # whose libraries are not here
        missing = [x for x in words if "/" in x and not (ROOT / x).exists()]
        return f"there is no {missing}" if missing else None
    if program == "pytest":
        result = run([sys.executable, "-m", "pytest", "--collect-only", "-q", *words])
        return None if result.returncode == 0 else last_line(result)
    if program == "pip":
        return problem_of_install(words)
    if program == ".ci/run":
        parts = (ROOT / ".ci" / "run").read_text()
        known = all(
            re.search(rf"^( *{word}\)|{word}\(\) {{$)", parts, re.M) for word in words
        )
        return None if known else "no such part"
    return None if program == "pre-commit" else "an unknown program"


def problem_of_module(module: str, words: list[str]) -> str | None:
    """Returns what is wrong with the module or its options, which ``--help`` lists."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        return f"there is no {path.relative_to(ROOT)}"
    if '"__main__"' not in path.read_text():
        return f"{module} takes no options" if words else None
    known = set(re.findall(r"--[\w-]+", help_of(module)))
    unknown = [x for x in words if x.startswith("--") and x.split("=")[0] not in known]
    return f"no such options: {' '.join(unknown)}" if unknown else None


@functools.cache
def help_of(module: str) -> str:
    """Returns what a program prints of its options."""
    result = run([sys.executable, "-m", module, "--help"])
    if result.returncode:
        raise RuntimeError(f"python -m {module} --help fails: {last_line(result)}")
    return result.stdout


def problem_of_install(words: list[str]) -> str | None:
    """Returns which extras or groups of dependencies do not exist."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
    wanted = {name for names in extras for name in names.split(",")}
    missing = wanted - set(pyproject["project"]["optional-dependencies"])
    groups = {y for x, y in itertools.pairwise(words) if x == "--group"}
    missing |= groups - set(pyproject["dependency-groups"])
    if words[0] != "install" or missing:
        return f"pip cannot install {sorted(missing) or words}"
    return None


def run(words: list[str], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, and keeps what it prints."""
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=False
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """Returns what a program said last."""
    lines = (result.stdout + result.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit code {result.returncode}"


def is_long(command: str) -> bool:
    """Whether a pattern of LONG keeps a command from being run here."""
    return any(fnmatch.fnmatchcase(command, pattern) for pattern in LONG)


def run_short(short: list[str]) -> list[str]:
    """Runs commands as they are written, in a copy; returns those that failed."""
    failed = []
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    }
    listed = run(["git", "ls-files", "-co", "--exclude-standard"]).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in listed.splitlines():
            copy = Path(folder) / name
            if not (ROOT / name).exists():  # deleted, and not yet committed
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
        for command in short:
            start = time.monotonic()
            result = subprocess.run(
                ["bash", "-c", command],
                cwd=folder, env=environment, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            print(f"{time.monotonic() - start:5.0f} s  {command}", flush=True)
            if result.returncode:
                print(result.stdout)
                failed.append(f"{command}: exit code {result.returncode}")
    return failed


def main() -> None:
    """Checks every command and, unless told otherwise, runs the short ones."""
    found = all_commands()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        wrongs = threads.map(problem, found)
    problems = [
        f"{page}: {command}: {wrong}"
        for (command, page), wrong in zip(found.items(), wrongs, strict=True)
        if wrong
    ]
    problems += [
        f"LONG has {pattern!r}, and no page has such a command"
        for pattern in LONG
        if not fnmatch.filter(found, pattern)
    ]
    print(f"{len(found)} commands, {len(problems)} problems", flush=True)
    if not problems and sys.argv[1:] != ["check"]:
        problems = run_short([x for x in found if not is_long(x)])
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
