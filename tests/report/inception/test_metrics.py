"""Figures 3 and 4 computed from courses made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from batchnorm.report.inception.figures import figure_2, figure_4
from batchnorm.report.inception.metrics import Ensemble, Metrics, Run, Settings, smoothed, summarize
from batchnorm.report.inception.page import page
from batchnorm.report.inception.tables import headline, tables

STEPS = [0, 10, 20, 30, 40]
PLAIN = [0.1, 0.2, 0.5, 0.6, 0.7]  # smoothed: .15 .2667 .4333 .6 .65, best .65 at 40
NORMALIZED = [0.1, 0.6, 0.7, 0.8, 0.9]  # smoothed: .35 .4667 .7 .8 .85: reached at 20, best .85 at 40


def made(variant: str, accuracy: list[float], seed: int = 0, complete: bool = True, **others: Any) -> Run:
    recalibrated = None if variant.startswith("inception") else [min(1.0, a + 0.05) for a in accuracy]
    run = Run(
        variant=variant, seed=seed, complete=complete, seconds=2.0, cpu_seconds=1.5, steps=STEPS[: len(accuracy)],
        loss=[None, *[1.0] * (len(accuracy) - 1)], accuracy=accuracy, recalibrated=recalibrated,
        test_accuracy=accuracy[-1] - 0.01 if complete else None,
        test_recalibrated=accuracy[-1] if complete and recalibrated else None,
    )  # fmt: skip
    return {**run, **others}  # type: ignore[return-value]


ENSEMBLE = Ensemble(variant="bn-x5", seeds=[0, 1], single=[0.88, 0.9], together=[0.88, 0.92])


def metrics_of(*runs: Run, ensemble: Ensemble | None = ENSEMBLE, complete: bool = True) -> Metrics:
    names = {
        "inception": "Inception", "bn-baseline": "BN-Baseline", "bn-x5": "BN-x5",
        "inception-sigmoid": "Inception-Sigmoid",
    }  # fmt: skip
    recipe = {"normalize": True, "nonlinearity": "relu", "learning_rate": 0.1, "decay": 30.0, "l2_weight": 1e-4}
    seeds = sorted({run["seed"] for run in runs})
    return Metrics(
        schema=1, experiment="inception", complete=complete, started="2026-05-06T07:08:09+00:00", seconds=120.0,
        cpu_seconds=200.0,
        settings=Settings(
            steps=40, batch_size=32, seeds=seeds, ensemble=2, width=0.125, size=None, scale="small", learning_rate=0.02,
            decay=30.0, sweep=True, device="cpu", processes=2,
        ),
        data={"name": "<Fashion>", "source": "a b", "channels": 1, "height": 28, "width": 28, "classes": 10,
              "train": 58000, "validation": 2000, "test": 10000},
        versions={"batchnorm": "9.8.7", "torch": "2.13.0", "numpy": "2", "python": "3", "machine": "m"},
        variants=[{"key": key, "name": name, "sentence": f"sentence of {name}", "parameters": 161054, "recipe": recipe}
                  for key, name in names.items()],
        changes=[{"setting": "local_response", "sentence": "not necessary.", "paper": [True, False],
                  "used": [False, False], "why": "few channels"}],
        sweep=[{"learning_rate": 0.02, "decay": 30.0, "best": 0.65, "best_step": 40, "final": 0.7, "complete": True},
               {"learning_rate": 0.1, "decay": 30.0, "best": 0.1, "best_step": 0, "final": 0.1, "complete": True}],
        runs=list(runs),
        summary=summarize(runs, ensemble),
    )  # fmt: skip


def test_an_evaluation_is_averaged_with_its_neighbours() -> None:
    assert smoothed(PLAIN) == pytest.approx([0.15, 0.8 / 3, 1.3 / 3, 0.6, 0.65])
    assert smoothed([0.5]) == [0.5]


def test_steps_to_the_plain_networks_best_of_the_same_seed() -> None:
    late = [0.1, 0.1, 0.1, 0.3, 0.4]  # best .35 at 40, which the normalized network of seed 1 reaches at once
    runs = [
        made("inception", PLAIN),
        made("bn-x5", NORMALIZED),
        made("inception", late, 1),
        made("bn-x5", NORMALIZED, 1),
    ]
    found = summarize(runs, None)["variants"]
    assert found["inception"]["best"]["mean"] == pytest.approx(0.5)
    assert found["inception"]["steps_to_plain_best"] == found["inception"]["best_step"] == [40, 40]
    assert found["bn-x5"]["steps_to_plain_best"] == [20, 0]
    assert found["bn-x5"]["ratio"] == [2, None]
    assert found["bn-x5"]["best"]["min"] == found["bn-x5"]["best"]["max"] == pytest.approx(0.85)


def test_what_is_never_reached_and_what_was_cut_short() -> None:
    runs = [made("inception", PLAIN), made("bn-baseline", [0.1] * 5), made("bn-x5", NORMALIZED[:3], complete=False)]
    found = summarize(runs, None)["variants"]
    assert found["bn-baseline"]["steps_to_plain_best"] == [None]
    assert "bn-x5" not in found
    assert summarize(runs[2:], None)["variants"] == {}


def test_tables_and_headline_as_a_user_reads_them() -> None:
    metrics = metrics_of(made("inception", PLAIN), made("bn-x5", NORMALIZED), made("inception-sigmoid", [0.1] * 5))
    figure_3, tested, figure_four, sweep = tables(metrics)
    assert figure_3.rows == [
        ("Inception", "40", "", "65.0 %", "40", "31.0 million", "72.2 %"),
        ("BN-x5", "20", "2", "85.0 %", "40", "2.1 million", "73.0 %"),
        ("Inception-Sigmoid", "not reached", "–", "10.0 %", "0", "", "0.1 %, chance"),
    ]
    assert tested.rows[:2] == [("Inception", "69.0 %", ""), ("BN-x5", "89.0 %", "90.0 %")]
    assert figure_four.rows[-2:] == [("mean of the single networks", "1", "89.0 %"), ("ensemble of 2", "2", "92.0 %")]
    assert [row[0] for row in sweep.rows if row[-1] == "chosen"] == ["0.02, 30"]
    assert headline(metrics) == (
        "The plain network's best validation accuracy is 65.0 %, at step 40. That is reached by BN-x5 2 times sooner. "
        "Inception-Sigmoid stayed at chance."
    )


def test_the_page_is_whole_and_safe() -> None:
    metrics = metrics_of(made("inception", PLAIN), made("bn-x5", NORMALIZED))
    text = page(metrics, b"<svg>two</svg>", b"<svg>four</svg>")
    assert "<Fashion>" not in text and "&lt;Fashion&gt;" in text
    assert text.count("data:image/svg+xml;base64,") == 2
    assert "sentence of BN-x5" in text and "few channels" in text
    assert "batchnorm reproduce inception --data &#39;a b&#39; --steps 40" in text
    assert "--sweep" in text and "--lr" not in text
    assert "Incomplete." not in text
    assert "Incomplete." in page(metrics_of(made("inception", PLAIN[:2], complete=False), complete=False), b"", b"")


def test_figures_hold_every_variant_and_the_ensemble(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []

    def keep(figure: Any, kind: str) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr("batchnorm.report.drawing._saved", keep)
    metrics = metrics_of(made("inception", PLAIN), made("bn-x5", NORMALIZED), made("inception-sigmoid", [0.1] * 5))
    figure_2(metrics)
    whole, near, _ = figures[0].axes
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "Inception",
        "BN-x5",
        "Inception-Sigmoid",
    ]
    assert [list(line.get_ydata()) for line in whole.lines][1] == pytest.approx([100 * a for a in NORMALIZED])
    dots = {text.get_text() for text in near.texts}
    assert dots == {"40", "20"}
    figure_4(metrics)
    labels = [label.get_text() for label in figures[-1].axes[0].get_yticklabels()]
    assert labels == ["Inception", "BN-x5", "ensemble of 2 BN-x5"]  # what stayed at chance is left out


def test_figures_of_a_run_that_has_hardly_begun_are_drawn() -> None:
    metrics = metrics_of(made("inception", PLAIN[:1], complete=False), ensemble=None, complete=False)
    assert figure_2(metrics)["png"].startswith(b"\x89PNG")
    assert figure_4(metrics)["svg"].rstrip().endswith(b"</svg>")
