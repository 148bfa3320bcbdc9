"""The benchmarks still run. Their figures are never asserted: they belong to the machine."""

import json
import subprocess
import sys

import pytest

from tests.bench.measure import Sample, interleave
from tests.bench.report import Line
from tests.bench.tap import ROOT, environment


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.bench", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def test_the_cheapest_part_runs_and_speaks_json():
    done = bench("flow", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["version"] == 1 and document["lines"]
    for line in document["lines"]:
        assert line["ratio"] == pytest.approx(line["peer"]["p50"] / line["ours"]["p50"])
        assert line["ours"]["n"] > 0 and line["peer"]["n"] > 0


def test_an_unknown_name_is_refused():
    done = bench("nonsense")
    assert done.returncode == 2
    assert "no benchmark nonsense" in done.stderr


def test_a_line_compares_medians_and_says_what_was_met():
    ours, theirs = Sample([0.001, 0.002, 0.009]), Sample([0.02, 0.03])
    line = Line("walk", "1,000 sockets", "ms", ours, "drgn", theirs, at_least=10, below=0.001)
    assert line.ratio == pytest.approx(12.5)
    assert [target.met for target in line.targets] == [True, False]
    assert line.body()["ours"]["p50"] == pytest.approx(2.0)


def test_rounds_are_interleaved_and_every_second_one_goes_backwards():
    order = []
    samples = interleave(2, lambda: order.append("a"), lambda: order.append("b"))
    assert order == ["a", "b", "b", "a"]
    assert [len(sample) for sample in samples] == [2, 2]


@pytest.mark.root("network namespaces")
def test_the_packet_eye_is_compared_with_tcpdump_and_loses_no_flow():
    done = bench("eye", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [line["peer"]["name"] for line in document["lines"]][:2] == ["tcpdump -w", "tcpdump -w"]


@pytest.mark.root("network namespaces")
def test_the_hand_holds_and_drops_what_is_measured():
    done = bench("hand", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["lines"]) == 4
