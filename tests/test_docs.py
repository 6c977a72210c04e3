"""The documentation keeps what it shows: its examples run, and its relative links lead somewhere."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCED = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def broken_links(page: Path) -> list[str]:
    """The page's links to files that are not there, as `page: target`; other hosts are not asked."""
    text = CODE.sub("", FENCED.sub("", page.read_text(encoding="utf-8")))
    targets = [target.split("#")[0] for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    return [f"{page.name}: {target}" for target in targets if target and not (page.parent / target).exists()]


def failures(page: Path) -> tuple[int, str]:
    """How many of the page's `>>>` examples fail, and doctest's account of them."""
    # A fence that closes an example would be read as its expected output: blank it, keep the line numbers.
    text = re.sub(r"^(```|~~~).*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, page.name, str(page), 0)
    account: list[str] = []
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=account.append)
    return result.failed, "".join(account)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_examples_give_what_the_page_shows(page: Path) -> None:
    failed, account = failures(page)
    assert failed == 0, account


def test_a_broken_link_and_a_wrong_example_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[good](page.md#top) [bad](gone.md) `[code](no.md)` [far](https://arxiv.org)\n"
        "```python\n>>> 1 + 1\n3\n```\n```python\n>>> 1 + 1\n2\n```\n",
        encoding="utf-8",
    )
    assert broken_links(page) == ["page.md: gone.md"]
    failed, account = failures(page)
    assert failed == 1
    assert "Expected:\n    3\nGot:\n    2\n" in account
