"""Every benchmark in its quick form, and the page that is made of them."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder that a quick run of all benchmarks on the CPU wrote."""
    out = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, str(SCRIPTS / "bench_all.py"), "--quick", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_every_benchmark_runs_and_has_its_place_on_the_page(run):
    saved = json.loads((run / "benchmarks.json").read_text())
    names = {path.stem.removeprefix("bench_") for path in SCRIPTS.glob("bench_*.py")} - {"all"}
    assert set(saved["results"]["cpu"]) == names
    page = (run / "benchmarks.md").read_text()
    for name, result in saved["results"]["cpu"].items():
        assert f"## {result['title']}\n" in page
        assert f"`python scripts/bench_{name}.py --device cpu`" in page
        assert result["rows"]
        for row in result["rows"]:
            assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
            assert f"| {row['name']} | " in page


@pytest.mark.slow
def test_reasons_are_given_for_aims_that_exist_and_shown_where_they_are_missed(run):
    saved = json.loads((run / "benchmarks.json").read_text())
    aims = {aim["key"]: aim for result in saved["results"]["cpu"].values() for aim in result.get("aims", ())}
    reasons = tomllib.loads((SCRIPTS / "bench_reasons.toml").read_text())
    assert set(reasons) <= set(aims)
    saved["results"]["cpu"] = {"one": {"title": "One", "about": "", "rows": [], "process_peak_bytes": 1, "aims": []}}
    for key in reasons:
        for met in (True, False):
            saved["results"]["cpu"]["one"]["aims"] = [{**aims[key], "measured": 1.0, "met": met}]
            (run / "benchmarks.json").write_text(json.dumps(saved))
            command = [sys.executable, str(SCRIPTS / "bench_all.py"), "--page", "--out", str(run)]
            subprocess.run(command, check=True, capture_output=True)
            page = (run / "benchmarks.md").read_text()
            assert (f"- `{key}`: {reasons[key]}" in page) is not met
