"""The eighteen labels of chest CT reports against hand-made ones: F1 of each, macro F1 and speed.

    python bench/labels.py REPORTS.csv [--rows ROWS.json] [--part NAME]

REPORTS.csv has a column `report_text` and a column of 0 and 1 for each label; a folder stands for the first
CSV file in it. ROWS.json, {name: row numbers}, with --part restricts the rows. Prints figures, no text.
"""
import argparse
import csv
import json
import time
from pathlib import Path

from medvlm3d.evaluation.labels import LABELS, label_scores, report_labels


def read_rows(path):
    "The rows of a CSV file, or of the first one in a folder."
    path = Path(path)
    if path.is_dir(): path = sorted(path.glob("*.csv"))[0]
    with open(path, encoding="utf-8", newline="") as f: return list(csv.DictReader(f))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports")
    parser.add_argument("--rows")
    parser.add_argument("--part")
    a = parser.parse_args()
    rows = read_rows(a.reports)
    if a.rows: rows = [rows[i] for i in json.loads(Path(a.rows).read_text())[a.part]]
    start = time.process_time()
    predicted = [report_labels(row["report_text"]) for row in rows]
    seconds = time.process_time() - start
    true = [{label: row[label] == "1" for label in LABELS} for row in rows]
    for label, s in label_scores(predicted, true).items():
        print(f"{label:36} F1 {s['F1']:.3f}  precision {s['precision']:.3f}  recall {s['recall']:.3f}  n {s['n']}")
    print(f"{len(rows)} reports, {len(rows) / seconds:.0f} reports/s on one core")


if __name__ == "__main__":
    main()
