"""The clock, the scale and the goals report what was there; `bench/goals.py` runs at small sizes."""
import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.front.runners import run_plan
from medvlm3d.studies.efficiency import (COST_COLUMNS, Finding, Tower3D, cost_rows, goal_rows, interleave,
                                         method_and_yardstick, peak_memory, ratio)
from medvlm3d.training.cost import ViT, count_flops

SHAPES = dict(channels=32, heads=2, blocks=2, grid=4, depth=16, hidden=24, scan=(8, 32, 32))


@pytest.fixture(scope="module")
def goals():
    "The script `bench/goals.py` as a module."
    spec = importlib.util.spec_from_file_location("goals", ROOT/"bench"/"goals.py")
    module = sys.modules["goals"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["goals"]


def test_the_yardstick_has_the_size_of_the_original():
    with torch.device("meta"): tower, volume = Tower3D(), torch.empty(1, 1, 32, 256, 256)
    parameters = sum(p.numel() for p in tower.parameters())
    assert abs(parameters / 107.3e6 - 1) < .01 and tower(volume).shape == (1, 256, 4096)
    assert abs(count_flops(lambda: tower(volume)) / 516e9 - 1) < .01
    assert ViT(768, 12, 768, 196).flops == pytest.approx(35.13e9, rel=1e-3)


def test_each_round_runs_everybody_once_in_changing_order_and_the_first_does_not_count():
    now, calls = [0.], []
    def work(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds + 100 * (len(calls) <= 3)
        return run
    contestants = {"a": work("a", 1), "b": work("b", 2), "c": work("c", 4)}
    times = interleave(contestants, rounds=9, clock=lambda: now[0])
    rounds = [tuple(calls[i:i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(rounds) == 10 and len(set(rounds)) > 2
    assert times == {"a": [1.] * 9, "b": [2.] * 9, "c": [4.] * 9} and ratio(times, "c", "a") == (4., 4., 4.)


def test_a_case_that_fails_is_named_and_not_weighed():
    message = r"efficiency.fill: could not be weighed: TypeError.*Give options"
    with pytest.raises(MedVLM3DError, match=message):
        peak_memory("medvlm3d.studies.efficiency", "fill", kilobytes=3)


def test_the_method_and_the_yardstick_are_counted():
    "Parameters and operations of the encoder follow from its shape, and what is frozen keeps nothing."
    rows = cost_rows(method_and_yardstick(**SHAPES))
    assert len(rows) == 3 and all(len(row) == len(COST_COLUMNS) for row in rows)
    assert float(rows[0][2]) == pytest.approx(ViT(32, 2, 768, 16).flops / 1e9, rel=1e-3) and rows[0][3] == "0"
    assert all(float(row[3]) > 0 for row in rows[1:])


def test_a_missed_goal_is_called_missed():
    rows = goal_rows([Finding("G1", "x", .5, .45), Finding("G1", "x", .45, .45),
                      Finding("G7", "x", 2.4, 2.5, least=True)])
    assert [r[-1] for r in rows] == ["MISSED", "yes", "MISSED"]


def test_the_contestants_of_a_goal_do_the_same_work(goals):
    "The bare products are the encoder's, and every weight of every contestant moves in a training step."
    small = goals.small()
    biases = 10 * 2 * 16 * 32 * (32 - 768)       # the products take patches of 32 values, the encoder of 768
    encoder = count_flops(goals.encode(small, 10, blocks=2))
    assert count_flops(goals.products(small, 10, 2)) == encoder + biases
    for name in ("cached", "explicit", "fused"):
        module, read = goals.contestant(small, name)
        before = [p.clone() for p in module.parameters()]
        optimiser = torch.optim.AdamW(module.parameters(), fused=True)
        module(read()).square().mean().backward()
        optimiser.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters())), name


def test_fast_forms_give_the_same_numbers(goals):
    "G1, G5 and G7: the even-odd path, stored features and a prefix that is read once."
    small = goals.small()
    error = goals.frequency_findings(small, 1)[-1]
    loss = goals.store_findings(small)[-1]
    likelihood = goals.reuse_findings(small)[-1]
    assert error.met and loss.value == 0 and likelihood.met, (error, loss, likelihood)


def test_packed_questions_cost_what_single_ones_do_in_three_families(goals):
    findings = [f for f in goals.packing_findings(goals.small(), 1) if "difference" in f.what]
    assert {f.what.split(", ")[1] for f in findings} == {"LLaMA", "SmolLM", "Qwen"}
    assert all(f.met for f in findings), findings


def test_the_runner_measures_at_small_sizes_and_its_record_agrees(tmp_path):
    plan = {"94_efficiency": {"out": str(tmp_path/"out"), "rounds": 1}}
    record, = run_plan(plan, tmp_path/"out", show=False, tell=lambda _: None)
    findings = json.loads((tmp_path/"out"/"results.json").read_text())["findings"]
    assert {f["goal"] for f in findings} == {f"G{i}" for i in range(1, 8)}
    for f in findings:
        assert f["met"] == (f["value"] >= f["target"] if f["least"] else f["value"] <= f["target"])
    table = (tmp_path/"out"/"tables"/"goals.md").read_text()
    assert table.count("MISSED") == sum(not f["met"] for f in findings)
    assert "3D tower" in record.read_text() and str(ROOT) not in record.read_text()


def test_a_finished_run_is_read_and_not_measured_again(goals, tmp_path, monkeypatch):
    finding = Finding("G1", "x", .4, .45)
    monkeypatch.setattr(goals, "measure_all", lambda *_: [finding])
    first = goals.run(tmp_path/"out", goals.small(), rounds=1)
    monkeypatch.setattr(goals, "measure_all", lambda *_: pytest.fail("measured again"))
    assert goals.run(tmp_path/"out", goals.small(), rounds=1) == first
    assert first[0]["met"] and set(first[0]) == {*Finding.__dataclass_fields__, "met"}
