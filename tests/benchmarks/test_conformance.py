"""Tests that the comparison with other libraries is correct, complete, and what the page says."""

import itertools

import numpy as np
import pytest

from benchmarks import conformance
from benchmarks.conformance import NO_COUNTERPART, PEERS, TABLES

ROWS = [(peer, row[0]) for _, rows in TABLES.values() for peer, row in rows.items()]


# 16. torchmetrics#2558, #2866, #3047: mean IoU with absent classes as 0, or averaged over batches
@pytest.mark.parametrize(("peer", "expression"), ROWS, ids=[row[0] for row in ROWS])
def test_other_libraries_agree(peer, expression):
    for case, theirs in PEERS["values"][peer].items():
        np.testing.assert_allclose(
            conformance.ours(expression, case), theirs, atol=1e-5, rtol=0, err_msg=case
        )


def test_every_value_is_compared_once_or_has_a_reason():
    peers = [peer for peer, _ in ROWS] + list(itertools.chain(*NO_COUNTERPART.values()))
    assert sorted(peers) == sorted(PEERS["values"])


def test_every_complaint_has_a_test():
    assert [number for (number, _), _ in conformance.complaints()] == list(range(1, 34))


def test_the_page_is_what_the_command_writes():
    same = conformance.PAGE.read_text() == conformance.page()
    assert same, "run: python -m benchmarks.conformance"
