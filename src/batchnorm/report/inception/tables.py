"""The figures of section 4.2 as rows of text, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from batchnorm.report.inception.metrics import PLAIN, Metrics, at_chance
from batchnorm.report.metrics import Spread
from batchnorm.report.table import Table, accuracy, over_seeds

# Figure 3 of the paper, on ImageNet: steps to Inception's best, and highest validation accuracy.
_PAPER = {
    "inception": ("31.0 million", "72.2 %"),
    "bn-baseline": ("13.3 million", "72.7 %"),
    "bn-x5": ("2.1 million", "73.0 %"),
    "bn-x30": ("2.7 million", "74.8 %"),
    "bn-x5-sigmoid": ("", "69.8 %"),
    "inception-sigmoid": ("", "0.1 %, chance"),
}


def tables(metrics: Metrics) -> tuple[Table, ...]:
    """Figure 3, the test images, figure 4, and the sweep, as far as each was recorded."""
    found = []
    if metrics["summary"]["variants"]:
        found += [_figure_3(metrics), _tested(metrics)]
    if metrics["summary"]["ensemble"] is not None:
        found.append(_figure_4(metrics))
    if metrics["sweep"]:
        found.append(_sweep(metrics))
    return tuple(found)


def headline(metrics: Metrics) -> str:
    """The result in a few sentences."""
    variants = metrics["summary"]["variants"]
    if PLAIN not in variants:
        return "No plain network was trained to its end yet, so there is nothing to compare with."
    plain = variants[PLAIN]
    seeds = plain["best"]
    text = f"The plain network's best validation accuracy is {accuracy(seeds)}, at step {_mean(plain['best_step'])}."
    reached = []
    for key, row in variants.items():
        name = _name(metrics, key)
        if key == PLAIN:
            continue
        ratios = [ratio for ratio in row["ratio"] if ratio is not None]
        if len(ratios) == len(row["ratio"]):
            reached.append(f"{name} {_range(ratios)} times sooner")
        elif ratios:
            reached.append(f"{name} in {len(ratios)} of {len(row['ratio'])} runs")
    if reached:
        text += f" That is reached by {_listed(reached)}."
    stuck = [
        _name(metrics, key)
        for key, row in variants.items()
        if at_chance(row["best"]["max"], metrics["data"]["classes"])
    ]
    if stuck:
        text += f" {_listed(stuck)} stayed at chance."
    return text


def _figure_3(metrics: Metrics) -> Table:
    rows = []
    for key, row in metrics["summary"]["variants"].items():
        paper_steps, paper_best = _PAPER[key]
        reached = over_seeds(row["steps_to_plain_best"], "d")
        rows.append(
            (
                _name(metrics, key),
                reached,
                "" if key == PLAIN else over_seeds(row["ratio"], "r"),
                accuracy(row["best"]),
                _mean(row["best_step"]),
                paper_steps,
                paper_best,
            )
        )
    return Table(
        "Figure 3: steps to the plain network's best validation accuracy, and the highest" + _spread_words(metrics),
        (
            "network",
            "steps to it",
            "times sooner",
            "highest accuracy",
            "at step",
            "the paper, ImageNet: steps",
            "highest",
        ),
        rows,
    )


def _tested(metrics: Metrics) -> Table:
    return Table(
        "Test accuracy after the last step" + _spread_words(metrics),
        ("network", "running averages (.eval())", "recalibrated statistics"),
        [
            (_name(metrics, key), _maybe(row["test_accuracy"]), _maybe(row["test_recalibrated"]))
            for key, row in metrics["summary"]["variants"].items()
        ],
    )


def _figure_4(metrics: Metrics) -> Table:
    ensemble = metrics["summary"]["ensemble"]
    assert ensemble is not None
    name = _name(metrics, ensemble["variant"])
    rows = [
        (f"{name}, seed {seed}", "1", _percent(single))
        for seed, single in zip(ensemble["seeds"], ensemble["single"], strict=True)
    ]
    rows.append(("mean of the single networks", "1", _percent(fmean(ensemble["single"]))))
    rows += [
        (f"ensemble of {count}", str(count), _percent(together))
        for count, together in enumerate(ensemble["together"], 1)
        if count > 1
    ]
    return Table("Figure 4: single networks and their ensembles on the test images", ("", "networks", "accuracy"), rows)


def _sweep(metrics: Metrics) -> Table:
    rows = metrics["sweep"] or []
    chosen = metrics["settings"]["learning_rate"], metrics["settings"]["decay"]
    return Table(
        f"Sweep of the plain network, validation accuracy, seed {metrics['settings']['seeds'][0]}",
        ("learning rate, decay", "highest", "at step", "at the end", ""),
        [
            (
                f"{row['learning_rate']:g}, {row['decay']:g}",
                _percent(row["best"]),
                f"{row['best_step']:,}",
                _percent(row["final"]),
                "chosen" if (row["learning_rate"], row["decay"]) == chosen else "",
            )
            for row in rows
        ],
    )


def _name(metrics: Metrics, key: str) -> str:
    return next(variant["name"] for variant in metrics["variants"] if variant["key"] == key)


def _spread_words(metrics: Metrics) -> str:
    several = len(metrics["settings"]["seeds"]) > 1
    return f"; mean of {len(metrics['settings']['seeds'])} seeds (lowest to highest)" if several else ""


def _maybe(spread: Spread | None) -> str:
    return "" if spread is None else accuracy(spread)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):,.0f}"


def _listed(words: Sequence[str]) -> str:
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"
