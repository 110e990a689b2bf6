"""Plants faults, one at a time, into a copy of this checkout, and checks that the tests find them.

    python tests/mutants.py [--only NAME ...] [--shard I/N] [--tier fast|full] [--tests "-k words"] [--resume] ...
    python tests/mutants.py --check     every text to be replaced occurs once in its file

The faults are listed in planted/. The copy is build/mutants/tree; it is kept, so that a build compiles only changes. A
fault in C++ is compiled first, for the best instruction set of this machine or, where it says so, for all; one in the
CUDA kernels is compiled by emulated.py, and skipped without nvcc. Then the test files that are most likely to find it
run for its backend, and after those the whole tier, each until a test fails. Results are added to
build/mutants/results.csv.
"""

import argparse
import csv
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from planted import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutants"
TREE = WORK / "tree"
BACKENDS = ("reference", "cpu", "triton", "cuda")
LEFT_ALONE = re.compile(r"(build|.*\.egg-info|__pycache__|\..*cache|\.hypothesis|\.benchmarks)$|.*\.so$")
# It tests this list, and fails for every planted fault.
NOT_RUN = {"test_mutants.py"}
# It needs the baseline, which a build for the best instruction set leaves out.
NEEDS_ALL_ISAS = "tests/test_build.py::test_the_best_isa_is_chosen_by_default"


# ---- the list ----


def problems(mutants: Iterable[Mutant], root: Path = ROOT) -> list[str]:
    """The list's problems, in words."""
    found, names = [], set()
    for m in mutants:
        if m.name in names or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", m.name):
            found.append(f"{m.name}: not a name in kebab-case of its own")
        names.add(m.name)
        path = root / m.file
        count = path.read_text().count(m.text) if path.exists() else 0
        if count != 1:
            found.append(f"{m.name}: its text occurs {count} times in {m.file}: {m.text!r}")
        if m.text == m.replacement:
            found.append(f"{m.name}: its replacement is its text")
        if not m.breaks.endswith(".") or not m.first or m.isas not in ("best", "all"):
            found.append(f"{m.name}: says nothing that is used of `breaks`, `first` or `isas`")
    return found


def planted(m: Mutant, root: Path) -> str:
    """The file with the fault in it."""
    source = (root / m.file).read_text()
    assert source.count(m.text) == 1, m.name
    return source.replace(m.text, m.replacement)


def is_compiled(m: Mutant) -> bool:
    """Whether the CPU's library is compiled from the fault's file."""
    path = Path(m.file)
    return m.file in ("CMakeLists.txt", "setup.py") or (path.parts[0] == "csrc" and not is_cuda(m))


def is_cuda(m: Mutant) -> bool:
    return m.file.startswith(("csrc/cuda/", "csrc/row_math.h"))


def backend_of(m: Mutant) -> str | None:
    """The backend whose tests a fault is most likely to fail; None: any."""
    if m.file.startswith("csrc/"):
        return "cuda" if is_cuda(m) else "cpu"
    return "triton" if m.file.startswith("kdfast/triton/") else None


# ---- the copy ----


def sync() -> None:
    """Updates the copy; unchanged files keep their time, so that they are not compiled again."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    names = {name for name in os.fsdecode(listed.stdout).split("\0") if name and (ROOT / name).is_file()}
    for name in names:
        source, target = ROOT / name, TREE / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    for folder, folders, files in os.walk(TREE):
        folders[:] = [each for each in folders if not LEFT_ALONE.match(each)]
        for file in files:
            path = Path(folder, file)
            if not LEFT_ALONE.match(file) and str(path.relative_to(TREE)) not in names:
                path.unlink()


class DoesNotBuild(Exception):
    pass


def run(command: list[Any], environment: dict[str, str], limit: float | None = None) -> tuple[int, str]:
    """Status and output of a command in the copy; its process group is killed afterwards."""
    process = subprocess.Popen(
        list(map(str, command)), cwd=TREE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return -1, f"not done after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Copy:
    def __init__(self, jobs: int) -> None:
        TREE.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "PYTHONPATH": str(TREE),
            "KDFAST_CUDA": "0",
            "KDFAST_BUILD_EXT": "1",
            "KDFAST_STRICT": "0",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
            "TRITON_CACHE_DIR": str(WORK / "triton"),  # kernels with faults stay apart
        }
        self.installed = ""  # which build's library, without a fault, the package has
        sync()

    @contextmanager
    def with_fault(self, m: Mutant) -> Iterator[None]:
        """Both changes set a new time, so that the file is compiled again."""
        path = TREE / m.file
        before = path.read_text()
        path.write_text(planted(m, TREE))
        try:
            yield
        finally:
            path.write_text(before)

    def build(self, m: Mutant) -> None:
        """Compiles a planted fault; DoesNotBuild where that fails."""
        if is_compiled(m):
            self.installed = ""
            self._compile(m.isas)
            return
        self.install_sound("best")
        if is_cuda(m):
            self._do([sys.executable, "-c", "import emulated; emulated.compiled()"], PYTHONPATH=f"{TREE}:{TREE}/tests")
        elif m.file.startswith("kdfast/triton/"):
            self._do([sys.executable, "-c", "import kdfast.triton.ops"], TRITON_INTERPRET="1")
        else:
            self._do([sys.executable, "-c", "import kdfast"])

    def install_sound(self, isas: str) -> None:
        """The library without a fault, kept from its first build, which takes a minute."""
        kept = WORK / f"sound-{isas}"
        if self.installed == isas:
            return
        self.installed = ""
        package = TREE / "kdfast"
        for library in package.glob("*.so"):
            library.unlink()
        for library in kept.glob("*.so"):
            shutil.copy(library, package)
        self.installed = isas

    def build_sound(self, isas: str) -> None:
        started = time.monotonic()
        self._compile(isas)
        kept = WORK / f"sound-{isas}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for library in (TREE / "kdfast").glob("*.so"):
            shutil.copy(library, kept)
        self.installed = isas
        which = "all instruction sets" if isas == "all" else "the best instruction set"
        print(f"built without a fault for {which}, {time.monotonic() - started:.0f} s", flush=True)

    def _compile(self, isas: str) -> None:
        if isas == "all":
            self._do([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"])
            return
        import cmake
        import ninja

        tool, build = Path(cmake.CMAKE_BIN_DIR) / "cmake", WORK / "best"
        if not (build / "build.ninja").exists():
            settings = {
                "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
                "TORCH_DIR": Path(str(importlib.util.find_spec("torch").origin)).parent,  # type: ignore[union-attr]
                "KDFAST_CUDA": "OFF",
            } | {f"COMPILER_HAS_{isa}": "OFF" for isa in other_isas()}  # presets skip CMake's checks
            self._do([tool, "-G", "Ninja", "-S", TREE, "-B", build, *(f"-D{k}={v}" for k, v in settings.items())])
        self._do([tool, "--build", build])
        self._do([tool, "--install", build, "--prefix", TREE / "kdfast"])

    def _do(self, command: list[Any], **environment: str) -> None:
        status, output = run(command, self.environment | environment)
        if status:
            raise DoesNotBuild(output[-3000:])


def other_isas() -> list[str]:
    """The instruction sets that the best one does not need; avx512_bf16 uses avx512 for other dtypes."""
    code = "from kdfast import choice; print(*choice.usable_isas())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"mutants: kdfast is not compiled here; `make build` does that\n{done.stderr}")
    best = done.stdout.split()[-1]
    needed = {best, "avx512"} if best == "avx512_bf16" else {best}
    return [isa for isa in ("baseline", "avx2", "avx512", "avx512_bf16") if isa not in needed]


# ---- the tests ----


class Tests(NamedTuple):
    tier: str
    jobs: int
    extra: list[str]
    limit: float
    likely: bool  # these alone

    def first_that_fails(self, copy: Copy, m: Mutant | None, isas: str) -> str | None:
        """The first failing test's name, or None; likely files run first, for the likely backend."""
        first = [f"tests/{name}" for name in (m.first if m else ()) if (TREE / "tests" / name).exists()]
        named = [word for word in self.extra if (TREE / word.split("::")[0]).exists()]
        if m and first and not named and "-k" not in self.extra:
            others = [each for each in BACKENDS if each != backend_of(m)]
            focus = ["-k", " and ".join(f"not {each}" for each in others)] if backend_of(m) else []
            failed = self._run(copy, isas, [*first, *focus])
            if failed or self.likely:
                return failed
        rest = sorted(f"tests/{path.name}" for path in (TREE / "tests").glob("test_*.py") if path.name not in NOT_RUN)
        files = [] if named else [*first, *(each for each in rest if each not in first)]
        return self._run(copy, isas, files)

    def _run(self, copy: Copy, isas: str, arguments: list[str]) -> str | None:
        deselected = [NEEDS_ALL_ISAS] if isas == "best" else []
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", self.jobs]
        command += ["--dist", "worksteal", *(f"--deselect={each}" for each in deselected)]
        command += (["--full"] if self.tier == "full" else []) + arguments + self.extra
        status, output = run(command, copy.environment, self.limit)
        if status in (0, 5):  # 5: no tests ran
            return None
        if status < 0:
            return output
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        (WORK / "last-failure.txt").write_text(output)
        return failed[1] if failed else f"pytest, which ended with status {status} before any test did"


# ---- the run ----


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="only these faults")
    parser.add_argument("--shard", metavar="I/N", help="the I-th of N parts of the list, from 1 on")
    parser.add_argument("--tier", choices=("fast", "full"), default="fast", help="full: pytest --full")
    parser.add_argument("--jobs", type=int, default=2, help="processes of tests, and of the compiler")
    parser.add_argument("--tests", default="", metavar="ARGS", help="further arguments of pytest; files: only these")
    parser.add_argument("--limit", type=float, default=3600, help="the timeout of a run of pytest, in seconds")
    parser.add_argument("--likely", action="store_true", help="only the likely files: quick, but faults survive")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--no-baseline", action="store_true", help="assume that the tests pass without a fault")
    parser.add_argument("--check", action="store_true", help="only check that the list fits the sources")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Mutant]:
    unknown = set(options.only) - {m.name for m in MUTANTS}
    if unknown:
        sys.exit(f"mutants: none is called {', '.join(sorted(unknown))}")
    mutants = [m for m in MUTANTS if not options.only or m.name in options.only]
    if options.shard:
        part, count = map(int, options.shard.split("/"))
        if not 1 <= part <= count:
            sys.exit(f"mutants: --shard {options.shard}: the first number must be in [1, {count}]")
        mutants = mutants[part - 1 :: count]
    if shutil.which("nvcc") is None and any(map(is_cuda, mutants)):
        print(f"no nvcc, which compiles CUDA's kernels: {sum(map(is_cuda, mutants))} faults are skipped")
        mutants = [m for m in mutants if not is_cuda(m)]
    return mutants


def run_all(options: argparse.Namespace, mutants: list[Mutant]) -> int:
    results = WORK / ("results.csv" if not options.shard else f"results-{options.shard.replace('/', '-of-')}.csv")
    ran = (
        f"{options.tier}{' likely' if options.likely else ''} {options.tests}".strip()
    )  # results of other tests do not count
    done: dict[str, list[str]] = {}
    if not (options.resume or options.only):
        results.unlink(missing_ok=True)
    if options.resume and results.exists():
        with open(results, newline="") as file:
            done = {row[0]: row for row in csv.reader(file) if row[4:] == [ran]}
    copy = Copy(options.jobs)
    tests = Tests(options.tier, options.jobs, shlex.split(options.tests), options.limit, options.likely)
    to_do = [m for m in mutants if m.name not in done]
    for isas in sorted({"best", *(m.isas for m in to_do if is_compiled(m))}):
        copy.build_sound(isas)
        if not options.no_baseline and to_do and (failed := tests.first_that_fails(copy, None, isas)):
            print(f"without any fault {failed} fails; build/mutants/last-failure.txt says how")
            return 2
    for m in to_do:
        started = time.monotonic()
        result, by = outcome(copy, tests, m)
        seconds = f"{time.monotonic() - started:.0f}"
        done[m.name] = [m.name, result, by, seconds, ran]
        with open(results, "a", newline="") as file:
            csv.writer(file).writerow(done[m.name])
        print(f"{result:14} {m.name}{f'  by {by}' if result == 'caught' else ''}  {seconds} s", flush=True)
        if result == "does not build":
            print(by, flush=True)
    return summary([done[m.name] for m in mutants if m.name in done])


def outcome(copy: Copy, tests: Tests, m: Mutant) -> tuple[str, str]:
    with copy.with_fault(m):
        try:
            copy.build(m)
        except DoesNotBuild as error:
            return "does not build", str(error)
        failed = tests.first_that_fails(copy, m, m.isas if is_compiled(m) else "best")
    return ("caught", failed) if failed else ("SURVIVES", "")


def summary(rows: list[list[str]]) -> int:
    named: Callable[[str], list[str]] = lambda result: [row[0] for row in rows if row[1] == result]  # noqa: E731
    caught, survivors, unbuilt = named("caught"), named("SURVIVES"), named("does not build")
    print(f"\ncaught {len(caught)} of {len(caught) + len(survivors)}")
    if unbuilt:
        print(f"do not build: {', '.join(unbuilt)}")
    for m in MUTANTS:
        if m.name in survivors:
            print(f"survives: {m.name}, {m.file}: {m.breaks}")
    return 1 if survivors else 2 if unbuilt else 0


def main() -> int:
    options = arguments()
    found = problems(MUTANTS)
    for problem in found:
        print(problem)
    if options.check or found:
        print(f"{len(MUTANTS)} faults, {len(found)} problems")
        return int(bool(found))
    import fcntl

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the copy is restored
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("mutants: another run uses build/mutants")
        try:
            return run_all(options, chosen(options))
        except KeyboardInterrupt:
            print("interrupted; --resume continues")
            return 130


if __name__ == "__main__":
    sys.exit(main())
