"""The worked example: the printed numbers are computed again, by loops, from the printed x and W, with every router."""

import re

import numpy as np
import pytest

import naive
import naive_routing
from test_cli import invoke
from tinymoe import Tensor
from tinymoe.moe.routers import ROUTERS
from tinymoe.tools.explain import Example, draw


@pytest.fixture(scope="module")
def printed():
    code, output = invoke("explain")
    assert code == 0
    return [part.split("\n", 1)[1] for part in output.split("## ")[1:]]


def matrix(part, name):
    """The numbers of a printed matrix; 0 for a dot."""
    lines = re.search(rf"^    {name} +\w.*\n((?:    .*\n)*)", part + "\n", re.M)[1].splitlines()
    return np.array([[0 if cell == "." else float(cell) for cell in line[13:].split()] for line in lines])


def test_every_printed_number_follows_from_x_and_w(printed):
    x, w = matrix(printed[0], "x"), matrix(printed[1], "W")
    logits = np.array([[sum(x[n, d] * w[d, e] for d in range(3)) for e in range(4)] for n in range(4)])
    np.testing.assert_allclose(matrix(printed[1], "logits"), logits, atol=1e-12)
    probs = np.array([naive.softmax(row) for row in logits])
    np.testing.assert_allclose(matrix(printed[1], "probability"), probs, atol=0.0051)
    gates = np.zeros((4, 4))
    for n in range(4):
        best = sorted(range(4), key=lambda e: -probs[n, e])[:2]
        gates[n, best] = probs[n, best] / sum(probs[n, best])
    np.testing.assert_allclose(matrix(printed[2], "G"), gates, atol=0.0051)
    assert (matrix(printed[3], "ran") == (gates > 0)).all() and "8 of the 16 pairs" in " ".join(printed[3].split())
    first = np.zeros(3)
    for e in np.flatnonzero(gates[0]):
        w1, w2 = matrix(printed[4], f"W1 of e{e}"), matrix(printed[4], f"W2 of e{e}")
        hidden = [max(0.0, sum(x[0, d] * w1[d, h] for d in range(3))) for h in range(2)]
        first += [gates[0, e] * sum(hidden[h] * w2[h, d] for h in range(2)) for d in range(3)]
    for name in ("y", "by hand"):
        np.testing.assert_allclose(matrix(printed[5], name)[0], first, atol=5.1e-5)
    load = (gates > 0).sum(axis=0)
    assert np.allclose(matrix(printed[6], "expert")[:, 0], load / load.sum(), atol=5e-4)
    assert f"column count of G: {', '.join(map(str, load))}." in printed[6]
    loss = naive_routing.balance(load, probs)
    assert f"sum of f * P = {loss:.4f}" in " ".join(printed[6].split())

    def moved(logits):
        return naive_routing.balance(load, np.array([naive.softmax(row) for row in logits]))

    gradient = naive.central_difference(moved, logits, 1.0)
    np.testing.assert_allclose(matrix(printed[6], "gradient"), gradient, atol=5.1e-5)


def test_what_the_capacity_drops_and_what_expert_choice_takes(printed):
    gates, limited, chosen = (matrix(printed[i], "G") for i in (2, 7, 8))
    kept = naive_routing.limited(gates > 0, gates, 1, "order")
    assert ((limited > 0) == kept).all() and "Dropped: 4" in " ".join(printed[7].split())
    assert (matrix(printed[7], "y")[2] == 0).all()
    probs = np.array([naive.softmax(row) for row in matrix(printed[1], "logits")])
    for e in range(4):  # the two tokens of largest probability, the earlier one where they tie
        assert set(np.flatnonzero(chosen[:, e])) == set(sorted(range(4), key=lambda n: (-probs[n, e], n))[:2])
    assert "Load: 2, 2, 2, 2" in printed[8]


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_has_an_example_that_agrees_with_the_sum_by_hand(name):
    code, output = invoke("explain", "--router", name)
    assert code == 0, output
    assert output.count("ifference: below 1e-12") + output.count("by hand: below 1e-12") >= 2, output
    part = output.split("## ")[6]
    np.testing.assert_allclose(matrix(part, "y"), matrix(part, "by hand"), atol=1.01e-4)


@pytest.mark.parametrize("docstring, said", [(None, "own."), ("\n    Mine (a paper).\n\n    More.\n    ", "Mine.")])
def test_a_router_is_told_by_its_first_line_or_its_name(monkeypatch, docstring, said):
    monkeypatch.setitem(ROUTERS, "own", None)
    del ROUTERS["own"]  # and again after the test

    class Own(ROUTERS["top_k"], name="own"):
        __doc__ = docstring

    parts = " ".join(Example({"router": "own"}).parts()).split()
    assert f" {said} The chosen places" in " ".join(parts)


def test_a_difference_from_the_sum_by_hand_is_said():
    example = Example({})
    y = example.output(example.routing)
    example.output = lambda routing: y + 1e-9
    assert "Largest difference: 1.0e-09." in example.all_tokens()


def test_the_experts_that_ran_are_counted_and_not_read_off_the_routing():
    """A bank that runs every expert on every token is found out."""
    example = Example({})
    example.bank.backend = "naive"
    assert example.ran().all()


def test_other_sizes_other_numbers_and_what_is_refused():
    assert invoke("explain", "--seed", 1)[1] != invoke("explain")[1]
    code, output = invoke("explain", "--set", "n_experts=6", "--set", "top_k=3", "--set", "router.renormalise=false")
    assert code == 0 and "12 of the 24 pairs" in " ".join(output.split())
    code, output = invoke("explain", "--set", "n_layers=3")
    assert code == 2 and "n_layers: explain has no such setting; it can set n_experts" in output
    assert invoke("explain", "--router", "nope")[0] == 2


def test_equal_probabilities_of_unequal_logits_are_chosen_alike_by_hand(monkeypatch):
    """Would have caught: two logits 0.06 that differ in their last bit, whose probabilities are both 0.5."""
    logits = [[0.06, np.nextafter(0.06, 1)]] * 4  # given, since the last bit of a product is not the same on every CPU
    monkeypatch.setattr(ROUTERS["top_k"], "scores", lambda self, x: Tensor(np.array(logits)))
    example = Example({"n_experts": 2, "top_k": 1})
    logits, probs = example.routing.logits.data[3], example.routing.probs.data[3]
    assert logits[0] < logits[1] and probs[0] == probs[1]
    assert "Largest difference from G: below 1e-12." in example.choice()


@pytest.mark.parametrize("router", ["expert_choice", "expert_threshold", "mixture_of_depths"])
def test_a_mean_of_experts_may_be_a_fraction(router):
    parts = Example({"router": router, "top_k": 1.5}).parts()
    assert "Experts of each token: 2, 2, 2, 2. Here K is a whole number, 2." in " ".join(parts[-1].split())


def test_a_layer_that_chooses_nothing_is_drawn_without_outputs():
    example = Example({"router": "remoe"}, seed=2)
    assert not example.routing.coverage.any()
    titles = [axes.get_title() for axes in draw(example).axes]
    assert titles[-2:] == ["gates\nof the chosen", "y, their\nsum"]


def test_sizes_beyond_the_memory_are_one_line():
    code, output = invoke("explain", "--set", "d_ff=2147483647", "--set", "n_experts=1000")
    assert code == 1 and output.startswith("Error: not enough memory: ") and output.count("\n") == 1


def test_step_waits_only_at_a_terminal():
    assert invoke("explain", "--step")[1].split() == invoke("explain")[1].split()


def test_the_figure_has_the_numbers_of_the_text(tmp_path, printed):
    assert invoke("explain", "--figure", tmp_path / "one.png")[0] == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    drawn = [[text.get_text() for text in axes.texts] for axes in draw(Example({})).axes]
    assert drawn[0] == [f"{value:.2f}" for value in matrix(printed[0], "x")[0]]
    assert drawn[1] == [f"{value:.2f}" for value in matrix(printed[1], "logits")[0]]
    assert [float(text) for text in drawn[3] if text != "."] == [g for g in matrix(printed[2], "G")[0] if g]
    np.testing.assert_allclose(np.array(drawn[6], float), matrix(printed[5], "y")[0], atol=0.0051)


def part_of(number, *args):
    """One part of the explanation."""
    return invoke("explain", *args)[1].split("## ")[number]


def test_it_says_what_makes_the_probabilities_and_shows_logits_only_where_there_are_some():
    for router, says, title in (
            ("top_k", "The softmax makes probabilities of the logits", "probabilities\n(softmax)"),
            ("sigmoid_bias", "The function sigmoid makes other scores of the logits", "probabilities"),
            ("hash", "It has no logits. Its probabilities:", "probabilities")):
        text = part_of(2, "--router", router)
        titles = [axes.get_title() for axes in draw(Example({"router": router})).axes]
        assert says in " ".join(text.split()) and ("softmax" in text) == (router == "top_k")
        assert ("\n    logits " in text) == ("logits\nof the router" in titles) == (router != "hash")
        assert title in titles


def test_a_probability_of_sigmoid_scores_is_a_score_divided_by_the_sum_of_its_row():
    text = part_of(2, "--router", "sigmoid_bias")
    scores = 1 / (1 + np.exp(-matrix(text, "logits")))
    np.testing.assert_allclose(matrix(text, "probability"), scores / scores.sum(axis=1, keepdims=True), atol=0.0051)


def test_where_the_load_is_even_no_expert_is_said_to_lose():
    text = part_of(7, "--router", "expert_choice")
    assert "so its gradient on the logits is 0" in text and "lose" not in text and "gradient  " not in text


def test_the_figure_goes_where_a_link_points_and_an_empty_name_is_refused(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "there.png")
    assert invoke("explain", "--figure", tmp_path / "link.png")[0] == 0
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "there.png").read_bytes()[1:4] == b"PNG"
    code, output = invoke("explain", "--figure", "")
    assert code == 2 and "the name is empty" in output
