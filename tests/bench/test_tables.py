"""The tables that benchmarks print."""

from stepgraph.bench.tables import show_facts, show_rows


def cells(text: str) -> list[list[str]]:
    """The words of every printed row, by cell."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_rows_show_whole_numbers_as_they_are_and_nothing_for_what_they_lack(capsys):
    rows = [{"name": "full", "peak_bytes": 12345678, "error": 0.0}, {"name": "cached", "error": 0.123456, "spread": None}]
    show_rows("title", rows, ("name", "peak_bytes", "error", "spread"))
    printed = capsys.readouterr().out
    assert "peak bytes" in printed
    assert cells(printed) == [["full", "12345678", "0", ""], ["cached", "", "0.1235", ""]]


def test_facts_have_a_line_each(capsys):
    show_facts("title", {"model": "glyph-dit", "seconds": 1.23456, "steps": 20}, ".2f")
    assert cells(capsys.readouterr().out) == [["model", "glyph-dit"], ["seconds", "1.23"], ["steps", "20"]]
