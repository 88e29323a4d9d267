"""Sums up over all workers what the fuzz tests ran."""

from __future__ import annotations

import collections

import pytest
from harness import COUNTS, summary


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    COUNTS.clear()
    try:
        return (yield)
    finally:
        item.user_properties.append(("fuzz", dict(COUNTS)))


def pytest_terminal_summary(terminalreporter):
    counts = collections.Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            counts.update(dict(report.user_properties).get("fuzz", {}))
    if counts:
        terminalreporter.section("fuzzer")
        for line in summary(counts):
            terminalreporter.write_line(line)
