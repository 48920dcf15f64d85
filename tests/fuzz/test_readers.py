"""Damaged files of every kind that is read: refused in words, or the same answer; never anything else.

LIME_EDGE_FUZZ_SECONDS says for how long each reader is tried (`make check`: 2 minutes in all, `make fuzz`: an hour),
LIME_EDGE_FUZZ_SEED where the seeds begin. What fails is repeated by tests/fuzz/campaign.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from campaign import run_reader
from readers import QUICK, READERS

SECONDS = float(os.environ.get("LIME_EDGE_FUZZ_SECONDS", "2"))
SEED = int(os.environ.get("LIME_EDGE_FUZZ_SEED", "0"))


@pytest.mark.parametrize("name", QUICK)
def test_damaged_files(name: str) -> None:
    try_reader(name)


@pytest.mark.check
@pytest.mark.parametrize("name", sorted(READERS.keys() - set(QUICK)))
def test_damaged_files_of_slow_readers(name: str) -> None:
    try_reader(name)


def try_reader(name: str) -> None:
    found = run_reader(READERS[name], SEED, None, SECONDS)
    assert not found["bugs"], found["bugs"][:10]
    assert found["outcomes"].get("refused", 0) > found["files"] // 4, "hardly anything was damaged"
