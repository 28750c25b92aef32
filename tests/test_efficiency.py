"""The clock, the scale and the goals: what they say is what was there."""
import json

import pytest
import torch
from conftest import ROOT

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.training.cost import ViT, count_flops
from medvlm3d.studies.efficiency import Finding, Tower3D, goal_rows, interleave, peak_memory, ratio
from medvlm3d.studies.goals import packing_findings, small
from medvlm3d.front.runners import run_plan


def test_the_yardstick_has_the_size_of_the_original():
    with torch.device("meta"): tower, volume = Tower3D(), torch.empty(1, 1, 32, 256, 256)
    assert abs(sum(p.numel() for p in tower.parameters()) / 107.3e6 - 1) < .01 and tower(volume).shape == (1, 256, 4096)
    assert abs(count_flops(lambda: tower(volume)) / 516e9 - 1) < .01
    assert ViT(768, 12, 768, 196).flops == pytest.approx(35.13e9, rel=1e-3)


def test_each_round_runs_everybody_once_in_changing_order_and_the_first_does_not_count():
    now, ran = [0.], []
    def work(name, seconds):
        def run(): ran.append(name); now[0] += seconds + 100 * (len(ran) <= 3)
        return run
    times = interleave({"a": work("a", 1), "b": work("b", 2), "c": work("c", 4)}, rounds=9, clock=lambda: now[0])
    rounds = [tuple(ran[i:i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(rounds) == 10 and len(set(rounds)) > 2
    assert times == {"a": [1.] * 9, "b": [2.] * 9, "c": [4.] * 9} and ratio(times, "c", "a") == (4., 4., 4.)


def test_a_case_that_fails_is_named_and_not_weighed():
    with pytest.raises(MedVLM3DError, match=r"efficiency.fill: could not be weighed: TypeError.*Give options"):
        peak_memory("medvlm3d.studies.efficiency", "fill", kilobytes=3)


def test_a_missed_goal_is_called_missed():
    rows = goal_rows([Finding("G1", "x", .5, .45), Finding("G1", "x", .45, .45), Finding("G7", "x", 2.4, 2.5, least=True)])
    assert [r[-1] for r in rows] == ["MISSED", "yes", "MISSED"]


def test_packed_questions_cost_what_single_ones_do_in_three_families():
    found = [f for f in packing_findings(small(), 1) if "difference" in f.what]
    assert {f.what.split(", ")[1] for f in found} == {"LLaMA", "SmolLM", "Qwen"} and all(f.met for f in found), found


def test_the_runner_measures_at_small_sizes_and_its_record_agrees(tmp_path):
    record, = run_plan({"94_efficiency": {"out": str(tmp_path/"out"), "rounds": 1}}, tmp_path/"out", show=False, tell=lambda _: None)
    found = json.loads((tmp_path/"out"/"results.json").read_text())["findings"]
    assert {f["goal"] for f in found} == {f"G{i}" for i in range(1, 8)}
    assert all(f["met"] == (f["value"] >= f["target"] if f["least"] else f["value"] <= f["target"]) for f in found)
    table = (tmp_path/"out"/"tables"/"goals.md").read_text()
    assert table.count("MISSED") == sum(not f["met"] for f in found) and str(ROOT) not in record.read_text()
