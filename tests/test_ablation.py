"""The ablation through papermill, from nothing to its tables; rows that are run, and rows that are not."""
import csv

import pytest
import yaml
from conftest import ROOT

from medvlm3d.base.core import MedVLM3DError, read_json
from medvlm3d.evaluation.uncertainty import mcnemar
from medvlm3d.front.runners import read_plan, run_plan
from medvlm3d.method.connector import MedVLM3DConfig
from medvlm3d.method.fusion import OPTIONS as FUSION
from medvlm3d.method.injection import OPTIONS as INJECTION
from medvlm3d.method.selection import STRATEGIES
from medvlm3d.phantoms.probes import PROBES
from medvlm3d.studies.ablation import Corpora, Setup, read_rows
from medvlm3d.studies.paper_tables import findings, paper_tables
from medvlm3d.studies.probe import Lesson
from medvlm3d.studies.sweep import ablate, pooled

ROWS = read_rows(ROOT/"runs"/"ablate")
CORPORA = ("phantom", *PROBES)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "A finished small ablation, its folder and its parameters; one row asks for an encoder that is not there."
    base = tmp_path_factory.mktemp("ablation")
    (base/"rows").mkdir()
    for path in (ROOT/"runs"/"ablate"/"tiny").glob("*.yaml"):
        (base/"rows"/path.name).write_text(path.read_text())
    (base/"rows"/"absent.yaml").write_text("group: encoder\nlabel: absent\nencoder: nobody/nothing\n")
    folders = {name: str(base/name) for name in ("out", "data", "store", "rows")}
    plan = {"93_ablate": {**folders, "drawn": 4, "seeds": [0, 1], "resamples": 50, "workers": 1}}
    run_plan(plan, base/"out", show=False, tell=lambda _: None)
    return base, plan


def ablate_again(plan, steps=3):
    "The plan's ablation, called as the runner calls it; what the plan leaves out are the runner's defaults."
    given = plan["93_ablate"]
    corpora = Corpora(train=8, test=4, probe_train=2, probe_test=2, depth=8, size=32, seed=given["drawn"])
    setup = Setup(corpora=corpora, lesson=Lesson(steps=steps, batch=4), channels=8, grid=[2, 2],
                  seeds=given["seeds"], workers=given["workers"], progress=False)
    return ablate(given["out"], given["data"], store=given["store"], rows=given["rows"], setup=setup,
                  shares=[50, 100], resamples=given["resamples"])


def times(folder): return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def stored_rows(out): return read_json(out/"results.json")["rows"]


def test_it_ends_with_tables_figures_and_a_manifest(ran):
    out = ran[0]/"out"
    assert {p.stem for p in (out/"tables").glob("*.csv")} == {"ablation", "probes", "curve"}
    figures = {p.stem for p in (out/"figures").glob("*.pdf")}
    assert figures == {"curve", *(f"differences-{corpus}" for corpus in CORPORA)}
    manifest = read_json(out/"manifest.json")
    assert manifest["status"] == "done" and manifest["stores"]["tiny"]["rho"] == 100


def test_an_absent_encoder_is_not_run_and_says_why(ran):
    absent = stored_rows(ran[0]/"out")["absent"]
    assert "cells" not in absent and "nobody/nothing: is not on this machine" in absent["why"]
    assert "absent,–,–,not run" in (ran[0]/"out"/"tables"/"ablation.csv").read_text()


def test_differences_are_paired_by_case_and_adjusted(ran):
    rows = stored_rows(ran[0]/"out")
    versus = rows["injection-none"]["versus"]
    full, none = (rows[name]["cells"]["phantom"]["mean"]["mean"] for name in ("full", "injection-none"))
    assert versus["phantom"]["mean"]["difference"] == pytest.approx(none - full, abs=1e-3)
    assert all(versus[c]["mean"]["p_holm"] >= versus[c]["mean"]["p"] for c in CORPORA)
    assert "versus" not in rows["full"]


def test_mcnemar_stands_beside_the_permutation_for_each_seed(ran):
    out = ran[0]/"out"
    cell = stored_rows(out)["injection-none"]["versus"]["phantom"]["mean"]
    items = read_json(out/"items.json")

    def right(name, seed):
        letters = read_json(out/"rows"/f"{name}-seed-{seed}.json")["letters"]
        pairs = zip(letters, items, strict=True)
        return [letter == item[4] for letter, item in pairs if item[2] == "phantom"]

    each = [mcnemar(right("injection-none", seed), right("full", seed)) for seed in (0, 1)]
    assert cell["mcnemar of seeds"] == each
    assert cell["mcnemar"] == min(1, 2 * min(each)) <= cell["mcnemar_holm"]


@pytest.mark.parametrize("p, expected", [([.3], .3), ([.2, .04, .1], .15), ([.01, .9, .9], 1),
                                         ([.02, .5], .04),
                                         ([.5, .01, .02, .4, .03], .05)])
def test_seeds_are_pooled_by_their_median(p, expected):
    assert pooled(p) == pytest.approx(expected)


def test_a_constant_and_chance_stand_in_every_table(ran):
    out = ran[0]/"out"
    results = read_json(out/"results.json")
    chance, constant = (results["baselines"][name] for name in ("chance", "constant"))
    assert chance["phantom"]["mean"]["mean"] == 25 and {*constant} == {*CORPORA}
    for name in ("ablation", "probes"):
        rows = list(csv.reader((out/"tables"/f"{name}.csv").open(encoding="utf-8")))
        assert [r[1] for r in rows if r[0] == "baseline"] == ["best constant", "chance"]
    rows = {(r[0], r[1]): r[2] for r in csv.reader((out/"tables"/"curve.csv").open(encoding="utf-8"))}
    best = results["curve"]["constant"]["100"]
    assert rows["all", "chance"] == "25.0"
    assert rows["100 %", "best constant"].startswith(f"{best['mean']:.1f} [")
    assert best["seeds"] == [constant["phantom"]["mean"]["mean"]] * 2, "all cases, whatever the seed"
    assert len(results["curve"]["constant"]["50"]["seeds"]) == 2


def test_the_loss_at_the_end_is_the_records_own(ran):
    out = ran[0]/"out"
    loss = read_json(out/"results.json")["curve"]["loss"]
    assert {*loss} == {"kept", "all", "3D"}
    for side, shares in loss.items():
        for share, value in shares.items():
            records = [read_json(out/"curve"/f"{side}-{share}-seed-{seed}.json") for seed in (0, 1)]
            assert value == pytest.approx(sum(record["loss"] for record in records) / 2, abs=1e-4)


def test_tables_name_the_protocol_and_the_lesson(ran):
    text = {p.stem: p.read_text() for p in (ran[0]/"out"/"tables").glob("*.md")}
    assert "paper, m3d" in text["ablation"] and "here, both protocols" in text["ablation"]
    assert all("likeliest of the options offered" in t for t in text.values())
    assert "the learning rate of each side was chosen on another draw" in text["curve"]


def test_mirror_images_are_one_cluster(ran):
    items = read_json(ran[0]/"out"/"items.json")
    pairs = [cluster for _, cluster, corpus, *_ in items if corpus == "mirror"]
    assert len(pairs) == 2 and len(set(pairs)) == 1


def test_a_second_run_does_nothing(ran):
    base, plan = ran
    def files(): return {**times(base/"out"/"rows"), **times(base/"out"/"curve")}
    before, messages = files(), []
    run_plan(plan, base/"out", show=False, tell=messages.append)
    assert files() == before and len(before) == 2 * 2 + 3 * 2 * 2
    assert all("already done" in message for message in messages)


def test_a_cut_run_continues(ran):
    "A row that is lost is trained again, and alone; its numbers are the same."
    base, plan = ran
    lost = base/"out"/"rows"/"full-seed-1.json"
    before = lost.read_text()
    lost.unlink()
    others = times(lost.parent)
    ablate_again(plan)
    assert lost.read_text() == before
    assert {path: time for path, time in times(lost.parent).items() if path != lost} == others


def test_other_parameters_are_refused(ran):
    base, plan = ran
    with pytest.raises(MedVLM3DError, match=r"another config \(differs in lesson\).*Choose a new folder"):
        ablate_again(plan, steps=99)


# --- the rows of the study ---------------------------------------------------------------------------------

def test_the_rows_cover_the_papers_table_and_the_issues_list():
    with open(ROOT/"data"/"published.csv", newline="") as f:
        known = {r["metric"] for r in csv.DictReader(f) if r["table"] == "8"}
    assert {r.published for r in ROWS.values()} - {""} == known
    def values(key): return {getattr(row, key) for row in ROWS.values()}
    assert values("selection") == {*STRATEGIES} and values("fusion") == {*FUSION["path"]}
    assert values("attention") == {*INJECTION["attention"], "mean-pool"} and values("scale") == {1, 2, 4}
    assert values("encoder") == {"biomedclip", "pubmedclip", "clip-vit-l-14", "dinov2-s", "dinov2-s-random"}
    assert len({r.rho for r in ROWS.values()}) == 4 and any(r.frequency == "global" for r in ROWS.values())


def test_the_full_row_is_the_papers_method():
    full, paper = ROWS["full"], MedVLM3DConfig()
    for key in ("selection", "rho", "fusion", "frequency", "attention", "residual", "scale"):
        assert getattr(full, key) == getattr(paper, key), key


@pytest.mark.parametrize("name", [n for n in ROWS if n != "full"])
def test_a_row_changes_one_thing(name):
    "Against the row it is compared with."
    mine, other = ROWS[name].changes, ROWS[ROWS[name].versus].changes
    assert len({k for k in mine if mine[k] != other[k]} - {"pixels"}) == 1


def test_the_plan_has_three_seeds_and_known_parameters():
    plan = read_plan("ablate")["93_ablate"]
    assert len(plan["seeds"]) >= 3 and plan["rows"] == "runs/ablate"
    assert plan["shares"] == [5, 10, 25, 50, 100]
    assert yaml.safe_load((ROOT/"runs"/"ablate.yaml").read_text())["93_ablate"] == plan


# --- tables and sentences ----------------------------------------------------------------------------------

def test_paper_tables_and_findings_come_from_the_run(ran):
    out = ran[0]/"out"
    table = {r[1]: r for r in paper_tables(ablation=out)["table-8"].rows}
    mean = stored_rows(out)["full"]["cells"]["phantom"]["mean"]["mean"]
    assert table["full method"][2] == "82.90" and table["full method"][4].startswith(f"{mean:.1f} [")
    lines = findings(ablation=out)
    assert len(lines) == 5 and lines[0].endswith("Not run.")
    assert "2 seeds" in lines[2] and "at 100 %" in lines[4]


def test_without_a_run_nothing_is_claimed():
    table = paper_tables()["table-8"]
    assert {r[4] for r in table.rows} == {"not run"} and len(table.rows) == len(ROWS)
    assert all(line.endswith("Not run.") for line in findings())
