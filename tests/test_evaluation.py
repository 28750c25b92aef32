"""Tests over a table, and the readers that a score must beat."""
import pytest
import torch

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.data.samples import Sample
from medvlm3d.evaluation.baselines import Blank, Reversed, first_offered, nearest_lines, neighbours
from medvlm3d.evaluation.comparison import compare, evaluate_systems
from medvlm3d.evaluation.prediction import prediction_line
from medvlm3d.evaluation.scores import grouped_cells
from medvlm3d.evaluation.uncertainty import compare_seeds, edge_bounds, holm

# --- tests over a table -------------------------------------------------------------------------------------

def answers(skill, n=40):
    lines = []
    for i in range(n):
        right = i % 10 < 10 * skill
        sample = Sample(f"{i:03d}", f"c{i // 2}", image=f"i{i}", split="test", task="closed",
                        type="Organ" if i % 2 else "Plane", question="?", choices=("a", "b", "NA", "NA"),
                        answer="a", letter="A")
        lines.append(prediction_line(sample, "A. a" if right else "B. b"))
    return lines


def test_holm_covers_the_whole_table():
    skills = {"model": .9, "blind": .5, "other image": .6, "no image": .3}
    systems = {name: answers(skill) for name, skill in skills.items()}
    versus = evaluate_systems(systems, n=50)["comparisons"]
    rows = [c for system in versus.values() for g, c in system["closed"]["accuracy"].items() if g != "micro"]
    assert len(rows) == 3 * 3
    for test in ("p", "mcnemar"): assert [c[f"{test}_holm"] for c in rows] == holm([c[test] for c in rows])
    alone = compare(systems["model"], systems["blind"], n=50)["Organ"]
    among_three = versus["blind"]["closed"]["accuracy"]["Organ"]
    assert among_three["p_holm"] > alone["p_holm"], "three systems cost more than one"


def test_seeds_must_be_paired():
    message = r"compare_seeds: has \(2, 4\) against \(3, 4\).*Run both with the same seeds"
    with pytest.raises(MedVLM3DError, match=message):
        compare_seeds(torch.zeros(2, 4).numpy(), torch.zeros(3, 4).numpy(), clusters=list("abcd"))


# --- baselines ----------------------------------------------------------------------------------------------

class Kept:
    "A store in memory."
    spec = {"weights": "w", "encoder": "e", "rho": 50, "preprocess": {"depth": 4, "height": 8, "width": 8}}
    def __init__(self, n=6):
        def features(seed): return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed))
        self.all = {f"i{i}": (features(i), torch.tensor([0, 3])) for i in range(n)}

    def __getitem__(self, image): return self.all[image]


def test_reversal_changes_the_order_and_nothing_else():
    store = Kept()
    features, indices = Reversed(store)["i1"]
    assert torch.equal(features.flip(0), store["i1"][0]) and indices.tolist() == [3, 0]
    assert torch.equal(Reversed(Reversed(store))["i1"][0], store["i1"][0])


def test_a_blank_image_needs_the_stores_encoder():
    class Other: name, weights_hash = "another", "x"
    with pytest.raises(MedVLM3DError, match="another: is not the encoder of this store. Load e."):
        Blank(Kept(), Other())


def test_the_nearest_case_is_found_whatever_its_scale():
    store = Kept()
    store.all["copy"] = (store["i2"][0] + .01, store["i2"][1])
    assert neighbours(store, ["copy"], [f"i{i}" for i in range(6)])["copy"][0] == "i2"


def test_the_nearest_offered_answer_is_lent():
    def sample(i, answer, split="train", choices=("liver", "spleen", "NA", "NA"), letter="A"):
        return Sample(f"{i}/1", str(i), image=f"i{i}", split=split, task="closed", type="Organ", question="?",
                      choices=choices, answer=answer, letter=letter)
    training = [sample(0, "lung", choices=("lung", "spleen", "NA", "NA")), sample(1, "spleen", letter="B")]
    asked = [sample(2, "liver", "test")]
    lines = nearest_lines(asked, training, {"i2": ["i0", "i1"]})
    assert lines[0]["prediction"] == "B. spleen", "a lung is not offered"
    assert first_offered(asked[0], ["lung"]) == "" and first_offered(asked[0], []) == ""


@pytest.mark.parametrize("value, least", [(1., 0.), (0., 0.), (.5, 0.), (0., -1.), (1., -1.)])
def test_no_interval_has_width_zero(value, least):
    "Where all 40 cases agree the bounds are exact: a case that was not seen may score anything."
    rows = [[value, 1.]] * 40
    cell = grouped_cells(rows, ["Organ"] * 40, cases=list(map(str, range(40))), least=least, n=100)["macro"]
    low, high = edge_bounds(value, 40, least=least)
    assert (cell["low"], cell["high"]) == (pytest.approx(100 * low, abs=1e-3), pytest.approx(100 * high, abs=1e-3))
    assert low < high and least <= low <= value <= high <= 1


def test_an_interval_of_few_cases_is_wider_than_its_resamples():
    "Below 30 cases Student's t; from one case there is none."
    rows = [[i % 3 == 0, 1.] for i in range(12)]
    few = grouped_cells(rows, ["Organ"] * 12, cases=list(map(str, range(12))), n=500)["Organ"]
    many = grouped_cells(rows * 3, ["Organ"] * 36, cases=list(map(str, range(36))), n=500)["Organ"]
    assert few["high"] - few["low"] > 3**.5 * (many["high"] - many["low"])
    assert grouped_cells(rows, ["Organ"] * 12, cases=["a"] * 12)["Organ"]["low"] is None


def test_seeds_that_disagree_outweigh_any_number_of_cases():
    "One of three trainings carries the difference: cases alone would find it, the test that decides does not."
    a, b = [[1.] * 400, [0.] * 400, [0.] * 400], [[0.] * 400] * 3
    found = compare_seeds(a, b, clusters=range(400), n=200)
    assert found["permutation"] < .001 and found["p"] > .3
    agreed = compare_seeds([[float(i % 2) for i in range(400)]] * 3, b, clusters=range(400), n=200)
    assert agreed["p"] < .001
