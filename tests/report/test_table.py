"""The rows and the sentence, read as a user reads them."""

from __future__ import annotations

from batchnorm.report.metrics import summarize
from batchnorm.report.table import headline, tables


def test_one_run(make_metrics) -> None:  # type: ignore[no-untyped-def]
    steps, final, inputs = tables(make_metrics())
    assert steps.caption == "Training steps to reach a test accuracy"
    assert steps.heads == ("test accuracy", "without", "with", "times sooner")
    assert steps.rows == (
        ("80 %", "10", "2", "5"),
        ("90 %", "20", "4", "5"),
        ("95 %", "40", "10", "4"),
        ("96.0 %, the best without", "100", "10", "10"),
    )
    assert final.rows == (
        ("without", "96.0 %"),
        ("with, running averages (.eval())", "98.0 %"),
        ("with, statistics of the test mini-batches", "97.0 %"),
        ("with, Algorithm 2 as printed", "96.0 %"),
        ("with, Algorithm 2 with pooled moments", "95.0 %"),
    )
    assert inputs.rows == (
        ("the median moves by (largest − smallest)", "1.25", "1.25"),
        ("the 15th to 85th percentile widens (widest ÷ narrowest)", "3×", "3×"),
    )


def test_several_runs_show_their_spread_and_count_those_that_never_got_there(make_run, make_metrics) -> None:  # type: ignore[no-untyped-def]
    slow = make_run(plain=(0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.92, 0.9), seed=1)
    steps, final, inputs = tables(make_metrics(make_run(), slow))
    assert steps.caption == "Training steps to reach a test accuracy, mean (lowest to highest)"
    assert steps.rows == (
        ("80 %", "25 (10 to 40)", "2 (2 to 2)", "12.5 (5 to 20)"),
        ("90 %", "30 (20 to 40)", "4 (4 to 4)", "7.5 (5 to 10)"),
        ("95 %", "40, in 1 of 2 runs", "10 (10 to 10)", "4, in 1 of 2 runs"),
        ("94.0 ± 2.8 % (92.0 to 96.0), the best without", "70 (40 to 100)", "7 (4 to 10)", "10 (10 to 10)"),
    )
    assert final.rows[0] == ("without", "93.0 ± 4.2 % (90.0 to 96.0)")
    assert inputs.rows[0][1] == "1.25 (1.25 to 1.25)"


def test_large_numbers_are_grouped(make_run, make_metrics) -> None:  # type: ignore[no-untyped-def]
    run = make_run()
    run["steps"] = [1000 * step for step in run["steps"]]
    assert tables(make_metrics(run))[0].rows[-1] == ("96.0 %, the best without", "100,000", "10,000", "10")


def test_headline(make_metrics) -> None:  # type: ignore[no-untyped-def]
    assert headline(make_metrics()) == (
        "Without batch normalization the best test accuracy is 96.0 %, at step 100; with it that is reached at "
        "step 10, 10 times sooner."
    )


def test_headline_where_normalization_did_not_get_there(make_run, make_metrics) -> None:  # type: ignore[no-untyped-def]
    never = make_run(normalized=[0.1] * 8)
    start = "Without batch normalization the best test accuracy is 96.0 %, at step 100; with it that is "
    assert headline(make_metrics(never)) == start + "not reached in 100 steps."
    both = start.replace("100;", "100 on average over 2 runs;")
    assert headline(make_metrics(make_run(), never)) == both + "reached in 1 of 2 runs."


def test_headline_of_several_runs_gives_the_range_of_ratios(make_run, make_metrics) -> None:  # type: ignore[no-untyped-def]
    late = make_run(normalized=(0.1, 0.96, 0.96, 0.96, 0.96, 0.96, 0.96, 0.96), seed=1)
    assert headline(make_metrics(make_run(), late)) == (
        "Without batch normalization the best test accuracy is 96.0 %, at step 100 on average over 2 runs; with it "
        "that is reached at step 6, 10 to 100 times sooner."
    )


def test_headline_where_the_plain_network_has_not_begun(make_run, make_metrics) -> None:  # type: ignore[no-untyped-def]
    assert headline(make_metrics(make_run(plain=(0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.3)))) == (
        "Without batch normalization the best test accuracy is 30.0 %, at step 100; with it that is reached at "
        "step 1, 100 times sooner. The network without it has hardly begun to learn by then: more steps say more."
    )


def test_what_is_not_finite_is_said(make_run, make_metrics) -> None:  # type: ignore[no-untyped-def]
    metrics = make_metrics()
    metrics["runs"][0]["plain"]["travel"] = None
    metrics["summary"] = summarize(metrics["runs"])
    assert tables(metrics)[2].rows[0][1] == "not finite"
