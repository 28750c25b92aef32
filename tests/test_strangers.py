"""Files as strangers bring them: what is read is said, what cannot be read is refused by name, and a study of alike reports still splits."""
import json

import numpy as np
import pytest
from own_corpus import write_scans
from typer.testing import CliRunner

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.data.asked import read_questions
from medvlm3d.evaluation.columns import parse_columns
from medvlm3d.evaluation.outputs import read_file
from medvlm3d.front.cli import app

LETTERS = "ABCDEFGHIJ"


def read(tmp_path, name, content, **options):
    "(lines, note) of a file of answers with this content."
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file(tmp_path/name, **options)


@pytest.mark.parametrize("sign", ",;\t|")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_in_any_separator_and_any_marked_encoding(sign, encoding, tmp_path):
    rows = [["question", "answer", "prediction"], ["Wo?", "Läsion", "Läsion links"]]
    (line,), _ = read(tmp_path, "a.csv", "\r\n".join(sign.join(row) for row in rows).encode(encoding))
    assert (line["question"], line["answer"], line["prediction"], line["task"]) == ("Wo?", "Läsion", "Läsion links", "open")


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_columns_of_options_are_used_and_said_to_be(count, tmp_path):
    letters = LETTERS[:count]
    head = ["", "question", *(f"choice_{letter}" for letter in letters), "answer", "pred"]
    rows = [[str(n), "Where?", *(f"organ {k}" for k in letters), letter, f"{letter}) organ {letter}"] for n, letter in enumerate(letters)]
    lines, note = read(tmp_path, "a.csv", "\n".join(map(",".join, [head, *rows])))
    assert [len(line["choices"]) for line in lines] == [count] * count and [line["letter"] for line in lines] == [*letters]
    assert f"options in {', '.join(head[2:-2])}" in note and note.endswith("not used: (no name)")


def test_an_object_of_records_by_id(tmp_path):
    told = {"17": {"answer": "liver", "prediction": "Liver."}, "18": {"answer": "spleen", "prediction": "liver"}}
    lines, _ = read(tmp_path, "a.json", json.dumps(told))
    assert [(line["id"], line["answer"], line["prediction"]) for line in lines] == [("17", "liver", "Liver."), ("18", "spleen", "liver")]


def test_one_column_cannot_be_answer_and_truth():
    with pytest.raises(MedVLM3DError, match="gives the column pred two roles"): parse_columns("answer=pred,truth=pred")


@pytest.mark.parametrize("name, content, says", [
    ("a.parquet", b"PAR1\0\0", "has an ending that is not read"), ("a.xlsx", b"PK", "has an ending that is not read"),
    ("a.csv", b"question,answer,prediction\n", "holds a header and no answers"), ("a.csv", b"", "holds no answers"),
    ("a.csv", "Wo?,Läsion".encode("cp1252"), "is not UTF-8")])
def test_what_is_no_file_of_answers_is_refused_with_its_reason(name, content, says, tmp_path):
    with pytest.raises(MedVLM3DError, match=says): read(tmp_path, name, content)


def test_a_document_is_no_list_of_questions(tmp_path):
    (tmp_path/"q.docx").write_bytes(b"PK\3\4..")
    with pytest.raises(MedVLM3DError, match="has an ending that is not read"): read_questions(tmp_path/"q.docx")
    (tmp_path/"q.txt").write_text("Which organ?\nWhich side?\n")
    assert [one.question for one in read_questions(tmp_path/"q.txt")] == ["Which organ?", "Which side?"]


def prepare(corpus, out, **changes):
    "The first step of a study, called as the runner calls it."
    from medvlm3d.studies.own import prepare_own
    return prepare_own(out, corpus, store=out/"store", encoder="tiny", depth=8, size=32, rho=50, window=(-1000, 1000),
                       percentiles=(.5, 99.5), quiet=True, workers=1, **changes)


@pytest.fixture
def alike(tmp_path):
    "Fourteen patients, whose reports are three templates word for word."
    write_scans(tmp_path/"scans", 14, 14)
    texts = ("No acute abnormality is seen.\n", "Stable cyst of the left kidney, 2 cm.\n", "Small effusion on the right side.\n")
    for n, path in enumerate(sorted((tmp_path/"scans").rglob("*.txt"))): path.write_text(texts[n % 3])
    return tmp_path


def test_reports_from_templates_are_split_by_patient_and_that_is_said(alike, capsys):
    facts = prepare(alike/"scans", alike/"run")
    assert min(facts["cases"].values()) > 0 and facts["torn"]["text"] > 0
    said = capsys.readouterr().out
    assert "alike on both sides of the split" in said and f"text ({facts['torn']['text']} test volumes)" in said
    assert "kept together: patient" in said and "bytes" in said


def test_ties_that_are_asked_for_are_kept_or_refused(alike):
    with pytest.raises(MedVLM3DError, match="cannot be split so"): prepare(alike/"scans", alike/"run", ties=["text", "near text"])
    facts = prepare(alike/"scans", alike/"run", ties=["bytes"], allow=["text", "near text"])
    assert facts["torn"] == {}


def test_the_study_takes_ties_as_a_change_and_knows_their_names(tmp_path):
    write_scans(tmp_path/"scans", 2)
    words = ["study", str(tmp_path/"scans"), "--out", str(tmp_path/"run"), "--preset", "laptop", "-p", "ties=5"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, MedVLM3DError) and "ties" in str(result.exception)
    assert np.all([not path.exists() for path in (tmp_path/"run", tmp_path/"scans"/"study.jsonl")])


@pytest.mark.parametrize("change, says", [
    ("depth=0", "at least 1"), ("size=-1", "at least 1"), ("rho=200", "at most 100"), ("batch=0", "at least 1"),
    ("resamples=0", "at least 1"), ("stage1_epochs=-1", "at least 0"), ("stage2_lr=-1e-3", "at least 0"), ("unknown_limit=2", "at most 1")])
def test_a_number_out_of_range_is_refused_before_the_first_step(change, says, tmp_path):
    write_scans(tmp_path/"scans", 2)
    words = ["study", str(tmp_path/"scans"), "--out", str(tmp_path/"run"), "--preset", "laptop", "-p", change]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, MedVLM3DError) and repr(change.partition("=")[0]) in str(result.exception)
    assert says in str(result.exception) and not (tmp_path/"run").exists()
