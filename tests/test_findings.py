"""Sentences as a radiologist would write them: kind, status, side, organ, level, grade and size of each finding."""
import time

import pytest

from medvlm3d.evaluation.findings import read_findings
from medvlm3d.evaluation.labels import LABELS, report_labels
from medvlm3d.evaluation.measures import sizes

SIGN = {"present": "+", "uncertain": "?", "absent": "-"}

SENTENCES = {
    # side and place
    "Consolidation in the left lower lobe, effusion on the right.":
        "+consolidation left lung lower; +effusion right",
    "Right adrenal nodule and left renal cyst.": "+nodule right adrenal; +cyst left kidney",
    "On the left a small effusion, on the right a pneumothorax.": "+effusion left small; +pneumothorax right",
    "Nodule in the RML, mass in the LUL.": "+nodule right lung middle; +mass left lung upper",
    "Cyst in the Lt. kidney, stone in the Rt. ureter.": "+cyst left kidney; +stone right ureter",
    "Infarct in the left frontal lobe; haemorrhage in the right basal ganglia.":
        "+infarct left brain; +haemorrhage right brain",
    "Hepatic and splenic cysts.": "+cyst liver; +cyst spleen",
    "The left kidney shows a 12 mm stone and hydronephrosis.":
        "+stone left kidney 12; +hydronephrosis left kidney",
    "Large right and small left effusions.": "+effusion right large; +effusion left small",
    "A right effusion and a left pneumothorax.": "+effusion right; +pneumothorax left",
    "Stones in both kidneys, the largest on the left measuring 9 mm.": "+stone both kidney 9",
    "The right lung is clear. The left lung shows a nodule.": "+nodule left lung",
    "Mild emphysema with a 6 mm nodule in the right upper lobe.":
        "+emphysema small; +nodule right lung upper 6",
    # sizes
    "Mass of 4cm x 35mm in the liver.": "+mass liver 40",
    "Nodule, .9 cm, right lung.": "+nodule right lung 9",
    "The nodule, previously 10 mm, now measures 6 mm.": "+nodule 6",
    "A cyst 12 mm from the capsule measures 5 mm.": "+cyst 5",
    "Cysts of 5-9 mm in the liver.": "+cyst liver 9",
    "A nodule smaller than 4 mm in the left lung.": "+nodule left lung <4",
    "There is a nodule in the left lung. It measures 8 mm.": "+nodule left lung 8",
    "Abscess of 30 cm^3 in the liver.": "+abscess liver",
    "The mass has grown from 2 cm to 3.5 cm.": "+mass 35",
    "Aneurysm of the aorta, 5.1 cm (previously 4.7 cm).": "+aneurysm aorta 51",
    # polarity
    "No ascites, large cyst in the spleen.": "-ascites; +cyst spleen large",
    "No haemorrhage despite the fracture.": "-haemorrhage; +fracture",
    "No progression of the metastases.": "+metastasis",
    "No increase in the effusion.": "+effusion",
    "History of breast cancer, now with a 15 mm nodule.": "-mass; +nodule 15",
    "Effusion: none.": "-effusion", "Ascites absent.": "-ascites", "Fracture - none.": "-fracture",
    "The haematoma has almost completely resolved.": "+haemorrhage",
    "The haematoma has fully resolved.": "-haemorrhage",
    "Unlikely to represent metastasis.": "-metastasis", "Metastases are unlikely.": "-metastasis",
    "INDICATION: Rule out appendicitis.": "", "REASON FOR EXAM: stone. FINDINGS: No stone.": "-stone",
    "Clinical information: known emphysema.\nFindings: nodule in the left lung.": "+nodule left lung",
    "An abscess was not detected.": "-abscess", "Free fluid was not noted.": "-ascites",
    "The appendix is free of stones.": "-stone", "Mass versus abscess.": "?mass; ?abscess",
    "Presumed haemangioma.": "?haemangioma", "Metastasis is favored.": "?metastasis",
    "Worrisome for dissection.": "?dissection", "Stone? in the left ureter": "?stone left ureter",
    "The differential includes lymphoma.": "?mass", "?Fracture of the left rib.": "?fracture left rib",
    "No midline shift, hydrocephalus or haemorrhage.": "-midline shift; -hydrocephalus; -haemorrhage",
    "Neither ascites nor free air is seen.": "-ascites; -free air",
    "Nodules are seen in the right lung and effusion is not observed.": "+nodule right lung; -effusion",
    "Effusion has not resolved.": "+effusion",
    "No new infarct; old infarct in the left cerebellar hemisphere.": "-infarct; +infarct left brain",
    "The previously seen effusion is not seen today.": "-effusion",
    "A nodule not seen on the prior is present in the left lung.": "+nodule left lung",
    "No evidence of hernia.": "-hernia", "Pulmonary embolism can be excluded.": "-embolism",
    "The spleen is enlarged.": "+splenomegaly spleen", "The heart is not enlarged.": "-cardiomegaly",
    "Heart size is within normal limits.": "", "Liver size is increased.": "+hepatomegaly liver",
    "No pleural or pericardial effusion.": "-effusion; -effusion",
    "Could represent an abscess.": "?abscess", "Screening for metastases.": "",
    "Gallbladder without stones or polyps.": "-stone; -polyp",
    "No acute infarct. Chronic microangiopathy. ": "-infarct; +white matter disease",
}


def short(f):
    "The finding as in `SENTENCES`; of an absent one only the kind."
    if f.status == "absent": return "-" + f.kind
    size = [f"{f.bound or ''}{f.size:g}"] if f.size else []
    return SIGN[f.status] + " ".join([f.kind, *(x for x in (f.side, f.organ, f.level, f.grade) if x), *size])


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_is_read(sentence):
    assert "; ".join(map(short, read_findings(sentence))) == SENTENCES[sentence]


@pytest.mark.parametrize("written, expected", [
    (".6 cm", 6), ("3cm x 45mm", 45), ("4x3 cm x 9 mm", 40), ("2.500,5 mm", 2500.5), ("3,000 mm", 3000),
    ("before 11 mm, now 4 mm", 4), ("9 mm from the fissure measures 3 mm", 3), ("4 to 7 mm", 7)])
def test_a_size_is_read(written, expected): assert [s[2] for s in sizes(f"It is {written}.")] == [expected]


@pytest.mark.parametrize("written", ["6 cm^3", "6 cm³", "6 mm/s", "80 mm Hg", "6 mm above the knee", "2 mm slices"])
def test_what_is_no_size_is_none(written): assert sizes(f"It is {written}.") == []


@pytest.mark.parametrize("cue", "observed detected seen noted identified visualised found present demonstrated".split())
def test_every_participle_denies(cue):
    for negation in ("was not", "is not", "has not been", "was not clearly"):
        assert read_findings(f"A mass {negation} {cue}.")[0].status == "absent", (negation, cue)


def test_reading_is_fast_enough_for_a_corpus():
    report = "No mass was seen. A 4 mm nodule in the right upper lobe, and small effusions on both sides. " * 20
    start = time.process_time()
    for _ in range(10): report_labels(report)
    assert time.process_time() - start < 2
    assert sum(report_labels(report).values()) == 2 and len(LABELS) == 18
