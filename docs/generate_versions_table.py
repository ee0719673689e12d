"""Runs the tests with the installed versions of torch and Transformers, and records the result in docs/versions.md.

    python docs/generate_versions_table.py -n 2 --dist loadgroup

Arguments are passed on to pytest. A new row replaces the row of the same versions.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree


ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "versions.md"
HEADER = """\
# Versions

Each row is one run of all tests, recorded by `python docs/generate_versions_table.py -n 2 --dist loadgroup`.
`constraints.txt` pins the newest versions and `constraints-lowest.txt` the oldest supported ones, which
`make test-versions` uses.

*Absent* counts skipped tests of models and features that these versions do not have. *GPU* counts tests skipped for
lack of a GPU.

| torch | transformers | Python | passed | failed | absent | GPU |
|---|---|---|---:|---:|---:|---:|
"""


def outcome(case: ElementTree.Element) -> str:
    """Returns `"passed"`, `"failed"`, `"absent"` or `"gpu"`; the last two are skipped tests."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    return "gpu" if "CUDA" in skipped.get("message", "") else "absent"


def sort_key(row: str) -> list[list[int]]:
    cells = row.split("|")[1:4]
    return [[int(part) for part in cell.strip().split("+")[0].split(".") if part.isdigit()] for cell in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        result = subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}", *options], cwd=ROOT)
        if not report.exists():
            sys.exit(result.returncode)
        counts = Counter(map(outcome, ElementTree.parse(report).iter("testcase")))
    versions = [version("torch"), version("transformers"), platform.python_version()]
    numbers = [counts[name] for name in ("passed", "failed", "absent", "gpu")]
    start = f"| {' | '.join(versions)} |"
    old = TABLE.read_text().removeprefix(HEADER).splitlines() if TABLE.exists() else []
    rows = [row for row in old if not row.startswith(start)] + [f"{start} {' | '.join(map(str, numbers))} |"]
    TABLE.write_text(HEADER + "\n".join(sorted(rows, key=sort_key)) + "\n")
    sys.exit(result.returncode)


if __name__ == "__main__":
    main()
