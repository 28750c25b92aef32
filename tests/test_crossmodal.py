"""The cross-modal benchmark: answers are true, raters are blind to each other, their known error rate is
found, patients stay on one side."""
import json
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from corpora import invented
from typer.testing import CliRunner

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.front.cli import app
from medvlm3d.data.corpora import load_autopet, load_brats
from medvlm3d.studies.crossmodal import (MODALITY_WORDS, QUESTIONS, Drafter, collect_facts,
                                         load_phantom_studies, review, simulated_raters, split_by_patient,
                                         study_facts, true_answer)
from medvlm3d.base.core import sha256_file
from medvlm3d.studies.crossmodal_study import (accuracy_table, agreement_figure, agreement_table, build,
                                               by_modality, contact_sheet, difference_table, open_corpora,
                                               run, score, scores, source_table)
from medvlm3d.data.m3d import read_image
from medvlm3d.evaluation.comparison import evaluate_systems
from medvlm3d.phantoms.layouts import sample_brains, write_layout
from medvlm3d.studies.judging import keeping, open_review, read_round, review_widget
from medvlm3d.data.manifest import read_manifest, write_manifest
from medvlm3d.evaluation.metrics import offered, parse_choice
from medvlm3d.evaluation.prediction import prediction_line
from medvlm3d.studies.raters import (SHEET, agreement, cohen_kappa, disagreement, error_rate, fleiss_kappa,
                                     pattern_counts, read_rows, read_sheet, set_verdict, sheet_rows,
                                     simulated_names, simulated_votes, votes_from_sheets, write_rows)

SHAPE, STUDIES = (20, 36, 36), 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("crossmodal")
    for layout in ("brats", "autopet", "phantom"):
        write_layout(root/layout, layout, studies=STUDIES, shape=SHAPE, seed=5)
    return root


@pytest.fixture(scope="module")
def studies(data):
    return [*load_brats(data/"brats"), *load_autopet(data/"autopet"), *load_phantom_studies(data/"phantom")]


@pytest.fixture(scope="module")
def facts(studies): return collect_facts(studies)


# --- what is asked --------------------------------------------------------------------------------

def test_sides_are_those_of_the_drawing(data, facts):
    truth = {c.id: (c.side, c.level) for c in sample_brains(STUDIES, seed=5)}
    brains = [f for f in facts[0] if f.source.startswith("BraTS")]
    assert len(brains) > STUDIES // 2
    for f in brains: assert (f.side, f.level) == truth[f.case]


def test_volumes_are_read_in_the_unit_of_their_modality(studies):
    expected = {"MR": ("MR", "arbitrary"), "CT": ("CT", "HU"), "PT": ("PT", "SUV"),
                **dict.fromkeys(("t1n", "t1c", "t2w", "t2f"), ("MR", "arbitrary"))}
    seen = set()
    for study in (studies[0], studies[STUDIES], studies[-1]):
        for kind, path in study.images.items():
            volume = read_image(path)
            assert (volume.modality, volume.intensity) == expected[kind], kind
            seen.add(kind)
    assert seen == set(expected)


def test_left_stays_left_however_the_file_is_stored(studies, tmp_path):
    "All 48 orders of axes of one PET study, mask and volume: the same facts, or the same refusal."
    study = next(s for s in studies if s.source == "AutoPET" and nib.load(s.mask).get_fdata().any())
    def facts_or_refusal(s):
        try: f = study_facts(s, "PT")
        except MedVLM3DError as error: return error.why
        return f.side, f.level, f.shares
    first, seen = facts_or_refusal(study), set()
    for axes in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        for flips in range(8):
            turn = np.array([[a, 1 - 2 * (flips >> i & 1)] for i, a in enumerate(axes)])
            paths = {}
            for kind, path in (("PT", study.images["PT"]), ("mask", study.mask)):
                paths[kind] = tmp_path/f"{kind}.nii"
                nib.save(nib.load(path).as_reoriented(turn), paths[kind])
            seen.add(facts_or_refusal(replace(study, images={"PT": paths["PT"]}, mask=paths["mask"])))
    assert seen == {first}


def test_three_questions_a_volume_and_every_answer_is_true(data, facts):
    drafter = Drafter(facts[0], data, seed=3)
    pairs = drafter.draft(12)
    assert Counter((p.case, p.modality) for p in pairs).most_common()[-1][1] == 3
    assert Counter(p.type for p in pairs) == {kind: 24 for kind in QUESTIONS}
    for p in pairs:
        assert p.choices["ABCD".index(p.letter)] == p.answer
        assert p.answer == true_answer(p.type, p.question, drafter.facts[p.id])
        assert len(set(offered(p.choices).values())) == len(offered(p.choices)) >= 2
        assert parse_choice(f"{p.letter}. {p.answer}", p.choices) == p.letter and (data/p.image).exists()


def test_answers_are_balanced_within_each_modality():
    "From a pool that is large enough: no type, modality, side or letter has a favourite."
    pairs = Drafter(invented(800), ROOT, seed=1).draft(160)
    groups = defaultdict(Counter)
    for p in pairs:
        if p.type != "Modality Identification": groups[p.type, p.modality][p.answer] += 1
        if p.type == "Lesion Detection": groups["half", p.modality, "right" in p.question][p.answer] += 1
        groups[p.type, "letter"][p.letter] += 1
    groups["modality"].update(p.answer for p in pairs if p.type == "Modality Identification")
    for key, counts in groups.items():
        assert max(counts.values()) - min(counts.values()) <= (8 if "half" in key else 1), (key, counts)


def test_no_volume_is_drawn_twice_and_the_pool_ends_with_a_message():
    drafter = Drafter(invented(40), ROOT)
    pairs = drafter.draft(20)
    assert len({p.case for p in pairs}) == 40
    with pytest.raises(MedVLM3DError, match="pool of MRI volumes of invented: is used up.*Ask for fewer"):
        drafter.replace(pairs[0])


def test_what_cannot_be_asked_is_counted_with_its_reason(studies, facts):
    found, refused = facts
    assert len(found) + sum(refused.values()) == len(studies)
    assert refused["the mask holds no lesion"] == STUDIES // 4


def test_a_mask_on_another_grid_is_refused(studies, tmp_path):
    study = studies[0]
    small = nib.load(study.mask).slicer[:-2]
    nib.save(small, tmp_path/"seg.nii.gz")
    with pytest.raises(MedVLM3DError, match="another grid.*Restore"):
        study_facts(replace(study, mask=tmp_path/"seg.nii.gz"), "t1n")


def test_a_pair_is_replaced_by_one_of_the_same_source_or_not_at_all():
    "Three BraTS volumes in a pool of phantoms: two replacements are of BraTS, the third is an error."
    pool = [replace(f, source="phantom") for f in invented(40, ("MR",))]
    pool[:3] = [replace(f, source="BraTS 2023") for f in pool[:3]]
    drafter = Drafter(pool, ROOT)
    pair = drafter.pair("Modality Identification", drafter.pool.take("MR", source="BraTS 2023"))
    for _ in range(2):
        pair = drafter.replace(pair)
        assert pair.source == "BraTS 2023"
    with pytest.raises(MedVLM3DError, match="pool of MRI volumes of BraTS 2023: is used up"):
        drafter.replace(pair)


@pytest.fixture(scope="module")
def many(): return split_by_patient(Drafter(invented(1200), ROOT, seed=1).draft(240))


# --- sheets ---------------------------------------------------------------------------------------

@pytest.fixture
def sheets(data, facts, tmp_path):
    drafter = Drafter(facts[0], data, seed=3)
    pairs = drafter.draft(4)
    vote = votes_from_sheets(tmp_path, ("anna", "ben", "carla"), seed=2)
    with pytest.raises(MedVLM3DError, match="awaits the verdicts of anna, ben, carla"): vote(1, pairs)
    return drafter, pairs, vote, tmp_path/"round-1"


def test_raters_are_blind_to_each_other(sheets):
    "One file each, in an order of its own; nothing of a verdict, a patient or the mask in another's file."
    drafter, pairs, vote, folder = sheets
    orders = {}
    for name in ("anna", "ben", "carla"):
        orders[name] = tuple(r["id"] for r in read_rows(folder/f"{name}.csv"))
    assert len(set(orders.values())) == 3 and len({frozenset(o) for o in orders.values()}) == 1
    before = (folder/"ben.csv").read_bytes()
    set_verdict(folder/"anna.csv", pairs[0].id, "reject", "a secret remark")
    assert (folder/"ben.csv").read_bytes() == before
    for name in orders:
        text = (folder/f"{name}.csv").read_text()
        assert name == "anna" or "secret" not in text
        for p in pairs:
            assert p.patient not in [c for r in read_rows(folder/f"{name}.csv") for c in r.values()]
        assert "nii" not in text and not any(p.image in text or p.case in text for p in pairs)


def test_a_sheet_names_a_volume_without_its_path(sheets):
    "A path may hold a patient's name; pairs about one volume share its name on the sheet, others do not."
    drafter, pairs, vote, folder = sheets
    row = sheet_rows([replace(pairs[0], image="DOE_JANE_1970/scan.nii.gz", case="DOE_JANE_1970")], "anna")[0]
    assert "DOE" not in " ".join(row)
    names = defaultdict(set)
    for r in read_rows(folder/"anna.csv"):
        names[r["volume"]].add(next(p.case for p in pairs if p.id == r["id"]))
    assert len(names) == 8 and all(len(cases) == 1 for cases in names.values())


def test_verdicts_arrive_in_the_order_of_the_pairs(sheets):
    drafter, pairs, vote, folder = sheets
    rejected = {"anna": {pairs[2].id}, "ben": {pairs[2].id, pairs[7].id}, "carla": set()}
    for name, out in rejected.items():
        rows = []
        for r in read_rows(folder/f"{name}.csv"):
            rows.append([*[r[c] for c in SHEET[:-2]], " Reject" if r["id"] in out else "ACCEPT ", ""])
        write_rows(folder/f"{name}.csv", rows)
    votes = vote(1, pairs)
    dissent = {i: votes[i].tolist() for i in range(len(pairs)) if not votes[i].all()}
    assert dissent == {2: [False, False, True], 7: [True, False, True]}


def test_a_begun_sheet_is_never_written_over(sheets):
    drafter, pairs, vote, folder = sheets
    set_verdict(folder/"anna.csv", pairs[0].id, "accept")
    before = (folder/"anna.csv").read_bytes()
    with pytest.raises(MedVLM3DError, match="awaits the verdicts"): vote(1, pairs)
    assert (folder/"anna.csv").read_bytes() == before


def test_every_fault_of_a_sheet_is_named_at_once(sheets):
    drafter, pairs, vote, folder = sheets
    rows = [[r[c] for c in SHEET[:-2]] for r in read_rows(folder/"ben.csv")]
    verdicts = ["maybe", "", *["accept"] * (len(rows) - 3)]
    repeated = [*rows[4], "reject", ""]
    unknown = ["location/9999", *rows[0][1:], "accept", ""]
    write_rows(folder/"ben.csv", [*([*r, v, ""] for r, v in zip(rows, verdicts)), repeated, unknown])
    with pytest.raises(MedVLM3DError) as caught: read_sheet(folder/"ben.csv", pairs)
    n = len(rows)
    for part in ("ben.csv:2: has a verdict that is not known", "ben.csv:3: has no verdict",
                 f"ben.csv:{n + 1}: repeats a pair", f"ben.csv:{n + 2}: is not a pair of this round",
                 "ben.csv: lacks 1 pairs", "has 5 problems"):
        assert part in str(caught.value)


def test_a_file_that_is_no_sheet(sheets, tmp_path):
    (tmp_path/"x.csv").write_text("id,verdict\n1,accept\n")
    with pytest.raises(MedVLM3DError, match="x.csv: does not have a sheet's columns.*They are id, volume"):
        read_sheet(tmp_path/"x.csv", sheets[1])


def test_a_sheet_in_another_encoding_or_torn_is_an_error_with_a_remedy(sheets):
    "As Excel saves it in western Europe, as Unicode text, and with a quote that never closes."
    folder = sheets[3]
    whole = (folder/"ben.csv").read_text(encoding="utf-8")
    for data, why in ((whole.replace("?", "é", 1).encode("cp1252"), "is not UTF-8"),
                      (whole.encode("utf-16"), "is not UTF-8"),
                      ((whole + '"torn').encode(), "is no CSV file")):
        (folder/"ben.csv").write_bytes(data)
        with pytest.raises(MedVLM3DError, match=f"ben.csv: {why}.*save it as CSV UTF-8"):
            read_sheet(folder/"ben.csv", sheets[1])


def test_cells_are_no_formulas(sheets):
    risky = replace(sheets[1][0], image="=cmd|x", question="+1", answer="@x")
    assert not [c for c in sheet_rows([risky], "anna")[0] if c[:1] in tuple("=+-@") and c]


# --- judging --------------------------------------------------------------------------------------

@pytest.fixture
def waiting(data, facts, tmp_path):
    "A run folder that awaits two raters, with its drafter and pairs."
    drafter = Drafter(facts[0], data, seed=3)
    pairs = drafter.draft(1)
    vote = keeping(votes_from_sheets(tmp_path/"review", ("anna", "ben")), tmp_path/"review", drafter.facts,
                   data)
    with pytest.raises(MedVLM3DError, match="awaits the verdicts of anna, ben.*open_review"): vote(1, pairs)
    (tmp_path/"config.yaml").write_text(f"data: {data}\n")
    return tmp_path, drafter, pairs, vote


def parts(widget):
    "(accept, reject, comment, status, picture) of a review widget."
    buttons, status, picture = widget.children
    return *buttons.children, status, picture


def test_clicks_are_verdicts_on_the_pair_that_is_shown(waiting):
    """Without a browser, from files alone: the widget shows the first open pair, the sheet holds the click,
    and a second opening continues behind it."""
    out, drafter, pairs, vote = waiting
    sheet = out/"review"/"round-1"/"anna.csv"
    order = [r["id"] for r in read_rows(sheet)]
    accept, reject, comment, status, picture = parts(open_review(out, "anna"))
    first = picture.value
    assert first[:4] == b"\x89PNG" and status.value.startswith(order[0])
    comment.value = "too dark"
    reject.click()
    assert picture.value != first and status.value.startswith(order[1]) and comment.value == ""
    accept, *_, status, picture = parts(open_review(out, "anna"))
    assert status.value.startswith(order[1])
    for _ in order: accept.click()
    assert status.value == "done, thank you" and accept.disabled
    rows = {r["id"]: r for r in read_rows(sheet)}
    assert rows[order[0]]["verdict"] == "reject" and rows[order[0]]["comment"] == "too dark"
    assert {rows[i]["verdict"] for i in order[1:]} == {"accept"}
    assert not any(r["verdict"] for r in read_rows(out/"review"/"round-1"/"ben.csv"))


def test_a_kept_round_is_what_was_drafted_and_names_no_machine(waiting, data):
    out, drafter, pairs, vote = waiting
    file = out/"review"/"round-1"/"pairs.jsonl"
    kept = read_round(file, data)
    def text(p): return p.id, p.question, f"{p.letter} {p.answer}"
    assert [text(j) for j in kept.values()] == [text(p) for p in pairs]
    assert all(kept[p.id].image == drafter.facts[p.id].image and kept[p.id].mask.exists() for p in pairs)
    assert str(data) not in file.read_text()


def test_without_widgets_a_sheet_or_a_place_the_review_says_what_to_do(waiting, monkeypatch):
    out = waiting[0]
    with pytest.raises(MedVLM3DError, match="holds no sheet of carla.*spell it as there"):
        open_review(out, "carla")
    (out/"config.yaml").unlink()
    with pytest.raises(MedVLM3DError, match="does not say where its volumes lie.*Give `data`"):
        open_review(out, "anna")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(MedVLM3DError, match="ipywidgets: is not installed.*or fill the sheet"):
        review_widget(out/"review"/"round-1"/"anna.csv", {})


# --- agreement ------------------------------------------------------------------------------------

def test_kappa_of_textbooks():
    "Cohen on 20, 5, 10, 15 is 0.4; Fleiss equals a loop; perfect agreement is 1; independence about 0."
    counts = np.zeros(4)
    counts[[3, 1, 2, 0]] = 20, 5, 10, 15
    assert cohen_kappa(counts, 0, 1) == pytest.approx(.4)
    votes = np.random.default_rng(1).random((300, 4)) < np.random.default_rng(2).random((300, 1))
    observed = np.mean([[a == b for a, b in combinations(v, 2)] for v in votes])
    q = votes.mean()
    expected = q**2 + (1 - q)**2
    kappa = fleiss_kappa(pattern_counts(votes).sum(0))
    assert kappa == pytest.approx((observed - expected) / (1 - expected))
    same = np.repeat(np.arange(100)[:, None] < 30, 3, 1)
    assert fleiss_kappa(pattern_counts(same).sum(0)) == pytest.approx(1)
    apart = np.random.default_rng(3).random((40000, 3)) < .9
    assert abs(fleiss_kappa(pattern_counts(apart).sum(0))) < .02


def test_kappa_where_nobody_rejects_is_undefined_and_not_one():
    account = agreement(np.ones((60, 3), bool), np.arange(60), names=("a", "b", "c"), n=50)
    assert account["Fleiss"]["value"] is None and account["mean Cohen"]["value"] is None
    assert account["accepted by all"]["value"] == 1
    review = {"rounds": [{"judged": 60, "accepted by all": 60}], "replaced": 0}
    assert "undefined" in agreement_table(account | review).markdown()


def test_intervals_resample_patients():
    "The same votes in fewer patients give wider intervals."
    votes = simulated_votes(np.repeat(np.random.default_rng(5).random(60) < .8, 10), .05, seed=1)
    def width(patients):
        kappa = agreement(votes, patients, names=("a", "b", "c"), n=400)["Fleiss"]
        return kappa["high"] - kappa["low"]
    assert width(np.arange(600) // 10) > 1.5 * width(np.arange(600))


@pytest.mark.parametrize("error", [.005, .02, .1, .25])
def test_the_known_error_rate_of_simulated_raters_is_recovered(error):
    "From votes alone: within four standard errors, and inside its interval in most of forty reviews."
    n, right = 40000, np.random.default_rng(0).random(40000) < .93
    counts = pattern_counts(simulated_votes(right, error, seed=1)).sum(0)
    assert disagreement(counts) == pytest.approx(2 * error * (1 - error), rel=.1)
    standard_error = np.sqrt(error * (1 - error) / (3 * n)) / (1 - 2 * error)
    assert abs(float(error_rate(counts)) - error) < 4 * standard_error
    def covered(seed):
        votes = simulated_votes(np.random.default_rng(seed).random(600) < .93, error, seed=seed)
        account = agreement(votes, np.arange(600) // 3, names=simulated_names(3, error), seed=seed, n=300)
        return account["error rate"]["low"] <= error <= account["error rate"]["high"]
    assert sum(map(covered, range(40))) >= 33


# --- discard and replace --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reviewed():
    drafter = Drafter(invented(1200), ROOT, seed=4, slip=.06)
    pairs = drafter.draft(120)
    return drafter, pairs, review(drafter, pairs, simulated_raters(drafter.facts, .02, seed=7))


def test_the_review_ends_unanimous_and_keeps_its_shape(reviewed):
    drafter, pairs, done = reviewed
    assert len(done.rounds) > 1 and done.rounds[-1][1].all() and len(done.final) == len(pairs) == 720
    assert Counter((p.type, p.modality) for p in done.final) == Counter((p.type, p.modality) for p in pairs)
    for (before, votes), (after, _) in zip(done.rounds, done.rounds[1:]):
        assert len(after) == (~votes.all(1)).sum()


def test_discarded_pairs_never_return_and_replacements_are_of_fresh_volumes(reviewed):
    drafter, pairs, done = reviewed
    dropped = {p.id for ps, votes in done.rounds for p, ok in zip(ps, votes.all(1)) if not ok}
    kept = {p.id for p in done.final}
    assert dropped and not dropped & kept and done.replaced == len(dropped)
    seen = {p.case for p in pairs}
    for ps, _ in done.rounds[1:]:
        assert not {p.case for p in ps} & seen
        seen |= {p.case for p in ps}


def test_wrong_pairs_are_found(reviewed):
    "With three raters that err in 2 %, of about 43 wrong pairs none is left (0.02³ of them would be)."
    drafter, pairs, done = reviewed
    def wrong(ps): return sum(p.answer != true_answer(p.type, p.question, drafter.facts[p.id]) for p in ps)
    assert 25 < wrong(pairs) < 65 and wrong(done.final) == 0


def test_the_account_is_of_the_first_round_before_replacement(reviewed):
    drafter, pairs, done = reviewed
    first, votes = done.first
    assert [p.id for p in first] == [p.id for p in pairs] and not votes.all()
    account = agreement(votes, [p.patient for p in first], names=simulated_names(3, .02), n=300)
    assert account["pairs"] == 720 and .5 < account["mean Cohen"]["value"] < .95
    assert account["error rate"]["low"] <= .02 <= account["error rate"]["high"]


def test_a_review_without_end_is_ended():
    drafter = Drafter(invented(400), ROOT)
    with pytest.raises(MedVLM3DError, match="not unanimous after 3 rounds.*Look at what"):
        review(drafter, drafter.draft(4), lambda n, ps: np.zeros((len(ps), 3), bool), max_rounds=3)


# --- split ----------------------------------------------------------------------------------------

def test_patients_stand_on_one_side_and_shares_are_eight_to_two(reviewed):
    final = split_by_patient(reviewed[2].final, seed=3)
    sides = defaultdict(set)
    for p in final: sides[p.patient].add(p.split)
    assert all(len(s) == 1 for s in sides.values())
    for modality in ("MR", "PT"):
        mine = [p for p in final if p.modality == modality]
        assert abs(sum(p.split == "train" for p in mine) / len(mine) - .8) < .02
    assert [p.split for p in split_by_patient(reviewed[2].final, seed=3)] == [p.split for p in final]


def test_a_patient_in_two_sources_stands_on_one_side():
    facts = [replace(f, patient=f"p{i % 30}", source="ab"[i % 2]) for i, f in enumerate(invented(240))]
    final = split_by_patient(Drafter(facts, ROOT).draft(60))
    train, test = ({p.patient for p in final if p.split == side} for side in ("train", "test"))
    assert not train & test


# --- end to end -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")/"out"
    tables = run(out, data, studies=STUDIES, shape=SHAPE, volumes=8, slip=.1, resamples=100, seed=5,
                 workers=1, progress=False)
    shutil.copy(data/"crossmodal.jsonl", out.parent/"pairs.jsonl")   # other tests draft anew in `data`
    return out, tables


def test_run_leaves_tables_figures_and_records(whole, data):
    out, tables = whole
    tables = {p.stem for p in (out/"tables").glob("*.md")}
    assert tables == {"accuracy", "differences", "agreement", "sources"}
    assert {p.name for p in (out/"figures").glob("*.png")} == {"agreement.png", "contact-sheet.png"}
    manifest = json.loads((out/"manifest.json").read_text())
    assert manifest["status"] == "done" and manifest["raters"] == "simulated"
    pairs = read_manifest(data/"crossmodal.jsonl")
    assert len(pairs) == 48 and {p.split for p in pairs} == {"train", "test"}
    assert all(len(p.sha256) == 64 for p in pairs)


def test_the_verb_runs_end_to_end_and_its_record_says_simulated(data, tmp_path):
    "`medvlm3d data crossmodal`, which is runner 95."
    parameters = {"data": data, "studies": STUDIES, "shape": list(SHAPE), "volumes": 6, "model": "''",
                  "resamples": 60, "seed": 5, "workers": 1}
    command = ["data", "crossmodal", "--out", str(tmp_path/"out")]
    for key, value in parameters.items(): command += ["-p", f"{key}={value}"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output + str(done.exception)
    text = (tmp_path/"out"/"notebooks"/"95_crossmodal.ipynb").read_text()
    assert "simulated raters" in text and "generated, layout of BraTS 2023" in text and '"image/png"' in text
    assert str(tmp_path) not in text and str(ROOT) not in text
    assert (tmp_path/"out"/"figures"/"agreement.png").exists()
    assert (tmp_path/"out"/"tables"/"agreement.md").exists()


def test_simulated_and_generated_are_said_everywhere(whole, data, facts):
    "In every file that is written about the pairs, in every figure, and in every line of the benchmark."
    out, tables = whole
    assert len(written := sorted((out/"tables").iterdir())) == 16
    for path in written:
        assert "simulated raters" in path.read_text(), path.name
        if path.suffix in (".md", ".tex"):
            for words in ("These raters are simulated", "Research use only"):
                assert words in path.read_text(), path.name
        if path.stem == "sources": assert "generated" in path.read_text(), path.name
    assert json.loads((out/"results.json").read_text())["benchmark"]["accepted by"] == "simulated raters"
    pairs = read_manifest(data/"crossmodal.jsonl")
    assert all(p.source.endswith(", accepted by simulated raters") for p in pairs)
    assert any(p.source.startswith("generated") for p in pairs)
    account = json.loads((out/"review.json").read_text())
    by_case = {f.case: f for f in facts[0]}
    sheet = contact_sheet(pairs, {p.id: by_case[p.case] for p in pairs}, account, each=1)
    assert "simulated raters. Research use only" in sheet.get_suptitle()
    assert all("accepted by simulated raters" in row.get_title() for row in sheet.axes[1::3])
    assert agreement_figure(account).get_suptitle() == "Research use only"
    assert account["simulated"] and all(name.startswith("simulated rater") for name in account["raters"])
    titles = [ax.get_title() for ax in agreement_figure(account).axes]
    assert any("simulated raters" in t for t in titles)
    assert "simulated" not in agreement_table({**account, "simulated": False}).markdown()
    assert "before replacement" in tables["agreement"].title


def test_real_volumes_that_only_programs_judged_are_marked(data, tmp_path):
    for name in ("brats", "autopet"): (shutil.copytree(data/name, tmp_path/name)/"GENERATED.json").unlink()
    studies = open_corpora(tmp_path, ("brats", "autopet"))
    build(tmp_path/"out", tmp_path, studies=studies, volumes=2, resamples=20)
    sources = {p.source for p in read_manifest(tmp_path/"crossmodal.jsonl")}
    assert sources == {f"{name}, accepted by simulated raters" for name in ("BraTS 2023", "AutoPET")}
    with pytest.raises(MedVLM3DError, match="are all MRI: to ask for the modality would be to answer"):
        build(tmp_path/"out", tmp_path, studies=[s for s in studies if s.source == "BraTS 2023"], volumes=2)


def test_the_record_identifies_its_pairs(whole):
    asked = json.loads((whole[0]/"results.json").read_text())["benchmark"]
    assert asked["sha256"] == sha256_file(whole[0].parent/"pairs.jsonl")
    assert asked["pairs"] == 48 and 0 < asked["test"] < 48


def test_a_constant_learned_on_all_training_pairs_is_at_chance_by_modality(many, tmp_path):
    """Lesion and place: at chance under MRI and under PET. The modality: the one that is named is right there
    and wrong in the other, where a constant learned within each modality would be right in both."""
    write_manifest(tmp_path/"crossmodal.jsonl", many)
    results = score(tmp_path, tmp_path, pairs=many, account={"simulated": True}, resamples=20)
    cells = {}
    for word in ("MRI", "PET"):
        accuracy = results[word]["systems"]["constant"]["standard"]["closed"]["accuracy"]
        cells |= {(word, kind): accuracy[kind] for kind in QUESTIONS}
    assert {cells[word, "Modality Identification"]["value"] for word in ("MRI", "PET")} == {0, 100}
    for kind, chance in (("Lesion Detection", .5), ("Anatomical Localization", .25)):
        for word in ("MRI", "PET"):
            c = cells[word, kind]
            assert abs(c["value"] / 100 - chance) <= 3 * np.sqrt(chance * (1 - chance) / c["n"]), (word, kind)


def test_differences_are_corrected_over_all_rows_that_are_printed(many, tmp_path):
    "Two systems, three types and their mean, three groups of pairs: the least p times the number of rows."
    asked = [p for p in many if p.split == "test"]
    systems = {"model": [prediction_line(p, f"{p.letter}. {p.answer}") for p in asked],
               "other image": [prediction_line(p, "A") for p in asked]}
    results = scores(systems, asked, training=[p for p in many if p.split == "train"], n=20)
    table = difference_table(results, {"simulated": True, "raters": ["a", "b", "c"]})
    assert len(table.rows) == 3 * 2 * 4 and "Holm: adjusted for all rows of this table" in table.note
    cells = []
    for r in by_modality(results).values():
        for tasks in r["comparisons"].values():
            cells += [c for group, c in tasks["closed"]["accuracy"].items() if group != "micro"]
    least = min(cells, key=lambda c: c["p"])
    assert least["p_holm"] == pytest.approx(min(1, len(table.rows) * least["p"]))


def test_published_numbers_stand_beside_and_what_was_not_run_says_so(whole):
    rows = {r[:2]: r for r in whole[1]["accuracy"].rows}
    assert rows["MRI", "mean of types"][3] == "93.8" and rows["PET", "mean of types"][3] == "91.5"
    assert rows["MRI", "mean of types"][4] == rows["MRI", "mean of types"][7] == "not run" and rows["MRI", "mean of types"][8] != "not run"
    paper = {r[0]: r[1] for r in whole[1]["agreement"].rows}
    assert paper["accepted by all, %"] == "99.67" and paper["Cohen's kappa, mean of the couples"] == "0.927"


def test_an_oracle_is_right_and_scored_by_modality(whole, data):
    pairs = [p for p in read_manifest(data/"crossmodal.jsonl") if p.split == "test"]
    results = {}
    for modality in ("MR", "PT"):
        lines = [prediction_line(p, f"{p.letter}. {p.answer}") for p in pairs if p.modality == modality]
        results[MODALITY_WORDS[modality]] = evaluate_systems({"model": lines}, n=50)
    for row in accuracy_table(results, {"simulated": True, "raters": ["a", "b", "c"]}).rows:
        assert row[4].startswith("100.0") or row[2] == 0


def test_people_are_awaited_and_the_same_pairs_are_asked_again(data, tmp_path):
    def go():
        return run(tmp_path/"people", data, studies=STUDIES, shape=SHAPE, volumes=2, raters=["anna", "ben"],
                   resamples=50, seed=5, workers=1, progress=False)
    with pytest.raises(MedVLM3DError, match="round-1: awaits the verdicts of anna, ben"): go()
    first = {n: read_rows(tmp_path/"people"/"review"/"round-1"/f"{n}.csv") for n in ("anna", "ben")}
    for name, rows in first.items():
        verdicts = ["accept"] * len(rows)
        if name == "ben": verdicts[0] = "reject"
        write_rows(tmp_path/"people"/"review"/"round-1"/f"{name}.csv",
                   [[*[r[c] for c in SHEET[:-2]], v, ""] for r, v in zip(rows, verdicts)])
    with pytest.raises(MedVLM3DError, match="round-2: awaits"): go()
    for name in first:
        path = tmp_path/"people"/"review"/"round-2"/f"{name}.csv"
        assert len(read_rows(path)) == 1 and read_rows(path)[0]["id"] not in {r["id"] for r in first[name]}
        write_rows(path, [[*[r[c] for c in SHEET[:-2]], "accept", ""] for r in read_rows(path)])
    tables = go()
    assert tables["agreement"].title.startswith("Agreement of 2 raters")
    assert json.loads((tmp_path/"people"/"review.json").read_text())["known error"] is None


def test_a_real_corpus_is_never_written_over_and_an_empty_one_is_no_licence_to_generate(data, tmp_path):
    real = shutil.copytree(data/"brats", tmp_path/"brats")
    (real/"GENERATED.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in real.rglob("*")}
    assert {s.source for s in open_corpora(tmp_path, ("brats",), studies=2)} == {"BraTS 2023"}
    assert {p: p.stat().st_mtime_ns for p in real.rglob("*")} == before
    with pytest.raises(MedVLM3DError, match="nothing real is ever written over"):
        write_layout(real, "brats", studies=2)
    (tmp_path/"autopet").mkdir()
    with pytest.raises(MedVLM3DError, match="holds no study"): open_corpora(tmp_path, ("autopet",), studies=2)


def test_source_table_counts_what_was_left_out(whole):
    account = json.loads((whole[0]/"review.json").read_text())
    assert "holds no lesion: 6" in source_table(account).note
    assert sum(account["studies"].values()) == 3 * STUDIES
