"""The table of docs/comparison.md is that of the results."""

import pytest

pytest.importorskip("matplotlib", reason="benchmarks.report draws")

from benchmarks import comparison


def test_the_table_of_the_page_is_that_of_the_results():
    text = comparison.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- comparison -->\n") == text.count("<!-- /comparison -->") == 1
    assert comparison.write(text) == text
    assert f"\n{comparison.table()}<" in text
