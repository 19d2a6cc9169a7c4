"""Links between the pages that people read in the repository itself; those of docs/ are checked when the site is built."""

import re

import pytest

from helpers.paths import ROOT

LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as Markdown viewers make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = LINK.findall(text)
    assert links or page == "CHANGELOG.md"
    for target, anchor in links:
        path = ROOT / (target or page)
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), (target, anchor)


def test_every_page_is_in_both_indexes():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    for index, prefix in (("README.md", "docs/"), ("docs/index.md", "")):
        linked = {target.removeprefix(prefix) for target, _ in LINK.findall((ROOT / index).read_text(encoding="utf-8"))}
        assert pages - linked == set(), index
