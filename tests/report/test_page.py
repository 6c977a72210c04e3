"""The page: whole, self-contained, and safe whatever a folder is called."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from importlib.resources import files

from batchnorm.report.figure import figure_1
from batchnorm.report.page import page
from batchnorm.report.table import headline, tables

VOID = {"meta", "img"}


class Outline(HTMLParser):
    """Checks that tags close in order, and gathers what a browser would show or fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def shown(text: str) -> str:
    return re.sub(r"\s+", " ", Outline(text).text)


def test_the_page_needs_nothing_beside_it(make_metrics) -> None:  # type: ignore[no-untyped-def]
    metrics = make_metrics()
    svg = figure_1(metrics)["svg"]
    text = page(metrics, svg)
    outline = Outline(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not outline.seen & {"script", "link", "iframe", "object", "embed"}
    assert "url(" not in text
    assert "@import" not in text
    (source,) = outline.fetched
    kind, data = source.split(",", 1)
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(data) == svg


def test_the_page_shows_result_tables_settings_versions_and_the_command(make_metrics) -> None:  # type: ignore[no-untyped-def]
    metrics = make_metrics()
    text = shown(page(metrics, b""))
    assert headline(metrics) in text
    for table in tables(metrics):
        assert table.caption in text
        for row in table.rows:
            for cell in row:
                assert cell in text
    for wanted in (
        "run again on a few digits, 2024-05-06",
        "(number 3 without, 8 with, counted from 0; seed 0)",
        "1,317 training and 480 test images of 8×8 pixels",
        "100 steps, mini-batches of 60, hidden layers of 100, 100, 100 sigmoids, weights N(0, 0.1²)",
        "3.2 s for 1 run of both networks",
        "batchnorm 9.8.7, PyTorch 2.13.0, NumPy 2.4.0, Python 3.11.7, Linux x86_64",
        "batchnorm reproduce --data digits --steps 100 --lr 0.1 --weight-std 0.1 --seed 0 --seeds 1 --threads 1",
        "One image of the test set is 0.21 % of accuracy",
        "standard error of the plain network's final accuracy is 0.9 %",
        "What the paper reports",
    ):
        assert wanted in text
    assert "Incomplete." not in text


def test_a_name_is_text_and_never_markup(make_metrics) -> None:  # type: ignore[no-untyped-def]
    text = page(make_metrics(name="<script>alert(1)</script>", source="a b; rm 'c'"), b"")
    assert "<script>" not in text
    assert "run again on <script>alert(1)</script>," in shown(text)
    assert """--data 'a b; rm '"'"'c'"'"''""" in shown(text)


def test_an_interrupted_run_says_so_first(make_run, make_metrics) -> None:  # type: ignore[no-untyped-def]
    metrics = make_metrics(make_run(), make_run(plain=[0.1] * 4, normalized=[0.5] * 4, seed=1))
    assert (
        "Incomplete. The run was interrupted. This page shows what was recorded until then: 2 of 2 seeds begun, the "
        "shortest up to step 4 of 100."
    ) in shown(page(metrics, b""))


def test_several_seeds_are_explained_in_the_caption(make_run, make_metrics) -> None:  # type: ignore[no-untyped-def]
    text = shown(page(make_metrics(make_run(), make_run(seed=1)), b""))
    assert "mean of 2 seeds, the bands from the lowest to the highest" in text
    assert "3.2 s for 2 runs of both networks" in text


def test_the_template_is_part_of_the_package() -> None:
    assert files("batchnorm.report").joinpath("templates", "mnist.html.j2").is_file()
