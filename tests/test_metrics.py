"""Scores against their formulae and golden values, hostile texts, clinical prose, and files of others."""
import csv
import io
import json
import math
import re
import sys
import types
from collections import Counter

import numpy as np
import pytest

from medvlm3d.phantoms.benchmark import make_benchmark
from medvlm3d.front.cli import app
from medvlm3d.base.core import MedVLM3DError
from medvlm3d.data.m3d import load_m3d
from medvlm3d.base.fetch import fetch
from medvlm3d.evaluation.findings import (
    LEXICON, Finding, extract_facts, finding_counts, finding_rows,
    read_findings, true_finding)
from medvlm3d.evaluation.foreign import load_ratescore
from medvlm3d.evaluation.lexicon import FINDINGS, mentions
from medvlm3d.evaluation.metrics import (
    METEOR, BERTScore, bleu1, bleu4_from_sums, bleu4_statistics, closed_m3d, corpus_bleu4, meteor_name,
    normalise, parse_choice, read_choice, rouge1, rouge_l, text_scores, tokens_13a, words)
from medvlm3d.evaluation.wording import in_scheme, scheme_of
from medvlm3d.evaluation.columns import parse_columns
from medvlm3d.evaluation.outputs import evaluate_file, read_outputs, scores_3drad
from medvlm3d.evaluation.prediction import read_predictions
from medvlm3d.phantoms.phantom import make_phantom, read_truth
from typer.testing import CliRunner

REFERENCE = "There is a small renal cyst on the left side."
HOSTILE = {"empty": "", "blank": " \n\t ", "identical": REFERENCE, "one word": "cyst",
           "punctuation": "...!?", "unicode": "Zyste in der Leber, 3 cm – ﬂüssig 囊肿",
           "very long": "cyst " * 5000, "repeated": "the the the the",
           "numbers": "3.5 cm, 2-3 mm; T2-weighted 1,000.",
           "entities": "&lt;cyst&gt; &amp; mass", "lines": "a cyst-\nlike\nlesion"}


# --- the formulae of the literature's scripts ---------------------------------------------------------------

def published_bleu(prediction, reference, order=1):
    "BLEU as in the script behind `evaluate`'s: mean precision, penalty from the ratio of lengths."
    hyp, ref, precisions = tokens_13a(prediction), tokens_13a(reference), []
    for n in range(1, order + 1):
        grams = [Counter(tuple(t[i:i+n]) for i in range(len(t) - n + 1)) for t in (hyp, ref)]
        total = max(0, len(hyp) - n + 1)
        precisions.append(sum((grams[0] & grams[1]).values()) / total if total else 0.)
    mean = math.exp(sum(math.log(p) for p in precisions) / order) if min(precisions) > 0 else 0.
    if not hyp or not ref: return 0.
    ratio = len(hyp) / len(ref)
    return mean * (1. if ratio > 1 else math.exp(1 - 1 / ratio))


def published_rouge1(prediction, reference):
    hyp, ref = words(prediction), words(reference)
    same = sum(min(hyp.count(w), ref.count(w)) for w in set(hyp))
    precision, recall = same / max(1, len(hyp)), same / max(1, len(ref))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_bleu_and_rouge_are_the_published_formulae(text):
    assert bleu1(text, REFERENCE) == pytest.approx(published_bleu(text, REFERENCE), abs=1e-12)
    assert rouge1(text[:500], REFERENCE) == pytest.approx(published_rouge1(text[:500], REFERENCE), abs=1e-12)


def test_empty_scores_zero(meteor):
    for score in (bleu1, rouge1, rouge_l, meteor): assert score("", REFERENCE) == score("", "") == 0


def test_golden_values():
    "By hand, and with the package rouge-score 0.1.2."
    assert bleu1("A cyst in the left kidney.", REFERENCE) == pytest.approx(.322697, abs=1e-6)
    assert rouge1("A cyst in the left kidney.", REFERENCE) == pytest.approx(.5)
    assert rouge1("T2-weighted Zyste 3.5cm", "t2 weighted cyst 3.5 cm") == pytest.approx(6 / 11)
    assert rouge_l("the cat the mat", "the mat on the cat") == pytest.approx(4 / 9)


def test_golden_values_of_meteor(meteor):
    assert meteor("the cat sat", "the cat sat down") == pytest.approx(.75 / .975 * (1 - .5 / 27))
    assert meteor("cyst", "cyst") == .5
    synonyms = meteor("a renal tumour", "a renal neoplasm")
    assert synonyms > .9 if meteor.name == "METEOR" else synonyms < .7


@pytest.mark.parametrize("draw", [make_phantom, make_benchmark], ids=["phantom", "benchmark"])
def test_meteors_words_do_not_hang_on_the_sentence_splitter(draw, tmp_path, meteor):
    """The literature's scripts split with a trained model.

    In all that the corpora write, its sentences and ours must be those that a full stop ends."""
    draw(tmp_path, train=2, validation=1, test=22, shape=(4, 12, 12), workers=1, progress=False)
    written = {text for s in load_m3d(tmp_path) for text in (s.answer, s.question)}
    for text in written:
        sentences = re.split(r"(?<=[.?]) ", text)
        assert meteor.tokens(text) == [word for part in sentences for word in meteor.words.tokenize(part)]
    assert len(written) > 40


@pytest.fixture(scope="module")
def bert(): return BERTScore(fetch("minilm"), batch_size=2)


@pytest.fixture(scope="module", params=[None, "wordnet"], ids=["exact and stem", "WordNet"])
def meteor(request): return METEOR(request.param and fetch(request.param))


@pytest.mark.parametrize("name", HOSTILE)
def test_every_score_stays_between_0_and_1(name, meteor, bert):
    for pair in ((HOSTILE[name], REFERENCE), (REFERENCE, HOSTILE[name]), (HOSTILE[name], HOSTILE[name])):
        scores = {k: float(v[0]) for k, v in text_scores([pair[0]], [pair[1]], meteor, bert).items()}
        assert all(0 <= v <= 1 + 1e-6 for v in scores.values()), scores
        if not pair[0].strip() or not pair[1].strip(): assert not any(scores.values())
        elif pair[0] == pair[1] and words(pair[0]):
            whole = {in_scheme(n, scheme_of([pair[1]])): 1. for n in ("BLEU-1", "ROUGE-1", "ROUGE-L")}
            assert {k: v for k, v in scores.items() if not k.startswith("METEOR")} == pytest.approx(
                {**whole, bert.name: 1.}, abs=1e-5)


def test_bertscore_of_texts_of_different_lengths_in_one_batch():
    texts = [t for t in HOSTILE.values()]
    references = [REFERENCE] * len(texts)
    whole, alone = (BERTScore(fetch("minilm"), batch_size=size) for size in (len(texts) + 1, 1))
    assert whole(texts, references) == pytest.approx(alone(texts, references), abs=1e-5)
    assert whole.name == "BERTScore(MiniLM-L6)"


def test_meteor_says_what_it_lacks():
    assert METEOR().name == "METEOR (exact+stem)" and "no WordNet" in METEOR().signature
    assert meteor_name(synonyms=True, trained=True) == "METEOR"
    assert meteor_name(synonyms=True, trained=False) == "METEOR (untrained punkt)"
    assert meteor_name(synonyms=False, trained=False) == "METEOR (exact+stem, untrained punkt)"
    with pytest.raises(MedVLM3DError, match="no WordNet that NLTK can read"): METEOR("no-such-folder")


def test_an_abbreviation_ends_no_sentence_for_meteor():
    meteor = METEOR()
    assert "punkt trained" in meteor.signature
    text = "Dr. Smith saw it on Nov. 3 in St. Paul. It was a cyst."
    assert len(meteor.sentences.tokenize(text)) == 2


def test_bertscore_reads_a_long_text_to_its_end(bert):
    start = "a cyst of the liver and the spleen " * 80
    right, wrong = start + "no fracture was seen", start + "the femur is broken in two"
    before = bert.windowed
    assert bert([right], [right])[0] == pytest.approx(1, abs=1e-5) and bert.windowed == before + 1
    assert bert([wrong], [right])[0] < 1 - 1e-3
    before = bert.windowed
    assert bert(["a cyst"], ["a cyst"])[0] == pytest.approx(1, abs=1e-5) and bert.windowed == before


@pytest.mark.parametrize("text, scheme", [
    ("右肺见结节。", "zh"), ("右肺に結節を認める。", "char"), ("ก้อนในปอดขวา", "char"), ("Узел в правом лёгком.", "intl"),
    ("Rundherd, größer als früher.", "intl"), ("Épaississement péricardique.", "intl"), ("A nodule.", "13a")])
def test_every_language_is_cut_by_a_stated_scheme(text, scheme):
    scores = text_scores([text], [text])
    assert {name: v[0] for name, v in scores.items()} == pytest.approx({in_scheme(n, scheme): 1. for n in (
        "BLEU-1", "ROUGE-1", "ROUGE-L")})
    other = text_scores([text[: len(text) // 2]], [text])
    assert all(0 <= v[0] < 1 for v in other.values())


def test_corpus_bleu4_is_sacrebleus_on_hostile_texts():
    texts = list(HOSTILE.values())
    references = [REFERENCE] * len(texts)
    score, signature = corpus_bleu4(texts, references)
    assert bleu4_from_sums(bleu4_statistics(texts, references).sum(0)) == pytest.approx(score, abs=1e-9)
    assert "tok:13a" in signature and "smooth:exp" in signature


@pytest.mark.parametrize("answer, strict, loose", [
    ("A. axial", "A", True), ("a. axial", "A", False), ("axial", "A", False), ("(B) coronal", "B", False),
    ("B", "B", False), ("The answer is A.", "A", True), ("It is axial.", "A", False),
    ("coronal or axial", None, False), ("A. axial B. coronal", "A", True), ("D. NA", None, False),
    ("", None, False), ("A plane", None, False), ("ＡＸＩＡＬ", None, False), ("B, left coronal", "B", False)])
def test_closed_answers(answer, strict, loose):
    assert parse_choice(answer, ["axial", "coronal", "sagittal", "NA"]) == strict
    assert closed_m3d(answer, "A") == loose


@pytest.mark.parametrize("one, other", [
    ("<5 mm", ">5 mm"), ("≥ 5", "≤ 5"), ("<= 5", "< 5"), ("-5 HU", "5 HU"), ("−5 HU", "5 HU"), ("1.5", "1 5"),
    (".5", "5"), ("1/2", "1 2"), ("?", ""), ("...", ""), ("+", "-"), ("T1+", "T1-"), ("5 %", "5"), ("~5", "5")])
def test_what_changes_the_meaning_is_no_punctuation(one, other):
    assert normalise(one) != normalise(other)
    assert parse_choice(one, [other, one]) == "B" and parse_choice(other or "-", [other or "-", one]) == "A"


@pytest.mark.parametrize("one, other", [("A cyst.", "a cyst"), ("3-4 cm", "3–4 cm"), ("CT, native", "ct native"),
                                        ("<5 mm", "< 5 mm"), ("-5 HU.", "−5 hu")])
def test_what_says_the_same_is_the_same(one, other): assert normalise(one) == normalise(other)


ORGANS = ["liver", "spleen", "left kidney", "lung"]


@pytest.mark.parametrize("answer, letter, how", [
    ("The answer is B", "B", "stated"), ("Answer: B", "B", "stated"), ("**B**", "B", "letter"),
    ("b)", "B", "letter"), ("[b]", "B", "letter"), ("Final answer: (B) spleen", "B", "stated"),
    ("**Answer:** B", "B", "stated"), ("not the liver", None, "nothing"), ("It isn't the liver", None, "nothing"),
    ("Not liver or spleen.", None, "nothing"), ("liver, not spleen", "A", "words"),
    ("not the liver, but the spleen", "B", "words"), ("The answer is not B", None, "nothing"),
    ("It is not A. The answer is B.", "B", "stated"), ("Option A is wrong, option B is right.", "B", "stated"),
    ("B or C", None, "several options"), ("liver or spleen", None, "several options"),
    ("A. liver\nB. spleen\nC. left kidney\nD. lung", None, "all options"),
    ("liver, spleen, left kidney, lung", None, "all options"), ("E", None, "not offered"),
    ("The answer is a left kidney", "C", "words"), ("Let me see.\n\nD", "D", "letter"),
    ("\\boxed{D}", "D", "letter"), ("<think>liver?</think><answer>d</answer>", "D", "letter")])
def test_how_an_answer_in_words_is_read(answer, letter, how):
    assert read_choice(answer, ORGANS) == (letter, how)


def test_ten_options_are_read():
    ten = [f"segment {n}" for n in range(1, 11)]
    assert [parse_choice(f"{letter}.", ten) for letter in "AJK"] == ["A", "J", None]
    assert parse_choice("In segment 10.", ten) == "J" and parse_choice("segment 1", ten) == "A"


def test_a_missing_key_is_never_right(): assert not closed_m3d("Anything. At all.", "")


# --- findings -----------------------------------------------------------------------------------------------

# sentence → findings: sign (+ present, ? uncertain, - denied or past), kind, side, organ, level, grade, mm
PROSE = {
    # plain statements
    "There is a 3.2 cm simple cyst in the upper pole of the left kidney.": "+cyst left kidney upper 32",
    "Nonobstructing 4-mm calculus in the right renal pelvis.": "+stone right kidney 4",
    "The liver contains a hypervascular mass measuring 5.1 x 4.3 x 4 cm.": "+mass liver 51",
    "Moderate right pleural effusion.": "+effusion right pleura moderate",
    "Bilateral pleural effusions, with basal atelectasis.": "+effusion both pleura; +atelectasis lower",
    "Large left-sided pneumothorax.": "+pneumothorax left large",
    "Ground-glass opacities in the right lower lobe.": "+ground glass right lung lower",
    "Diffuse fatty infiltration of the liver.": "+steatosis liver",
    "Several enlarged lymph nodes are seen in the mediastinum.": "+lymphadenopathy mediastinum",
    "Filling defect in the left lower lobe pulmonary artery.": "+embolism left lung lower",
    "Acute haemorrhage in the right frontal lobe.": "+haemorrhage right brain",
    "Mild splenomegaly.": "+splenomegaly small",
    "Cholelithiasis; the gallbladder wall is thin.": "+stone",
    "Massive ascites.": "+ascites large",
    "Marked cardiomegaly with pulmonary edema.": "+cardiomegaly large; +oedema lung",
    "A tiny nodule, 3 mm, in the left apex.": "+nodule left upper small 3",
    "Hepatic metastases, the largest 2,5 cm.": "+metastasis liver 25",
    "Infrarenal aortic aneurysm, 5.6 cm in diameter.": "+aneurysm aorta 56",
    "Compression fracture of a lumbar vertebra.": "+fracture spine",
    "Small-bowel obstruction.": "+obstruction bowel",
    "Calcifications of the aorta.": "+calcification aorta",
    "Extensive emphysematous changes in the upper lobes.": "+emphysema lung upper large",
    # denials that reach forward
    "No pleural effusion.": "-effusion",
    "There is no evidence of pulmonary embolism.": "-embolism",
    "No pneumothorax, consolidation or effusion.": "-pneumothorax; -consolidation; -effusion",
    "Lungs are clear, without nodule or mass.": "-nodule; -mass",
    "Both kidneys are free of stones.": "-stone",
    "Negative for acute intracranial hemorrhage.": "-haemorrhage",
    "Neither hydronephrosis nor calculi are seen.": "-hydronephrosis; -stone",
    "The study fails to show an abscess.": "-abscess",
    "Absence of lymphadenopathy.": "-lymphadenopathy",
    "The patient denies hernia.": "-hernia",
    "CT rules out appendicitis.": "-appendicitis",
    "No new metastases.": "-metastasis",
    "Liver without focal mass; spleen unremarkable.": "-mass",
    "Interval resolution of the right pneumothorax.": "-pneumothorax",
    "Resolved consolidation.": "-consolidation",
    # denials that reach back
    "Hydronephrosis is absent.": "-hydronephrosis",
    "Pulmonary embolism has been excluded.": "-embolism",
    "Aortic dissection was ruled out.": "-dissection",
    "An abscess is not identified.": "-abscess",
    "The previously described effusion is no longer present.": "-effusion",
    "The pneumonia has resolved.": "-pneumonia",
    "Acute cholecystitis is unlikely.": "-cholecystitis",
    "A discrete mass is not seen in the pancreas.": "-mass",
    # past
    "History of pancreatitis.": "-pancreatitis",
    "Status post removal of a renal stone.": "-stone",
    # only look like denials
    "No change in the 8 mm nodule of the right lung.": "+nodule right lung 8",
    "No significant interval change in the left pleural effusion.": "+effusion left pleura",
    "Without significant change in size, the hepatic cyst measures 2 cm.": "+cyst liver 20",
    "The aneurysm has not significantly increased.": "+aneurysm",
    "The mass is not enlarged.": "+mass",
    "Not only diverticulosis but diverticulitis of the sigmoid.": "+diverticulosis; +diverticulitis bowel",
    "No mass effect.": "-mass effect",
    "The cyst is unchanged.": "+cyst",
    "No further increase in ascites.": "+ascites",
    # the end of a clause
    "No effusion, but a consolidation in the left lower lobe.": "-effusion; +consolidation left lung lower",
    "No mass; a cyst in the spleen.": "-mass; +cyst spleen",
    "There is no hydronephrosis, however a 6 mm stone is seen in the left kidney.":
        "-hydronephrosis; +stone left kidney 6",
    "No focal lesion except a cyst of 1 cm in the liver.": "+cyst liver 10",
    "The liver is normal, although the spleen shows a small infarct.": "+infarct spleen small",
    "No fracture. Degenerative stenosis of the lumbar spine.": "-fracture; +stenosis spine",
    "Cyst in the right kidney without calcification.": "+cyst right kidney; -calcification",
    "Pneumothorax has resolved; a small effusion persists.": "-pneumothorax; +effusion small",
    "No pericardial effusion and there is a moderate hernia.": "-effusion; +hernia moderate",
    # doubt
    "Possible nodule in the right upper lobe.": "?nodule right lung upper",
    "A small abscess cannot be excluded.": "?abscess small",
    "Pulmonary embolism is not definitely excluded.": "?embolism lung",
    "Findings suspicious for metastasis in the liver.": "?metastasis liver",
    "Consolidation may represent pneumonia.": "?consolidation; ?pneumonia",
    "Probable haemangioma, 14 mm, liver.": "?haemangioma liver 14",
    "Infarct versus mass in the left kidney.": "?infarct; ?mass left kidney",
    "Appearances suggest early appendicitis.": "?appendicitis",
    "Likely atelectasis at the left base.": "?atelectasis left lower",
    # two sides, two sizes
    "A 12 mm nodule in the left upper lobe and a 5 mm nodule in the right lower lobe.":
        "+nodule left lung upper 12; +nodule right lung lower 5",
    "Left kidney: 2.4 cm cyst. Right kidney: 7 mm stone.": "+cyst left kidney 24; +stone right kidney 7",
    "Right renal cyst (11 mm), left adrenal nodule (2 by 1.5 cm).":
        "+cyst right kidney 11; +nodule left adrenal 20",
    "Nodule in the right lung, 1 cm. Impression: right pulmonary nodule.": "+nodule right lung 10",
    "Unremarkable study.": "",
    "The heart is of normal size; the mediastinum is not widened.": "",
}

SIGN = {"present": "+", "uncertain": "?", "absent": "-"}


def short(f):
    properties = [] if f.status == "absent" else [x for x in (f.side, f.organ, f.level, f.grade) if x]
    if f.size and f.status != "absent": properties.append(f"{f.size:g}")
    return SIGN[f.status] + " ".join([f.kind, *properties])


@pytest.mark.parametrize("sentence", PROSE)
def test_prose(sentence):
    assert "; ".join(short(f) for f in read_findings(sentence)) == PROSE[sentence]


def test_prose_is_wide():
    parts = [part for expected in PROSE.values() for part in expected.split("; ") if part]
    assert len(PROSE) >= 60 and len({part.lstrip("+?-").split()[0] for part in parts}) >= 25


def test_synonyms_name_one_finding():
    names = [s for kind, synonyms in FINDINGS.items() for s in (kind, *synonyms)]
    assert len(names) == len({*names})
    for kind, synonyms in FINDINGS.items():
        for s in (kind, *synonyms):
            assert [m[2] for m in mentions(f"there are {s.upper()}.".lower(), FINDINGS)] == [kind]


@pytest.mark.parametrize("draw", [make_phantom, make_benchmark], ids=["phantom", "benchmark with more kinds"])
def test_the_oracle_is_read_without_an_error(draw, tmp_path):
    "Reports of a drawn corpus against its file of truth: all findings, with side, organ, level and grade."
    draw(tmp_path, train=1, validation=1, test=22, shape=(4, 12, 12), workers=1, progress=False)
    rows = list(read_truth(tmp_path).values())
    reports = [(tmp_path/r["text"]).read_text().split("study_findings: ")[1] for r in rows]
    found = finding_rows(reports, [(true_finding(r),) for r in rows])
    for name in ("F1", "precision", "recall", "laterality", "location", "severity"):
        assert (found[name][:, 0] == found[name][:, 1]).all() and found[name].sum() > 0, name
    assert found["omission"][:, 0].sum() == found["hallucination"][:, 0].sum() == 0
    for r, text in zip(rows, reports): assert read_findings(text) == (true_finding(r),)


def test_a_wrong_report_is_not_read_as_right():
    true = (Finding("cyst", organ="kidney", side="left", size=30.),)
    counts = {"Cyst, 3 cm, left kidney.": (1, 0, 0), "No cyst in the left kidney.": (0, 0, 1),
              "Mass in the left kidney.": (0, 1, 1), "": (0, 0, 1), "Two masses and a cyst.": (1, 1, 0)}
    for text, expected in counts.items():
        assert tuple(np.sum([*finding_counts(text, true)[0].values(), [0, 0, 0]], 0)) == expected
    for text, size in {"Cyst, 3.5 cm.": 1, "Cyst, 3.7 cm.": 0, "Cyst, 28 mm.": 1, "Cyst.": 0}.items():
        assert finding_counts(text, true)[1]["size"] == [size, 1]
    assert finding_counts("Right renal cyst.", true)[1] == {
        "laterality": [0, 1], "location": [1, 1], "severity": [0, 0], "size": [0, 1]}


def test_facts_of_unicode_and_nothing():
    assert extract_facts("", LEXICON) == {}
    assert extract_facts("nó cyst – Größe 3 cm", LEXICON) == {"kind": ["cyst"]}
    assert extract_facts("NON CONTRAST ct; no\tcyst", LEXICON) == {"phase": ["non-contrast"]}
    assert read_findings("no " * 2000 + "cyst")[0].status == "absent"


def test_ratescore_is_used_where_it_is_and_asked_for_where_not(tmp_path, monkeypatch):
    with pytest.raises(MedVLM3DError, match=r"ner: holds no weights.*BioLORD"): load_ratescore(tmp_path)
    for part in ("ner", "encoder"):
        (tmp_path/part).mkdir()
        for name in ("config.json", "model.safetensors"): (tmp_path/part/name).touch()
    monkeypatch.setitem(sys.modules, "RaTEScore", None)
    with pytest.raises(MedVLM3DError, match="pip install ratescore"): load_ratescore(tmp_path)

    class Stand:
        def __init__(self, bert_model, eval_model, use_gpu): self.folders = bert_model, eval_model, use_gpu
        def compute_score(self, candidate_list, reference_list):
            return [.5 if c != r else 1. for c, r in zip(candidate_list, reference_list)]
    monkeypatch.setitem(sys.modules, "RaTEScore", types.SimpleNamespace(RaTEScore=Stand))
    assert load_ratescore(tmp_path)(["a", "b", " "], ["a", "c", "d"]).tolist() == [1, .5, 0]


# --- anybody's files ----------------------------------------------------------------------------------------

CLOSED = ("Question Type,Question,Answer,Answer Choice,Pred,Correct\r\n"
          '1,"<im_patch><im_patch> Which plane? Choices: A. axial B. coronal C. sagittal D. nan",'
          'A. axial,A,"A. axial\nindeed",1\r\n'
          '3,<im_patch> Which organ? Choices: A. liver B. spleen C. lung D. left kidney,'
          'D. left kidney,D,kidney,0\r\n')
OPEN = "Question Type,Question,Answer,Pred,bleu,rouge1,meteor,bert_f1\n" \
       "4,<im_patch> What?,a cyst,a cyst,1,1.0,0.9375,1\n"
REPORT = 'Question,Ground Truth,pred,bleu,rouge1,meteor,bert_f1\n' \
         '<im_patch>Describe.,"A cyst, left kidney.","No cyst, left kidney.",0.8333,0.857,0.8,0.9\n'
LINE = {"id": "1", "case": "a", "task": "closed", "type": "Plane", "question": "?",
        "answer": "axial", "letter": "A", "choices": ["axial", "coronal"], "prediction": "A."}
BAD = {
    "unknown type": (CLOSED.replace("\r\n3,", "\r\n6,"), r":4: has the question type '6'"),
    "key not offered": (CLOSED.replace(",D,kidney", ",E,kidney"), r":4: has the key 'E'"),
    "key of a missing option": (CLOSED.replace("A. axial,A", "D. nan,D"), r":2: has the key 'D'"),
    "answer is another option": (CLOSED.replace("D. left kidney,D,", "D. spleen,D,"),
                                 r":4: has the answer 'spleen'"),
    "no options": (CLOSED.replace("Choices: A. liver", "A. liver"), r":4: holds no options"),
    "cut in a row": (CLOSED.rstrip()[:-8], r":4: has 5 cells under 6 columns"),
    "cut in a quotation": (CLOSED[:CLOSED.index("indeed")], r":2: begins a row that is not CSV"),
    "one cell too many": (OPEN.replace("a cyst,a cyst", "a cyst,a,cyst"), r":2: has 9 cells under 8 columns"),
    "score is no number": (OPEN.replace("0.9375", "n/a"), r":2: has 'n/a' where the score meteor should be"),
    "columns of something else": ("case_id,prediction\n1,a\n", r":1: has the columns case_id, prediction.* truth"),
    "NaN as a score": (OPEN.replace("0.9375", "nan"), r":2: has 'nan' where the score meteor should be"),
    "NaN in JSON": (json.dumps({**LINE, "option_logprobs": [float("nan"), -1]}), r":1: holds NaN"),
    "two log-probabilities for three": (
        json.dumps({**LINE, "choices": ["axial", "b", "c"], "option_logprobs": [-1, -2]}), r":1: has 2 option_logprobs for 3"),
    "a log-probability that is a text": (json.dumps({**LINE, "option_logprobs": ["x", -2]}), r":1: has an option_logprob"),
    "two files in one": (OPEN + OPEN, r":3: has the question type 'Question Type'|:3: has 'bleu'"),
    "nothing": ("\n", "holds no answers"),
    "only a header": (OPEN.split("\n")[0], "holds a header and no answers"),
    "cut JSON": (json.dumps(LINE) + "\n" + json.dumps({**LINE, "id": "2"})[:-5], r":2: is not JSON"),
    "the same id twice": ((json.dumps(LINE) + "\n") * 2, r":2: repeats the id of line 1"),
    "a number as prediction": (json.dumps({**LINE, "prediction": 3}),
                               r":1: has no prediction of the right kind"),
    "no choices": (json.dumps({k: v for k, v in LINE.items() if k != "choices"}),
                   r":1: has no choices of the right kind"),
    "unknown task": (json.dumps({**LINE, "task": "oral"}), r":1: has the task 'oral'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_name_file_and_line(name, tmp_path):
    text, message = BAD[name]
    path = tmp_path/"theirs.csv"
    path.write_bytes(text.encode())
    with pytest.raises(MedVLM3DError, match=message) as error: read_outputs(path)
    assert "theirs.csv" in str(error.value) and error.value.remedy


OPTIONS = ["liver", "spleen", "lung", "bone", "skin"]
ASKED = [("Which organ?", "skin", "E. skin"), ("Which organ?", "spleen", "It is not the spleen but the liver."),
         ("Which organ?", "liver", None)]


def csv_text(rows, sign):
    text = io.StringIO()
    csv.writer(text, delimiter=sign).writerows(rows)
    return text.getvalue()


def inline(question): return f"{question} Choices: " + " ".join(f"{c}. {o}" for c, o in zip("ABCDE", OPTIONS))


FORMS = {   # how anybody may have written the three answers → text, --columns
    "pandas.csv": (csv_text([["", "label", "pred", "question", "extra"]] + [
        [n, truth, said, inline(q), "x"] for n, (q, truth, said) in enumerate(ASKED)], ","), None),
    "semicolons.csv": (csv_text([["q", "mine", "theirs"]] + [[inline(q), said, truth] for q, truth, said in ASKED], ";"),
                       "answer=mine,truth=theirs,question=q"),
    "tabs.csv": (csv_text([["id", "prediction", "answer", "question", *(f"option_{c}" for c in "abcde")]] + [
        [7 + n, said, truth, q, *OPTIONS] for n, (q, truth, said) in enumerate(ASKED)], "\t"), None),
    "letters.csv": (csv_text([["Pred", "Answer Choice", "Question", *(f"Choice {c}" for c in "ABCDE")]] + [
        [said, "ABCDE"[OPTIONS.index(truth)], q, *OPTIONS] for q, truth, said in ASKED], ","), None),
    "array.json": (json.dumps([{"id": n, "question": q, "choices": OPTIONS, "response": said, "answer": truth}
                               for n, (q, truth, said) in enumerate(ASKED)], indent=1), None),
    "object.json": (json.dumps({"results": [{"prompt": q, "options": dict(zip("ABCDE", OPTIONS)), "output": said, "gt": truth}
                                            for q, truth, said in ASKED]}), None),
    "lines.jsonl": ("\n".join(json.dumps({"question": inline(q), "pred": said, "label": truth}) for q, truth, said in ASKED), None),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_answers_in_any_form_are_the_same(name, tmp_path):
    text, columns = FORMS[name]
    (tmp_path/name).write_text(text)
    lines = read_outputs(tmp_path/name, columns=columns and parse_columns(columns))
    assert [(line["task"], line["question"], line["choices"], line["letter"], line["answer"]) for line in lines] == [
        ("closed", "Which organ?", OPTIONS, "ABCDE"[OPTIONS.index(truth)], truth) for _, truth, _ in ASKED]
    assert [line["prediction"] for line in lines] == ["E. skin", "It is not the spleen but the liver.", ""]
    assert len({line["id"] for line in lines}) == 3
    done = CliRunner().invoke(app, ["evaluate", "--predictions", str(tmp_path/name), *(["--columns", columns] if columns else [])])
    assert done.exit_code == 0, done.output
    assert "closed, n = 3" in done.stdout and "read as answer=" in done.stdout and "33.33" in done.stdout


@pytest.mark.parametrize("options", [2, 3, 5, 10])
def test_two_to_ten_options_of_m3ds_csv_are_read(options, tmp_path):
    texts = [f"organ {n}" for n in range(options)]
    asked = "Which? Choices: " + " ".join(f"{c}. {t}" for c, t in zip("ABCDEFGHIJ", texts))
    last = "ABCDEFGHIJ"[options - 1]
    rows = [["Pred", "Question", "Question Type", "Answer", "Answer Choice"], [f"{last}.", asked, 3, f"{last}. {texts[-1]}", last]]
    (tmp_path/"a.csv").write_text(csv_text(rows, ","))
    line, = read_outputs(tmp_path/"a.csv")
    assert (line["choices"], line["letter"], line["answer"]) == (texts, last, texts[-1])


def test_a_letter_inside_an_option_is_no_option(tmp_path):
    row = ["3", "Cause? Choices: A. virus B. fungus C. none D. infection by E. coli", "D. infection by E. coli", "D", "D."]
    (tmp_path/"a.csv").write_text(csv_text([["Question Type", "Question", "Answer", "Answer Choice", "Pred"], row], ","))
    assert read_outputs(tmp_path/"a.csv")[0]["choices"] == ["virus", "fungus", "none", "infection by E. coli"]


def test_one_odd_row_costs_no_other(tmp_path):
    "It is set aside and counted; silence counts as wrong; a file of odd rows is refused."
    lines = [{**LINE, "id": str(n)} for n in range(6)]
    lines[1]["letter"], lines[2]["prediction"], lines[3]["option_logprobs"] = "E", None, [-1]
    (tmp_path/"a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tables, aside = [], []
    results = evaluate_file(tmp_path/"a.jsonl", n=20, tell=tables.append)
    assert results["set aside"]["rows"] == 2 and "set aside: 2 rows" in tables[0]
    accuracy = results["systems"]["model"]["m3d"]["closed"]["accuracy"]["micro"]
    assert (accuracy["value"], accuracy["n"]) == (75, 4) and results["systems"]["model"]["items"]["failed"] == 1
    assert len(read_outputs(tmp_path/"a.jsonl", aside=aside)) == 4 and [p.where for p in aside] == ["a.jsonl:2", "a.jsonl:4"]
    for line in lines: line["letter"] = "E"
    (tmp_path/"b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(MedVLM3DError, match="has the key 'E'"): evaluate_file(tmp_path/"b.jsonl", n=20)


def test_strange_line_ends_in_texts_are_texts(tmp_path):
    strange = "A.\x85 or \u2028 and \u2029 so"
    lines = [{**LINE, "id": str(n), "prediction": strange, "tokens": 1} for n in range(2)]
    (tmp_path/"a.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    for read in (read_outputs, read_predictions): assert [line["prediction"] for line in read(tmp_path/"a.jsonl")] == [strange] * 2


def test_files_of_3d_rad_are_scored_as_its_script_does(tmp_path):
    "Closed by letter and full stop; open without silent answers, beside the mean that counts them."
    rows = [["Question Aspect", "Question", "Answer", "Answer Choice", "Pred", "Correct"],
            ["Size", "How? Choices: A. Yes B. No C. - D. -", "B. No", "B", "I say B. or A.", 1]]
    (tmp_path/"closed.csv").write_text(csv_text(rows, ","))
    results = evaluate_file(tmp_path/"closed.csv", n=20, tell=lambda text: None)
    assert results["3drad"]["accuracy"]["value"] == 100 and read_outputs(tmp_path/"closed.csv")[0]["choices"][:2] == ["Yes", "No"]
    with pytest.raises(MedVLM3DError, match="Choose 3drad"): evaluate_file(tmp_path/"closed.csv", protocol="rad")
    assert scores_3drad([{**LINE, "task": "open", "id": str(n), "prediction": p} for n, p in enumerate(("axial", ""))])["BLEU-1"] == {
        "value": 100, "with silence": 50, "left out": 1}


def test_answers_of_radfm_and_ct_chat(tmp_path):
    (tmp_path/"radfm.csv").write_text(csv_text([["Question", "Ground Truth", "Pred", "belong_to"],
                                                [["What?"], ["a cyst, 3 cm"], ["A cyst."], ["vqa"]]], ","))
    line, = read_outputs(tmp_path/"radfm.csv")
    assert [line[k] for k in ("task", "question", "answer", "prediction", "type")] == ["open", "What?", "a cyst, 3 cm", "A cyst.", "vqa"]
    turns = [{"from": "human", "value": "<image>\nWhere? (a) left (b) right", "type": "multiple_choice"}, {"from": "gpt", "value": "(b) right"},
             {"from": "human", "value": "How large?"}, {"from": "gpt", "value": "6 mm"}]
    (tmp_path/"asked.json").write_text(json.dumps([{"id": "1", "image": "valid_1_a_1.nii.gz", "conversations": turns}]))
    said = [{"image": "valid_1_a_1.npz", "conversations_out": [{"question": "?", "answer": "(b)</s>"}, {"question": "?", "answer": "5 mm"}]}]
    (tmp_path/"said.json").write_text(json.dumps(said))
    lines = read_outputs(tmp_path/"said.json", tmp_path/"asked.json")
    assert [(li["task"], li["letter"], li["prediction"], li["case"]) for li in lines] == [
        ("closed", "B", "(b)", "valid_1_a_1"), ("open", "", "5 mm", "valid_1_a_1")]
    with pytest.raises(MedVLM3DError, match="without the truth"): read_outputs(tmp_path/"said.json")


def test_files_in_other_codes_and_places(tmp_path):
    (tmp_path/"latin.csv").write_bytes(OPEN.replace("cyst", "Zyste ü").encode("latin-1"))
    with pytest.raises(MedVLM3DError, match="latin.csv: is not UTF-8"): read_outputs(tmp_path/"latin.csv")
    with pytest.raises(MedVLM3DError, match="is not a file"): read_outputs(tmp_path)
    (tmp_path/"bom.csv").write_bytes(b"\xef\xbb\xbf" + OPEN.encode())
    assert read_outputs(tmp_path/"bom.csv")[0]["prediction"] == "a cyst"


def test_rows_are_read_as_their_scripts_wrote_them(tmp_path):
    (tmp_path/"closed.csv").write_bytes(CLOSED.encode())
    first, second = read_outputs(tmp_path/"closed.csv")
    expected = {"question": "Which plane?", "choices": ["axial", "coronal", "sagittal", "nan"], "letter": "A",
                "answer": "axial", "prediction": "A. axial\nindeed", "type": "Plane"}
    assert {key: first[key] for key in expected} == expected
    assert (second["case"], second["written"]) == ("closed.csv:4", {"Correct": 0.})
    (tmp_path/"ours.jsonl").write_text(json.dumps(LINE))
    assert read_outputs(tmp_path/"ours.jsonl")[0]["letter"] == "A"


def test_evaluate_file_writes_what_it_tells(tmp_path):
    tables = []
    for name, text in {"closed": CLOSED, "open": OPEN, "report": REPORT}.items():
        (tmp_path/f"{name}.csv").write_bytes(text.encode())
        results = evaluate_file(tmp_path/f"{name}.csv", tmp_path/name, n=50, tell=tables.append)
        assert json.loads((tmp_path/name/"results.json").read_text()) == results
        assert (tmp_path/name/"table.txt").read_text() == tables[-1] + "\n" and "no case" in tables[-1]
        assert str(tmp_path) not in (tmp_path/name/"results.json").read_text()
    # "No cyst": every word but one is right
    assert results["clinical"]["recall"]["value"] == 0 and results["clinical"]["omission"]["value"] == 100
    assert results["systems"]["model"]["m3d"]["report"]["BLEU-1"]["all"]["value"] > 75
    closed, spoken, report = tables
    assert "accuracy (m3d)" in closed and "unparsed (standard)" in closed
    assert "rouge1" in spoken and "omission" in report
    assert results["agreement"]["bleu"]["written"] == pytest.approx(83.33)


# --- from the command line ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    "A folder with a RoBERTa of two layers and random weights, and its tokenizer."
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast
    folder = tmp_path_factory.mktemp("encoders")/"tiny-roberta"
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([REFERENCE] * 4, vocab_size=300, special_tokens=special, show_progress=False)
    folder.mkdir()
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2,
                           num_attention_heads=2, intermediate_size=32, max_position_embeddings=40)
    RobertaModel(config).save_pretrained(folder)
    return folder


def test_any_encoder_gives_a_bertscore_under_its_own_name(roberta):
    "Also a RoBERTa, whose positions begin after the padding index: the longest text fits."
    score = BERTScore(roberta, 1, name="tiny-roberta", batch_size=3)
    assert (score.name, score.limit, len(score.model.encoder.layer)) == ("BERTScore(tiny-roberta)", 38, 1)
    texts = [REFERENCE, "cyst", "a cyst on the left " * 30, ""]
    together = score(texts, [REFERENCE] * 4)
    assert together[0] == pytest.approx(1, abs=1e-6) and together[3] == 0 and 0 < together[1] < 1
    alone = [BERTScore(roberta, 1, batch_size=1)([text], [REFERENCE])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    with pytest.raises(MedVLM3DError, match="has 2 layers, not 17"):
        BERTScore(roberta, 17, name="roberta-large")


FILES = {"closed.csv": CLOSED, "open.csv": OPEN, "report.csv": REPORT, "ours.jsonl": json.dumps(LINE)}


@pytest.mark.parametrize("name", FILES)
def test_evaluate_scores_each_kind_of_file(name, tmp_path, roberta, monkeypatch):
    "M3D's and Med3DVLM's scripts write the same CSVs; here with another encoder, and RaTEScore where it is."
    class Stand:
        def __init__(self, **folders): pass
        def compute_score(self, candidate_list, reference_list): return [.25] * len(candidate_list)
    monkeypatch.setitem(sys.modules, "RaTEScore", types.SimpleNamespace(RaTEScore=Stand))
    for part in ("ner", "encoder"):
        (tmp_path/"rate"/part).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"): (tmp_path/"rate"/part/file).touch()
    (tmp_path/name).write_bytes(FILES[name].encode())
    options = {"predictions": tmp_path/name, "out": tmp_path/"out", "encoder": roberta, "layer": 1,
               "ratescore": tmp_path/"rate"}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert done.exit_code == 0, done.output
    assert done.stdout == (tmp_path/"out"/"table.txt").read_text()
    results = json.loads((tmp_path/"out"/"results.json").read_text())
    published, standard = (results["systems"]["model"][protocol] for protocol in ("m3d", "standard"))
    task = "closed" if name == "ours.jsonl" else name.split(".")[0]
    assert {*published} == {*standard} == {task} and "BERTScore(tiny-roberta)" not in published[task]
    assert ("BERTScore(tiny-roberta)" in standard[task]) == (task != "closed")
    assert ("RaTEScore  " in done.stdout) == (task == "report")
    if task == "report": assert results["clinical"]["RaTEScore"]["value"] == 25


def test_options_of_a_file_of_answers_need_one(roberta):
    done = CliRunner().invoke(app, ["evaluate", "--encoder", str(roberta)])
    assert done.exit_code and "It counts with --predictions" in str(done.exception)
