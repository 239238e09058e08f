"""What rail_kd.py promises. `pytest` runs everything, offline, in about a minute on two CPU cores.
The order is that of the file. The name of a test says the property; expected values come from
formulas in float64, not from the module. `pytest -q -x -k NAME` with sample_layer_map, mean_pool,
RailLoss, kd_loss or combined_loss checks one exercise."""
import csv, inspect, itertools, json, math, os, re, shutil, sys, tempfile
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",      # threads don't survive a fork
               "HF_HUB_OFFLINE": "1", "RAIL_KD_DEBUG": "",          # no network, no tracebacks,
               "HF_HOME": tempfile.mkdtemp()}                       # and nothing left in a cache

import datasets
import numpy as np
import pytest
import torch
import transformers

import rail_kd
from rail_kd import RailLoss, Settings, combined_loss, kd_loss, mean_pool, run, sample_layer_map

VARIANTS = pytest.mark.parametrize("variant", ["layerwise", "concat", "attention"])


def check(condition, hint):
    """Fails with the hint alone, without a traceback: it is what a student reads."""
    if not condition:
        pytest.fail(hint, pytrace=False)


def close(actual, expected, hint, tolerance=1e-5):
    """Checks that two numbers or arrays have the same shape and agree, absolutely."""
    actual, expected = (x.detach().double().numpy() if torch.is_tensor(x) else np.asarray(x, float)
                        for x in (actual, expected))
    check(actual.shape == expected.shape, f"shape {actual.shape}, not {expected.shape}: {hint}")
    worst = np.abs(actual - expected).max(initial=0.0)
    check(worst <= tolerance, f"off by {worst:.3g} (at most {tolerance:g} is right): {hint}")


def refuses(call, why):
    """Checks that a call raises a ValueError whose message is a sentence."""
    try:
        found = f"got {call()!r}"
    except NotImplementedError:
        raise
    except Exception as error:
        found = f"got {type(error).__name__}"
        if isinstance(error, ValueError):
            return check(len(str(error).split()) >= 4, f"the ValueError should say more: {error}")
    check(False, f"expected a ValueError, {found}, since {why}")


# How the tests of refusals call each exercise, and arguments that are right.
EXERCISES = {
    "sample_layer_map": (lambda n, m: sample_layer_map(n, m, np.random.default_rng(0)), (2, 2)),
    "mean_pool": (lambda *sides: mean_pool(*map(torch.ones, sides)), ((1, 1, 1), (1, 1))),
    "RailLoss": (lambda k, variant, *sides: RailLoss(8, 6, k, variant)(*map(torch.ones, sides)),
                 (1, "layerwise", (1, 1, 6), (1, 1, 8))),
    "kd_loss": (lambda T, *sides: kd_loss(*map(torch.ones, sides), T), (1.0, (1, 1), (1, 1))),
    "combined_loss": (lambda *weights: combined_loss(1.0, 1.0, 1.0, weights), (1, 0, 0))}


def unsolved():
    """The exercises that are still blank, as in the course version of the module."""
    blank = []
    for name, (call, arguments) in EXERCISES.items():
        try:
            call(*arguments)
        except NotImplementedError:
            blank.append(name)
        except Exception:                          # wrong, not blank: its own tests say how
            pass
    return blank


needs_all = pytest.mark.skipif(bool(unsolved()), reason="solve the five exercises first")
GOOD = "sentence,label\nfine,good\ndull,bad\n"


# ---- 1. and 2. The draw and the losses ---------------------------------------------------------

def draws(n, m, count):
    rng = np.random.default_rng(0)
    return np.array([sample_layer_map(n, m, rng) for _ in range(count)])


@pytest.mark.parametrize("n, m", [(12, 4), (12, 6), (24, 6), (6, 2), (4, 4), (2, 2)])
def test_sample_layer_map_is_ascending_distinct_and_on_average_even(n, m):
    found, i = draws(n, m, 10_000), np.arange(1, m)
    check(found.shape == (10_000, m - 1), f"draw k = m-1 = {m - 1} layers, not {found.shape[1:]}")
    check(np.issubdtype(found.dtype, np.integer), "layers are whole numbers: return an int array")
    check((np.diff(found) >= 0).all(), "sort the draw: deeper layers learn from deeper layers")
    check((np.diff(found) != 0).all(), "draw without replacement: a layer may come only once")
    check(found.min() >= 1, "layers count from 1: hidden_states[0] is the embeddings")
    check(found.max() <= n - 1, f"the last layer, {n}, is no candidate: the logits teach it")
    sigma = np.sqrt(i * (m - i) * n * (n - m) / (m ** 2 * (m + 1)) / 10_000)
    error = np.abs(found.mean(axis=0) - i * n / m)
    check((error <= 5 * sigma).all(), f"the i-th layer is i*n/m on average, not off by {error}")


def test_sample_layer_map_is_uniform_over_all_subsets():
    _, counts = np.unique(draws(6, 4, 10_000), axis=0, return_counts=True)
    chi_square = np.sum((counts - 1000) ** 2 / 1000) + 1000 * (10 - len(counts))
    # 10 subsets, 9 degrees of freedom: 33.7 is exceeded by chance in one of 10,000 seeds
    check(chi_square < 33.7, f"all subsets must be equally likely (chi-square {chi_square:.0f})")


def test_sample_layer_map_uses_the_given_generator_alone():
    drawn = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        drawn.append(sample_layer_map(24, 8, np.random.default_rng(5)).tolist())
        after = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        check(before == after, "draw from `rng` alone: this changed the global random state")
    check(drawn[0] == drawn[1], "the map must depend on `rng` alone, not on a global seed")


@needs_all
def test_map_of_an_epoch_depends_on_seed_and_epoch_alone_and_is_uniform():
    def maps(which=range(1, 40), steps=(0,), **settings):
        return [tuple(rail_kd.choose_layers(Settings(**settings), 24, 8, epoch, step))
                for epoch in which for step in steps]
    assert maps(seed=3) == maps(seed=3, batch_size=7, task="mnli", epochs=2, variant="concat")
    assert len(set(maps())) > 35, "a new draw in each epoch"
    assert maps(seed=3)[1] != maps(seed=4)[0], "seed 3, epoch 2 is not seed 4, epoch 1"
    assert len(set(maps([1], range(50)))) == 1, "one draw in an epoch"
    assert len(set(maps([1], range(50), resample="step"))) > 40, "a new draw in each step"
    counts, sigma = np.zeros(12), math.sqrt(2000 * 3 / 11 * 8 / 11)
    for seed, epoch in itertools.product(range(40), range(1, 51)):
        counts[rail_kd.choose_layers(Settings(seed=seed), 12, 4, epoch)] += 1
    assert np.abs(counts[1:] - 2000 * 3 / 11).max() < 5 * sigma, counts


@pytest.mark.parametrize("mapping, n, m, expected", [
    ("skip", 12, 4, [3, 6, 9]), ("skip", 12, 6, [2, 4, 6, 8, 10]), ("skip", 5, 3, [2, 3]),
    ("last", 12, 4, [9, 10, 11]), ("last", 6, 6, [1, 2, 3, 4, 5]),
    ("attention", 6, 3, [1, 2, 3, 4, 5]), ("none", 12, 4, None), ("finetune", 12, 4, None)])
def test_fixed_maps_are_those_of_the_compared_methods(mapping, n, m, expected):
    assert np.array_equal(rail_kd.choose_layers(Settings(mapping=mapping), n, m, 1), expected)


@pytest.mark.parametrize("filler", [0.0, 7.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32], ids=str)
def test_mean_pool_is_the_mean_over_real_tokens_and_0_without_any(kind, filler):
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0], [0] * 6])
    hidden = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    pooled = mean_pool(hidden.masked_fill(mask[:, :, None] == 0, filler), mask.to(kind))
    check(bool((pooled[3] == 0).all()), "a row without tokens is 0, even if padding is NaN: fill")
    close(pooled[:3], torch.stack([hidden[b][mask[b] == 1].double().mean(0) for b in range(3)]),
          "add up the tokens whose mask is 1 and divide by their number; padding may hold anything")


def test_mean_pool_sums_and_returns_float32_for_half_precision():
    hidden = (torch.arange(512) / 512).to(torch.bfloat16).view(1, 512, 1)
    pooled = mean_pool(hidden, torch.ones(1, 512))
    check(pooled.dtype == torch.float32, f"return float32, not {pooled.dtype}")
    close(pooled, hidden.double().mean(dim=1), "turn to float32 before you add up", 1e-6)


def rail_case(variant, centre=False, shape=(5, 8, 4, 8, 6, 4)):
    """A RailLoss and inputs of both sides; by default k = 3, d_t = 8, d_s = 6, u = 4."""
    B, n, m, d_t, d_s, u = shape
    torch.manual_seed(0)
    loss = RailLoss(d_t, d_s, m - 1, variant, projection_size=u, centre=centre)
    rows = n - 1 if variant == "attention" else m - 1
    return loss, torch.randn(B, m - 1, d_s), torch.randn(B, rows, d_t)


def rail_by_hand(loss, student, teacher, variant, centre):
    """The definition in float64, one sentence and one pair at a time."""
    sides = []
    for proj, rows in ((loss.student_proj, student), (loss.teacher_proj, teacher)):
        if variant == "concat":
            rows = rows.flatten(1).unsqueeze(1)                                 # (B, 1, k * d)
        side = rows.double() @ proj.weight.double().T + proj.bias.double()
        sides.append(side - side.mean(0, keepdim=True) if centre else side)
    distances = []
    for s, t in zip(*sides):
        if variant == "attention":
            t = [torch.softmax(t @ a, dim=0) @ t for a in s]
        units = [[x / x.norm().clamp(min=1e-30) for x in side] for side in (s, t)]
        distances += [((a - b) ** 2).sum() for a, b in zip(*units)]
    return sum(distances) / len(distances)


@pytest.mark.parametrize("shape", [  # B, n, m, d_t, d_s, u
    (5, 8, 4, 8, 6, 4), (2, 4, 2, 8, 8, 8), (1, 12, 4, 4, 6, 16), (3, 3, 3, 5, 5, 1)], ids=str)
@pytest.mark.parametrize("centre", [False, True], ids=["uncentred", "centred"])
@VARIANTS
def test_RailLoss_is_the_mean_squared_distance_of_unit_vectors(variant, centre, shape):
    loss, student, teacher = rail_case(variant, centre, shape)
    _, n, m, d_t, d_s, u = shape
    joined = m - 1 if variant == "concat" else 1
    check([tuple(p.shape) for p in loss.parameters() if p.dim() == 2]
          == [(u, joined * d_t), (u, joined * d_s)], "two projections, each to width u")
    close(loss(student, teacher), rail_by_hand(loss, student, teacher, variant, centre),
          f"{variant}: project each side, " + "subtract the mean over the batch, " * centre
          + "weigh the candidates, " * (variant == "attention") + "divide by the L2 norm, "
          "sum the squares, mean over pairs and batch")


@pytest.mark.parametrize("other, expected", [([21, 28], 0), ([-4, 3], 2), ([-3, -4], 4)])
def test_RailLoss_is_2_minus_2_cos_for_any_size_and_number(other, expected):
    loss = RailLoss(2, 2, 3, projection_size=2)
    for proj in (loss.teacher_proj, loss.student_proj):
        proj.weight.data, proj.bias.data = torch.eye(2), torch.zeros(2)
    student, teacher = (torch.tensor([[x] * 3] * 5).float() for x in ([3, 4], other))
    close(loss(student, teacher), expected, "2 - 2 cos for each pair, mean over pairs and batch")


@VARIANTS
def test_RailLoss_sends_its_gradient_to_all_but_the_teacher(variant):
    loss, student, teacher = rail_case(variant)
    sources = [student.requires_grad_(), loss.student_proj.weight, loss.teacher_proj.weight]
    right = torch.autograd.grad(rail_by_hand(loss, student, teacher, variant, False), sources)
    loss(student, teacher.requires_grad_()).backward()
    for name, x, grad in zip(("student_pooled", "student_proj", "teacher_proj"), sources, right):
        close(x.grad, grad, f"{variant}: no, or a wrong, gradient reaches {name}: detached?")
    check(teacher.grad is None or not teacher.grad.any(), "detach teacher_pooled: it is a target")


@pytest.mark.parametrize("centre, batch", [(False, 2), (True, 1)], ids=["zeros", "centred single"])
@VARIANTS
def test_RailLoss_stays_finite_for_vectors_of_length_0(variant, centre, batch):
    loss, student, teacher = rail_case(variant, centre, (batch, 8, 4, 8, 6, 4))
    for proj in (loss.teacher_proj, loss.student_proj):
        proj.bias.data.zero_()
    check(math.isfinite(loss(0 * student, 0 * teacher).item()), "a vector of length 0 stays 0")


def kd_by_hand(student, teacher, temperature):
    p, q = (torch.softmax(x.double() / temperature, dim=-1) for x in (teacher, student))
    return temperature ** 2 * (p * (p / q).log()).sum(dim=-1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_loss_is_T_squared_times_KL_from_teacher_to_student(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3), 3 * torch.randn(4, 3)
    close(kd_loss(student, teacher, temperature), kd_by_hand(student, teacher, temperature),
          "T^2 * sum_c p_t log(p_t / p_s), mean over the batch, not classes: T^2? which is first?")


def test_kd_loss_of_wide_logits_and_of_a_regression():
    wide = torch.tensor([[150.0, 0.0, -60.0]])
    close(kd_loss(wide, wide.flip(1), 1.0), 210, "log_softmax: the log of a softmax is -inf")
    close(kd_loss(wide, wide, 1.0), 0, "equal distributions have KL 0, also with p = 0")
    close(kd_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.0]]), 3.0), 4.5,
          "(B, 1) is a regression: (3^2 + 0^2) / 2, without T")


@pytest.mark.parametrize("classes", [3, 1])
def test_kd_loss_sends_its_gradient_to_the_student_alone(classes):
    student, teacher = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[-1.0, 0.5, 0.2]])
    s, t = (x[:, :classes].clone().requires_grad_() for x in (student, teacher))
    value = kd_loss(s, t, 100.0)
    check(value.requires_grad, "the student must learn from it: is it detached?")
    value.backward()
    limit = (student - student.mean() - teacher + teacher.mean()) / 3        # Hinton et al. 2015
    if classes == 3:
        close(s.grad, limit, "without T^2 the gradient shrinks as 1/T^2", 0.01)
    check(t.grad is None or not t.grad.any(), "detach teacher_logits: they are a target")


def test_combined_loss_is_the_weighted_sum_and_passes_gradients():
    terms = [torch.tensor(x, requires_grad=True) for x in (1.0, 10.0, 100.0)]
    total = combined_loss(*terms, (0.2, 0.3, 0.5))
    close(total, 53.2, "0.2 * 1 + 0.3 * 10 + 0.5 * 100")
    check(getattr(total, "requires_grad", False), "keep the tensor: a float has no gradient")
    total.backward()
    close(torch.stack([term.grad for term in terms]), [0.2, 0.3, 0.5], "a weight for each term")
    for weights in ((0.6, 0.3, 0.1), (1.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3)):
        close(combined_loss(2.0, 2.0, 2.0, weights), 2.0, f"{weights} sum to 1 but for rounding")


REFUSED = [
    ("sample_layer_map", "n and m, 2 <= m <= n", [(4, 5), (12, 1), (12, 0), (1, 1)]),
    ("mean_pool", "shapes (B, S, d) and (B, S)", [
        ((3, 4), (3, 4)), *(((2, 3, 4), mask) for mask in ((2, 4), (3,), (1, 3), (2, 1)))]),
    ("RailLoss", "k > 0, a known variant, and k pairs of layers for each of B sentences", [
        (0, "layerwise", (5, 0, 6), (5, 0, 8)), (3, "sideways", (5, 3, 6), (5, 3, 8)),
        (3, "layerwise", (5, 2, 6), (5, 3, 8)), (3, "layerwise", (5, 3, 6), (5, 2, 8)),
        (3, "layerwise", (5, 2, 6), (5, 2, 8)), (3, "layerwise", (5, 3, 6), (1, 3, 8)),
        (3, "concat", (5, 2, 6), (5, 2, 8)), (3, "concat", (5, 3, 6), (1, 3, 8)),
        (3, "attention", (5, 2, 6), (5, 7, 8)), (3, "attention", (5, 3, 6), (1, 7, 8))]),
    ("kd_loss", "a positive finite temperature, also for (B, 1), and two sides (B, C)", [
        *((T, (2, C), (2, C)) for T in (0.0, -1.0, math.nan, math.inf) for C in (1, 3)),
        (1.0, (2, 3), (2, 4)), (1.0, (2, 3), (1, 3)), (1.0, (2, 1), (1, 1)), (1.0, (3,), (3,))]),
    ("combined_loss", "three weights, each >= 0, of sum 1", [
        (0.5, 0.5), (0.4, 0.3, 0.2, 0.1), (0.5, 0.5, 0.5), (1.2, -0.2, 0.0), (math.nan, 0.5, 0.5),
        (0.3, 0.3, 0.3), (0.35, 0.35, 0.31), (0.5, 0.3, 0.20001)])]


@pytest.mark.parametrize("name, rule, arguments", [
    pytest.param(name, rule, arguments, id=f"{name} {arguments}")
    for name, rule, rows in REFUSED for arguments in rows])
def test_what_makes_no_sense_is_refused_in_a_sentence(name, rule, arguments):
    refuses(lambda: EXERCISES[name][0](*arguments), f"{arguments} must be {rule}")


# ---- 3. One step and the loop ------------------------------------------------------------------
# Ten sentences, four epochs of three steps. The oracle redoes each step, one sentence at a time.
STEPS = dict(epochs=4, batch_size=4, learning_rate=0.01, seed=3, weights=[0.5, 0.3, 0.2],
             projection_learning_rate=0.02, temperature=3.0, precision="fp32", device="cpu")
WAYS = {"layerwise": {}, "concat": dict(variant="concat"), "centred": dict(centre=True),
        "attention": dict(mapping="attention", variant="attention"),
        "each step": dict(resample="step"), "skip": dict(mapping="skip"),
        "fp16": dict(precision="fp16"), "none": dict(mapping="none", weights=[0.625, 0.375, 0.0])}
RNG, LENGTHS = np.random.default_rng(0), [3, 30, 7, 12, 21, 5, 17, 9, 26, 14]
DATA = datasets.Dataset.from_dict({
    "input_ids": [RNG.integers(5, 40, n).tolist() for n in LENGTHS],
    "attention_mask": [[1] * n for n in LENGTHS], "label": RNG.integers(0, 3, 10).tolist()})
TOKENIZER = transformers.BertTokenizer(
    {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}, model_max_length=64)


def small(name, layers, width, seed=0, **more):
    """A small model of any family, untrained, in eval mode, without dropout."""
    torch.manual_seed(seed)
    more = dict(
        vocab_size=60, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40, embedding_size=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3) | more
    config = getattr(transformers, f"{name}Config")(
        **{key: value for key, value in more.items() if value is not None})
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def start(way):
    """Settings, teacher, student and RailLoss, the same at each call."""
    settings = Settings(**STEPS | way)
    teacher, student = small("Bert", 5, 12, seed=1), small("Bert", 3, 8, seed=2)
    torch.manual_seed(4)
    rail = RailLoss(12, 8, 2, settings.variant, 6, settings.centre)
    return settings, teacher.requires_grad_(False), student, rail


def loop(folder, way):
    """How the loop is called. Returns student, RailLoss, history, and the rows of each step."""
    settings, teacher, student, rail = start(way)
    look_up, batches = rail_kd.teacher_table(teacher, DATA, TOKENIZER, settings, folder), []
    sizes = []
    student.classifier.weight.register_hook(lambda grad: sizes.append(grad.abs().max().item()))
    def teacher_outputs(rows, layers):
        batches.append(list(rows))
        return look_up(rows, layers)
    distiller = rail_kd.Distiller(student, rail if settings.mapping != "none" else None, settings)
    history = rail_kd.train(distiller, DATA, TOKENIZER, settings, folder / "state.pt",
                            lambda history, _: history[-1].update(gradient=max(sizes)),
                            teacher_outputs, 5)
    return student, rail, history, batches


def by_hand(way, batches):
    """The same in float64, from the definitions. Returns student, RailLoss, and mean losses."""
    settings, *models = start(way)
    teacher, student, rail = (model.double() for model in models)
    optimizer = torch.optim.Adam([{"params": x.parameters()} for x in (student, rail)])
    means = np.zeros((4, 4))
    for step, rows in enumerate(batches):
        layers = rail_kd.choose_layers(settings, 5, 3, step // 3 + 1, step % 3)
        logits, pooled = [], []
        for model, which in ((student, (1, 2)), (teacher, () if layers is None else layers)):
            found = [model(input_ids=torch.tensor([DATA[row]["input_ids"]]),
                           output_hidden_states=True) for row in rows]
            logits.append(torch.cat([x.logits for x in found]))
            pooled.append([x.hidden_states[j][0].mean(0) for x in found for j in which])
        ce = -torch.log_softmax(logits[0], 1)[range(len(rows)), DATA[rows]["label"]].mean()
        kd, loss = kd_by_hand(*logits, 3.0), torch.zeros(())
        if layers is not None:
            s, t = (torch.stack(side).unflatten(0, (len(rows), -1)) for side in pooled)
            loss = rail_by_hand(rail, s, t.half(), settings.variant, settings.centre)  # as stored
        total = sum(weight * x for weight, x in zip(settings.weights, (ce, kd, loss)))
        for group, rate in zip(optimizer.param_groups, (0.01, 0.02)):
            group["lr"] = rate * (12 - step) / 11 if step else 0.0     # of 12 steps, one is warm-up
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        means[step // 3] += [x.item() * len(rows) / 10 for x in (ce, kd, loss, total)]
    return student, rail, means


@needs_all
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_loop_does_what_the_definitions_say_sentence_by_sentence(way, tmp_path):
    *models, history, batches = loop(tmp_path, way)
    orders = [sum(batches[i:i + 3], []) for i in (0, 3, 6, 9)]
    assert all(sorted(order) == list(range(10)) for order in orders), "each row once per epoch"
    assert len(set(map(tuple, orders))) == 4, "another order in each epoch"
    *exact, means = by_hand(way, batches)
    zero = ("key.bias", "_proj.bias") if "centre" in way else ("key.bias",)   # 0 but for rounding
    worst = max(((p - q).abs().max().item(), name) for model, other in zip(models, exact)
                for (name, p), q in zip(model.named_parameters(), other.parameters())
                if not name.endswith(zero))
    half = "precision" in way                      # a T4, on the CPU: scaled gradients
    assert (worst[0] > 2e-4) == half == (history[-1]["gradient"] > 100), worst
    one_map = way.get("mapping") in (None, "skip") and "resample" not in way
    for epoch, (record, mean) in enumerate(zip(history, means), 1):
        close([record[key] for key in ("ce", "kd", "rail", "total")], mean, "means",
              0.02 if half else 1e-4)
        layers = rail_kd.choose_layers(Settings(**STEPS | way), 5, 3, epoch)
        assert record["layers"] == (layers.tolist() if one_map else None)


# ---- 4. to 9. The table, models, data, scores and whole jobs -----------------------------------

def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence", "label"), *rows])
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small files of own data, a teacher with dropout, and a student unlike it in every way."""
    folder = tmp_path_factory.mktemp("world")
    for name, data in zip(("validation", "train", "other"), rail_kd.toy_sentences(0, [20, 40, 20])):
        rows = [(row["sentence1"], ["bad", "good"][row["label"]]) for row in data]
        write_csv(folder / f"{name}.csv", rows)
    tokenizer = rail_kd.toy_teacher(0, num_layers=1)[1]
    words = sorted(tokenizer.get_vocab(), key=lambda word: (not word.startswith("["), word))[::-1]
    other = transformers.BertTokenizer({word: i for i, word in enumerate(words)})
    both = dict(vocab_size=len(words), num_labels=2)
    teacher = small("Bert", 6, 16, hidden_dropout_prob=0.2, **both)
    student = small("DistilBert", 3, 24, hidden_dim=32, dropout=0.0, attention_dropout=0.0,
                    seq_classif_dropout=0.0, pad_token_id=other.pad_token_id, **both)
    unused = small("BigBird", 3, 16, attention_type="original_full", sep_token_id=3, **both)
    for name, *parts in (("teacher", teacher, tokenizer), ("stranger", student, other),
                         ("encoder", student.distilbert, other), ("unused", unused, tokenizer)):
        for part in parts:
            part.save_pretrained(folder / name)
    return folder


def job(world, out, **more):
    """Settings of a small run: 6 -> 3 layers, one epoch of five steps."""
    return Settings(**dict(
        train_file=f"{world}/train.csv", validation_file=f"{world}/validation.csv", epochs=1,
        teacher=f"{world}/teacher", student_layers=None if "student" in more else 3, batch_size=8,
        output_dir=str(out), device="cpu", learning_rate=1e-3) | more)


@needs_all
def test_table_is_shared_until_pooling_or_configuration_changes(world, tmp_path, monkeypatch):
    teacher, history = shutil.copytree(world / "teacher", tmp_path / "teacher"), []
    def tables_after(name, **way):
        history.extend(run(job(world, tmp_path / name, teacher=str(teacher), **way))["epochs"])
        return len(list(teacher.glob("table-*")))
    assert tables_after("first") == 1
    os.truncate(next(teacher.glob("table-*/pooled.bin")), 1000)        # a copy was cut off; a run
    monkeypatch.setattr(torch, "from_file", lambda *a, real=torch.from_file, **b: [real(*a, **b)])
    pytest.raises(AttributeError, tables_after, "killed")      # died before it was filled again
    monkeypatch.undo()
    assert tables_after("anew") == 1 and history[0]["total"] == history[1]["total"]
    assert tables_after("skip", mapping="skip", seed=5) == tables_after("c", variant="concat") == 1
    monkeypatch.setattr(rail_kd, "mean_pool", lambda hidden, mask: hidden.float().mean(dim=1))
    assert tables_after("pooling") == 2
    config = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text(config.replace('"gelu"', '"relu"'))
    assert tables_after("config") == 3


FAMILIES = pytest.mark.parametrize("name", ["Bert", "XLMRoberta", "Electra", "MPNet", "DebertaV2"])


def logits_of(model):
    ids = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.detach()


@FAMILIES
def test_student_is_cut_from_evenly_spaced_layers_and_reloads(name, tmp_path):
    teacher = small(name, 6, 16)
    student = rail_kd.build_student(teacher.requires_grad_(False), 3)
    assert student.training and all(p.requires_grad for p in student.parameters())
    stacks = [next(x for x in model.modules() if isinstance(x, torch.nn.ModuleList) and len(x) == n)
              for model, n in ((student, 3), (teacher, 6))]
    for i, j in ((1, 2), (2, 4), (3, 6)):
        for a, b in zip(stacks[0][i - 1].parameters(), stacks[1][j - 1].parameters()):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(student.eval()))
    assert torch.equal(logits_of(rail_kd.build_student(teacher, 6).eval()), logits_of(teacher))


@pytest.mark.parametrize("name, layers, more", [
    ("Bert", 7, {}), ("Bert", 0, {}), ("Albert", 3, {}), ("ModernBert", 3, dict(pad_token_id=0)),
    ("Longformer", 3, dict(attention_window=[4] * 6)),
    ("Funnel", 3, dict(block_sizes=[3, 3], num_hidden_layers=None))])
def test_student_that_can_not_be_cut_is_refused(name, layers, more):
    model = small(name, 6, 16, **more)
    refuses(lambda: rail_kd.build_student(model, layers), f"{name} to {layers} layers")


@pytest.mark.parametrize("own, wanted, order", [
    ([*"PONMLKJIHGFEDCBA"], [*"abcdefghijklmnop"], [*range(15, -1, -1)]),
    (["Good", "good", "bad"], ["good", "bad", "Good"], [1, 2, 0]),
    ([7, 8, 9], ["a", "b", "c"], [0, 1, 2])], ids=["wide", "case", "new"])
@FAMILIES
def test_teacher_gives_its_logits_in_the_order_of_the_data(name, own, wanted, order):
    numbers = {label: i for i, label in enumerate(own)}
    teacher = small(name, 6, 16, id2label=dict(enumerate(own)), label2id=numbers, num_labels=None)
    before = logits_of(teacher)
    rail_kd.align_labels(teacher, datasets.ClassLabel(names=wanted))
    assert torch.equal(logits_of(teacher), before[:, order])
    assert list(teacher.config.id2label.values()) == wanted


@pytest.mark.parametrize("task, columns, label, ends", [
    ("sst2", ["sentence"], datasets.ClassLabel(2), [""]),
    ("stsb", ["sentence1", "sentence2"], datasets.Value("float32"), [""]),
    ("mnli", ["premise", "hypothesis"], datasets.ClassLabel(3), ["_matched", "_mismatched"])])
def test_glue_task_is_complete_but_for_its_test_set(task, columns, label, ends, monkeypatch):
    def split(name):
        rows = {column: [f"{name} {column}"] for column in columns} | {"label": [1], "idx": [0]}
        return datasets.Dataset.from_dict(rows).cast_column("label", label)
    hub = {name: split(name) for name in ["train"] + [
        f"{kind}{end}" for kind in ("validation", "test") for end in ends]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: {("nyu-mll/glue", task): hub}[args])
    found = rail_kd.load_task(Settings(task=task))
    assert list(found) == ["train", "validation"] + ["validation_mismatched"] * (len(ends) - 1)
    for name, data in found.items():
        source = hub[name if name in hub else "validation_matched"][0]
        texts = dict(zip(("sentence1", "sentence2"), map(source.get, columns)))
        assert data[0] == texts | {"label": 1} and data.features["label"] == label


def load(path, rows=None, **more):
    if rows:
        write_csv(path, rows)
    return rail_kd.load_task(Settings(train_file=str(path), validation_file=str(path), **more))


def test_own_files_keep_texts_and_labels_are_names_numbers_or_decimals(tmp_path):
    path, other = tmp_path / "data.csv", write_csv(tmp_path / "other.csv", [("a", 1)])
    data = load(path, [("NA", "good"), ("007", "bad"), ('a "quoted", text', " good")])["train"]
    assert data.to_dict() == {"sentence1": ["NA", "007", 'a "quoted", text'], "label": [1, 0, 1]}
    assert load(path, [("a", 10), ("b", 2)])["train"].features["label"].names == ["2", "10"]
    refuses(lambda: load(path, eval_file=[other]),
            "1 is no label of the classes 2 and 10, and must not mean the second of them")
    data = load(path, [("a", 1)] * 10_050 + [("b", 2.5)])["train"]
    assert data.features["label"].dtype == "float32" and data["label"][-1] == 2.5
    pairs, path = [dict(sentence1="", sentence2=x, label=x/1) for x in (0, 1)], tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    assert str(load(path)["train"][1]) == "{'sentence1': '', 'sentence2': '1', 'label': 1.0}"


def test_own_files_are_read_anew_by_exact_name_and_limited_by_drawing(tmp_path):
    write_csv(tmp_path / "train1.csv", [("wrong", 0), ("wrong", 1)])
    path, numbers = tmp_path / "train[1].csv", write_csv(tmp_path / "n.csv", [("x", 1), ("y", 0)])
    assert load(path, [("old", 0), ("old", 1)])["train"]["sentence1"][:] == ["old", "old"]
    stamp = path.stat()
    write_csv(path, [("new", "a"), ("new", "b")])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    found = load(path, eval_file=[numbers])
    assert found["train"]["sentence1"][:] == ["new", "new"] and found[numbers]["label"][:] == [1, 0]
    data = load(path, [(str(i), i // 50) for i in range(100)], max_train_examples=40)["train"]
    assert len(data) == 40 and 10 < sum(data["label"]) < 30, "not the first 40 of a sorted file"


def test_toy_is_balanced_without_repeats_and_the_main_clause_decides():
    parts = rail_kd.toy_sentences(0, [300, 200, 500])
    texts = sum((data["sentence1"][:] for data in parts), [])
    assert len(set(texts)) == 1000 and 0.4 < np.mean(parts[2]["label"]) < 0.6
    for row in parts[0]:
        text = re.sub("^although .*?, ", "", row["sentence1"].lower().rstrip("."))
        clause = re.split(", (?:but|yet) ", text.split(", although ")[0])[-1].split()
        positive = clause[-1] in "clever moving fresh funny warm sharp gripping charming".split()
        assert row["label"] == (positive != any(x in clause for x in ("not", "never", "hardly")))
    clean = rail_kd.toy_sentences(0, [1000, 200])[1].to_dict()
    noisy = rail_kd.load_task(Settings(task="toy", max_train_examples=200))["train"].to_dict()
    assert noisy["sentence1"] == clean["sentence1"]
    assert np.not_equal(noisy["label"], clean["label"]).mean() == 0.2


def test_metrics_agree_with_their_definitions():
    labels = np.array([1] * 6 + [0] * 14)
    logits = np.eye(2)[[1, 1, 1, 1, 0, 0] + [1] * 3 + [0] * 11]     # TP 4, FN 2, FP 3, TN 11
    rail = RailLoss(2, 2, 1, projection_size=2)
    rail.teacher_proj = torch.nn.Identity()                         # cosines: 0, 0.6, 0.8
    assert rail.cosine(torch.tensor([[[2.0, 0]], [[0, 1]], [[3, 4]]])) == pytest.approx(1.4 / 3)
    output, ratings = np.array([[1.0], [2], [2], [4], [9]]), np.array([0.0, 1, 3, 3, 3])
    for found, expected in (
            (rail_kd.compute_metrics(logits, labels, "mrpc"), {
                "accuracy": 0.75, "f1": 8 / 13, "eval_loss": 0.25 + math.log(1 + math.exp(-1))}),
            (rail_kd.compute_metrics(logits, labels, "cola"), {
                "matthews_correlation": (4 * 11 - 3 * 2) / math.sqrt(7 * 6 * 14 * 13)}),
            (rail_kd.compute_metrics(logits[:2], labels[:2], "cola"), {"matthews_correlation": 0}),
            (rail_kd.compute_metrics(output, ratings, "stsb"), {"eval_loss": 8.0,   # ties: one rank
                "spearmanr": 7 / math.sqrt(9.5 * 8), "pearson": 11 / math.sqrt(41.2 * 8)})):
        assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_evaluate_scores_a_whole_set_at_once_and_without_dropout():
    model, one = (small("Bert", 2, 8, seed=4, hidden_dropout_prob=x) for x in (0.5, 0.0))
    data = datasets.concatenate_datasets([DATA] * 7).select(range(67))      # 64 + 3
    logits = [one(input_ids=torch.tensor([row["input_ids"]])).logits[0].tolist() for row in data]
    right = np.argmax(logits, axis=1) == np.array(data["label"])
    found = rail_kd.evaluate(model.train(), data, TOKENIZER, teacher_logits=np.array(logits))
    assert found["accuracy"] == pytest.approx(right.mean()) and found["agreement"] == 1


@needs_all
def test_every_setting_has_an_effect(world, tmp_path):
    ways = [{}, dict(variant="concat"), dict(resample="step"), dict(centre=True), dict(seed=1),
            dict(projection_size=8), dict(projection_learning_rate=0.1), dict(temperature=5.0),
            dict(weights=[0.2, 0.2, 0.6]), dict(batch_size=20), dict(learning_rate=1e-2),
            dict(max_length=6), dict(max_train_examples=30), dict(precision="bf16"),
            dict(student_layers=2), dict(student=f"{world}/stranger"),
            *(dict(mapping=x) for x in ("skip", "last", "attention", "none", "finetune"))]
    found = [run(job(world, tmp_path / str(i), **way))["epochs"][0] for i, way in enumerate(ways)]
    for (a, x), (b, y) in itertools.combinations(zip(ways, found), 2):
        assert (x["total"], x["eval_loss"]) != (y["total"], y["eval_loss"]), (a, b)
    none, labels = found[-2:]
    assert labels["kd"] == labels["rail"] == none["rail"] == 0
    assert none["total"] == pytest.approx((none["ce"] + none["kd"]) / 2)


@needs_all
def test_job_leaves_a_student_for_pipelines_and_all_numbers(world, tmp_path):
    out, other = tmp_path / "out", str(world / "other.csv")
    result = run(job(world, out, eval_file=[other], epochs=2, teacher=str(world / "encoder"),
                     teacher_epochs=1, student_layers=2))
    assert result == json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert set(result) == set("settings versions device teacher student epochs evaluation".split())
    assert {"layers", "ce", "kd", "rail", "total", "seconds", "examples_per_second", "accuracy",
            "agreement", "eval_loss"} <= set(result["epochs"][1]) and result["teacher"]["epochs"][0]
    again = run(job(world, f"{out}2", epochs=2, teacher=f"{out}/teacher", student_layers=2))
    assert again["epochs"][1]["total"] == result["epochs"][1]["total"], "cut before fine-tuning?"
    toy = run(Settings(max_train_examples=9, teacher_epochs=1, epochs=1, output_dir=f"{out}3"))
    tuned_on = [toy["teacher"]["epochs"][0][x] for x in ("seconds", "examples_per_second")]
    assert round(math.prod(tuned_on)) == 8 * 9, "the toy's teacher has sentences of its own"
    assert "accuracy" in result["evaluation"][other]["teacher"]
    assert {x.name for x in out.iterdir()} == {"metrics.json", "student", "teacher"}
    pipe = transformers.pipeline("text-classification", model=str(out / "student"))
    rows = csv.DictReader((world / "validation.csv").read_text(encoding="utf-8").splitlines())
    right = [pipe(row["sentence"])[0]["label"] == row["label"] for row in rows]
    assert np.mean(right) == pytest.approx(result["student"]["accuracy"])
    assert result["student"]["parameters"] == sum(p.numel() for p in pipe.model.parameters())


@needs_all
def test_regression_runs_and_a_weak_teacher_is_announced(world, tmp_path, capsys):
    path = write_csv(tmp_path / "scores.csv", [(f"{x} plot", x + 0.5) for x in range(16)])
    found = run(job(world, tmp_path / "out", train_file=path, validation_file=path,
                    teacher=f"{world}/encoder", teacher_epochs=1, student_layers=2))
    assert {"pearson", "spearmanr", "eval_loss"} <= set(found["student"])
    assert "!!!" in capsys.readouterr().out and found["epochs"][0]["kd"] > 0


@needs_all
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_two_processes_do_a_whole_job_like_one(world, tmp_path):
    """Without dropout. The last batches have one row: less than the two can share."""
    def whole_job(rank, count):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/{count}.meet", rank=rank,
                                             world_size=count)
        run(job(world, tmp_path / f"{count}", teacher=f"{world}/encoder", teacher_epochs=2,
                student=f"{world}/unused", batch_size=13, epochs=2, learning_rate=1e-2))
    for count in (1, 2):
        torch.multiprocessing.start_processes(whole_job, (count,), count, start_method="fork")
    found = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in "12"]
    for a, b in zip(*(x["teacher"]["epochs"] + x["epochs"] for x in found)):
        for key in ("ce", "kd", "rail", "total", "eval_loss"):
            close(a[key], b[key], f"{key}: a mean over the batch, however it is shared", 1e-4)


# ---- 10. The command line, and what can go wrong -----------------------------------------------

def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def complaint(words, capsys):
    """Runs a command that must fail with status 2 and one line on stderr; returns the line."""
    assert rail_kd.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


@needs_all
def test_interrupted_job_ends_bit_for_bit_the_same(world, tmp_path, capsys, monkeypatch):
    train, whole, cut = (tmp_path / name for name in ("train.csv", "whole", "cut"))
    shutil.copy(world / "train.csv", train)
    words = flags(train_file=train, validation_file=world / "validation.csv", epochs=3,
                  teacher=world / "teacher", student_layers=3, device="cpu")
    assert rail_kd.main([*words, f"--output-dir={whole}"]) == 0
    real, calls = rail_kd.kd_loss, itertools.count()
    def stops(*args):
        if next(calls) == 3:                                   # in the second step of epoch 2
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(rail_kd, "kd_loss", stops)
    assert rail_kd.main([*words, f"--output-dir={cut}"]) == 130
    assert f"--resume {cut}" in capsys.readouterr().err
    monkeypatch.undo()
    write_csv(train, [("another text", "good"), ("than before", "bad")])
    assert "data" in complaint(flags(resume=cut), capsys)
    assert "flags" in complaint(flags(resume=cut, epochs=5), capsys)
    shutil.copy(shutil.copy(world / "train.csv", train), cut / "mine.pt")
    assert rail_kd.main(flags(resume=cut, device="cpu")) == 0
    a, b = ([(out / "student" / "model.safetensors").read_bytes(),
             [x["total"] for x in json.loads((out / "metrics.json").read_text())["epochs"]]]
            for out in (whole, cut))
    assert a == b and (cut / "mine.pt").exists()


@needs_all
@pytest.mark.parametrize("words, hint", [
    ("--precision fp16 --device cpu", "fp16"), ("--weights 0 0 1 --mapping none", "nothing"),
    ("--task sst2 --train-file a --validation-file b", "excl"), ("--eval-file train", "rename"),
    ("--resume x --seed 3", "--resume"), ("--weights 1 0", "three"), ("--mapping any", "attention"),
    ("--projection-size 1000000000000", "--proj"), ("--task sst3", "sst3"), ("--task sst2", "sst2"),
    ("--train-file= --validation-file=", "--train"), ("--epoch 3", "--epoch"), ("--epochs x", "x"),
    ("--student-layers 13", "13"), ("--student-layers 1", "2 to 12"), ("--max-length 0", "--max"),
    ("--train-file no --validation-file no", "no must"), ("--teacher no/model", "no/model"),
    ("--epochs 0", "--epochs"), ("--learning-rate nan", "--learning"), ("--resume none", "none"),
    ("--student x --student-layers 3", "excl"), ("--variant concat --mapping attention", "layer"),
    ("--seed -1", "--seed"), ("--temperature inf", "--temp"), ("--train-file a", "together")])
def test_bad_settings_end_in_one_line_and_leave_nothing(words, hint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hint in complaint(words.split(), capsys) and not list(tmp_path.iterdir())


@needs_all
@pytest.mark.parametrize("train, validation, hint", [
    ("", GOOD, ""), ("text,label\na,b\n", GOOD, "sentence"), ("sentence,label\n", GOOD, ""),
    ("sentence,kind\na,b\n", GOOD, "label"), ("sentence,label\ncaf\udce9,x\n", GOOD, "UTF-8"),
    ("sentence,label\na,x\nb,\n", GOOD, "example 2"), ("sentence,label\na,NA\n", GOOD, "example 1"),
    ("sentence,label\na,1\nb,2.5\nc,x\n", GOOD, "numbers"),
    ("sentence,label\na,1.5\nb,inf\n", GOOD, "numbers"), ("sentence,label\na,x\n", GOOD, "differ"),
    (GOOD, "sentence,label\na,so-so\n", "so-so"), ('sentence,label\n"open,x\n', GOOD, ""),
    (GOOD, "sentence1,sentence2,label\na,b,good\n", "columns"),
    ("sentence,label\na, and b,x\nc,y\n", GOOD, ""), ('{"sentence": "a", "lab', GOOD, ""),
    ('{"sentence":"a","label":1}\n{"sentence":"b","sentence2":"","label":2}', GOOD, "example 1"),
    ('{"sentence": ["a"], "label": 1}\n', GOOD, ""), (GOOD, "sentence,label\na,-01\n", "'-01'"),
    ('{"sentence": null, "label": 1}\n', GOOD, "example 1")], ids=range(19))
def test_bad_file_is_named_in_one_line(world, tmp_path, capsys, train, validation, hint):
    paths = [tmp_path / f"train.{'jsonl' if '{' in train else 'csv'}", tmp_path / "validation.csv"]
    for path, content in zip(paths, (train, validation)):
        path.write_bytes(content.encode(errors="surrogateescape"))
    line = complaint(flags(train_file=paths[0], validation_file=paths[1], teacher=world / "teacher",
                           output_dir=tmp_path / "out"), capsys)
    assert hint in line and str(tmp_path) in line and not (tmp_path / "out").exists()


@needs_all
def test_models_that_do_not_fit_are_refused_before_a_folder_is_made(world, tmp_path, capsys):
    def line(**more):
        return complaint(flags(**dict(train_file=world / "train.csv", output_dir=tmp_path / "out",
                                      validation_file=world / "validation.csv") | more), capsys)
    config = shutil.copytree(world / "stranger", tmp_path / "broken") / "config.json"
    config.write_text(config.read_text().replace('"hidden_dim": 32', '"hidden_dim": 30'))
    assert "broken" in line(teacher=world / "teacher", student=tmp_path / "broken")
    three = write_csv(tmp_path / "three.csv", [("a", 0), ("b", 1), ("c", 2)])
    assert "classes" in line(train_file=three, validation_file=three, teacher=world / "teacher")
    long = write_csv(tmp_path / "long.csv", [("very " * 30, "good"), ("very", "bad")])
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    for name, hint in (("Deberta", "--precision fp32"), ("FNet", "mask"), ("Roberta", "Roberta")):
        model = small(name, 6, 16, num_labels=2, vocab_size=70, max_position_embeddings=20)
        model.save_pretrained(tmp_path / name)
        assert "no tokenizer" in line(teacher=tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        assert hint in line(teacher=tmp_path / name, precision="bf16", student_layers=2,
                            validation_file=long, max_length=19)       # Roberta: up to 18
    assert not (tmp_path / "out").exists()


def test_help_can_be_shown_and_choices_hold_in_python_too():
    assert pytest.raises(SystemExit, rail_kd.main, ["--help"]).value.code == 0
    refuses(lambda: run(Settings(resample="steps")), "steps is neither epoch nor step")


@needs_all
def test_folder_of_another_run_is_refused_and_left_alone(world, tmp_path, monkeypatch):
    settings, file, real = job(world, tmp_path), tmp_path / "metrics.json", rail_kd.encode_and_check
    def meanwhile(*args):                          # the other run is a little faster
        file.write_text("precious")
        return real(*args)
    monkeypatch.setattr(rail_kd, "encode_and_check", meanwhile)
    refuses(lambda: run(settings), "the other run has claimed the folder")
    monkeypatch.undo()
    refuses(lambda: run(settings), "the folder is in use")
    assert file.read_text() == "precious"


@needs_all
def test_course_version_is_blank_in_five_functions_only(monkeypatch):
    blank, count = re.subn("(?s)### BEGIN SOLUTION.*?### END SOLUTION", "raise NotImplementedError",
                           inspect.getsource(rail_kd))
    course = type(sys)("course")
    monkeypatch.setitem(sys.modules, "course", course)
    exec(compile(blank, "course.py", "exec"), vars(course))
    for name in EXERCISES:
        monkeypatch.setitem(globals(), name, getattr(course, name))
    assert count == len(unsolved()) == 5
    model, tokenizer = course.toy_teacher(0, num_layers=2)
    data = course.encode(course.toy_sentences(0, [8])[0], tokenizer, model, 32)
    assert 0 <= course.evaluate(model, data, tokenizer)["accuracy"] <= 1
