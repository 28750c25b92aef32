"""Many scans are answered by several processes: each takes its share, and one table comes out."""
import json

import nibabel as nib
import numpy as np
from processes import command, torchrun

from medvlm3d import tiny

ASKED = ["-q", "Which organ is enlarged?", "--choices", "liver,spleen", "--max-new-tokens", "4", "--quiet"]


def rows_of(table):
    rows = map(json.loads, table.read_text().splitlines())
    return [{**row, "ms": 0} for row in rows]


def test_two_ranks_write_the_table_of_one(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path/"scans").mkdir()
    for name in "abcde":
        array = rng.normal(0, 300, (16, 16, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([2., 2., 5., 1.])), tmp_path/"scans"/f"{name}.nii.gz")
    tiny().save_pretrained(tmp_path/"model")
    typed = ["predict", tmp_path/"scans", "--model", tmp_path/"model", *ASKED]
    done = torchrun("medvlm3d", *typed, "--out", tmp_path/"two.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: 5 of 5 scans") == 1
    command(*typed, "--out", tmp_path/"one.jsonl")
    assert rows_of(tmp_path/"two.jsonl") == rows_of(tmp_path/"one.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir() if "two" in p.name) == ["two.about.json", "two.jsonl"]
