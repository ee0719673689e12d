"""Workers that share a PostgreSQL database, on a server that the test starts."""

import glob
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_attentiondrop.cli import main

from .studies import lines, outcomes, wait_for, write_study


# `nobody`: the server refuses to run as root.
UNPRIVILEGED = 65534


def program(name: str) -> str:
    """A program of PostgreSQL. Debian keeps those of the server off the path."""
    found = shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))), None)
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed")
    return found


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of an empty database."""
    pytest.importorskip("psycopg")
    postgres, initdb = program("postgres"), program("initdb")
    # The folders of pytest are closed to other users.
    folder = tempfile.mkdtemp(prefix="pg")
    data = f"{folder}/data"
    prefix = []
    if os.getuid() == 0:
        os.chown(folder, UNPRIVILEGED, UNPRIVILEGED)
        prefix = [program("setpriv"), f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups"]
    initialize = [initdb, "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run([*prefix, *initialize], check=True, capture_output=True, cwd=folder)
    server = subprocess.Popen(
        [*prefix, postgres, "-D", data, "-k", folder, "-c", "listen_addresses=", "-F"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(
            lambda: Path(folder, ".s.PGSQL.5432.lock").exists() and "ready" in Path(data, "postmaster.pid").read_text()
        )
        yield f"postgresql+psycopg://tester@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        shutil.rmtree(folder)


@pytest.mark.usefixtures("short_grace")
def test_machines_share_the_runs_and_one_dies(database: str, tmp_path: Path, starts: Path, start: Any) -> None:
    gate = tmp_path / "gate"
    study = write_study(tmp_path, arguments={"gate": str(gate)}, methods={"none": {}, "low": {"x": 0.1}}, seeds=4)
    flags = ("compare", study, "--storage", database, "--output_dir")
    machines = [start(*flags, tmp_path / name) for name in ("a", "b", "c")]
    wait_for(lambda: len(lines(starts)) == 3)
    machines[0].kill()
    gate.touch()
    for machine in machines:
        machine.join()
    assert [machine.exitcode for machine in machines] == [-9, 0, 0]
    # Each once, and once more the one that was killed.
    assert len(set(lines(starts))) == 8 and len(lines(starts)) == 9
    runs = outcomes(tmp_path / "b")
    assert len(runs) == 8 and {run["state"] for run in runs} == {"complete"}
    # Each machine has the runs of all.
    assert runs == outcomes(tmp_path / "c")


def test_a_title_stands_for_one_study(database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["compare", str(tmp_path / "tiny.yaml"), "--storage", database, "--output_dir"]
    write_study(tmp_path, title="Same", seeds=1)
    assert main([*flags, str(tmp_path / "a")]) == 0
    write_study(tmp_path, title="Same", seeds=1, arguments={"size": 2})
    capsys.readouterr()
    assert main([*flags, str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "already has a study 'Same': arguments/size was None and is 2" in error
    assert not (tmp_path / "b").exists()
