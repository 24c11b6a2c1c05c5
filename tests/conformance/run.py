"""Run transformers' own model tests on this package's classes: `make conformance`.

The tests come from the source distribution of the installed transformers, which pip downloads once
into `.cache/conformance`. Where that cannot be had, says so and ends well. Arguments go to pytest.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "conformance"


def download(release: str, folder: Path) -> str | None:
    """Put the tests of a transformers release into `folder`; returns what went wrong, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        pip += ["--dest", scratch, "--no-deps", "--no-binary", "transformers", "--retries", "1"]
        done = subprocess.run(
            [*pip, f"transformers=={release}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        archives = list(Path(scratch).glob("transformers-*.tar.gz"))
        if done.returncode or not archives:
            return (done.stdout.strip().splitlines() or ["pip downloaded nothing"])[-1]
        with tarfile.open(archives[0]) as archive:
            top = f"transformers-{release}/tests/"
            members = [m for m in archive.getmembers() if m.name.startswith(top) and m.isfile()]
            if not members:
                return f"the source distribution of transformers {release} carries no tests"
            for member in members:
                member.name = member.name.removeprefix(top)
            folder.parent.mkdir(parents=True, exist_ok=True)
            unpacked = Path(tempfile.mkdtemp(dir=folder.parent))
            archive.extractall(unpacked, members, filter="data")
            unpacked.rename(folder)
    return None


def main() -> int:
    release = version("transformers")
    folder = CACHE / f"transformers-{release}"
    if not folder.is_dir():
        problem = download(release, folder)
        if problem:
            print(f"conformance: skipped, no tests of transformers {release} to run: {problem}")
            return 0
    command = [sys.executable, "-m", "pytest", "tests/conformance", "--timeout", "300"]
    # no strict markers: transformers' tests carry some of their own, unknown here
    command += "-o addopts= -W ignore::pytest.PytestUnknownMarkWarning".split()
    command += ["-o", "verbosity_subtests=0", *sys.argv[1:]]
    environment = os.environ | {"FAMILIAL_CONFORMANCE": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
