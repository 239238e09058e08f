"""Tests of rail_kd.py. `pytest` runs everything, offline, on two CPU cores in two to three minutes.

The name of each test says the property it checks. Expected values come from a few lines of float64 numpy or from a formula that
can be checked by hand, never from the module itself. `pytest -k sample_layer_map` (or mean_pool, RailLoss, kd_loss,
combined_loss) is the check for one exercise of the course version, see the README.
"""
import contextlib
import csv
import dataclasses
import errno
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ["HF_HUB_OFFLINE"] = "1"                        # no test may reach for the network
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="rail-")  # nor leave anything in the user's cache

import datasets
import numpy as np
import pytest
import torch
import transformers

import rail_kd
from rail_kd import Settings, main, run

SOURCE = Path(rail_kd.__file__).read_text(encoding="utf-8")
COURSE_VERSION = "raise NotImplementedError" in SOURCE
CORE = ["sample_layer_map", "mean_pool", "RailLoss", "kd_loss", "combined_loss"]
has_solutions = pytest.mark.skipif("### BEGIN SOLUTION" not in SOURCE, reason="this is a course version of the module already")
has_notebook = pytest.mark.skipif(not (HERE / "tutorial.ipynb").exists(), reason="tutorial.ipynb does not lie beside the tests")
whole_module = pytest.mark.skipif(COURSE_VERSION, reason="needs all five core functions; solve the exercises first")


def close(actual, expected, why, tolerance=1e-5):
    """Asserts that two numbers or arrays agree, and says what was expected and why if they do not."""
    actual = actual.detach().double().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}: {why}"
    assert np.allclose(actual, expected, rtol=tolerance, atol=tolerance), f"got {actual}, expected {expected}: {why}"


def refuses(call, why, error=ValueError):
    """Asserts that a call raises the error, with a sentence and not just a code."""
    try:
        result = call()
    except error as raised:
        assert len(str(raised).split()) >= 4, f"the message should be a sentence, got: {raised}"
    else:
        pytest.fail(f"expected a {error.__name__}, got {result!r}: {why}")


# ---------------------------------------------------------------------------------------------------------------------
# The random map
# ---------------------------------------------------------------------------------------------------------------------

def draws(n, m, count, **more):
    rng = np.random.default_rng(0)
    return np.array([rail_kd.sample_layer_map(n, m, rng, **more) for _ in range(count)])


@pytest.mark.parametrize("n, m, last", [(12, 4, False), (12, 6, False), (24, 6, False), (6, 2, False), (4, 4, False), (12, 4, True),
                                        (6, 1, True), (6, 6, True)])
def test_sample_layer_map_is_distinct_ascending_and_in_range(n, m, last):
    found = draws(n, m, 200, include_last=last)
    k, highest = (m, n) if last else (m - 1, n - 1)
    assert found.shape == (200, k), f"one teacher layer for each of the student's {k} layers, got shape {found.shape[1:]}"
    assert np.issubdtype(found.dtype, np.integer), "layers are whole numbers"
    assert (np.diff(found, axis=1) > 0).all(), ("each draw must be sorted ascending and without repeats, so that deeper student "
                                                "layers learn from deeper teacher layers")
    assert found.min() >= 1 and found.max() <= highest, f"layers count from 1 and the candidates end at {highest}: 0 would be the embeddings"


def test_sample_layer_map_is_uniform_over_all_subsets():
    subsets = list(itertools.combinations(range(1, 6), 3))  # 6 -> 4 layers: 3 of 5 candidates, 10 subsets
    counts = dict.fromkeys(subsets, 0)
    for drawn in draws(6, 4, 10_000):
        counts[tuple(drawn.tolist())] += 1
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    # 33.7 is exceeded by chance once in 10,000 seeds (9 degrees of freedom); a draw with replacement that is mended scores > 500
    assert chi_square < 33.7, f"every subset must be equally likely; chi-square {chi_square:.0f} over {counts}"


@pytest.mark.parametrize("n, m", [(12, 4), (12, 6)])
def test_sample_layer_map_has_the_evenly_spaced_map_as_its_mean(n, m):
    expected = [i * n / m for i in range(1, m)]  # order statistics of a draw without replacement: i (N + 1) / (k + 1)
    close(draws(n, m, 20_000).mean(axis=0), expected, "the i-th smallest layer is i * n / m on average", tolerance=0.02)


def test_sample_layer_map_leaves_layers_out_as_often_as_the_formula_says():
    left_out = 1 - np.mean([5 in drawn for drawn in draws(12, 4, 20_000)])
    close(left_out, 1 - 3 / 11, "a candidate is left out of one draw with probability 1 - k/(n-1)", tolerance=0.015)


def test_sample_layer_map_uses_the_given_generator_and_no_global_one():
    np.random.seed(1)
    torch.manual_seed(1)
    first = rail_kd.sample_layer_map(24, 8, np.random.default_rng(5)).tolist()
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    np.random.seed(2)
    torch.manual_seed(2)
    assert first == rail_kd.sample_layer_map(24, 8, np.random.default_rng(5)).tolist(), \
        "the same generator must give the same map, whatever the global random state is"
    np.random.seed(1)
    torch.manual_seed(1)
    rail_kd.sample_layer_map(24, 8, np.random.default_rng(6))
    assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()), "a draw must not touch the global state"


@pytest.mark.parametrize("n, m, last, why", [(4, 5, False, "more student than teacher layers"), (4, 5, True, "more student than "
                                             "teacher layers"), (12, 1, False, "no intermediate layer"), (12, 0, True, "no layer")])
def test_sample_layer_map_refuses_impossible_numbers(n, m, last, why):
    refuses(lambda: rail_kd.sample_layer_map(n, m, np.random.default_rng(0), last), why)


@whole_module
def test_random_map_of_an_epoch_depends_on_seed_and_epoch_alone():
    def maps(**settings):
        return [rail_kd.choose_layers(Settings(**settings), 24, 8, epoch, step=epoch).tolist() for epoch in range(1, 30)]
    assert maps(seed=3) == maps(seed=3, batch_size=7, task="mnli", epochs=2, variant="concat", learning_rate=1.0)
    assert maps(seed=3) != maps(seed=4)
    assert len({tuple(drawn) for drawn in maps()}) > 20, "a fresh draw each epoch"


@whole_module
def test_maps_of_successive_epochs_are_uniform_too():
    counts = np.zeros(12)
    for seed in range(40):
        for epoch in range(1, 51):
            counts[rail_kd.choose_layers(Settings(seed=seed), 12, 4, epoch)] += 1
    expected = 2000 * 3 / 11
    assert ((counts[1:] - expected) ** 2 / (expected * (1 - 3 / 11))).max() < 16, counts  # four standard deviations


@whole_module
def test_resample_step_draws_anew_in_each_step_and_resample_epoch_does_not():
    def maps(resample):
        return {tuple(rail_kd.choose_layers(Settings(resample=resample), 24, 8, 1, step)) for step in range(50)}
    assert len(maps("epoch")) == 1 and len(maps("step")) > 40


@whole_module
@pytest.mark.parametrize("mapping, n, m, last, expected", [
    ("skip", 12, 4, False, [3, 6, 9]), ("skip", 12, 6, False, [2, 4, 6, 8, 10]), ("skip", 12, 4, True, [3, 6, 9, 12]),
    ("last", 12, 4, False, [9, 10, 11]), ("last", 12, 4, True, [9, 10, 11, 12]), ("attention", 6, 3, False, [1, 2, 3, 4, 5]),
    ("attention", 6, 3, True, [1, 2, 3, 4, 5, 6])])
def test_fixed_maps_are_those_of_the_other_methods(mapping, n, m, last, expected):
    settings = Settings(mapping=mapping, include_last=last)
    assert rail_kd.choose_layers(settings, n, m, epoch=1).tolist() == expected


def test_none_and_finetune_have_no_map():
    assert all(rail_kd.choose_layers(Settings(mapping=mapping), 12, 1, 1) is None for mapping in ("none", "finetune"))


# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------

def test_mean_pool_is_the_mean_over_real_tokens():
    hidden = np.random.default_rng(0).normal(size=(3, 4, 5))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])  # padding may stand on either side
    expected = [hidden[b][mask[b] == 1].mean(axis=0) for b in range(3)]
    close(rail_kd.mean_pool(torch.tensor(hidden), torch.tensor(mask)), expected, "the mean of the token vectors whose mask is 1")


def test_mean_pool_does_not_change_with_the_amount_or_the_content_of_padding():
    hidden, mask = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3)
    alone = rail_kd.mean_pool(hidden, mask)
    for filler in (0.0, 7.0, math.nan, math.inf):
        padded = torch.cat([hidden, torch.full((2, 5, 4), filler)], dim=1)
        close(rail_kd.mean_pool(padded, torch.cat([mask, torch.zeros(2, 5)], dim=1)), alone.numpy(),
              f"five padded positions holding {filler} must not move the mean; is the sum divided by L, or is padding added in? "
              "(0 * nan is nan: where padding may hold anything, multiplying by the mask is not enough)")


def test_mean_pool_keeps_the_precision_of_float32_on_half_precision_input():
    hidden = torch.full((1, 512, 2), 1.001).to(torch.bfloat16)
    pooled = rail_kd.mean_pool(hidden, torch.ones(1, 512))
    assert pooled.dtype == torch.float32
    close(pooled, hidden[0, :1].double().numpy(), "512 equal vectors have that vector as their mean; sum them in float32")


@pytest.mark.parametrize("hidden, mask", [((2, 3, 4), (2, 4)), ((2, 3, 4), (3,)), ((3, 4), (3, 4))])
def test_mean_pool_refuses_shapes_that_do_not_belong_together(hidden, mask):
    refuses(lambda: rail_kd.mean_pool(torch.zeros(hidden), torch.ones(mask)), "(B, L, d) and (B, L)")


def rail_inputs(k=3, candidates=None, batch=5, d_t=8, d_s=6):
    rng = np.random.default_rng(1)
    return rng.normal(size=(batch, k, d_s)), rng.normal(size=(batch, candidates or k, d_t))


def rail_expected(loss, student, teacher):
    """The definition of method, in float64 numpy, one sentence and one pair at a time."""
    def unit(x):
        return x / np.linalg.norm(x)

    total = []
    for s, t in zip(projected(loss, loss.student_proj, student), projected(loss, loss.teacher_proj, teacher)):
        if loss.variant == "attention":
            scores = [np.exp([a @ b for b in t]) for a in s]
            t = [sum(w * b for w, b in zip(score / score.sum(), t)) for score in scores]
        total.append(np.mean([np.sum((unit(a) - unit(b)) ** 2) for a, b in zip(s, t)]))
    return np.mean(total)


def projected(loss, proj, pooled):
    """(B, k, d) -> (B, k, u), concat (B, 1, u): what one side looks like before it is normalised."""
    def linear(module, x):
        bias = 0 if module.bias is None else module.bias.detach().double().numpy()
        return module.weight.detach().double().numpy() @ x + bias

    if loss.variant == "concat":
        pooled = pooled.reshape(len(pooled), 1, -1)
    maps = list(proj) if isinstance(proj, torch.nn.ModuleList) else [proj] * pooled.shape[1]
    vectors = np.array([[linear(module, x) for module, x in zip(maps, row)] for row in pooled])
    return vectors - vectors.mean(axis=0) if loss.centred else vectors


@pytest.mark.parametrize("projection", [[], ["no-bias"], ["centred"], ["centred", "no-bias", "frozen-teacher"]])
@pytest.mark.parametrize("variant, candidates", [("layerwise", 3), ("concat", 3), ("attention", 7)])
def test_RailLoss_is_the_mean_squared_distance_of_projected_unit_vectors(variant, candidates, projection):
    torch.manual_seed(0)
    loss = rail_kd.RailLoss(8, 6, 3, variant, projection_size=4, projection=projection)
    student, teacher = rail_inputs(candidates=candidates)
    close(loss(torch.tensor(student).float(), torch.tensor(teacher).float()), rail_expected(loss, student, teacher),
          "project both sides, divide by the L2 norm, squared distance, mean over pairs and batch")


def test_RailLoss_is_0_for_equal_2_for_orthogonal_and_4_for_opposite_directions():
    loss = rail_kd.RailLoss(2, 2, 1, projection_size=2)
    with torch.no_grad():
        for proj in (loss.teacher_proj, loss.student_proj):
            proj.weight.copy_(torch.eye(2))
            if proj.bias is not None:
                proj.bias.zero_()
    one = torch.tensor([[[3.0, 4.0]]])
    for other, expected in ((7 * one, 0), (torch.tensor([[[-4.0, 3.0]]]), 2), (-one, 4)):
        close(loss(one, other), expected, "two unit vectors are at a squared distance of 2 - 2 cos, whatever their lengths were")


def test_RailLoss_stays_within_0_and_4_and_ignores_the_size_of_the_batch():
    torch.manual_seed(0)
    for variant in ("layerwise", "concat"):
        loss = rail_kd.RailLoss(8, 6, 3, variant)
        student, teacher = torch.randn(50, 3, 6) * 100, torch.randn(50, 3, 8)
        value = loss(student, teacher).item()
        assert 0 <= value <= 4, f"{variant}: {value}; with a_i = 1/k the loss of unit vectors lies in [0, 4]"
        close(loss(student.repeat(2, 1, 1), teacher.repeat(2, 1, 1)), value, "a mean over the batch does not grow with the batch")


@pytest.mark.parametrize("variant", ["layerwise", "concat", "attention"])
def test_RailLoss_gives_gradients_to_student_and_both_projections_but_not_to_a_frozen_teacher(variant):
    torch.manual_seed(0)
    loss = rail_kd.RailLoss(8, 6, 3, variant)
    student, teacher = (torch.tensor(x).float() for x in rail_inputs())
    student.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0, "the student must learn from the loss: is it detached?"
    for proj in ("teacher_proj", "student_proj"):
        assert getattr(loss, proj).weight.grad.abs().sum() > 0, f"{proj} is trained with the student"
    assert teacher.grad is None


def test_projections_of_RailLoss_are_registered_so_they_are_trained_moved_and_saved():
    loss = rail_kd.RailLoss(8, 6, 3)
    names = {name.split(".")[0] for name, _ in loss.named_parameters()}
    assert names == {"teacher_proj", "student_proj"} == {name.split(".")[0] for name in loss.state_dict()}
    assert all(p.dtype == torch.float64 for p in loss.double().parameters())
    assert (loss.teacher_proj.out_features, loss.student_proj.in_features) == (128, 6)
    assert rail_kd.RailLoss(8, 6, 3, "concat").teacher_proj.in_features == 24
    refuses(lambda: rail_kd.RailLoss(8, 6, 3, "sideways"), "an unknown variant")
    refuses(lambda: rail_kd.RailLoss(8, 6, 0), "no pairs")


def test_separate_projections_give_each_pair_of_RailLoss_its_own_map_on_both_sides():
    torch.manual_seed(0)
    loss = rail_kd.RailLoss(8, 6, 3, projection_size=4, projection=["separate"])
    student, teacher = rail_inputs()
    close(loss(torch.tensor(student).float(), torch.tensor(teacher).float()), rail_expected(loss, student, teacher), "pair i has map i")
    assert sum(p.numel() for p in loss.parameters()) == 3 * (4 * 8 + 4 + 4 * 6 + 4)
    assert len(torch.unique(torch.stack([linear.weight for linear in loss.teacher_proj]), dim=0)) == 3
    for variant in ("concat", "attention"):
        refuses(lambda: rail_kd.RailLoss(8, 6, 3, variant, projection=["separate"]), "there are no pairs of one layer each")
    refuses(lambda: rail_kd.RailLoss(8, 6, 3, projection=["crooked"]), "an unknown change")
    field, = [field for field in dataclasses.fields(Settings) if field.name == "projection"]
    assert rail_kd.RailLoss(8, 6, 3, projection=field.metadata["choices"]), "what --projection offers, RailLoss knows"


def test_centring_takes_the_trivial_answer_away_from_RailLoss():
    """A map that sends all sentences in one direction, here by a large bias, has a loss of 0; centred, the bias has no effect."""
    student, teacher = (torch.tensor(x).float() for x in rail_inputs())
    values = {}
    for projection in ([], ["centred"]):
        torch.manual_seed(0)
        loss = rail_kd.RailLoss(8, 6, 3, projection_size=4, projection=projection)
        before = loss(student, teacher).item()
        with torch.no_grad():
            for proj in (loss.teacher_proj, loss.student_proj):
                proj.bias += 1e4
        values[bool(projection)] = before, loss(student, teacher).item()
    assert values[False][1] < 1e-4 < values[False][0]
    close(values[True][1], values[True][0], "a constant vector is taken off again", tolerance=1e-2)


@pytest.mark.parametrize("variant, projection", [
    ("layerwise", []), ("layerwise", ["centred"]), ("layerwise", ["separate"]), ("concat", []), ("concat", ["centred"])])
def test_projected_cosine_is_the_mean_over_all_pairs_of_different_sentences(variant, projection):
    torch.manual_seed(0)
    loss, (_, teacher) = rail_kd.RailLoss(8, 6, 3, variant, projection_size=4, projection=projection), rail_inputs()
    vectors = projected(loss, loss.teacher_proj, teacher)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = np.mean([vectors[a, i] @ vectors[b, i] for i in range(vectors.shape[1]) for a in range(5) for b in range(5) if a != b])
    close(loss.projected_cosine(torch.tensor(teacher).float()), expected, "cosine of sentence a and b in pair i, a != b")
    if not projection:
        same = torch.ones(5, 3, 8)
        close(loss.projected_cosine(same), 1.0, "one direction for all sentences is the trivial answer")
        close(loss.projected_cosine(same[:1]), 0.0, "one sentence alone has no other to be compared with")


@pytest.mark.parametrize("variant", ["layerwise", "concat"])
def test_RailLoss_refuses_numbers_of_pairs_that_do_not_match(variant):
    loss = rail_kd.RailLoss(8, 6, 3, variant)
    for student, teacher in (((5, 2, 6), (5, 3, 8)), ((5, 3, 6), (5, 2, 8)), ((5, 3, 6), (1, 3, 8))):
        refuses(lambda: loss(torch.ones(student), torch.ones(teacher)), f"{student} and {teacher} are not 3 pairs a sentence")


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_loss_is_T_squared_times_KL_from_teacher_to_student(temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(4, 3)), 3 * rng.normal(size=(4, 3))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = temperature ** 2 * np.mean(np.sum(p * np.log(p / q), axis=1))
    close(rail_kd.kd_loss(torch.tensor(student), torch.tensor(teacher), temperature), expected,
          "T^2 * sum_c p_t log(p_t / p_s), mean over the batch; the student's log-probabilities are F.kl_div's first argument")


def test_kd_loss_is_a_mean_over_the_batch_and_not_over_batch_and_classes():
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    two = rail_kd.kd_loss(student, teacher, 1.0)
    never = torch.full((1, 8), -100.0)  # eight more classes that neither of them considers
    ten = rail_kd.kd_loss(torch.cat([student, never], 1), torch.cat([teacher, never], 1), 1.0)
    close(ten, float(two), "classes of probability 0 change nothing; reduction='mean' would divide by the number of classes")
    close(rail_kd.kd_loss(student.repeat(7, 1), teacher.repeat(7, 1), 1.0), float(two), "nor does repeating the batch")


def test_kd_loss_gradient_keeps_its_size_when_the_temperature_rises():
    student, teacher = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True), torch.tensor([[-1.0, 0.5, 0.2]])
    rail_kd.kd_loss(student, teacher, 100.0).backward()
    centred = (student - student.mean() - teacher + teacher.mean()).detach() / 3  # its limit for a high T (Hinton et al. 2015)
    close(student.grad, centred.numpy(), "for high T the gradient is (z_s - z_t) / C; without T^2 it would be 10,000 times less",
          tolerance=0.02)


def test_kd_loss_is_zero_exactly_where_the_distributions_agree_and_is_not_symmetric():
    a, b = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    close(rail_kd.kd_loss(a, a + 5, 2.0), 0.0, "logits that differ by a constant are the same distribution")
    assert abs((rail_kd.kd_loss(a, b, 1.0) - rail_kd.kd_loss(b, a, 1.0)).item()) > 0.01, "KL(teacher || student) is not KL(student || teacher)"


def test_kd_loss_of_a_regression_is_the_mean_squared_error():
    close(rail_kd.kd_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.0]]), 3.0), 4.5, "(3^2 + 0^2) / 2, without T")


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_kd_loss_refuses_a_temperature_that_is_not_positive(temperature):
    refuses(lambda: rail_kd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature), "the temperature must be a positive number")


def test_kd_loss_refuses_logits_of_different_shape():
    refuses(lambda: rail_kd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 4), 1.0), "another number of classes")
    refuses(lambda: rail_kd.kd_loss(torch.zeros(2, 3), torch.zeros(1, 3), 1.0), "another batch size")


def test_combined_loss_is_the_weighted_sum():
    close(rail_kd.combined_loss(torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0), (0.2, 0.3, 0.5)), 53.2,
          "0.2 * 1 + 0.3 * 10 + 0.5 * 100")
    close(rail_kd.combined_loss(3.0, 6.0, 9.0, [1 / 3] * 3), 6.0, "a third each")


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.5, 0.5, 0.5), (1.2, -0.2, 0.0), (math.nan, 0.5, 0.5), (0.3, 0.3, 0.3)])
def test_combined_loss_refuses_weights_that_are_not_three_shares(weights):
    refuses(lambda: rail_kd.combined_loss(1.0, 1.0, 1.0, weights), "three weights >= 0 that sum to 1")


@whole_module
def test_objective_of_none_rescales_and_of_finetune_is_CE_alone():
    assert rail_kd.objective_weights("none", [0.2, 0.6, 0.2]) == pytest.approx([0.25, 0.75, 0])
    assert rail_kd.objective_weights("finetune", [0.2, 0.6, 0.2]) == [1, 0, 0]
    assert rail_kd.objective_weights("random", [0.2, 0.6, 0.2]) == [0.2, 0.6, 0.2]
    refuses(lambda: rail_kd.objective_weights("none", [0, 0, 1]), "nothing would be left to learn from")


# ---------------------------------------------------------------------------------------------------------------------
# Teacher and student
# ---------------------------------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=60, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=24, max_position_embeddings=40)
FAMILIES = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL)),
    "electra": lambda: transformers.ElectraForSequenceClassification(transformers.ElectraConfig(embedding_size=8, **SMALL)),
    "mpnet": lambda: transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**SMALL)),
    "deberta-v2": lambda: transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**SMALL)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
        vocab_size=60, dim=16, n_layers=6, n_heads=2, hidden_dim=24, max_position_embeddings=40)),
}


def tokens(batch=3, length=7):
    ids = torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", FAMILIES)
def test_student_is_cut_from_evenly_spaced_layers_and_reloads(family, tmp_path):
    torch.manual_seed(0)
    teacher = rail_kd.freeze(FAMILIES[family]())
    student = rail_kd.build_student(teacher, 3).eval()
    assert student.config.num_hidden_layers == 3 and all(p.requires_grad for p in student.parameters())
    layers = {n: next(p for p in model.modules() if isinstance(p, torch.nn.ModuleList) and len(p) == n)
              for model, n in ((teacher, 6), (student, 3))}
    for position, origin in enumerate([2, 4, 6]):
        for a, b in zip(layers[3][position].parameters(), layers[6][origin - 1].parameters()):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), "a copy, not a shared tensor"
    inside = {id(p) for stack in layers.values() for p in stack.parameters()}
    for (name, a), (other, b) in zip(*([(k, p) for k, p in model.named_parameters() if id(p) not in inside]
                                       for model in (student, teacher))):
        assert name == other and torch.equal(a, b), f"{name}: embeddings and classifier are copied"
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**tokens()).logits, student(**tokens()).logits)


def test_student_with_all_layers_is_its_teacher():
    torch.manual_seed(0)
    teacher = rail_kd.freeze(FAMILIES["bert"]())
    assert torch.equal(rail_kd.build_student(teacher, 6).eval()(**tokens()).logits, teacher(**tokens()).logits)


def test_student_can_not_be_cut_where_that_is_impossible():
    teacher = FAMILIES["bert"]()
    refuses(lambda: rail_kd.build_student(teacher, 7), "more layers than the teacher")
    refuses(lambda: rail_kd.build_student(teacher, 0), "no layers")
    albert = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(embedding_size=8, **SMALL))
    refuses(lambda: rail_kd.build_student(albert, 3), "ALBERT's layers are all the same one")


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_with_permuted_label_names_gives_its_logits_in_the_order_of_the_data(family):
    torch.manual_seed(0)
    teacher = FAMILIES[family]()
    teacher = rail_kd.freeze(type(teacher)(type(teacher.config)(**teacher.config.to_dict() | {
        "id2label": {0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}, "label2id": None})))
    before = teacher(**tokens()).logits
    rail_kd.use_labels_of(teacher, datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]))
    close(teacher(**tokens()).logits, before[:, [1, 2, 0]].numpy(), "column i must be the data's class i")
    assert teacher.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert teacher.config.label2id["neutral"] == 1


def test_unknown_label_names_leave_the_logits_alone():
    teacher = rail_kd.freeze(FAMILIES["bert"]())
    before = teacher(**tokens()).logits
    rail_kd.use_labels_of(teacher, datasets.ClassLabel(names=["negative", "positive"]))
    assert torch.equal(teacher(**tokens()).logits, before) and teacher.config.id2label == {0: "negative", 1: "positive"}


def test_what_a_model_was_for_before_does_not_stay_in_its_configuration():
    teacher = FAMILIES["bert"]()
    teacher.config.problem_type = "regression"  # a pipeline would show logits, not probabilities
    student = rail_kd.build_student(teacher, 3)
    for model in (teacher, student):
        rail_kd.use_labels_of(model, datasets.ClassLabel(names=["a", "b", "c"]))
        assert model.config.problem_type == "single_label_classification"
        rail_kd.use_labels_of(model, datasets.Value("float32"))
        assert model.config.problem_type == "regression"


def test_frozen_teacher_has_neither_dropout_nor_gradients():
    teacher = rail_kd.freeze(FAMILIES["bert"]().train())  # BertConfig's dropout is 0.1
    assert torch.equal(teacher(**tokens()).logits, teacher(**tokens()).logits)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_layer_j_is_the_output_of_layer_j_and_not_the_embeddings():
    if COURSE_VERSION:
        pytest.skip("needs mean_pool; solve that exercise first")
    teacher = rail_kd.freeze(FAMILIES["bert"]())
    seen = []
    for layer in teacher.bert.encoder.layer:  # what each layer really returned, caught by a hook
        layer.register_forward_hook(lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output))
    _, pooled = rail_kd.teacher_answers(teacher, tokens(), [1, 4, 6])
    for position, j in enumerate([1, 4, 6]):
        close(pooled[:, position], seen[j - 1].mean(dim=1).numpy(), f"the pooled output of layer {j}, counted from 1")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

GLUE_COLUMNS = {"cola": ["sentence"], "sst2": ["sentence"], "mrpc": ["sentence1", "sentence2"], "stsb": ["sentence1", "sentence2"],
                "qqp": ["question1", "question2"], "mnli": ["premise", "hypothesis"], "qnli": ["question", "sentence"],
                "rte": ["sentence1", "sentence2"], "wnli": ["sentence1", "sentence2"]}
GLUE_LABELS = {"cola": ["unacceptable", "acceptable"], "sst2": ["negative", "positive"], "mrpc": ["not_equivalent", "equivalent"],
               "stsb": None, "qqp": ["not_duplicate", "duplicate"], "mnli": ["entailment", "neutral", "contradiction"],
               "qnli": ["entailment", "not_entailment"], "rte": ["entailment", "not_entailment"],
               "wnli": ["not_entailment", "entailment"]}


@pytest.fixture
def glue(monkeypatch):
    """A stand-in for the hub with GLUE's own columns, splits and label names; as there, the test labels are all -1."""
    def load_dataset(path, name):
        assert path == "nyu-mll/glue"
        label = datasets.Value("float32") if GLUE_LABELS[name] is None else datasets.ClassLabel(names=GLUE_LABELS[name])
        features = datasets.Features({c: datasets.Value("string") for c in GLUE_COLUMNS[name]} | {"label": label, "idx": datasets.Value("int32")})

        def split(kind, labels):
            return datasets.Dataset.from_dict({c: [f"{kind} {c} {i}" for i in range(6)] for c in GLUE_COLUMNS[name]}
                                              | {"label": labels, "idx": list(range(6))}, features=features)
        good = [0.5, 1.5, 2.5, 3.0, 4.0, 5.0] if GLUE_LABELS[name] is None else [i % len(GLUE_LABELS[name]) for i in range(6)]
        names = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
        tests = [n.replace("validation", "test") for n in names]
        return datasets.DatasetDict({"train": split("train", good)} | {n: split(n, good) for n in names}
                                    | {n: split(n, [-1] * 6) for n in tests})
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("task", GLUE_COLUMNS)
def test_glue_tasks_have_their_columns_labels_and_validation_splits_and_never_the_test_split(task, glue):
    train, validation = rail_kd.load_task(Settings(task=task))
    assert list(validation) == (["matched", "mismatched"] if task == "mnli" else [""])
    splits = {"train": train} | {f"validation{'_' * bool(name)}{name}": data for name, data in validation.items()}
    for kind, data in splits.items():
        wanted = ["sentence1", "sentence2"][:len(GLUE_COLUMNS[task])]
        assert data.column_names == [*wanted, "label"] and len(data) == 6
        assert [data[0][name] for name in wanted] == [f"{kind} {column} 0" for column in GLUE_COLUMNS[task]]
        assert min(data["label"]) >= 0
        assert getattr(data.features["label"], "names", None) == GLUE_LABELS[task]
    assert len(rail_kd.load_task(Settings(task=task, max_train_examples=4))[0]) == 4


def write_csv(path, rows, columns=("sentence", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def own(tmp_path, train, validation, columns=("sentence", "label")):
    return Settings(train_file=write_csv(tmp_path / "train.csv", train, columns),
                    validation_file=write_csv(tmp_path / "validation.csv", validation, columns))


def test_own_csv_file_keeps_texts_that_look_like_missing_values(tmp_path):
    rows = [("NA", "good"), ("None", "bad"), ("null, \"they\" said", "good"), ("café", "bad")]
    train, validation = rail_kd.load_task(own(tmp_path, rows, rows[:2]))
    assert train["sentence1"][:] == [text for text, _ in rows]
    assert train.features["label"].names == ["bad", "good"] and train["label"][:] == [1, 0, 1, 0]
    assert validation[""]["label"][:] == [1, 0]


def test_own_labels_may_be_numbers_names_or_floats_for_a_regression(tmp_path):
    train, _ = rail_kd.load_task(own(tmp_path, [("a", 10), ("b", 2), ("c", 2)], [("d", 10)]))
    assert train.features["label"].names == ["2", "10"] and train["label"][:] == [1, 0, 0]
    train, validation = rail_kd.load_task(own(tmp_path, [("a", 1), ("b", 2.5)], [("d", 3)]))
    assert train.features["label"].dtype == "float32" and train["label"][:] == [1.0, 2.5] and validation[""]["label"][:] == [3.0]
    # a decimal in the 10,001st row still makes a regression
    train, _ = rail_kd.load_task(own(tmp_path, [("a", 1)] * 10_050 + [("b", 2.5)], [("d", 3)]))
    assert train.features["label"].dtype == "float32"


def test_own_json_lines_hold_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"sentence1": f"a{i}", "sentence2": f"b{i}", "label": ["no", "yes"][i % 2], "id": i}) + "\n"
                            for i in range(4)), encoding="utf-8")
    train, _ = rail_kd.load_task(Settings(train_file=str(path), validation_file=str(path)))
    assert train.column_names == ["sentence1", "sentence2", "label"] and train[1] == {"sentence1": "a1", "sentence2": "b1", "label": 1}


def test_labels_of_a_further_file_are_found_by_name_or_number(tmp_path):
    feature = datasets.ClassLabel(names=["negative", "positive"])
    for labels in (["positive", "negative"], [1, 0]):
        data = rail_kd.read_file(write_csv(tmp_path / "e.csv", [("a", labels[0]), ("b", labels[1])]))
        assert rail_kd.set_labels(data, feature, "e.csv")["label"][:] == [1, 0]
    data = rail_kd.read_file(write_csv(tmp_path / "f.csv", [("a", "neutral")]))
    refuses(lambda: rail_kd.set_labels(data, feature, "f.csv"), "an unknown label")


@pytest.fixture(scope="module")
def toy():
    """(validation, student's training set, teacher's training set) of the toy with its default sizes."""
    return rail_kd.toy_sentences(0, [1000, 1000, 8000])


def test_toy_sentences_are_distinct_balanced_and_made_from_the_seed_alone(toy):
    texts = [text for data in toy for text in data["sentence1"]]
    assert len(set(texts)) == len(texts) == 10_000, "no sentence stands twice, so none of the validation was trained on"
    assert 0.45 < np.mean(toy[2]["label"]) < 0.55
    np.random.seed(3)
    assert rail_kd.toy_sentences(0, [5])[0][:] == toy[0][:5] != rail_kd.toy_sentences(1, [5])[0][:]


def test_toy_labels_follow_the_main_clause(toy):
    """An independent reading of the grammar, by a regular expression."""
    for row in toy[0]:
        text = row["sentence1"].lower().rstrip(".")
        if text.startswith("although"):
            clause = text.split(", ")[1]
        elif re.search(", (but|yet) ", text):
            clause = re.split(", (?:but|yet) ", text)[1]
        else:
            clause = text.split(", although ")[0]
        positive = clause.split()[-1] in "clever moving fresh funny warm sharp gripping charming".split()
        negated = any(word in clause.split() for word in ("not", "never", "hardly"))
        assert row["label"] == int(positive != negated), row


def test_toy_words_alone_do_not_decide_the_label(toy):
    """Logistic regression on bags of words, trained to convergence on the teacher's 8,000 sentences."""
    words = {word: i for i, word in enumerate(sorted({w for t in toy[2]["sentence1"] for w in re.findall("[a-z]+", t.lower())}))}

    def bags(data):
        x = torch.zeros(len(data), len(words))
        for row, text in enumerate(data["sentence1"]):
            for word in re.findall("[a-z]+", text.lower()):
                x[row, words[word]] += 1
        return x, torch.tensor(data["label"][:])
    (x, y), (x_valid, y_valid) = bags(toy[2]), bags(toy[0])
    linear = torch.nn.Linear(len(words), 2)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(linear(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)
    accuracy = float((linear(x_valid).argmax(1) == y_valid).float().mean())
    assert 0.5 < accuracy < 0.65, accuracy


def test_toy_student_has_a_fifth_of_its_labels_wrong_and_the_teacher_none(toy, monkeypatch):
    made = {(0, 1000, 1000, 8000): toy}  # the default sizes, which take a second to make anew
    monkeypatch.setattr(rail_kd, "toy_sentences", lambda seed, sizes: made[(seed, *sizes)])
    train, validation = rail_kd.load_task(Settings(task="toy"))
    assert train["sentence1"][:] == toy[1]["sentence1"][:] and validation[""][:] == toy[0][:]
    assert np.mean(np.array(train["label"]) != np.array(toy[1]["label"])) == 0.2
    assert rail_kd.load_task(Settings(task="toy"), for_teacher=True)[0][:] == toy[2][:]


def encoded(sentences, labels=None, second=None, max_length=40):
    data = {"sentence1": sentences} | ({"sentence2": second} if second else {}) | {"label": labels or [0] * len(sentences)}
    model, tokenizer = rail_kd.toy_teacher(0, num_layers=2)
    return rail_kd.encode(datasets.Dataset.from_dict(data), tokenizer, model, max_length), tokenizer, model


def test_pairs_are_encoded_as_pairs_and_cut_to_max_length():
    data, tokenizer, _ = encoded(["the plot"], second=["is dull"])
    assert tokenizer.convert_ids_to_tokens(data[0]["input_ids"]) == "[CLS] the plot [SEP] is dull [SEP]".split()
    assert data[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert len(encoded(["the plot"] * 2, second=["is dull"] * 2, max_length=5)[0][0]["input_ids"]) == 5


def test_columns_that_a_model_does_not_know_are_left_out():
    _, tokenizer, _ = encoded(["the plot"])
    data = rail_kd.encode(datasets.Dataset.from_dict({"sentence1": ["the plot"], "label": [0]}), tokenizer, FAMILIES["distilbert"](), 40)
    assert sorted(data.column_names) == ["attention_mask", "input_ids", "label"]


@pytest.mark.parametrize("generator", [None, 3])
def test_every_example_is_seen_once_an_epoch_with_little_padding(generator):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(4, 6, 8003).astype(int), 3, 128)  # the lengths of sentences: 24 on average, a long tail
    batches = rail_kd.length_batches(lengths.tolist(), 32, generator and torch.Generator().manual_seed(generator))
    assert sorted(itertools.chain(*batches)) == list(range(8003)) and {len(batch) for batch in batches} == {32, 3}
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert 1 - lengths.sum() / padded < 0.05
    if generator:
        longest = [lengths[batch].max() for batch in batches]
        assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.5, "not from long to short"
        assert batches != rail_kd.length_batches(lengths.tolist(), 32, torch.Generator().manual_seed(4))


def test_a_batch_is_padded_to_its_own_longest_sentence():
    data, tokenizer, _ = encoded(["the plot is dull", "the plot", "the plot is very very very very dull"], [0, 1, 1])
    for rows, batch in rail_kd.batches_on("cpu", data, tokenizer, [[1, 0], [2]]):
        assert batch["input_ids"].shape == (len(rows), max(len(data[row]["input_ids"]) for row in rows))
        assert batch["attention_mask"].sum(1).tolist() == [len(data[row]["input_ids"]) for row in rows]
        assert batch["labels"].tolist() == [data[row]["label"] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The score
# ---------------------------------------------------------------------------------------------------------------------

def test_metrics_of_classes_agree_with_the_confusion_matrix():
    labels = np.array([1] * 6 + [0] * 14)
    predicted = np.array([1, 1, 1, 1, 0, 0] + [1] * 3 + [0] * 11)  # TP 4, FN 2, FP 3, TN 11
    logits = np.eye(2)[predicted]
    assert rail_kd.compute_metrics(logits, labels, "mrpc")["accuracy"] == pytest.approx(15 / 20)
    assert rail_kd.compute_metrics(logits, labels, "qqp")["f1"] == pytest.approx(2 * 4 / (2 * 4 + 3 + 2))
    mcc = (4 * 11 - 3 * 2) / math.sqrt((4 + 3) * (4 + 2) * (11 + 3) * (11 + 2))
    assert rail_kd.compute_metrics(logits, labels, "cola")["matthews_correlation"] == pytest.approx(mcc)
    for task, names in {"cola": ["matthews_correlation"], "mrpc": ["accuracy", "f1"], "mnli": ["accuracy"], None: ["accuracy"]}.items():
        assert [*rail_kd.compute_metrics(logits, labels, task)] == [*names, "eval_loss", "ece"]


def test_metrics_of_a_regression_handle_ties():
    output, labels = np.array([1.0, 2.0, 2.0, 4.0, 9.0]), np.array([0.0, 1.0, 3.0, 3.0, 3.0])

    def slow_ranks(x):  # the definition: smaller values, plus the middle of the equal ones
        return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]
    found = rail_kd.compute_metrics(output[:, None], labels, "stsb")
    assert found["pearson"] == pytest.approx(np.corrcoef(output, labels)[0, 1])
    assert found["spearmanr"] == pytest.approx(np.corrcoef(slow_ranks(output), slow_ranks(labels))[0, 1])
    assert found["spearmanr"] == pytest.approx(7 / math.sqrt(9.5 * 8), abs=1e-9)  # by hand: ranks 1 2.5 2.5 4 5 and 1 2 4 4 4
    assert found["eval_loss"] == pytest.approx(np.mean((output - labels) ** 2))


def test_metrics_that_are_undefined_are_zero_and_not_nan():
    constant = np.array([[0.0, 1.0]] * 4)
    assert rail_kd.compute_metrics(constant, np.array([0, 1, 0, 1]), "cola")["matthews_correlation"] == 0
    assert rail_kd.compute_metrics(-constant, np.array([0, 1, 0, 1]), "mrpc")["f1"] == 0
    assert rail_kd.compute_metrics(np.ones((3, 1)), np.array([1.0, 2.0, 3.0]), "stsb")["spearmanr"] == 0


def test_loss_and_calibration_error_agree_with_their_definitions():
    rng = np.random.default_rng(0)
    logits, labels = 2 * rng.normal(size=(500, 3)), rng.integers(0, 3, 500)
    p = softmax(logits)
    confidence, right, ece = p.max(1), p.argmax(1) == labels, 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = rail_kd.compute_metrics(logits, labels)
    assert found["ece"] == pytest.approx(ece) and found["eval_loss"] == pytest.approx(-np.log(p[range(500), labels]).mean())


def test_evaluate_scores_the_whole_set_at_once_and_in_order():
    rng = np.random.default_rng(0)
    sentences = [" ".join(["the plot is dull"] * int(rng.integers(1, 8))) for _ in range(70)]  # 64 + 6: a small last batch
    data, tokenizer, model = encoded(sentences, [int(rng.integers(0, 2)) for _ in range(70)])
    model.eval()
    one_by_one = np.concatenate([model(input_ids=torch.tensor([row["input_ids"]])).logits.detach().numpy() for row in data])
    close(rail_kd.predict(model, data, tokenizer), one_by_one, "logits in the order of the data, whatever the batches were", 1e-4)
    labels = np.array(data["label"])
    claimed, true = one_by_one.argmax(1) == 1, labels == 1
    found = rail_kd.evaluate(model, data, tokenizer, "mrpc", teacher_logits=-one_by_one)
    assert found["accuracy"] == pytest.approx(np.mean(one_by_one.argmax(1) == labels))
    assert found["f1"] == pytest.approx(2 * (claimed & true).sum() / (claimed.sum() + true.sum()))
    assert found["agreement"] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The whole job
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with small files of own data, a small teacher with dropout and a trained classifier, and a stranger as student."""
    folder = tmp_path_factory.mktemp("world")
    parts = rail_kd.toy_sentences(0, [40, 100, 30])
    for name, data in zip(("validation", "train", "other"), parts):
        write_csv(folder / f"{name}.csv", [(row["sentence1"], ["bad", "good"][row["label"]]) for row in data])
    teacher, tokenizer = rail_kd.toy_teacher(0, num_layers=6)
    config = transformers.BertConfig(**teacher.config.to_dict() | {"hidden_dropout_prob": 0.2})
    torch.manual_seed(0)
    teacher = transformers.BertForSequenceClassification(config)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    # another vocabulary (the words backwards), another width, another architecture
    vocabulary = tokenizer.get_vocab()
    special = [word for word in vocabulary if word.startswith("[")]
    words = [*special, *sorted(set(vocabulary) - set(special), reverse=True)]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    for name, entry in state["post_processor"]["special_tokens"].items():
        entry["ids"] = [words.index(name)]
    for entry in state["added_tokens"]:
        entry["id"] = words.index(entry["content"])
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=rail_kd.tokenizers.Tokenizer.from_str(json.dumps(state)),
                                                 pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                                                 model_max_length=64, model_input_names=["input_ids", "attention_mask"])
    stranger = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
        vocab_size=len(words), dim=32, n_layers=3, n_heads=2, hidden_dim=48, max_position_embeddings=64, pad_token_id=other.pad_token_id))
    stranger.save_pretrained(folder / "stranger")
    stranger.distilbert.save_pretrained(folder / "encoder")  # the same without a classifier
    for name in ("stranger", "encoder"):
        other.save_pretrained(folder / name)
    return folder


def job(world, out, **more):
    """Settings of a small run: 6 -> 3 layers, two epochs of seven steps, the last one of 4 examples."""
    teacher = out.parent / "teacher"
    if not teacher.exists() and "teacher" not in more:
        shutil.copytree(world / "teacher", teacher)
    defaults = dict(train_file=str(world / "train.csv"), validation_file=str(world / "validation.csv"), teacher=str(teacher),
                    epochs=2, batch_size=16, output_dir=str(out), device="cpu", learning_rate=1e-3)
    return Settings(**defaults | ({} if "student" in more else {"student_layers": 3}) | more)


def argv(settings):
    """The command line that says the same as some Settings."""
    default, words = Settings(), []
    for name, value in dataclasses.asdict(settings).items():
        if value != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def losses(result):
    return [[epoch[name] for name in ("ce", "kd", "rail", "total")] for epoch in result["epochs"]]


def weights_of(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def same_weights(a, b, tolerance=0.0):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=0, atol=tolerance) for key in a)


WAYS = [dict(mapping=mapping) for mapping in ("random", "skip", "last", "attention", "none", "finetune")] + [
    dict(variant="concat"), dict(resample="step"), dict(include_last=True), dict(variant="concat", mapping="skip", include_last=True)]


@whole_module
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_job_runs_for_each_mapping_and_variant_and_records_everything(world, tmp_path, way):
    result = run(job(world, tmp_path / "out", **way, eval_file=[str(world / "other.csv")]))
    assert result == json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert set(result["settings"]) == {field.name for field in dataclasses.fields(Settings)}
    assert result["settings"] | way == result["settings"] and result["settings"]["temperature"] > 0
    assert set(result["versions"]) == {"python", "torch", "transformers", "datasets", "numpy"}
    for side, layers in (("teacher", 6), ("student", 3)):
        assert result[side]["layers"] == layers and result[side]["milliseconds_per_sentence"] > 0
        assert {"accuracy", "eval_loss", "ece", "parameters", "bytes"} <= set(result[side])
        assert "accuracy" in result["evaluation"][str(world / "other.csv")][side]
    size = os.path.getsize(tmp_path / "out" / "student" / "model.safetensors")
    assert 0 <= size - result["student"]["bytes"] < 10_000, "bytes are those of the weights on disk, but for the file's header"
    for epoch in result["epochs"]:
        assert {"ce", "kd", "rail", "total", "seconds", "examples_per_second", "accuracy", "eval_loss", "agreement"} <= set(epoch)
        weights = rail_kd.objective_weights(way.get("mapping", "random"), [1 / 3] * 3)
        assert epoch["total"] == pytest.approx(np.dot(weights, [epoch["ce"], epoch["kd"], epoch["rail"]]), abs=1e-5)
        assert (epoch["rail"] > 0) == (weights[2] > 0) and (epoch["kd"] > 0) == (weights[1] > 0) and epoch["rail"] <= 4
        fixed = way.get("mapping") not in ("attention", "none", "finetune") and way.get("resample") != "step"
        assert (epoch["layers"] is not None) == fixed
        if fixed:
            assert len(epoch["layers"]) == (3 if way.get("include_last") else 2)
    assert not list(tmp_path.glob("**/*.part")) and not list(tmp_path.glob("**/*.pt")), "nothing half-done stays behind"


@whole_module
def test_saved_student_reloads_to_the_same_logits_also_in_a_pipeline(world, tmp_path):
    run(job(world, tmp_path / "out", epochs=1))
    folder = str(tmp_path / "out" / "student")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "bad", 1: "good"} and len(tokenizer) == len(transformers.AutoTokenizer.from_pretrained(world / "teacher"))
    sentence = "Although the plot is never dull, the acting is very cold."
    with torch.no_grad():
        expected = softmax(model(**tokenizer(sentence, return_tensors="pt")).logits.numpy())[0]
    found = transformers.pipeline("text-classification", model=folder)(sentence, top_k=None)
    assert {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in found} == {"bad": expected[0], "good": expected[1]}
    rows = rail_kd.read_file(str(world / "validation.csv"))
    labels = [["bad", "good"].index(label) for label in rows["label"]]
    predicted = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in rows["sentence1"]]
    recorded = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["student"]["accuracy"]
    assert np.mean(np.array(labels) == predicted) == pytest.approx(recorded)


@whole_module
def test_a_regression_runs_from_start_to_end(world, tmp_path):
    data = rail_kd.toy_sentences(1, [60])[0]
    path = write_csv(tmp_path / "scores.csv", [(row["sentence1"], row["label"] + 0.25) for row in data])
    result = run(job(world, tmp_path / "out", train_file=path, validation_file=path, teacher=str(world / "encoder"), student_layers=2, teacher_epochs=1))
    assert {"pearson", "spearmanr", "eval_loss"} <= set(result["student"]) and "agreement" not in result["student"]
    assert result["teacher"]["epochs"][0]["kd"] == 0 and result["epochs"][0]["kd"] > 0
    assert transformers.pipeline("text-classification", model=str(tmp_path / "out" / "student"))("The plot.")[0]["score"] is not None


def test_a_teacher_that_knows_no_more_than_the_labels_mean_or_largest_class_is_announced(capsys):
    rng = np.random.default_rng(0)
    scores, classes = rng.uniform(0, 5, 200), rng.permutation([0] * 120 + [1] * 80)
    for labels, weak, good in ((scores, scores / 5, scores + rng.normal(size=200)),   # right order, but on a scale from 0 to 1
                               (classes, np.eye(2)[1 - classes], np.eye(2)[np.where(np.arange(200) < 100, classes, 0)])):
        for logits, expected in ((weak, True), (good, False)):
            rail_kd.warn_of_weak_teacher({"": logits.reshape(200, -1)}, {"": {"label": labels}})
            assert ("!!!" in capsys.readouterr().out) == expected


@whole_module
def test_the_toy_runs_with_its_own_teacher_from_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("--task toy --student-layers 4 --max-train-examples 40 --epochs 1 --teacher-epochs 1".split()) == 0
    printed = capsys.readouterr()
    folder, = (tmp_path / "runs").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.json", "student", "teacher"]
    assert printed.err == "" and f"--teacher {folder.relative_to(tmp_path)}/teacher" in printed.out
    assert re.search(r"1←\d+ 2←\d+ 3←\d+", printed.out) and "examples/s" in printed.out
    assert "!!!" in printed.out, "a teacher that learned from one epoch of 320 sentences is weak, and the run must say so"
    # and its teacher serves a further run, which finds it trained and its table made
    assert main(f"--teacher {folder}/teacher --max-train-examples 40 --epochs 1 --mapping skip --student-layers 4".split()) == 0
    printed = capsys.readouterr().out
    assert "fine-tuned first" not in printed and "not asked again" in printed


@whole_module
def test_mnli_is_scored_on_both_validation_splits_with_the_labels_in_the_order_of_the_data(glue, world, tmp_path):
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(world / "teacher", num_labels=3, ignore_mismatched_sizes=True)
    teacher.config.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
    teacher.config.label2id = {label: i for i, label in teacher.config.id2label.items()}
    teacher.save_pretrained(tmp_path / "t")
    transformers.AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(tmp_path / "t")
    result = run(Settings(task="mnli", teacher=str(tmp_path / "t"), student_layers=3, epochs=1, output_dir=str(tmp_path / "out"), device="cpu"))
    assert {"accuracy", "accuracy_mismatched"} <= set(result["student"]) and {"accuracy", "accuracy_mismatched"} <= set(result["epochs"][0])
    student = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "student")
    assert student.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


@whole_module
@pytest.mark.parametrize("way", [{}, {"projection": ["frozen-teacher"]}, {"projection_learning_rate": 1e-2}])
def test_projections_are_trained_with_the_student_at_their_learning_rate_and_stay_where_frozen(world, tmp_path, monkeypatch, way):
    made = []

    class Spy(rail_kd.RailLoss):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((self, {name: p.detach().clone() for name, p in self.named_parameters()}))
    monkeypatch.setattr(rail_kd, "RailLoss", Spy)
    data = rail_kd.read_file(str(world / "train.csv"))
    result = run(job(world, tmp_path / "out", epochs=1, batch_size=len(data), **way))  # one step: that of AdamW is rate * sign(gradient)
    (loss, before), = made
    moved = {name: (p - before[name]).abs().max().item() for name, p in loss.named_parameters()}
    rate = way.get("projection_learning_rate", result["settings"]["learning_rate"])
    for name, distance in moved.items():
        frozen = "projection" in way and name.startswith("teacher_proj")
        assert distance == (0 if frozen else pytest.approx(rate, rel=0.02)), name
    assert -1 <= result["epochs"][0]["projected_cosine"] <= 1


@whole_module
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step_and_keeps_what_was_finished(world, tmp_path, monkeypatch, capsys):
    real, calls = rail_kd.kd_loss, itertools.count(1)

    def broken(*args):
        return real(*args) * (math.nan if next(calls) == 7 + 3 else 1.0)  # the third step of the second epoch
    monkeypatch.setattr(rail_kd, "kd_loss", broken)
    assert main(argv(job(world, tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert "step 3 of epoch 2" in error and error.count("\n") == 1
    kept = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert len(kept["epochs"]) == 1 and (tmp_path / "out" / "student.pt").exists()


def test_full_precision_needs_nothing_of_the_device():
    with rail_kd.autocast("meta", "fp32"):  # a device that knows no autocast, as MPS in older versions of torch
        assert (torch.ones(1) / 3).dtype == torch.float32


def test_precision_is_bf16_on_chips_that_have_it_and_fp16_on_older_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")):  # H100, A100, T4
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        assert rail_kd.resolve_device("auto", "auto") == ("cuda", expected)
    assert rail_kd.resolve_device("cpu", "auto") == ("cpu", "fp32") and rail_kd.resolve_device("cpu", "bf16") == ("cpu", "bf16")


@whole_module
def test_bf16_on_a_cpu_runs_and_stays_near_fp32(world, tmp_path):
    half = run(job(world, tmp_path / "half", epochs=1, precision="bf16"))
    full = run(job(world, tmp_path / "full", epochs=1))
    assert losses(half) != losses(full)
    close(losses(half), losses(full), "bf16 keeps 8 bits", tolerance=0.05)


@whole_module
def test_fp16_scales_the_gradients_and_learns_like_fp32(tmp_path, answers, monkeypatch):
    """The path of a T4, on the CPU: `run` does not offer it there, but the loop is the same."""
    model, data, tokenizer, settings = answers
    used = []
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, enabled: used.append(real(*args, enabled=enabled)) or used[-1])
    found = {}
    for precision in ("fp16", "fp32"):
        plan = dataclasses.replace(settings, mapping="finetune", precision=precision, epochs=2, learning_rate=1e-3, warmup_ratio=0.0, batch_size=16)
        history = rail_kd.train(rail_kd.build_student(model, 2), data, tokenizer, plan, lambda: {"accuracy": 0.0}, tmp_path / f"{precision}.pt")
        found[precision] = [epoch["ce"] for epoch in history]
    assert [scaler.is_enabled() for scaler in used] == [True, False] and used[0].get_scale() > 1
    assert found["fp16"] != found["fp32"]
    close(found["fp16"], found["fp32"], "the same training, in 11 bits", tolerance=0.02)


@whole_module
def test_compiled_student_trains_to_the_same_losses(world, tmp_path, monkeypatch):
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **more: compiled.append(real(module, backend="eager", **more)) or compiled[-1])
    found = run(job(world, tmp_path / "compiled", epochs=1, compile=True))  # traced as always, but needs no C++ compiler
    close(losses(found), losses(run(job(world, tmp_path / "plain", epochs=1))), "compiling changes the speed and nothing else", 1e-4)
    assert len(compiled) == 1 and weights_of(tmp_path / "compiled" / "student").keys() == weights_of(tmp_path / "plain" / "student").keys()


# ---------------------------------------------------------------------------------------------------------------------
# The teacher table
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def answers(world, tmp_path):
    """(teacher, encoded data, tokenizer, settings) for tests of the table alone."""
    feature = datasets.ClassLabel(names=["bad", "good"])
    model, tokenizer, trained = rail_kd.load_classifier(str(world / "teacher"), feature, "teacher")
    assert trained
    data = rail_kd.encode(rail_kd.set_labels(rail_kd.read_file(str(world / "train.csv")), feature, ""), tokenizer, model, 128)
    return rail_kd.freeze(model), data, tokenizer, dataclasses.replace(Settings(), output_dir=str(tmp_path / "out"), precision="fp32")


@whole_module
def test_table_holds_what_the_live_teacher_says_up_to_half_precision(answers, tmp_path):
    teacher, data, tokenizer, settings = answers
    folder = rail_kd.find_or_write_table(teacher, data, tokenizer, settings, tmp_path)
    logits, pooled = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("logits", "pooled"))
    assert (logits.shape, logits.dtype, pooled.shape, pooled.dtype) == ((100, 2), np.float32, (100, 5, 64), np.float16)
    table = rail_kd.table_teacher(folder, torch.device("cpu"))
    live = rail_kd.live_teacher(teacher, data, tokenizer, "fp32")
    for layers in ([1, 5], [3], None):
        (a, b), (c, d) = table([7, 99, 0], layers), live([7, 99, 0], layers)
        close(a, c.numpy(), "logits in full precision")
        assert (b is None) == (d is None) == (layers is None)
        if layers:
            close(b, d.numpy(), "the same layers, rounded to 11 bits", tolerance=2e-3)


@whole_module
def test_table_takes_full_precision_where_half_does_not_reach(answers, tmp_path):
    teacher, data, tokenizer, settings = answers
    with torch.no_grad():  # the last norm of layer 2 now puts out values near 1e6
        teacher.bert.encoder.layer[1].output.LayerNorm.weight.mul_(1e6)
    folder = rail_kd.find_or_write_table(teacher, data, tokenizer, settings, tmp_path)
    pooled = np.load(folder / "pooled.npy")
    assert pooled.dtype == np.float32 and np.isfinite(pooled).all() and np.abs(pooled[:, 1]).max() > 65504


def test_fingerprint_changes_with_weights_data_and_length_but_not_with_labels(answers):
    teacher, data, tokenizer, settings = answers
    first = rail_kd.fingerprint(teacher, data, 5)
    flipped = data.remove_columns("label").add_column("label", [1 - label for label in data["label"]])
    assert rail_kd.fingerprint(teacher, flipped, 5) == first
    shorter = data.map(lambda row: {"input_ids": row["input_ids"][:4], "token_type_ids": row["token_type_ids"][:4],
                                    "attention_mask": row["attention_mask"][:4]})
    others = [rail_kd.fingerprint(teacher, data.select(range(99)), 5), rail_kd.fingerprint(teacher, shorter, 5),
              rail_kd.fingerprint(teacher, data, 6)]
    with torch.no_grad():
        teacher.classifier.bias[0] += 1e-6
    others.append(rail_kd.fingerprint(teacher, data, 5))
    assert len({first, *others}) == 5


@whole_module
def test_two_runs_of_the_same_name_can_make_the_same_table_side_by_side(answers, tmp_path, monkeypatch):
    teacher, data, tokenizer, settings = answers
    real, calls = rail_kd.teacher_answers, itertools.count(1)

    def meanwhile(*args):  # the second run asks for the table while the first one is writing it
        if next(calls) == 2:
            other = dataclasses.replace(settings, output_dir=str(tmp_path / "elsewhere" / "out"))
            rail_kd.find_or_write_table(teacher, data, tokenizer, other, tmp_path)
        return real(*args)
    monkeypatch.setattr(rail_kd, "teacher_answers", meanwhile)
    folder = rail_kd.find_or_write_table(teacher, data, tokenizer, settings, tmp_path)
    assert next(calls) > 4, "both asked the teacher"
    assert np.abs(np.load(folder / "pooled.npy")).sum(axis=(1, 2)).min() > 0, "every row was written"
    assert [path.name for path in tmp_path.glob("table-*")] == [folder.name]


@whole_module
def test_table_cut_short_is_never_used(answers, tmp_path, monkeypatch):
    teacher, data, tokenizer, settings = answers
    real, calls = rail_kd.teacher_answers, itertools.count(1)

    def dies(*args):
        if next(calls) == 3:
            raise RuntimeError("the power is gone")
        return real(*args)
    monkeypatch.setattr(rail_kd, "teacher_answers", dies)
    with contextlib.suppress(RuntimeError):
        rail_kd.find_or_write_table(teacher, data, tokenizer, settings, tmp_path)
    assert not list(tmp_path.glob("table-*"))
    monkeypatch.setattr(rail_kd, "teacher_answers", real)
    folder = rail_kd.find_or_write_table(teacher, data, tokenizer, settings, tmp_path)
    assert np.abs(np.load(folder / "pooled.npy")).sum(axis=(1, 2)).min() > 0, "every row was written"


@whole_module
def test_too_little_disk_is_an_error_with_the_figure_before_the_pass_starts(answers, tmp_path, monkeypatch, capsys):
    teacher, data, tokenizer, settings = answers
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 ** 9, 10 ** 9, 1000))
    refuses(lambda: rail_kd.find_or_write_table(teacher, data, tokenizer, settings, tmp_path), "100 x 5 x 64 x 2 bytes do not fit in 1,000")
    assert "64.8 kB" in capsys.readouterr().out and not list(tmp_path.glob("table-*"))


@whole_module
def test_teacher_is_asked_once_about_each_example_for_all_epochs_mappings_seeds_and_students(world, tmp_path, monkeypatch):
    asked, real = [], rail_kd.teacher_answers

    def spy(teacher, batch, layers, *more):
        asked.append(len(batch["input_ids"]))
        return real(teacher, batch, layers, *more)
    monkeypatch.setattr(rail_kd, "teacher_answers", spy)
    run(job(world, tmp_path / "first", epochs=3))
    assert sum(asked[1:]) == 100, "one pass (after one batch that tells the width), not one for each epoch"
    asked.clear()
    for i, way in enumerate([dict(mapping="skip"), dict(mapping="none"), dict(mapping="attention"), dict(variant="concat"), dict(seed=5),
                             dict(student=str(world / "stranger"))]):
        run(job(world, tmp_path / str(i), epochs=1, **way))
    assert not asked, "later runs with the same teacher and data find the table"


@whole_module
@pytest.mark.parametrize("mapping", ["random", "attention", "none"])
def test_live_teacher_and_table_give_the_same_losses_and_maps(world, tmp_path, mapping):
    """Would fail too if the teacher were left in train mode: this one has a dropout of 0.2."""
    on, off = (run(job(world, tmp_path / table, mapping=mapping, teacher_table=table)) for table in ("on", "off"))
    assert [epoch["layers"] for epoch in on["epochs"]] == [epoch["layers"] for epoch in off["epochs"]]
    close(losses(on), losses(off), "the same but for the rounding to half precision", tolerance=2e-3)


@whole_module
def test_student_may_have_another_tokenizer_width_and_architecture(world, tmp_path):
    results = [run(job(world, tmp_path / table, student=str(world / "stranger"), teacher_table=table)) for table in ("on", "off")]
    close(losses(results[0]), losses(results[1]), "each side reads its own tokens", tolerance=2e-3)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "on" / "student")
    assert saved.get_vocab() == transformers.AutoTokenizer.from_pretrained(world / "stranger").get_vocab()
    assert saved.get_vocab() != transformers.AutoTokenizer.from_pretrained(world / "teacher").get_vocab()


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
import rail_kd
moment, argv = sys.argv[1], sys.argv[2:]
def killing(module, name, when):
    real, calls = getattr(module, name), [0]
    def wrapped(*args, **more):
        if when(*args):
            calls[0] += 1
            if calls[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    setattr(module, name, wrapped)
if moment == "teacher-pass":
    killing(rail_kd, "teacher_answers", lambda *_: True)
if moment == "second-epoch":
    steps = iter(range(10 ** 9))
    killing(rail_kd, "kd_loss", lambda *_: next(steps) in (0, 7 + 4))
if moment == "state-write":  # all bytes are written, the name is not changed yet
    killing(os, "replace", lambda part, _: "student.pt" in str(part))
rail_kd.main(argv)
"""


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    if COURSE_VERSION:
        pytest.skip("needs all five core functions; solve the exercises first")
    folder = tmp_path_factory.mktemp("whole")
    return folder / "out", run(job(world, folder / "out", epochs=3))


@whole_module
@pytest.mark.parametrize("moment", ["teacher-pass", "second-epoch", "state-write"])
def test_killed_and_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(world, tmp_path, uninterrupted, moment):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLER, moment, *argv(job(world, out, epochs=3))]
    killed = subprocess.run(command, cwd=HERE, capture_output=True)
    assert killed.returncode == -9 and (out / "metrics.json").exists() and not (out / "student").exists()
    result = run(Settings(resume=str(out)))
    whole_out, expected = uninterrupted
    assert same_weights(out / "student", whole_out / "student")
    assert losses(result) == losses(expected)
    for a, b in zip(result["epochs"], expected["epochs"]):
        assert {k: v for k, v in a.items() if "second" not in k} == {k: v for k, v in b.items() if "second" not in k}
    for name in ("accuracy", "eval_loss", "agreement"):
        assert result["student"][name] == expected["student"][name]
    assert not list(tmp_path.glob("**/*.part")), "what the killed process left is gone"


@whole_module
def test_resume_goes_on_with_a_teacher_that_was_being_fine_tuned(tmp_path, monkeypatch, capsys):
    command = "--task toy --max-train-examples 20 --student-layers 2 --epochs 1 --teacher-epochs 2 --output-dir".split()
    whole_run = main([*command, str(tmp_path / "whole")])
    real, calls = rail_kd.label_loss, itertools.count(1)

    def interrupted(*args):
        if next(calls) == 7:  # 160 sentences are 5 steps an epoch: this is in the teacher's second epoch
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(rail_kd, "label_loss", interrupted)
    capsys.readouterr()
    assert whole_run == 0 and main([*command, str(tmp_path / "cut")]) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--resume {tmp_path / 'cut'}" in error
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path / "cut")]) == 0
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8")) for name in ("whole", "cut"))
    assert losses(a) == losses(b) and losses(a["teacher"]) == losses(b["teacher"])
    assert all(same_weights(tmp_path / "whole" / part, tmp_path / "cut" / part) for part in ("teacher", "student"))
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "cut")]) == 0 and "finished already" in capsys.readouterr().out


@whole_module
def test_resume_refuses_settings_that_contradict_the_run_by_name(uninterrupted, capsys):
    out, _ = uninterrupted
    for given in (["--epochs", "5"], ["--seed", "1"], ["--mapping", "skip"], ["--weights", "0.5", "0.5", "0"], ["--variant", "concat"]):
        assert main(["--resume", str(out), *given]) == 2
        error = capsys.readouterr().err
        assert given[0] in error and "contradicts" in error and error.count("\n") == 1
    assert main(["--resume", str(out), "--epochs", "3", "--seed", "0"]) == 0, "what agrees is welcome"
    refuses(lambda: run(Settings(resume=str(out), epochs=7)), "from Python too")


@whole_module
def test_disk_that_fills_up_leaves_the_previous_state_and_the_run_can_go_on(world, tmp_path, uninterrupted, monkeypatch, capsys):
    real, calls = Path.write_bytes, itertools.count(1)

    def full(self, content):
        if next(calls) == 2:
            real(self, bytes(content)[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, content)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(argv(job(world, tmp_path / "out", epochs=3))) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "student.pt" in error and error.count("\n") == 1
    monkeypatch.undo()
    state = torch.load(tmp_path / "out" / "student.pt", weights_only=True)
    assert len(state["history"]) == 1
    assert losses(run(Settings(resume=str(tmp_path / "out")))) == losses(uninterrupted[1])


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------

@whole_module
def test_two_processes_train_like_one_and_write_one_set_of_files(world, tmp_path):
    """With dropout off. The last batch has 4 - then 1 - examples: less than the two processes can share."""
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    settings = job(world, tmp_path / "two", batch_size=11)  # 100 = 9 * 11 + 1
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE / "rail_kd.py"), *argv(settings)],
                            capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch  1/2") == 1, "one process prints"
    shutil.rmtree(next((tmp_path / "teacher").glob("table-*")))
    one = run(dataclasses.replace(settings, output_dir=str(tmp_path / "one")))
    two = json.loads((tmp_path / "two" / "metrics.json").read_text(encoding="utf-8"))
    assert [epoch["layers"] for epoch in one["epochs"]] == [epoch["layers"] for epoch in two["epochs"]]
    close(losses(two), losses(one), "the mean over the whole batch, however it is shared", tolerance=1e-4)
    assert same_weights(tmp_path / "one" / "student", tmp_path / "two" / "student", tolerance=1e-4)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["metrics.json", "student"]


def test_processes_share_each_batch_without_losing_or_repeating_an_example():
    for world, size in itertools.product((1, 2, 3, 4), (1, 2, 3, 5, 32)):
        losses = np.random.default_rng(size).normal(size=size)
        shares = [rail_kd.share_of(list(range(size)), rank, world) for rank in range(world)]
        assert sorted(row for rows, weight in shares if weight for row in rows) == list(range(size))
        assert all(rows for rows, _ in shares), "each process takes part in each step"
        average = np.mean([weight * losses[rows].mean() for rows, weight in shares])  # what averaging over processes makes of it
        assert average == pytest.approx(losses.mean())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

def complaint(words, capsys):
    """Runs a command that must fail: status 2, one line on stderr, nothing on stdout. Returns the line."""
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "Traceback" not in printed.err, printed
    return printed.err


@whole_module
@pytest.mark.parametrize("words, hint", [
    ("--task sst3", "sst3"), ("--mapping sideways", "attention"), ("--variant both", "layerwise"), ("--device tpu", "cuda"),
    ("--precision fp8", "bf16"), ("--epoch 3", "--epoch"), ("--student_layer 3", "--student_layer"), ("--epochs 0", "at least 1"),
    ("--epochs three", "three"), ("--batch-size -4", "at least 1"), ("--learning-rate nan", "above 0"), ("--learning-rate inf", "above 0"),
    ("--temperature 0", "above 0"), ("--temperature nan", "above 0"), ("--warmup-ratio 1.5", "below 1"), ("--warmup-ratio -0.1", "at least 0"),
    ("--weight-decay -1", "at least 0"), ("--max-length 0", "at least"), ("--seed -1", "at least 0"), ("--projection-size 0", "at least 1"),
    ("--projection crooked", "centred"), ("--projection separate --mapping attention", "layerwise"), ("--projection-learning-rate 0", "above 0"),
    ("--max-train-examples 0", "at least 1"), ("--student-layers 0", "at least 1"), ("--student-layers 13", "13"), ("--student-layers 1", "intermediate"),
    ("--weights 0.5 0.5", "three"), ("--weights 0.9 0.9 0.9", "sum to 1"), ("--weights -0.5 1 0.5", ">= 0"), ("--weights 0 0 1 --mapping none", "nothing"),
    ("--mapping attention --variant concat", "layerwise"), ("--student x --student-layers 3", "exclude"), ("--precision fp16 --device cpu", "fp16"),
    ("--task sst2 --train-file a.csv --validation-file b.csv", "exclude"), ("--train-file a.csv", "--validation-file"),
    ("--train-file a.csv --validation-file b.csv", "no such file"), ("--eval-file nowhere.csv", "nowhere.csv"), ("--teacher no/such/model", "no/such/model"),
    ("--student no/such/model", "no/such/model"), ("--resume nowhere", "nowhere"), ("--task sst2", "--task toy")])
def test_bad_settings_end_in_one_clear_line_before_anything_is_written(words, hint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hint in complaint(words.split(), capsys)
    assert not list(tmp_path.iterdir())


@whole_module
def test_cuda_that_is_absent_is_said_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in complaint(["--device", "cuda", "--output-dir", tmp_path / "out"], capsys)


GOOD = "sentence,label\nfine,good\ndull,bad\n"


@whole_module
@pytest.mark.parametrize("name, train, validation, hint", [
    ("csv", b"", GOOD, "at least one row"), ("csv", "sentence,label\n", GOOD, "one row"), ("csv", "sentence,label\ncaf\u00e9,good\n".encode("latin1"), GOOD, "UTF-8"),
    ("csv", "text,label\nfine,good\n", GOOD, "sentence"), ("csv", "sentence,class\nfine,good\n", GOOD, "label"), ("csv", "sentence,label\nfine,good\ndull,\n", GOOD, "example 2"),
    ("csv", "sentence,label\nfine,good\nwarm,good\n", GOOD, "tell apart"), ("csv", GOOD, "sentence,label\nso-so,neutral\n", "neutral"),
    ("csv", "sentence,label\na,1.5\nb,2\n", GOOD, "numbers"), ("csv", "sentence1,sentence2,label\na,b,good\nc,d,bad\n", GOOD, "sentence2"), ("csv", 'sentence,label\n"never closed,good\n', GOOD, "CSV"),
    ("jsonl", '{"sentence": "fine", "label": "good"}\n{"sentence": "dull", "lab', GOOD, "JSON"), ("jsonl", '{"sentence": null, "label": 1}\n{"sentence": "a", "label": 0}\n', GOOD, "no sentence1")])
def test_bad_files_end_in_one_clear_line(world, tmp_path, capsys, name, train, validation, hint):
    paths = [tmp_path / f"train.{name}", tmp_path / "validation.csv"]
    for path, content in zip(paths, (train, validation)):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = complaint(["--train-file", paths[0], "--validation-file", paths[1], "--teacher", world / "teacher", "--output-dir", tmp_path / "out"], capsys)
    assert hint in line and str(tmp_path) in line and not (tmp_path / "out").exists()


@whole_module
def test_folder_in_use_or_not_writable_is_refused_and_left_alone(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    assert "in use" in complaint(["--output-dir", tmp_path / "used"], capsys)
    assert (tmp_path / "used" / "thesis.txt").read_text() == "precious"
    assert "not a folder" in complaint(["--output-dir", tmp_path / "used" / "thesis.txt" / "x"], capsys)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "written to" in complaint(["--output-dir", tmp_path / "new"], capsys)


@whole_module
def test_folder_without_a_model_and_teacher_of_another_number_of_classes_are_refused(world, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty" in complaint(["--teacher", tmp_path / "empty", "--output-dir", tmp_path / "out"], capsys)
    three = write_csv(tmp_path / "three.csv", [("a", 0), ("b", 1), ("c", 2)])
    assert "number of classes" in complaint(["--train-file", three, "--validation-file", three, "--teacher", world / "teacher",
                                             "--output-dir", tmp_path / "out"], capsys)


@whole_module
def test_models_without_an_attention_mask_are_refused(world, tmp_path):
    config = transformers.FNetConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, intermediate_size=16, tpu_short_seq_length=16)
    transformers.FNetForSequenceClassification(config).save_pretrained(tmp_path / "fnet")
    transformers.AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(tmp_path / "fnet")
    refuses(lambda: rail_kd.load_classifier(str(tmp_path / "fnet"), datasets.ClassLabel(names=["bad", "good"]), "student"),
            "without a mask the padding is part of every sentence")


def test_code_that_comes_with_a_model_is_refused_without_asking(world, tmp_path, monkeypatch):
    shutil.copytree(world / "teacher", tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Foreign", "AutoModelForSequenceClassification": "code.Foreign"}}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    (tmp_path / "foreign" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Foreign: pass\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    refuses(lambda: rail_kd.load_classifier(str(tmp_path / "foreign"), datasets.ClassLabel(names=["bad", "good"]), "teacher"), "foreign code")
    assert not asked and not (tmp_path / "ran").exists()


@whole_module
def test_hub_out_of_reach_is_one_line_from_a_real_process(tmp_path):
    result = subprocess.run([sys.executable, str(HERE / "rail_kd.py"), "--task", "sst2"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "sst2" in result.stderr and "--task toy" in result.stderr


def test_help_names_every_setting_with_its_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"].endswith(".")


# ---------------------------------------------------------------------------------------------------------------------
# The notebook
# ---------------------------------------------------------------------------------------------------------------------

@has_notebook
def test_saved_notebook_was_run_from_top_to_bottom_and_is_small():
    notebook = json.loads((HERE / "tutorial.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds and sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) >= 10
    assert (HERE / "tutorial.ipynb").stat().st_size < 1.5e6


@whole_module
@has_notebook
def test_notebook_runs_from_a_clean_kernel_in_a_small_size(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("RAIL_KD_TUTORIAL", "small")
    shutil.copy(HERE / "rail_kd.py", tmp_path)
    notebook = nbformat.read(HERE / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()


# ---------------------------------------------------------------------------------------------------------------------
# The course version
# ---------------------------------------------------------------------------------------------------------------------

@has_solutions
def test_course_version_fails_in_each_exercise_and_only_there(tmp_path):
    command = re.search(r'^python -c "(.*)"$', (HERE / "README.md").read_text(encoding="utf-8"), re.M).group(1)
    shutil.copy(HERE / "rail_kd.py", tmp_path)
    shutil.copy(HERE / "test_rail_kd.py", tmp_path)
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    (tmp_path / "student_rail_kd.py").replace(tmp_path / "rail_kd.py")
    course = (tmp_path / "rail_kd.py").read_text(encoding="utf-8")
    assert course.count("raise NotImplementedError") == 5 and "SOLUTION" not in course
    for name in CORE:
        function = getattr(rail_kd, name)
        assert inspect.getdoc(function) and inspect.getdoc(function).splitlines()[0] in course, "the specification stays"
    report = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "--tb=line", "-p", "no:cacheprovider", "-k", "not real_process",
                             "test_rail_kd.py"], cwd=tmp_path, capture_output=True, text=True).stdout
    failed = re.findall(r"^FAILED test_rail_kd.py::(\w+)", report, re.M)
    passed = re.findall(r"^PASSED test_rail_kd.py::(\w+)", report, re.M)
    assert all(any(name in test for test in failed) for name in CORE), report
    assert all(any(name in test for name in CORE) for test in failed), report
    assert len(set(passed)) > 20 and not re.search(r"^ERROR", report, re.M), report
