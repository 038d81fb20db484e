"""Tests the table of docs/scaling.md."""

import json

from benchmarks import scaling


def test_the_table_of_scaling_shows_its_results():
    page, results = scaling.PAGE.read_text(), json.loads(scaling.RESULTS.read_text())
    names = {f"{network} on {kind}" for network in scaling.NETWORKS for kind in scaling.LINKS}
    assert results["steps"] and results["steps"].keys() <= names
    assert scaling.page(page, results) == page


def test_scaling_adds_the_time_of_collectives_to_that_of_the_cycles():
    numbers = {
        "flops": 197e9,  # a millisecond at the peak
        "cycles": 3_000_000,  # two milliseconds
        "peak_bytes": 2e9,
        "collectives": {"all-reduce": [10, 50_000_000], "all-gather": [2, 0]},
        "chip": {"memory": 16e9, "peak": 197e12, "clock": 1.5e9},
    }
    row = scaling.row("net", "v5e-8", numbers)
    assert row["computation"] == "2.0 ms" and row["of the peak"] == "50 %"
    assert row["collectives"] == "12, 50.0 MB"
    # A ring moves 7/4 of 1 ms; 12 collectives go 4 hops there and 4 back.
    assert row["their time"] == "1.85 ms"
    assert row["images per second"] == "16,641"  # 64 in 3.846 ms
    assert row["efficiency"] == "52 %"
    assert row["90 % from"] == "67"  # 9 * 1.846 ms, at 0.25 ms an image
