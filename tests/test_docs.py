"""The docs keep up with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import DOCS, PAGES

ROOT = DOCS.parent


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_up_to_date(page: str) -> None:
    """`python -m tests.docs` writes it anew."""
    assert (DOCS / page).read_text(encoding="utf-8") == PAGES[page]()


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_to_a_heading_lead_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:\s]*\.md)?#([^)\s]+)\)", text):
        there = page.parent / target if target else page
        assert anchor in anchors_of(there), f"{page.name} links to {target}#{anchor}"


def anchors_of(page: Path) -> set[str]:
    """Return the names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("page", ["operations.md", "threat-model.md"])
def test_each_promise_names_a_test_that_exists(page: str) -> None:
    """A promise whose test was renamed or removed is nobody's any more."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for path, name in re.findall(r"`([a-z_/]+/?[a-z_]*\.py)(?:::(\w+))?`", text):
        file = ROOT / "tests" / path
        assert file.is_file(), f"{page} names {path}"
        assert f"def {name}" in file.read_text(encoding="utf-8"), f"{page} names {path}::{name}"
    for path in re.findall(r"`([a-z_/]+\.py)`", text):
        assert (ROOT / "tests" / path).is_file()
    # `path::one`, `::two`
    for row in text.splitlines():
        files = re.findall(r"`([a-z_/]+\.py)::", row)
        for name in re.findall(r"`::(\w+)`", row):
            assert any(f"def {name}" in (ROOT / "tests" / f).read_text() for f in files), row


def test_what_a_reload_applies_is_listed() -> None:
    from shimpy.server.reload import LIVE

    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    listed = text.partition("Applied at once:")[2].partition("Those about")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == LIVE
