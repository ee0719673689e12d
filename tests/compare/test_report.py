"""Reports say what was measured, whatever the methods are called and whatever is missing."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_attentiondrop.compare import report
from hf_attentiondrop.compare.comparison import compare_methods, metric_values
from hf_attentiondrop.compare.report import write_report
from hf_attentiondrop.compare.results import Run, read_runs, write_runs
from tests.recipe_runs import ROOT

from . import LOG, WEIRD, question, run, study


class Page(HTMLParser):
    """The text of a page outside of style sheets, its tags and their attributes; checks that elements are closed."""

    EMPTY = {"meta", "br", "path", "use", "rect", "image"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            self.attributes.setdefault(name, []).append(value or "")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def written(folder: Path, runs: list[Run], **changes: object) -> tuple[str, Page, str]:
    table = write_report(question(**changes), runs, folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return (folder / "report.md").read_text(encoding="utf-8"), Page(html), table


def test_a_report_answers_first_and_has_all_parts(tmp_path: Path) -> None:
    runs = study(5)
    text, page, table = written(tmp_path, runs)
    headings = re.findall(r"^##? (.*)$", text, re.MULTILINE)
    assert headings == [
        "Digits with 20 % label noise",
        "test_accuracy (higher is better)",
        "test_expected_calibration_error (lower is better)",
        "Accuracy against calibration",
        "Cost",
        "Settings",
        "Failed runs",
        "Setup",
        "Repeating the statistics",
    ]
    first = text.split("\n")[2]
    assert re.fullmatch(r"- \*\*hard\*\*: more accurate: \+\S+ ± \S+; better calibrated: −\S+ ± \S+ ECE\.", first)
    assert "accuracy and calibration cannot be told from dropout's." in text
    compared = compare_methods(metric_values(runs, question(), "test_accuracy"), "dropout", "higher")
    half_width = f"{compared['hard'].difference.half_width:.4f}"
    for shown in (text, page.text, table):
        assert half_width in shown and "5 of 5" in shown and "1.50×" in shown
    for shown in (text, page.text):
        assert "5 (0, 1, 2, 3, 4)" in shown and "none, the study fixes them" in shown
        assert "2 cores" in shown and "abc123" in shown and "2.15.0" in shown and "SciPy" in shown
        assert "hf-attentiondrop compare digits.yaml --report_only" in shown
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 3 and all((tmp_path / picture).stat().st_size > 5000 for picture in pictures)
    assert page.tags.count("svg") == 3


def test_the_page_is_self_contained_and_fits_phones_and_dark_schemes(tmp_path: Path) -> None:
    _, page, _ = written(tmp_path, study(3))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.lstrip().startswith("<!doctype html>")
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    links = [value for name in ("src", "href", "xlink:href") for value in page.attributes.get(name, [])]
    assert links and all(link.startswith("#") for link in links)
    assert set(page.tags) & {"script", "link", "img"} == set() and "url(http" not in html


def test_names_and_logs_are_escaped(tmp_path: Path) -> None:
    failed = run(WEIRD, 5, state="failed", metrics={}, log=LOG)
    asked = {"title": f"T {WEIRD}", "reference": WEIRD, "command": "compare '<b>'", "metrics": {"a|<i>_b_": "higher"}}
    runs = [run(one.method, one.seed, metrics={"a|<i>_b_": one.metrics["test_accuracy"]}) for one in study(3)]
    text, page, table = written(tmp_path, [*runs, failed], **asked)
    assert set(page.tags) & {"script", "b", "i"} == set()
    on_one_line = " ".join(WEIRD.split())
    assert WEIRD in page.text and "RuntimeError: <b>out of</b> | memory ```" in page.text
    assert on_one_line in table
    prose = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    # Columns stay columns, and no HTML or emphasis of a name is active.
    rows = [line for line in prose.split("\n") if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows]
    assert set(widths) == {6, 4, 2}
    assert re.search(r"(?<!\\)<", prose) is None and "`c`" not in prose.replace("\\`", "")
    assert "    RuntimeError: <b>out of</b> | memory ```\n" in text and "\x1b" not in text and "10%" not in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_have_no_interval_and_the_report_says_why(tmp_path: Path, seeds: int) -> None:
    text, page, table = written(tmp_path, study(seeds))
    reason = f"no interval from {seeds} seed{'s' * (seeds > 1)} in common with the reference, at least 3 are needed"
    assert f"- **blur**: accuracy and calibration: {reason}." in text and reason in page.text
    assert "±" not in table and "ttest_rel" not in text and "Fewer than three seeds have no interval" in text


def test_failed_runs_are_listed_with_their_logs_and_settings_are_counted(tmp_path: Path) -> None:
    log = "\n".join(f"line {i}" for i in range(100))
    runs = [*study(4), run("hard", 4, state="failed", metrics={}, log=log), run("blur", 2, state="failed", metrics={})]
    tuned = [run(method, 50, phase="tune", trial=trial) for method in question().methods for trial in range(6)]
    tuned[7] = run("hard", 50, phase="tune", trial=1, state="failed", metrics={}, log=None)
    text, page, _ = written(tmp_path, [*runs, *tuned, run("old", 0)], tuning_trials=6)
    for shown in (text, page.text):
        assert "hard, seed 4, test" in shown and "line 99" in shown and "line 80" in shown and "line 79" not in shown
        assert "hard, seed 50, tuning, setting 1" in shown
        # It was completed later.
        assert "blur, seed 2, test" not in shown
        assert "dropout: 6; hard: 5 of 6; blur: 6" in shown
        assert "old (1 run)" in shown
    assert page.tags.count("details") == 2


def test_missing_metrics_mixed_hardware_and_no_runs_are_said(tmp_path: Path) -> None:
    runs = [one for one in study(4) if one.method != "blur"]
    runs += [run("blur", seed, metrics={"test_accuracy": 0.9}, hardware="H200", seconds=1.0) for seed in range(4)]
    text, _, table = written(tmp_path, runs)
    assert "calibration: no seed in common with the reference." in text
    assert re.search(r"test_expected_calibration_error +blur +– +– +– +– +–$", table, re.MULTILINE)
    assert re.search(r"^\| blur \| – \| – \| 0 \|$", text, re.MULTILINE)
    assert "2 cores (12 runs), H200 (4 runs)" in text
    text, page, table = written(tmp_path / "empty", [])
    assert "- **hard**: accuracy and calibration: no seed in common with the reference." in text
    assert "No pair of test runs" in text and "No pair of test runs" in page.text
    assert page.tags.count("svg") == 0 and re.search(r"test_accuracy +dropout +– +reference", table)


def test_settings_are_the_arguments_in_which_methods_differ(tmp_path: Path) -> None:
    settings = {"dropout": {"dropout": 0.1}, "hard": {"p": 0.2, "k": 5}, "blur": {"sigma_max": 1.0}}
    runs = [
        run(method, seed, arguments={"epochs": 3, "seed": seed, **extra})
        for method, extra in settings.items()
        for seed in range(3)
    ]
    text, _, _ = written(tmp_path, runs, methods=list(settings))
    assert "| dropout | dropout=0.1 |\n| hard | p=0.2, k=5 |\n| blur | sigma_max=1.0 |\n" in text
    assert "epochs" not in text


def test_the_code_in_the_report_repeats_its_first_test(tmp_path: Path) -> None:
    runs = study(5)
    write_runs(tmp_path / "results.jsonl", runs)
    text, page, _ = written(tmp_path, read_runs(tmp_path / "results.jsonl"))
    code = "\n".join(line[4:] for line in text[text.index("    import json") :].split("\n"))
    assert code.strip() in page.text
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    p, low = re.fullmatch(r"(\S+) ConfidenceInterval\(low=\S*?([\d.e-]+)\)?, high=.*\n", result.stdout).groups()
    hard = compare_methods(metric_values(runs, question(), "test_accuracy"), "dropout", "higher")["hard"]
    assert float(p) == pytest.approx(hard.p)
    assert float(low) == pytest.approx(hard.difference.mean - hard.difference.half_width)


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/compare.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "blur     0.91" in capsys.readouterr().out and (tmp_path / "report.html").is_file()


def test_nan_in_a_results_file_is_refused_before_a_report(tmp_path: Path) -> None:
    line = json.loads(run("blur").to_json())
    line["metrics"]["test_accuracy"] = float("nan")
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"line 1: Run of 'blur' with seed 0: .*'test_accuracy' .* got nan"):
        read_runs(tmp_path / "results.jsonl")


@pytest.mark.parametrize("module, name", [("scipy", "SciPy"), ("matplotlib.figure", "matplotlib")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{name}: `pip install"):
        report.write_report(question(), study(3), tmp_path)
    assert list(tmp_path.glob("report.*")) == []
