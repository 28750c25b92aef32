"""The phantom as a benchmark: known truth, chance without looking, 100 % with the truth, four probes."""
import hashlib
import time
from collections import Counter, defaultdict
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import ROOT
from corpora import invented
from scipy.ndimage import gaussian_filter

from medvlm3d.phantoms.anatomy import MORE_KINDS, TISSUES, draw_scene, sample_cases
from medvlm3d.phantoms.benchmark import asked_of, make_benchmark, report_about, sample_findings
from medvlm3d.base.core import MedVLM3DError
from medvlm3d.studies.crossmodal import Drafter
from medvlm3d.data.samples import by_image
from medvlm3d.data.m3d import load_m3d
from medvlm3d.evaluation.comparison import constant_predictions, evaluate_systems
from medvlm3d.base.fetch import fetch
from medvlm3d.evaluation.findings import LEXICON
from medvlm3d.evaluation.metrics import METEOR, BERTScore, tokens_13a
from medvlm3d.phantoms.scanner import MODES, draw_mode
from medvlm3d.phantoms.phantom import ASKED, TYPES, draw_ct, draw_letters, make_phantom, questions, read_masks
from medvlm3d.phantoms.phantom import read_truth, render, report, to_unit
from medvlm3d.phantoms.anatomy import Case
from medvlm3d.evaluation.prediction import prediction_line
from medvlm3d.phantoms.probes import PROBES, TEXTURES, make_probe, reflected

SMALL = dict(shape=(8, 32, 32), workers=1, progress=False)
SETS = {"demonstration": (None, None), "CT": ("CT", MORE_KINDS), "MR": ("MR", None), "PT": ("PT", None)}


def digests(root):
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*")) if p.is_file() and p.suffix != ".npz"
    }


def draw(root, name, **how):
    modality, kinds = SETS[name]
    if modality is None: return make_phantom(root, **how)
    return make_benchmark(root, modality, kinds=kinds, **how)


@pytest.fixture(scope="module", params=SETS)
def corpus(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)/"corpus"
    draw(root, request.param, train=12, validation=4, test=24, **SMALL)
    return request.param, root


# --- drawn from a seed -----------------------------------------------------------------------------

def test_the_same_seed_draws_the_same_bytes_in_one_process_or_two(corpus, tmp_path):
    name, root = corpus
    draw(tmp_path/"two", name, train=12, validation=4, test=24, **{**SMALL, "workers": 2})
    assert digests(tmp_path/"two") == digests(root)
    for row in read_truth(root).values():
        assert all(
            np.array_equal(a, b) for a, b in zip(read_masks(root, row), read_masks(tmp_path/"two", row)))


def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path):
    how = dict(train=4, validation=2, test=2, **SMALL)
    rows = make_phantom(tmp_path/"a", **how)
    whole = digests(tmp_path/"a")
    folder = (tmp_path/"a"/rows[1]["image"]).parent
    (folder/"truth.json").unlink()
    (tmp_path/"a"/rows[2]["image"]).unlink()
    (tmp_path/"a"/rows[2]["image"]).with_name("masks.npz").unlink()
    (tmp_path/"a"/"truth.jsonl").unlink()
    assert make_phantom(tmp_path/"a", **how) == rows and digests(tmp_path/"a") == whole


def test_other_parameters_in_the_same_folder_are_refused(tmp_path):
    make_benchmark(tmp_path/"a", "PT", train=2, validation=0, test=0, **SMALL)
    with pytest.raises(MedVLM3DError, match="a: holds a phantom with other parameters.*Choose a new folder"):
        make_benchmark(tmp_path/"a", "PT", train=2, validation=0, test=0, contrast=.5, **SMALL)


def test_masks_missing_from_an_older_phantom_are_added_without_touching_it(tmp_path):
    rows = make_phantom(tmp_path/"a", train=3, validation=0, test=0, **SMALL)
    before, masks = digests(tmp_path/"a"), read_masks(tmp_path/"a", rows[0])
    for p in (tmp_path/"a").rglob("masks.npz"): p.unlink()
    with pytest.raises(MedVLM3DError, match="masks.npz: is missing.*adds what is missing"):
        read_masks(tmp_path/"a", rows[0])
    make_phantom(tmp_path/"a", train=3, validation=0, test=0, **SMALL)
    assert digests(tmp_path/"a") == before
    assert all(np.array_equal(a, b) for a, b in zip(masks, read_masks(tmp_path/"a", rows[0])))


def test_ct_is_drawn_as_the_formula_says():
    """The whole drawing once more, organ by organ on the full grid, without boxes or tables: equal in
    every bit."""
    from medvlm3d.phantoms.anatomy import ANATOMY, build_patient, coordinates, inside, lesion_shape
    from medvlm3d.phantoms.phantom import paint_lesion
    shape = (12, 40, 40)
    for case in sample_cases(8, seed=9):
        rng, phase = np.random.default_rng(case.seed), ASKED["Phase"][1].index(case.phase)
        patient, xyz = build_patient(rng), coordinates(case.plane, shape)
        fine = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (.6, 1, 1)) * 3
        coarse = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (.9, 2.2, 2.2)) * 8
        body = inside(xyz, *patient["body"])
        hu = np.where(
            body < 1,
            np.where(body < .74, -45 + 22 * coarse, np.where(body < .88, 52. + 8 * fine, -95. + 6 * fine)),
            np.float32(-1000)).astype(np.float32)
        for name, (_, _, values, texture) in ANATOMY.items():
            q = inside(xyz, *patient[name])
            mask = (q < 1) & (body < .9)
            hu[mask] = values[phase] * rng.uniform(.93, 1.07) + texture * fine[mask]
            if name.endswith("kidney") and phase: hu[(q < .25) & mask] += (0, -70, -10, 160)[phase]
        paint_lesion(hu, q := np.where(body < .97, inside(xyz, *lesion_shape(case, patient, rng)), 2), case,
                     coarse)
        expected = gaussian_filter(hu, (.35, .6, .6)) + rng.normal(0, 9, shape).astype(np.float32)
        found, lesion = render(case, shape)
        assert np.array_equal(found, expected) and np.array_equal(lesion, q < 1)


# --- masks and modalities --------------------------------------------------------------------------

def test_masks_say_where_the_lesion_is(corpus):
    name, root = corpus
    for row in read_truth(root).values():
        tissue, lesion = read_masks(root, row)
        assert np.flatnonzero(lesion.any((1, 2))).tolist() == row["lesion_slices"]
        assert lesion.sum() == row["lesion_voxels"]
        assert np.load(root/row["image"]).shape == (1, *tissue.shape) and tissue.max() < len(TISSUES)


def test_one_patient_has_the_same_masks_in_every_modality():
    for case in sample_findings(6, seed=3, kinds=("mass", "abscess", "nodule")):
        scenes = [
            draw_mode(replace(case, phase=m.phases[2]), name, (12, 40, 40))[1] for name, m in MODES.items()
        ]
        assert all(np.array_equal(s.masks, scenes[0].masks) for s in scenes)
        assert np.array_equal(scenes[0].masks & 127, scenes[0].labels)


@pytest.mark.parametrize("modality", MODES)
def test_every_kind_is_visible_in_its_modality(modality):
    "Findings of each kind differ from the same scene without them, by more than its noise, in every organ."
    mode = MODES[modality]
    for kind in (MORE_KINDS if modality == "CT" else mode.kinds):
        for case in sample_findings(6, seed=4, kinds=(kind,), phases=mode.phases, planes=("axial",)):
            with_it, scene = draw_mode(case, modality, (24, 64, 64))
            without, _ = draw_mode(case, modality, (24, 64, 64), contrast=0.)
            step = abs(with_it[scene.lesion] - without[scene.lesion]).mean()
            assert step > {"CT": 15, "MR": 15, "PT": .3}[modality], (kind, case.organ, case.phase)


def test_left_is_left_and_upper_is_upper_in_every_modality():
    for modality, mode in MODES.items():
        for case in sample_findings(8, seed=6, kinds=mode.kinds, phases=mode.phases, planes=("axial",)):
            _, scene = draw_mode(case, modality, (32, 64, 64))
            d, _, w = np.argwhere(scene.lesion).mean(0)
            assert (w > 31.5) == (case.side == "left")
            organ = np.argwhere(scene.labels == TISSUES.index(case.organ))
            assert (d > organ[:, 0].mean()) == (case.level == "upper")


def test_unknown_modality_phase_and_kind_are_refused(tmp_path):
    case = sample_cases(1)[0]
    with pytest.raises(MedVLM3DError, match="US: is no modality.*CT, MR, PT"): draw_mode(case, "US")
    with pytest.raises(MedVLM3DError, match="has the phase.*which MRI has not.*T1-weighted"):
        draw_mode(case, "MR")
    with pytest.raises(MedVLM3DError, match="wart: is no kind of finding.*nodule"):
        make_benchmark(tmp_path/"x", kinds=("wart",))
    with pytest.raises(MedVLM3DError, match="cyst: is the only kind of finding.*Give two kinds"):
        make_benchmark(tmp_path/"x", kinds=("cyst",))


def test_an_effusion_is_behind_a_lung_and_organs_stay_balanced():
    cases = sample_findings(360, seed=2)
    for factor in ("plane", "phase", "organ", "kind", "level"):
        counts = Counter(getattr(c, factor) for c in cases)
        assert max(counts.values()) - min(counts.values()) <= 1, counts
    effusions = [c for c in cases if c.kind == "effusion"]
    assert effusions and all(c.organ.endswith("lung") for c in effusions)
    for case in [replace(c, plane="axial") for c in effusions[:6]]:
        scene = draw_scene(case, (24, 64, 64))
        lung = np.argwhere((scene.labels == TISSUES.index(case.organ)) & ~scene.lesion)
        assert np.argwhere(scene.lesion)[:, 1].mean() > lung[:, 1].mean() + 5


# --- chance without looking ------------------------------------------------------------------------

def asked_about(name, n, seed, first=0):
    """Questions about `n` cases of a set or a probe, or drafted as cross-modal pairs, one dict each,
    without drawing a volume."""
    if name == "crossmodal":
        return [asdict(p) for p in Drafter(invented(1200), ROOT, seed + first).draft(n // 3)]
    if name in PROBES:
        _, items_of, asked = PROBES[name]
        items = items_of(n, "test", first=first, seed=seed, shape=(8, 32, 32), size=1., contrast=1.)
        return [
            q for i, letters in zip(items, draw_letters(asked, n, (seed, first)))
            for q in questions(i.case, letters, asked, known_of(i, name))
        ]
    modality, kinds = SETS[name]
    asked = ASKED if modality is None else asked_of(modality, kinds)
    if modality is None: cases = sample_cases(n, seed, first=first)
    else:
        mode = MODES[modality]
        cases = sample_findings(n, seed, first=first, phases=mode.phases, kinds=kinds or mode.kinds)
    return [
        q for case, letters in zip(cases, draw_letters(asked, n, (seed, first)))
        for q in questions(case, letters, asked)
    ]


def known_of(item, name):
    "The facts of a probe's item, as its drawing records them."
    return {"organ": item.case.organ, "kind": item.case.kind, "location": item.case.location,
            "texture": item.variant, **(reflected(item.case, item.variant) if name == "mirror" else {})}


@pytest.mark.parametrize("name", PROBES)
def test_what_is_asked_about_a_probe_is_what_its_drawing_records(name):
    for item in items(name, 4, seed=2, shape=(8, 32, 32)):
        known, drawn = known_of(item, name), item.draw(item)[2]
        assert {k: known[k] for k in drawn if k in known} == {k: v for k, v in drawn.items() if k in known}


def features(q, letter):
    """What can be read off a question and one of its options: the option, its letter, the wording, the
    other options, and pairs of these."""
    option = q["choices"]["ABCD".index(letter)]
    others = sorted(c for c in q["choices"] if c not in ("NA", option))
    return [
        f"is {option}", f"at {letter}", f"{option} at {letter}", f"{option} in {q['question']}",
        *(f"{option} beside {o}" for o in others), f"{option} among {others}"
    ]


def learned_reader(training, steps=200, rate=1., decay=1e-3):
    """A conditional logit over the options: maximum likelihood with a small penalty, by gradient ascent.
    Returns question → letter."""
    names = {
        f: i for i, f in enumerate(
            sorted({f for q in training for letter in offered(q) for f in features(q, letter)}))
    }
    def numbers(q, letter):
        known = [names.get(f, len(names)) for f in features(q, letter)]
        return known + [len(names)] * (8 - len(known))
    rows = [np.array([numbers(q, letter) for letter in offered(q)]) for q in training]
    truth, weights = [offered(q).index(q["letter"]) for q in training], np.zeros(len(names) + 1)
    for _ in range(steps):
        gradient = np.zeros_like(weights)
        for r, t in zip(rows, truth):
            p = np.exp(weights[r].sum(1) - weights[r].sum(1).max())
            p /= p.sum()
            np.add.at(gradient, r[t], 1)
            np.add.at(gradient, r, -p[:, None])
        weights += rate * (gradient / len(rows) - decay * weights)
        weights[-1] = 0
    def score(q, letter): return sum(weights[names[f]] for f in features(q, letter) if f in names)
    return lambda q: max(offered(q), key=lambda letter: score(q, letter))


def offered(q): return [letter for letter, c in zip("ABCD", q["choices"]) if c != "NA"]


def within(right, chance):
    "Whether a share of `right` (0/1 values) is chance within three standard errors."
    return abs(np.mean(right) - chance) <= 3 * np.sqrt(chance * (1 - chance) / len(right))


@pytest.mark.parametrize("name", SETS)
def test_the_best_constant_answer_is_at_chance(name):
    """Of each type: the most frequent answer of the training cases where it is offered, and the most
    frequent letter."""
    training, test = asked_about(name, 480, 1), asked_about(name, 720, 1, first=480)
    for kind in TYPES:
        old, new = ([q for q in qs if q["type"] == kind] for qs in (training, test))
        chance = 1 / len(offered(new[0]))
        rank = [a for a, _ in Counter(q["answer"] for q in old).most_common()]
        assert within(
            [min((rank.index(c), c) for c in q["choices"] if c in rank)[1] == q["answer"] for q in new],
            chance), kind
        letter = Counter(q["letter"] for q in old).most_common(1)[0][0]
        assert within([q["letter"] == letter for q in new], chance), kind


@pytest.mark.parametrize("name", [*SETS, *PROBES, "crossmodal"])
def test_the_best_reader_of_questions_is_at_chance(name):
    "A learned reader of question, options and letters, on cases it has not seen."
    training, test = asked_about(name, 240, 2), asked_about(name, 720, 2, first=240)
    reader = learned_reader(training)
    for kind in {q["type"] for q in test}:
        mine = [q for q in test if q["type"] == kind]
        assert within([reader(q) == q["letter"] for q in mine], 1 / len(offered(mine[0]))), kind


def test_the_learned_reader_does_find_a_leak():
    """The same reader on questions whose answer is, in half of the cases, the option that comes first in
    the alphabet."""
    def leaky(seed, first):
        made = []
        for i, q in enumerate(asked_about("demonstration", 240, seed, first)):
            first_letter = min(offered(q), key=lambda letter: q["choices"]["ABCD".index(letter)])
            if i % 2: q = {**q, "letter": first_letter, "answer": q["choices"]["ABCD".index(first_letter)]}
            made.append(q)
        return made

    test = leaky(3, 240)
    reader = learned_reader(leaky(3, 0))
    assert np.mean([reader(q) == q["letter"] for q in test]) > .5


# --- 100 % with the truth --------------------------------------------------------------------------

def oracle(root, modality):
    """The prediction lines of a reader of `truth.jsonl`: facts by type, and the report written again from
    the case."""
    lines, truth = [], read_truth(root)
    for image, samples in by_image(load_m3d(root)).items():
        row = truth[image]
        case = Case(**{k: row[k] for k in Case.__dataclass_fields__})
        for s in samples:
            if s.type in ASKED: fact = row[ASKED[s.type][0]]
            else: fact = report(case) if modality is None else report_about(case, modality)
            if s.task == "closed":
                fact = next(f"{letter}. {c}" for letter, c in zip("ABCD", s.choices) if c == fact)
            scores = None
            if s.task == "closed":
                scores = [0. if c == row[ASKED[s.type][0]] else -9. for c in s.choices if c != "NA"]
            lines.append(prediction_line(s, fact, option_logprobs=scores))
    return lines


def lexicon_of(modality):
    if modality is None: return LEXICON
    return {
        **LEXICON, "phase": {p: () for p in MODES[modality].phases},
        "kind": {**LEXICON["kind"], "nodule": (), "effusion": ()}
    }


def cells(tree, path=()):
    if "value" in tree: yield path, tree
    else:
        for key, branch in tree.items():
            if isinstance(branch, dict): yield from cells(branch, (*path, key))


def test_an_oracle_scores_one_hundred_under_every_metric(corpus):
    """Both protocols, all tasks, types and facts. Two scores are below 100 for identical texts by definition,
    and the oracle must reach exactly that: METEOR gives 1 - 0.5/m³ to m identical words, BLEU-4 gives 0 where
    no answer has four words."""
    name, root = corpus
    modality = SETS[name][0]
    lines, meteor = oracle(root, modality), METEOR(fetch("wordnet"))
    facts = {
        "/".join(r["image"].split("/")[-3:-1]): {k: r[k] for k in LEXICON} for r in read_truth(root).values()
    }
    results = evaluate_systems({"model": lines}, truth=facts, lexicon=lexicon_of(modality), meteor=meteor,
                               bertscore=BERTScore(fetch("minilm")), n=50)
    found = {
        p: c for part in ("m3d", "standard") for p, c in cells(results["systems"]["model"][part], (part,))
    }
    zero = {p for p in found if p[2] == "unparsed"}
    ceilings = {p for p in found if p[2] == meteor.name}
    assert len(found) > 40 and ceilings and zero
    for path, c in found.items():
        if path in zero: assert c["value"] == 0, path
        elif path in ceilings:
            assert c["value"] == pytest.approx(ceiling(lines, meteor, *path), abs=1e-3), path
        elif path[1:3] == ("open", "BLEU-4"):
            assert c["value"] == pytest.approx(room_for_four(lines, path[3]), abs=1e-3), path
        elif "BERTScore" in path[2]:
            assert c["value"] == pytest.approx(100, abs=1e-3), path
        else:
            assert c["value"] == 100, path
    everything = dict(cells(results["systems"]["model"]["facts"]))
    for path, c in everything.items():
        assert c["value"] in ((0,) if path[1] in ("omitted", "hallucinated") else (100,)), path


def ceiling(lines, meteor, protocol, task, metric, group):
    "METEOR of identical texts, from its formula: 100 (1 - 0.5 / m³), averaged as the table does."
    groups = defaultdict(list)
    for l in lines:
        if l["task"] == task: groups[l["type"]].append(100 * (1 - .5 / len(meteor.tokens(l["answer"]))**3))
    if group == "macro": return np.mean([np.mean(v) for v in groups.values()])
    return np.mean(groups[group] if group in groups else [x for v in groups.values() for x in v])


def room_for_four(lines, group):
    "BLEU-4 of identical open answers: 100 where one of the group has four words, else 0."
    groups = defaultdict(list)
    for l in lines:
        if l["task"] == "open": groups[l["type"]].append(len(tokens_13a(l["answer"])) >= 4)
    if group == "macro": return 100 * np.mean([any(v) for v in groups.values()])
    return 100 * any(groups[group] if group in groups else [x for v in groups.values() for x in v])


def test_what_is_written_is_what_is_true(corpus):
    """Questions, options, answers and reports agree with the truth file, and the facts can be read back
    from the report."""
    name, root = corpus
    truth = read_truth(root)
    for s in load_m3d(root):
        row = truth[s.image]
        if s.task != "report": assert s.answer == row[ASKED[s.type][0]]
        if s.task == "closed":
            assert s.choices["ABCD".index(s.letter)] == s.answer
            assert len({c for c in s.choices if c != "NA"}) == sum(c != "NA" for c in s.choices)
        if s.task == "report":
            for fact in (row["kind"], row["organ"], row["phase"], row["plane"], row["level"], row["side"]):
                assert fact in s.answer


def test_a_constant_reader_of_the_whole_evaluation_is_at_chance(corpus):
    "Through the evaluation itself, with its interval: chance lies inside it for the mean over types."
    name, root = corpus
    samples = load_m3d(root)
    closed = [s for s in samples if s.task == "closed" and s.split == "test"]
    lines = constant_predictions([prediction_line(s) for s in closed],
                                 [s for s in samples if s.split == "train"])
    results = evaluate_systems({"model": lines}, n=500)
    found, chance = (
        results["systems"][k]["standard"]["closed"]["accuracy"]["macro"] for k in ("model", "chance"))
    assert found["low"] - 1 <= chance["value"] <= found["high"] + 1


# --- the dial and the clock ------------------------------------------------------------------------

@pytest.mark.parametrize("modality", MODES)
def test_the_dial_is_monotone(modality):
    mode = MODES[modality]
    case = replace(
        sample_findings(4, seed=5, kinds=("mass",), phases=mode.phases, planes=("axial",))[0],
        organ="liver", phase=mode.phases[1])
    still, _ = draw_mode(case, modality, (16, 64, 64), 0.)
    steps = []
    for contrast in (0., .25, .5, 1.):
        v, scene = draw_mode(case, modality, (16, 64, 64), contrast)
        steps.append(abs(v - still)[scene.lesion].mean())
    assert steps[0] == 0 and all(b > a for a, b in zip(steps, steps[1:]))
    sizes = [draw_scene(replace(case, radius=r), (16, 64, 64)).lesion.sum() for r in (6., 12., 24., 40.)]
    assert all(b > a for a, b in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("modality, shape, limit", [("CT", (32, 112, 112), .66), ("MR", (32, 112, 112), .66),
                                                    ("PT", (32, 112, 112), .66), ("CT", (50, 224, 224), 5.),
                                                    ("PT", (50, 224, 224), 5.)])
def test_volumes_are_drawn_fast_enough(modality, shape, limit, tmp_path):
    """Processor time, with writing: three volumes a second on two cores leave each core 0.66 s a volume;
    a large one takes a few seconds."""
    n = 4 if shape[0] == 32 else 1
    start = time.process_time()
    make_benchmark(tmp_path / "x", modality, train=n, validation=0, test=0, shape=shape, workers=1,
                   progress=False)
    assert (time.process_time() - start) / n < limit


# --- probes ----------------------------------------------------------------------------------------

def items(name, n=24, *, seed=3, shape=(16, 56, 56), size=1., contrast=1.):
    _, items_of, _ = PROBES[name]
    return items_of(n, "test", first=0, seed=seed, shape=shape, size=size, contrast=contrast)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_is_a_corpus_with_true_answers(name, tmp_path):
    rows = make_probe(tmp_path/"a", name, train=8, test=16, shape=(8, 40, 40), workers=1, progress=False)
    make_probe(tmp_path/"b", name, train=8, test=16, shape=(8, 40, 40), workers=2, progress=False)
    assert digests(tmp_path/"a") == digests(tmp_path/"b")
    samples, truth, asked = load_m3d(tmp_path/"a"), read_truth(tmp_path/"a"), PROBES[name][2]
    assert Counter(
        s.task for s in samples) == {"closed": 24 * len(asked), "open": 24 * len(asked), "report": 24}
    for s in samples:
        if s.task != "report": assert s.answer == truth[s.image][asked[s.type][0]]
    for row in rows:
        assert len(row["lesion_slices"]) > 0


@pytest.mark.parametrize("name", PROBES)
def test_no_constant_answer_wins_a_probe(name):
    "The most frequent answer of 240 cases, per type, is at chance within three standard errors."
    from medvlm3d.phantoms.probes import reflected
    facts = [asdict(i.case) | {"location": i.case.location, "texture": i.variant}
             | (reflected(i.case, i.variant) if name == "mirror" else {}) for i in items(name, 240)]
    for kind, (fact, values, _) in PROBES[name][2].items():
        share, chance = Counter(f[fact] for f in facts).most_common(1)[0][1] / len(facts), 1 / len(values)
        assert share <= chance + 3 * np.sqrt(chance * (1 - chance) / len(facts)), kind


def test_tiny_lesions_are_in_one_slice_and_seen():
    for item in items("tiny", 12, shape=(32, 112, 112)):
        unit, masks, _ = item.draw(item)
        lesion = masks > 127
        assert lesion.any((1, 2)).sum() == 1 and 1 <= lesion.sum() <= 20
        assert unit[lesion].max() > np.median(
            unit[draw_scene(item.case, item.shape).labels == TISSUES.index(item.case.organ)]) + .1


def test_textures_share_every_moment_and_differ_in_spectrum():
    values, roughness = defaultdict(list), defaultdict(list)
    for item in items("texture", 32, shape=(32, 112, 112)):
        unit, masks, facts = item.draw(item)
        hu, lesion = unit * 600 - 200, masks > 127
        values[facts["texture"]].append((hu[lesion].mean(), hu[lesion].std(), np.quantile(hu[lesion], .9)))
        roughness[facts["texture"]].append(
            [((hu - np.roll(hu, 1, a))[lesion & np.roll(lesion, 1, a)]**2).mean() for a in (1, 2)])
    assert {*values} == {*TEXTURES}
    for v in values.values():
        assert np.allclose(np.mean(v, 0), (90, 60, 166.9), atol=1.5)
    across, down, fine, coarse = (
        np.mean(roughness[t], 0) for t in ("striped across", "striped down", "fine", "coarse"))
    assert across[0] > 1.5 * across[1] and down[1] > 1.5 * down[0] and min(fine) > 3 * max(coarse)


def test_slices_holds_its_finding_in_one_or_two_of_many_alike():
    for item in items("slices", 12, shape=(32, 112, 112)):
        unit, masks, _ = item.draw(item)
        hit = (masks > 127).any((1, 2))
        assert hit.sum() == int(item.variant) and item.variant in "12"
        rest = unit[~hit]
        assert np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(rest, rest[1:])]) > .93


def test_mirror_pairs_differ_in_place_alone(tmp_path):
    rows = make_probe(tmp_path/"m", "mirror", train=8, validation=4, test=16, shape=(8, 40, 40), workers=1,
                      progress=False)
    kinds = Counter()
    for a, b in zip(rows[::2], rows[1::2]):
        x, y = (np.load(tmp_path/"m"/r["image"])[0] for r in (a, b))
        (tissue_a, lesion_a), (tissue_b, lesion_b) = (read_masks(tmp_path/"m", r) for r in (a, b))
        assert a["pair"] == b["pair"] and a["split"] == b["split"] and a["location"] != b["location"]
        assert a["id"] != b["id"]
        assert np.array_equal(np.sort(x, None), np.sort(y, None))
        assert np.bincount(tissue_a.ravel()).tolist() == np.bincount(tissue_b.ravel()).tolist()
        (axis,) = [k for k in range(3) if np.array_equal(np.flip(x, k), y)]
        assert np.array_equal(np.flip(lesion_a, axis), lesion_b)
        turned = "left-right" if a["side"] != b["side"] else "up-down"
        assert (turned == "left-right") == (axis == 2) and (a["level"] != b["level"]) == (turned == "up-down")
        kinds[turned] += 1
    assert min(kinds.values()) >= 4


def test_a_reader_without_position_is_right_on_one_of_each_pair_at_most(tmp_path):
    rows = make_probe(tmp_path/"m", "mirror", test=32, shape=(8, 40, 40), workers=1, progress=False)
    pooled = lambda r: tuple(np.histogram(np.load(tmp_path/"m"/r["image"]), 16, (0, 1))[0])
    known = {}
    for r in rows[:16]: known.setdefault(pooled(r), r["location"])
    assert sum(known.get(pooled(r)) == r["location"] for r in rows[:16]) == 8


def test_probes_refuse_what_they_cannot_be(tmp_path):
    with pytest.raises(MedVLM3DError, match="colour: is no probe.*tiny, texture, slices, mirror"):
        make_probe(tmp_path/"x", "colour")
    with pytest.raises(MedVLM3DError, match="mirror: comes in pairs.*even numbers"):
        make_probe(tmp_path/"x", "mirror", test=7)


def test_the_dial_of_a_probe_turns():
    large, small = (np.mean([(i.draw(i)[1] > 127).sum()
                             for i in items("tiny", 6, shape=(32, 112, 112), size=s)]) for s in (2., 1.))
    assert large > 2 * small
    spread = {
        c: np.mean([i.draw(i)[0][i.draw(i)[1] > 127].std() for i in items("texture", 4, contrast=c)])
        for c in (1., .3)
    }
    assert spread[.3] < .4 * spread[1.]


def test_damaged_truth_is_named(tmp_path):
    "A truth file that lost its last character names itself when the corpus is continued."
    rows = make_phantom(tmp_path/"a", train=2, validation=0, test=0, **SMALL)
    file = (tmp_path/"a"/rows[0]["image"]).with_name("truth.json")
    file.write_text(file.read_text()[:-4])
    with pytest.raises(MedVLM3DError, match="truth.json: not valid JSON.*Restore or regenerate"):
        make_phantom(tmp_path/"a", train=2, validation=0, test=0, **SMALL)
    file.unlink()
    assert make_phantom(tmp_path/"a", train=2, validation=0, test=0, **SMALL) == rows


def test_the_demonstration_is_a_plain_ct():
    "Its four kinds only, and `draw_ct` at full contrast."
    assert {c.kind for c in sample_cases(200)} == {*ASKED["Abnormality"][1]} == {*MORE_KINDS[:4]}
    case = sample_cases(1)[0]
    assert np.array_equal(to_unit(draw_ct(draw_scene(case, (8, 32, 32)))),
                          to_unit(render(case, (8, 32, 32))[0]))
