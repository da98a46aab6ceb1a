"""The table of checks: what failed is told once, with all its cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import checks

RESULTS = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one[1]" time="1.5" />
<testcase classname="tests.test_a" name="test_one[2]" time="0.5">
  <failure message="AssertionError: error 2e-3">{lines}</failure></testcase>
<testcase classname="tests.test_a" name="test_one[3]" time="0.5">
  <failure message="AssertionError: error 7e-1">again</failure></testcase>
<testcase classname="tests.test_a" name="test_two" time="0">
  <skipped type="pytest.xfail" message="known" /></testcase>
<testcase classname="" name="" time="0"><error message="collection" /></testcase>
</testsuite></testsuites>"""


def test_a_line_for_each_function_and_one_text_for_each_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.xml"
    file.write_text(RESULTS.format(lines="\n".join(f"line {i}" for i in range(90))))
    assert checks.main([str(file), "--lines", "6"]) == 1
    said = capsys.readouterr().out
    assert "--- 2 failed: test_one[2]" in said
    assert "line 89" in said
    assert "line 50" not in said
    assert "also test_one[3]: AssertionError: error 7e-1" in said
    assert "again" not in said
    rows = [line.split() for line in said.splitlines()]
    assert ["test_a::test_one", "1", "2", "0", "0", "2.5"] in rows
    assert ["test_a::test_two", "0", "0", "0", "1", "0.0", "known"] in rows


def test_nothing_to_read_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checks.main([str(tmp_path / "missing.xml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
