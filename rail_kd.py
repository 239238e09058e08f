"""RAIL-KD in one file: random intermediate layer mapping for knowledge distillation.

A small Transformer, the *student*, learns to imitate a large, frozen one, the *teacher*:

    L  =  w1 * CE  +  w2 * KD  +  w3 * RAIL

CE compares the student's output with the labels, KD with the teacher's output, and RAIL compares
intermediate layers. At the start of each epoch, RAIL-KD draws teacher layers at random and sorts
them, so that deeper student layers learn from deeper teacher layers:

    teacher layer    1    2    3    4    5    6    7    8    9   10   11   12
                          |                        |         |              :
                          v                        v         v              :
    student layer         1                        2         3              4   <--  labels: CE

    arrows: RAIL. This epoch's draw is 2, 7, 9; the next epoch draws again.
    dots: KD. It matches the last layers through the logits, so the draw leaves them out.

For each arrow, the outputs of both layers are averaged over the tokens of a sentence, projected to
a common width (one trained linear layer for each side) and scaled to length 1. RAIL is the squared
distance between the two vectors of a pair, averaged over pairs and sentences.

    python rail_kd.py --task toy --student-layers 4        # two minutes on a laptop, offline
    python rail_kd.py --task sst2 --student-layers 4       # BERT-base: fine-tuned, then cut to 4

Near its end, the toy run prints:

             layers  parameters  megabytes  ms per sentence  accuracy
    teacher      12     413,122        1.7             3.80  1.0000
    student       4     145,346        0.6             1.37  0.9930

The student is cut from its teacher, and a fifth of its labels are deliberately wrong. Seed 0 is
lucky. Mean accuracy over ten seeds, +- standard deviation (commands: end of tutorial.ipynb): labels
alone (--mapping finetune) 0.880 +- 0.011, vanilla KD (--mapping none) 0.969 +- 0.028, RAIL-KD 0.963
+- 0.029, --centre 0.987 +- 0.019. In README.md, RAIL-KD beats vanilla KD once, with --centre.

Notation: B sentences in a batch, S tokens in a sentence, N training examples, C classes (1 for
regression), n teacher layers of width d_t, m student layers of width d_s, k = m-1 pairs, u the
width of the projections, T the temperature.

Sections 1 to 3, about 300 lines, are the method: read them in one sitting. The rest is support.

    run (9) > teacher_table (4)                                                 once
            > train (3) > choose_layers (1) > sample_layer_map (1)              in each epoch
                        > Distiller (3) > model_outputs (3) > mean_pool (2)     in each step
                                        > label_loss, kd_loss, RailLoss, combined_loss (2)

Good first changes: an entry in `MAPS`, the distance in `RailLoss.forward`, another loss in
`Distiller.forward`. SOLUTION blocks are exercises; RAIL_KD_DEBUG=1 shows tracebacks.

Source: Haidar, Anchuri, Rezagholizadeh, Ghaddar, Langlais, Poupart, "RAIL-KD: RAndom Intermediate
Layer Mapping for Knowledge Distillation", Findings of NAACL 2022, arXiv 2109.10164. This is an
unofficial implementation, written without the paper's full text, from its abstract, its first table
and two public re-implementations (aitsc/GLMKD, TKC002/CILDA-plus-minILD). Origin of each choice:

    draw once per epoch, sorted; weighted sum of the losses                   the paper
    weights 1/3 each; u = 128; mean over tokens, projection, unit length      both implementations
    projections with a bias, at the learning rate of the student              both implementations
    candidates 1..n-1, k = m-1 pairs: the last layers stay out of the draw    GLMKD
    one projection per side, shared by all pairs; squared distance            GLMKD
    the mean over pairs and sentences, so that RAIL lies in [0, 4]            CILDA; GLMKD sums
    the default: RAIL-KD^l, pair by pair (both run RAIL-KD^c, concatenated)   ours
    padding is excluded from the mean over tokens (both include it)           ours
    temperature 2 (the factor T^2 is standard)                                ours (GLMKD: 10)
    10 epochs, rate 5e-5 (toy: 8, 5e-4), 10% warm-up, no weight decay         ours (CILDA: 20, 2e-5)
    the student starts from evenly spaced layers of its teacher               ours
    --centre, against the trivial solution of section 2; off by default       ours
"""
import argparse, contextlib, copy, csv, dataclasses, inspect, json, math, os
import re, shlex, shutil, sys, time, timeit
from pathlib import Path
from typing import Literal, get_args

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import distributed as dist, nn
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

# ---- 1. The draw -------------------------------------------------------------------------------
# A draw of 2, 7, 9 is a map: teacher layer 2 teaches student layer 1, 7 teaches 2, and 9 teaches 3.
# Two facts about these maps, both checked in the tests and the notebook:
# 1. On average, they are evenly spaced: the i-th smallest of k distinct draws from 1..n-1 has mean
#    i*n/(k+1) = i*n/m. For 12 -> 4, this is 3, 6, 9: PKD's "skip". Yet student layer 1 most often
#    gets teacher layer 1, and 3, 6, 9 is just one of C(11, 3) = 165 equally likely maps.
# 2. Over a run, nearly every candidate is drawn, although each step compares only k pairs. For
#    12 -> 4, the probability that a given layer sits out is 1 - k/(n-1) = 8/11 = 72.7% for one
#    epoch, (8/11)^5 = 20.3% for five, and 4.1% for ten.


def sample_layer_map(num_teacher_layers, num_student_layers, rng):
    """RAIL-KD's draw: one teacher layer for each of the student layers 1, 2, ..., m-1.

    k = m-1 distinct layers are drawn uniformly, without replacement, from the intermediate layers
    1..n-1 of the teacher, and sorted ascending. Layers are counted from 1, as in `hidden_states`,
    whose position 0 holds the embeddings.

    Args: num_teacher_layers (n), num_student_layers (m); rng: the np.random.Generator to use.
    Returns: ascending int array (k,).
    Raises: ValueError for m < 2 (no intermediate layer to teach) or m > n."""
    ### BEGIN SOLUTION
    if not 2 <= num_student_layers <= num_teacher_layers:
        raise ValueError(f"{num_student_layers} student layers and {num_teacher_layers} teacher "
                         "layers: the student needs at least 2 and at most as many as its teacher")
    candidates = np.arange(1, num_teacher_layers)                               # 1..n-1
    return np.sort(rng.choice(candidates, size=num_student_layers - 1, replace=False))
    ### END SOLUTION


def evenly_spaced(n, m):
    """m (almost) evenly spaced layers of 1..n, ending with n: those that `build_student` keeps."""
    return [round(i * n / m) for i in range(1, m + 1)]


# The other mappings: from n and m to the layers that teach, or None for no RAIL. A new one that
# always chooses the same k layers needs only an entry here.
# `skip`, `last` and `attention` borrow only the map from their papers, not the loss.
MAPS = {"skip": lambda n, m: np.array(evenly_spaced(n, m)[:-1]),       # PKD (Sun et al. 2019): (k,)
        "last": lambda n, m: np.arange(n - m + 1, n),                  # PKD: (k,)
        "attention": lambda n, m: np.arange(1, n),     # ALP-KD (Passban et al. 2021): all, (n-1,)
        "none": lambda n, m: None, "finetune": lambda n, m: None}


def choose_layers(settings, n, m, epoch, step=0):
    """The teacher layers to learn from, an int array of numbers in 1..n-1; None without RAIL."""
    if settings.mapping == "random":               # RAIL-KD: (k,)
        # Reseeded for each draw, so a resumed run draws the same layers.
        key = [settings.seed, epoch, step if settings.resample == "step" else 0]
        return sample_layer_map(n, m, np.random.default_rng(key))
    return MAPS[settings.mapping](n, m)


# ---- 2. The losses -----------------------------------------------------------------------------
#   student: k layers (B, S, d_s) - mean -> (B, k, d_s) - student_proj -> (B, k, u) - unit -> s
#   teacher: k layers (B, S, d_t) - mean -> (B, k, d_t) - teacher_proj -> (B, k, u) - unit -> t
#   RAIL = mean of || s_i - t_i ||^2 over the batch and the k pairs (concat: one pair)
# For unit vectors, || s - t ||^2 = 2 - 2 cos(s, t): 0 for equal directions, 4 for opposite ones.
#
# The trivial solution. The projections are trained too, and can lower the loss on their own by
# mapping all sentences to one direction. RAIL then teaches the student nothing.
#
# How to see it. Each epoch reports `cosine` (c), the mean cosine between the projected teacher
# vectors of different sentences (the first 256). Near 1, they have collapsed. Their mean has length
# about sqrt(c), so a student that always points along it has a loss of about 2 - 2 sqrt(c).
# Only a loss clearly below this can be a sign of teaching, but the projections alone can get there
# too. (`rail` is an epoch's mean, c is from its end. With --centre or attention, this is invalid.)
#
# --centre subtracts each side's batch mean, the part that all sentences share. From random initial
# weights, it beat vanilla KD by 0.027 on the toy (with ten other teachers by 0.022, which is not
# significant), but lost by 0.014 on film reviews (README.md).


def mean_pool(hidden_states, attention_mask):
    """One vector per sentence: the mean of a layer's output over the real tokens, [CLS] included.

    Padding is left out, whatever it contains. Otherwise a sentence's vector would depend on the
    longest sentence in its batch.

    Args: hidden_states (B, S, d), any float type; attention_mask (B, S), any type: 1 for a real
        token, 0 for padding.
    Returns: (B, d), summed and returned in float32; zeros for a row without real tokens.
    Raises: ValueError for shapes other than (B, S, d) and (B, S)."""
    ### BEGIN SOLUTION
    if hidden_states.dim() != 3 or hidden_states.shape[:2] != attention_mask.shape:
        raise ValueError(f"hidden states {hidden_states.shape} and attention mask "
                         f"{attention_mask.shape} must be (B, S, d) and (B, S)")
    mask = attention_mask.bool().unsqueeze(-1)                                  # (B, S, 1)
    # masked_fill, not a product with the mask: 0 * NaN is NaN.
    total = hidden_states.float().masked_fill(~mask, 0.0).sum(dim=1)            # (B, d)
    return total / mask.sum(dim=1).clamp(min=1)                                 # (B, d) / (B, 1)
    ### END SOLUTION


class RailLoss(nn.Module):
    """The intermediate loss: project, normalise, compare.

    Variant "layerwise" (RAIL-KD^l) compares pair by pair; "concat" (RAIL-KD^c) concatenates the k
    vectors of each side first; "attention" is layer-wise with all teacher candidates for each
    student layer. The projections are trained with the student and discarded afterwards.

    Args: teacher_dim (d_t), student_dim (d_s), num_pairs (k), projection_size (u); centre: whether
        to subtract the batch mean from both sides. A batch of one then has a loss of 0. Each
        process centres its own rows, so results depend on the number of processes.
    Raises: ValueError for an unknown variant, or a size below 1."""

    def __init__(self, teacher_dim, student_dim, num_pairs, variant="layerwise",
                 projection_size=128, centre=False):
        super().__init__()
        if variant not in ("layerwise", "concat", "attention"):
            raise ValueError(f"variant {variant!r} is not one of layerwise, concat, attention")
        if min(teacher_dim, student_dim, num_pairs, projection_size) < 1:
            raise ValueError("widths, number of pairs and projection size must be at least 1")
        self.num_pairs, self.variant, self.centre = num_pairs, variant, centre
        layers_joined = num_pairs if variant == "concat" else 1
        self.teacher_proj = nn.Linear(layers_joined * teacher_dim, projection_size)
        self.student_proj = nn.Linear(layers_joined * student_dim, projection_size)

    def project(self, linear, pooled):
        """Projects one side: (B, k, d) -> (B, k, u), or (B, u) for concat. Not yet normalised."""
        vectors = linear(pooled.flatten(1) if self.variant == "concat" else pooled)
        return vectors - vectors.mean(dim=0) if self.centre else vectors

    def forward(self, student_pooled, teacher_pooled):
        """Squared distance of the projected unit vectors, mean over pairs and batch: in [0, 4].

        Both sides go through `self.project`, each with its own projection, and are then divided by
        their L2 norm (zero vectors stay zero). Layer-wise, layer i is compared with layer i of the
        other side. With attention, the teacher vector for pair i is the sum of all projected
        candidates t_j, weighted by softmax_j(s_i . t_j), before s and t are normalised. Returns a
        scalar; no gradient flows into `teacher_pooled`.

        Args: student_pooled (B, k, d_s); teacher_pooled (B, k, d_t), or (B, n-1, d_t) if attention.
        Raises: ValueError unless each side has exactly k layers (with attention, only the
            student), or if the batch sizes differ."""
        ### BEGIN SOLUTION
        B, k = len(student_pooled), self.num_pairs
        expected = teacher_pooled.shape[1] if self.variant == "attention" else k
        if student_pooled.shape[1] != k or teacher_pooled.shape[:2] != (B, expected):
            raise ValueError(f"student {student_pooled.shape} and teacher {teacher_pooled.shape} "
                             f"do not make {k} pairs of layers for each sentence")
        s = self.project(self.student_proj, student_pooled)            # (B, k, u); concat: (B, u)
        t = self.project(self.teacher_proj, teacher_pooled.detach())   # attention: (B, n-1, u)
        if self.variant == "attention":
            t = torch.softmax(s @ t.transpose(1, 2), dim=-1) @ t                # (B, k, u)
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)                   # length 1
        return (s - t).pow(2).sum(dim=-1).mean()
        ### END SOLUTION

    @torch.no_grad()
    def cosine(self, teacher_pooled):
        """Mean cosine between different sentences after projection: (B, k, d_t) -> float."""
        B = len(teacher_pooled)
        t = F.normalize(self.project(self.teacher_proj, teacher_pooled), dim=-1)
        # || sum ||^2 adds up B^2 cosines: B of a vector with itself (1 each), B (B - 1) of others.
        return ((t.sum(dim=0).pow(2).sum(dim=-1) - B) / max(B * (B - 1), 1)).mean().item()


def label_loss(logits, labels):
    """CE of logits (B, C) and class numbers (B,); for regression (C = 1), mean squared error."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits.squeeze(1), labels)
    return F.cross_entropy(logits, labels)


def kd_loss(student_logits, teacher_logits, temperature):
    """T^2 * KL(softmax(z_t / T) || softmax(z_s / T)) for logits z, batch mean (Hinton et al. 2015).

    A higher T flattens both distributions, so the probabilities of the wrong classes count for
    more. For large T, the gradient of this KL shrinks as 1/T^2; the factor T^2 undoes that. For
    regression: the mean squared error. Returns a scalar, with no gradient for `teacher_logits`.

    Args: student_logits, teacher_logits (B, C); temperature T (checked even for regression).
    Raises: ValueError unless both have the same shape (B, C), and 0 < T < infinity."""
    ### BEGIN SOLUTION
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(f"student logits {student_logits.shape} and teacher logits "
                         f"{teacher_logits.shape} must both be of shape (B, C)")
    if not 0 < temperature < torch.inf:
        raise ValueError(f"temperature {temperature} must be a positive finite number")
    if student_logits.shape[1] == 1:
        return F.mse_loss(student_logits, teacher_logits.detach())
    # F.kl_div(a, b) is KL(b || a): the student comes first. Both are *log*-probabilities, hence
    # log_target. The default reduction "mean" divides by B * C, so KD's weight would depend on C.
    log_s = F.log_softmax(student_logits / temperature, dim=-1)
    log_t = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    return temperature ** 2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    ### END SOLUTION


def combined_loss(ce, kd, rail, weights):
    """The objective w1 * CE + w2 * KD + w3 * RAIL, a scalar.

    Args: ce, kd, rail: scalars, as tensors (gradients flow back) or numbers; weights (w1, w2, w3).
    Raises: ValueError unless there are three weights, all >= 0 (not NaN), with sum 1 (to 1e-6)."""
    ### BEGIN SOLUTION
    if len(weights) != 3 or not all(w >= 0 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights {weights} must be three numbers >= 0 (CE, KD, RAIL) with sum 1")
    w1, w2, w3 = weights
    return w1 * ce + w2 * kd + w3 * rail
    ### END SOLUTION


# ---- 3. One step, and the loop -----------------------------------------------------------------
# The frozen teacher's outputs never change, so the teacher runs just once, before the loop
# (section 4), and `teacher_outputs(rows, layers)` looks them up. Ignore at first: rank, world, own,
# share (several GPUs); load_state, save_state; scaler (fp16). Then read `model_outputs`.


class Distiller(nn.Module):
    """Student and projections in one module: trained, resumed and distributed together."""

    def __init__(self, student, rail_loss, settings):
        super().__init__()
        self.student, self.rail_loss, self.settings = student, rail_loss, settings

    def forward(self, batch, teacher_logits=None, teacher_pooled=None):
        """Returns (4,): CE, KD, RAIL and their weighted sum. KD is 0 without teacher logits, RAIL
        is 0 without projections. Args: batch: {input_ids (B, S), ..., labels (B,)}; the teacher's
        outputs for it: logits (B, C) and the layers of the map (B, k or n-1, d_t)."""
        use_rail = self.rail_loss is not None
        logits, pooled = model_outputs(self.student, batch, self.settings.precision, use_rail)
        ce = label_loss(logits, batch["labels"])
        kd = rail = torch.zeros_like(ce)
        if teacher_logits is not None:
            kd = kd_loss(logits, teacher_logits, self.settings.temperature)
        if use_rail:                               # all layers but the last: (B, m-1, d_s)
            rail = self.rail_loss(pooled[:, :-1], teacher_pooled)
        return torch.stack([ce, kd, rail, combined_loss(ce, kd, rail, self.settings.weights)])


def train(distiller, data, tokenizer, settings, state_file, after_epoch, teacher_outputs=None, n=0):
    """Trains a Distiller in place; returns the history, one dict per epoch.
    `teacher_outputs(rows, layers)` gives the outputs of a teacher of n layers (section 4); without
    it, only labels are used. `after_epoch(history, layers)` may add scores to the last dict. All
    randomness comes from seed, epoch and step: a killed run resumes after its last complete epoch,
    bit for bit on a CPU. Raises FloatingPointError (a loss isn't finite), ValueError or OSError."""
    rank, world = rank_and_world()                 # without torchrun: 0 and 1
    student = distiller.student
    steps = math.ceil(len(data) / settings.batch_size) * settings.epochs
    optimizer, schedule, scaler = make_optimizer(distiller, settings, steps)
    # A state file, if there is one, fills these four objects and the history.
    history, save_state = load_state(state_file, distiller, optimizer, schedule, scaler)
    m, lengths, model = student.config.num_hidden_layers, lengths_of(data), distiller
    if world > 1:                          # some models, such as XLNet, have unused weights
        model = nn.parallel.DistributedDataParallel(distiller, find_unused_parameters=True)

    for epoch in range(len(history) + 1, settings.epochs + 1):
        start = time.perf_counter()
        sums = 0
        layers = choose_layers(settings, n, m, epoch)                   # the draw: (k,), or None
        seed = int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0])
        torch.manual_seed(seed + rank)             # for dropout
        distiller.train()
        batches = length_batches(lengths, settings.batch_size, seed)
        for step, rows in enumerate(progress(batches, f"epoch {epoch}")):
            if settings.resample == "step":
                layers = choose_layers(settings, n, m, epoch, step)
            own, share = own_rows(rows)            # without torchrun: all rows, and 1
            batch = make_batch(data, tokenizer, own, student.device)
            teacher_side = () if teacher_outputs is None else teacher_outputs(own, layers)
            losses = model(batch, *teacher_side)           # (4,): CE, KD, RAIL, (your own,) total
            # losses[-1]: the total. DDP averages gradients; the factors make this a weighted sum.
            scaler.scale(losses[-1] * share * world).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            sums += losses.detach() * share * len(rows) / len(data)    # stays on the device
        ce, kd, rail, *_, total = sum_over_processes(sums, f"the loss of epoch {epoch}").tolist()
        seconds = time.perf_counter() - start      # the line above has waited for the device
        no_map = layers is None or settings.mapping == "attention" or settings.resample == "step"
        history.append({"epoch": epoch, "layers": None if no_map else layers.tolist(),
                        "seconds": seconds, "examples_per_second": len(data) / seconds,
                        "ce": ce, "kd": kd, "rail": rail, "total": total})
        after_epoch(history, layers)
        save_state()
    return history


def model_outputs(model, batch, precision="fp32", pool=False):
    """Logits (B, C), and with `pool` the pooled layers 1..n (B, n, d), else None; in float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16           # unused in fp32
    with torch.autocast(model.device.type, dtype, enabled=precision != "fp32"):
        # No labels, so the model does not compute a loss of its own.
        out = model(**dict(batch, labels=None), output_hidden_states=pool)
    if not pool:
        return out.logits.float(), None
    # hidden_states[0] is the output of the embeddings, hidden_states[j] that of layer j.
    pooled = [mean_pool(x, batch["attention_mask"]) for x in out.hidden_states[1:]]
    return out.logits.float(), torch.stack(pooled, dim=1)


def make_optimizer(distiller, settings, steps):
    """(AdamW, its learning-rate schedule over `steps` steps, the loss scaler)."""
    # One group for the student, one for the rest (projections): new weights may need another rate.
    added = [p for name, p in distiller.named_parameters() if not name.startswith("student.")]
    rate = settings.projection_learning_rate or settings.learning_rate
    groups = [{"params": distiller.student.parameters()}, {"params": added, "lr": rate}]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, weight_decay=0.0, fused=True)
    # Warm-up for a tenth of the steps, then linearly down to 0.
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    # In fp16, small gradients round to 0, so the loss is scaled up and the gradients scaled back.
    device = distiller.student.device.type
    return optimizer, schedule, torch.amp.GradScaler(device, enabled=settings.precision == "fp16")


# ==== The method ends here. The rest is support: on a first reading, stop. =======================


# ---- 4. The teacher's outputs ------------------------------------------------------------------
# For each sentence, RAIL-KD needs the teacher's logits and one pooled vector per layer. They never
# change and are small enough to store, so the teacher runs only once. A training step then costs
# about as much as three forward passes of the student (the backward pass counts as two). A live
# teacher of the same width would add about n/m forward passes of the student to every step. Since
# only sentence vectors are compared, student and teacher may differ in width, architecture and even
# tokenizer.


def make_batch(data, tokenizer, rows, device):
    """Rows of encoded data, padded to the longest: {input_ids (B, S), ..., labels (B,)}. (The
    collator renames the column "label" to "labels".)"""
    return transformers.DataCollatorWithPadding(tokenizer)(data[rows]).to(device)


@torch.no_grad()
def predict(model, data, tokenizer, precision="fp32", pooled=None):
    """The logits of a model for encoded data, in the order of its rows: float32 array (N, C). If
    `pooled` (N, n, d) is given, it is filled with the pooled outputs of all layers. Several
    processes share the work. Raises FloatingPointError for logits that are NaN or infinite."""
    model.eval()                                   # dropout would add noise
    rank, world = rank_and_world()
    logits = torch.zeros(len(data), model.config.num_labels, device=model.device)
    order = np.argsort(lengths_of(data))           # sorted by length: little padding
    batches = np.split(order, range(64, len(data), 64))[rank::world]            # of 64 examples
    for rows in progress(batches, "forward passes"):
        batch = make_batch(data, tokenizer, rows, model.device)
        logits[rows], vectors = model_outputs(model, batch, precision, pooled is not None)
        if pooled is not None:
            pooled[rows] = vectors.to(pooled)
    return sum_over_processes(logits, "a model's logits").cpu().numpy()


def teacher_table(teacher, data, tokenizer, settings, parent):
    """Runs the frozen teacher over the training data once, and returns a function that looks up its
    outputs: (rows, layers) -> logits (B, C), pooled layers (B, k or n-1, d_t), in float32.

    The layers are kept in half precision, in a memory-mapped file: 19 GB for MNLI and 24 layers of
    width 1024. A table that an earlier run left in the folder `parent` is reused; its name is a
    hash of the model, the sentences, the precision and the pooling. Raises ValueError if the disk
    has too little space."""
    # Labels are left out, so that the same sentences with different labels can share a table. The
    # hash covers the code of two functions: after a change to either, the table is rebuilt.
    name = fingerprint(data.remove_columns("label"), str(teacher.config), tokenizer.padding_side,
                       settings.precision, mean_pool.__code__, model_outputs.__code__,
                       *teacher.state_dict().values())
    shape = len(data), teacher.config.num_hidden_layers, teacher.config.hidden_size    # (N, n, d_t)
    size, folder = math.prod(shape), parent / f"table-{name}"
    file, logits_file = folder / "pooled.bin", folder / "logits.pt"
    # The large file may be missing or truncated. logits.pt is written last: it marks a full table.
    done = from_rank_0(logits_file.exists() and file.exists() and file.stat().st_size == 2 * size)
    if not done:
        if 2 * size > shutil.disk_usage(parent).free:
            raise ValueError(f"{parent}: no room for the teacher's outputs ({2e-9 * size:.1f} GB)")
        folder.mkdir(exist_ok=True)
        logits_file.unlink(missing_ok=True)
    # shared: what is written to `pooled` reaches the file (a finished one is only read)
    pooled = torch.from_file(str(file), shared=not done, size=size, dtype=torch.half).view(shape)
    if not done:
        print(f"The teacher runs once; {2e-6 * size:,.1f} MB of outputs go to {folder}")
        logits = torch.from_numpy(predict(teacher, data, tokenizer, settings.precision, pooled))
        save(logits_file, lambda tmp: torch.save(logits, tmp))
    logits = torch.load(logits_file, weights_only=True)

    def teacher_outputs(rows, layers):             # layers is None if there is no RAIL
        columns = [] if layers is None else np.subtract(layers, 1)
        # Index both at once: pooled[rows][:, columns] would first read all layers of a row.
        vectors = pooled[np.ix_(rows, columns)]                        # (B, k or n-1 or 0, d_t)
        return logits[rows].to(teacher.device), vectors.to(teacher.device).float()
    return teacher_outputs


# ---- 5. Teacher and student --------------------------------------------------------------------
# Any encoder that transformers offers as a sequence classifier can be the teacher. The student is
# cut from it, unless you name another model. Cut from 12 to 4 layers, BERT-base goes from 109 to 53
# million parameters, of which 24 million are the embeddings.


def toy_teacher(seed, num_layers=12):
    """(model, tokenizer): an untrained BERT of width 64 whose vocabulary is the words of the toy.
    Deep Transformers trained from scratch often get stuck at chance level. What helps: no dropout,
    warm-up, and a larger initial spread than BERT's 0.02, which was chosen for a width of 768."""
    # Every word that occurs in the lists of section 6.
    words = sorted(set(re.findall("[a-z]+", str([TOPICS, VERBS, ADJECTIVES, FORMS]))))
    ids = {x: i for i, x in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] , .".split() + words)}
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=len(ids), hidden_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, initializer_range=0.05,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return model, transformers.BertTokenizer(ids, model_max_length=64)


def load_classifier(name, feature, seed, role):
    """(model, tokenizer, trained) from a hub name or a folder, or the toy's teacher if `name` is
    None. The model has one output per class (one for regression); `feature` is the type of the
    label column. A checkpoint without a classifier gets a random one, drawn from the seed, and
    `trained` is False. The same goes for a student (`role`) that was trained for another number of
    classes; for a teacher, that is an error. Raises ValueError if no suitable one can be loaded."""
    if name is None:
        return *toy_teacher(seed), False
    torch.manual_seed(seed)
    with one_line_error(f"no {role} that fits the data can be loaded from {name!r}"):
        # No code from the hub can run here: custom model code is refused, and transformers reads
        # pickles with weights_only.
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            raise ValueError("it has no tokenizer: save one in the folder too")
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=getattr(feature, "num_classes", 1), ignore_mismatched_sizes=True,
            trust_remote_code=False, output_loading_info=True)
        # Transformers fills what a checkpoint lacks with random numbers. That is right for a new
        # classifier and for BERT's pooler, which belongs to it, but not for the encoder.
        mismatched = {key for key, *_ in info["mismatched_keys"]}  # present, but of another shape
        untrained, encoder = mismatched | set(info["missing_keys"]), f"{model.base_model_prefix}."
        wrong = [key for key in untrained if key.startswith(encoder) and "pooler" not in key]
        if wrong or (mismatched and role == "teacher"):
            raise ValueError(f"its weights don't fit config or classes: {min(wrong or mismatched)}")
    return model.float(), tokenizer, not untrained       # float: it may be stored in half precision


def align_labels(model, feature):
    """Gives a model the data's label names, in place, and puts its logits in the data's order.
    Some MNLI checkpoints number the classes differently from GLUE, and a student would silently
    learn the wrong ones. If the model has the data's names in another order, possibly in another
    case, the rows of its classifier's last layer are reordered. Other names (LABEL_0) are replaced,
    in the same order; the output of a regression keeps its name."""
    config, names = model.config, getattr(feature, "names", list(model.config.id2label.values()))
    # Letter case is ignored, unless two classes differ only in case.
    fold = str.lower if len(set(map(str.lower, names))) == len(names) else str
    row_of = {fold(str(name)): row for row, name in config.id2label.items()}
    order = [row_of.get(fold(name), -1) for name in names]     # -1: the model does not know it
    if -1 not in order and order != sorted(order):             # the same names, in another order
        encoder = set(model.base_model.modules())
        head = [x for x in model.modules() if type(x) is nn.Linear and x not in encoder][-1]
        head.load_state_dict({key: x[order] for key, x in head.state_dict().items()})
    config.problem_type = "single_label_classification" if len(names) > 1 else "regression"
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def build_student(teacher, num_layers):
    """A student cut from its teacher: `num_layers` of its layers, weights copied, nothing shared.
    The teacher must keep its n layers in one nn.ModuleList. Student layer i is teacher layer
    round(i*n/m), so the student keeps the last one, which the classifier was trained on. Returns a
    model of the same class, in train mode, trainable, on the CPU. Raises ValueError for more layers
    than the teacher has, or fewer than 1, and for an architecture that can't be cut."""
    n, cut = teacher.config.num_hidden_layers, copy.deepcopy(teacher)
    if not 1 <= num_layers <= n:
        raise ValueError(f"{num_layers} layers can't be cut from a teacher of {n}: choose 1 to {n}")
    kept = [layer - 1 for layer in evenly_spaced(n, num_layers)]               # counted from 0
    with one_line_error(f"{type(teacher).__name__} can't be cut: name another model as student"):
        cut.config.num_hidden_layers = num_layers
        if getattr(cut.config, "layer_types", None):           # each layer keeps its type
            cut.config.layer_types = [cut.config.layer_types[i] for i in kept]
        # ALBERT has no ModuleList of n layers, since its layers share their weights.
        path = next(p for p, x in cut.named_modules() if type(x) is nn.ModuleList and len(x) == n)
        cut.set_submodule(path, nn.ModuleList(cut.get_submodule(path)[i] for i in kept))
        # Copy the weights into a new model with this config, as loading the saved student will do;
        # a weight that does not fit raises here.
        student = type(teacher)(cut.config)
        student.load_state_dict(cut.state_dict())
    return student.train()


def encode_and_check(model, tokenizer, sets, settings, role):
    """Moves the model to the device, encodes all data for it, gives it the data's label names, and
    tries it on the shortest and longest example of each set. Returns (model, encoded sets,
    tokenizer). Raises ValueError, before anything slow begins, if the method can't use the model:
    no attention mask, hidden states that are missing or of another shape, too few positions, a
    precision that it does not support."""
    model.to(settings.device)
    hint = "" if settings.precision == "fp32" else "; --precision fp32 may help"
    with one_line_error(f"the {role}, a {type(model).__name__}, can't be used{hint}"):
        sets = {name: encode(x, tokenizer, model, settings.max_length) for name, x in sets.items()}
        if "attention_mask" not in sets["train"].column_names:
            raise ValueError("it has no attention mask, so padding would count as text")
        align_labels(model, sets["train"].features["label"])
        pooled = torch.zeros(2, model.config.num_hidden_layers, model.config.hidden_size)
        for data in sets.values():
            extremes = data.select(np.argsort(lengths_of(data))[[0, -1]])
            predict(model, extremes, tokenizer, settings.precision, pooled)
    return model, sets, tokenizer


# ---- 6. Data -----------------------------------------------------------------------------------
# Every source becomes Datasets with the columns sentence1, sometimes sentence2, and label: a
# ClassLabel with names, or a float for regression. The toy shows the method offline, in two
# minutes. The scenario: someone has trained a large model on 8,000 carefully labelled sentences.
# You have that model and 1,000 other sentences, a fifth of them mislabelled.

GLUE = "cola sst2 mrpc stsb qqp mnli qnli rte wnli".split()
METRICS = {"cola": ["matthews_correlation"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}
TOPICS = "acting plot music ending dialogue cast pacing script humour story".split()
ADJECTIVES = ("dull clumsy stale silly cold weak tedious messy".split(),             # negative
              "clever moving fresh funny warm sharp gripping charming".split())      # positive
VERBS = ["is", "is", "is very", "is quite", "is rather"], ["is not", "is never", "is hardly"]
FORMS = ["the {0}.", "the {0}, although the {1}.", "although the {1}, the {0}.",
         "the {1}, but the {0}.", "the {1}, yet the {0}."]             # {0} decides the label
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE](-\d+|\+?0?\d))?")       # no exponent above 9
MISSING = ("", "NA", "N/A", "NaN", "nan", "null")          # treated as missing labels
UNSCORED = ("train", "teacher_train")                       # data sets that are not scored


def toy_sentences(seed, sizes):
    """Short reviews, most of which need more than word counts: a Dataset for each size.

    "Although the plot is very clever, the acting is hardly moving" is negative: what counts is the
    clause without "although", or the one after "but" or "yet". Word order tells which clause that
    is, and a negation flips its meaning, so word counts say little. Sentences of one clause are a
    stepping stone for a deep model that starts from random weights. No sentence repeats, and all
    depend only on the seed and the sizes. There are only 1,120 sentences of one clause, so later
    sets have fewer of them: about 18% of the validation set, 15% of the student's sentences and 7%
    of the teacher's."""
    rng, label_of = np.random.default_rng([seed, 0x7071]), {}    # sentence -> label
    while len(label_of) < sum(sizes):
        clauses, labels = [], []                   # the deciding clause comes first
        for topic in rng.choice(TOPICS, 2, replace=False):
            positive, negated = rng.integers(2), rng.random() < 1 / 3
            verb, adjective = rng.choice(VERBS[negated]), rng.choice(ADJECTIVES[positive])
            clauses.append(f"{topic} {verb} {adjective}")
            labels.append(int(positive ^ negated))
        label_of.setdefault(rng.choice(FORMS).format(*clauses).capitalize(), labels[0])
    data = datasets.Dataset.from_dict({"sentence1": [*label_of], "label": [*label_of.values()]})
    data = data.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
    return [data.select(range(end - size, end)) for size, end in zip(sizes, np.cumsum(sizes))]


def read_file(path, train=None):
    """A CSV or JSON Lines file -> Dataset with sentence1, perhaps sentence2, and label.

    Names or whole numbers become classes, in sorted order; a single decimal means regression.
    Later files must have the columns of `train`, and its labels or, if these are names, class
    numbers (0 for "negative"). Raises ValueError. `datasets.load_dataset` is avoided because it
    treats [ and * in a path as a pattern, turns 007 into 7, and returns old rows for a file that
    changed but kept its timestamp."""
    with one_line_error(f"{path} must be CSV or JSON Lines, in UTF-8, with sentence and label"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            # Numbers in JSON stay text, as in CSV: 3.0 is a decimal, 3 may be a class.
            rows = (list(csv.DictReader(file, strict=True, skipinitialspace=True))
                    if path.lower().endswith(".csv") else
                    [json.loads(x, parse_int=str, parse_float=str) for x in file if x.strip()])
        if not rows:
            raise ValueError("it has no examples")
        first = "sentence" if "sentence" in rows[0] else "sentence1"
        names = [first, *({"sentence2"} & set().union(*rows)), "label"]
        for number, row in enumerate(rows, 1):
            # csv keeps surplus cells under the key None, and gives a missing cell the value None.
            if None in [*row, *map(row.get, names)] or row["label"] in MISSING:
                raise ValueError(f"example {number} needs exactly one of each: {', '.join(names)}")
        data = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in names})
        data = data.cast(datasets.Features(dict.fromkeys(names, datasets.Value("string"))))
        return cast_labels(data.rename_columns({first: "sentence1"}), train)


def cast_labels(data, train=None):
    """Turns the text labels of a Dataset into classes or decimals, see `read_file`."""
    labels = set(data["label"])
    # The classes of `train`. For regression, the "0" makes sure that only numbers pass below.
    known = set(getattr(train.features["label"], "names", labels | {"0"})) if train else labels
    numbers = set(filter(NUMBER.fullmatch, known))
    if 0 < len(numbers) < len(known) or (len(known) == 1 and not train):
        raise ValueError("labels must differ, and be all names or all numbers")
    # Classes with names may be given by number too, but -1 means "no label" to datasets.
    wrong = [x for x in sorted(labels - known) if numbers or x.strip().startswith("-")]
    if wrong:
        raise ValueError(f"the training data have no label {wrong[0]!r}")
    if train:
        return data.cast(train.features)
    # As text first: 01 and 1 are equal as numbers, and a set has no order of its own.
    classes = datasets.ClassLabel(names=sorted(sorted(labels), key=float if numbers else None))
    decimals = [x for x in numbers if not x.lstrip("+-").isdigit()]
    return data.cast_column("label", datasets.Value("float32") if decimals else classes)


def load_task(settings):
    """All data of a task, as text: {"train": ..., "validation": ..., file name: ...}.

    All sets are scored except "train" and the toy's "teacher_train": eight times as many sentences,
    all new and correctly labelled. MNLI also has "validation_mismatched". GLUE's test splits are
    left out: except for MRPC's, they have no labels. Raises ValueError if the hub can't be reached
    or a file is bad."""
    size = settings.max_train_examples or (1000 if settings.task == "toy" else math.inf)
    if settings.task == "toy":
        validation, train, teacher_train = toy_sentences(settings.seed, [1000, size, 8 * size])
        wrong = np.random.default_rng([settings.seed, 0xBAD]).permutation(size) < size // 5
        noisy = train.map(lambda row, i: {"label": row["label"] ^ int(wrong[i])}, with_indices=True)
        sets = {"train": noisy, "teacher_train": teacher_train, "validation": validation}
    elif settings.task:
        with one_line_error(f"{settings.task} can't be loaded from the hub (the toy needs no hub)"):
            splits = datasets.load_dataset("nyu-mll/glue", settings.task)
        texts = [x for x in splits["train"].column_names if x not in ("label", "idx")]
        names = dict(zip(texts, ("sentence1", "sentence2")))
        sets = {name.replace("_matched", ""): data.rename_columns(names).remove_columns("idx")
                for name, data in splits.items() if not name.startswith("test")}
    else:
        sets = {"train": read_file(settings.train_file)}
        sets["validation"] = read_file(settings.validation_file, sets["train"])
    sets |= {path: read_file(path, sets["train"]) for path in settings.eval_file}
    if size < len(sets["train"]):                  # shuffled, as a file may be sorted by label
        sets["train"] = sets["train"].shuffle(seed=settings.seed).select(range(size))
    return sets


def encode(data, tokenizer, model, max_length):
    """Dataset of text -> Dataset of token ids (input_ids, attention_mask, ...) and label.

    Truncated to `max_length` tokens, or to what tokenizer and model allow, but not padded yet.
    Columns that the model does not accept (DistilBERT: token_type_ids) are dropped."""
    limit = min(max_length, tokenizer.model_max_length)
    positions = getattr(model.config, "max_position_embeddings", None) or -1     # XLNet has -1
    if 0 < positions < limit:
        limit = positions - 2                      # RoBERTa and others reserve two
    texts = [name for name in data.column_names if name != "label"]
    data = data.map(tokenizer, input_columns=texts, batched=True,
                    fn_kwargs={"truncation": True, "max_length": limit})
    accepted = [*inspect.signature(model.forward).parameters, "label"]
    return data.select_columns([name for name in data.column_names if name in accepted])


def lengths_of(data):
    """The number of tokens of each row of an encoded Dataset."""
    return [len(tokens) for tokens in data["input_ids"]]


def length_batches(lengths, batch_size, seed):
    """Row numbers in batches of similar length, in random order; each row is in exactly one. A
    sentence is padded to the longest of its batch: padding 25 tokens to 128 would waste four fifths
    of the work."""
    generator = torch.Generator().manual_seed(seed)
    order = get_length_grouped_indices(lengths, batch_size, generator=generator)
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def fingerprint(data, *more):
    """16 hex digits that change whenever a Dataset, or anything else that is given, changes."""
    rows = map(json.dumps, data.iter(1000))
    return datasets.fingerprint.Hasher.hash([str(data.features), *rows, *more])


# ---- 7. Scores ---------------------------------------------------------------------------------
# A metric is computed once over a whole set, never averaged over batches: the last batch may be
# smaller, and F1 or a correlation is not the mean of its values on the parts.


def compute_metrics(logits, labels, task=None, teacher_logits=None):
    """GLUE's metrics for arrays (N, C) and (N,): {"accuracy": ..., "eval_loss": ...}.

    Your own data are scored by accuracy, or by two correlations for regression. `eval_loss` is CE
    in nats or the mean squared error; `agreement`: how often the teacher chooses the same class."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    regression = logits.shape[1] == 1
    predicted = logits[:, 0] if regression else logits.argmax(axis=1)           # (N,)
    table = datasets.Dataset.from_dict({"a": predicted, "b": labels}).to_pandas()
    # Spearman's correlation is Pearson's on the ranks; ties share their mean rank. Both are set
    # to 0 where they are undefined, if one side is constant.
    pearson, spearman = (table.corr(x).fillna(0).loc["a", "b"] for x in ("pearson", "spearman"))
    # F1 and Matthews are for classes 0 and 1, where Matthews equals Pearson's correlation.
    values = {"pearson": pearson, "spearmanr": spearman, "matthews_correlation": pearson,
              "accuracy": np.mean(predicted == labels),
              "f1": 2 * np.sum(predicted * labels) / max(np.sum(predicted + labels), 1)}
    names = ["pearson", "spearmanr"] if regression else METRICS.get(task, ["accuracy"])
    scores = {name: float(values[name]) for name in names}
    if teacher_logits is not None and not regression:
        scores["agreement"] = float(np.mean(predicted == np.argmax(teacher_logits, axis=1)))
    return scores | {"eval_loss": label_loss(torch.tensor(logits), torch.tensor(labels)).item()}


def evaluate(model, data, tokenizer, task=None, precision="fp32", teacher_logits=None):
    """The metrics of a model for an encoded Dataset with labels, see `compute_metrics`."""
    logits = predict(model, data, tokenizer, precision)
    return compute_metrics(logits, data["label"], task, teacher_logits)


def score_all(model, sets, tokenizer, settings, teacher_logits=None):
    """The metrics of all sets except the training sets. The names of MNLI's second set end in
    _mismatched, and those of further files go under "evaluation"."""
    scores = {name: evaluate(model, sets[name], tokenizer, settings.task, settings.precision,
                             (teacher_logits or {}).get(name))
              for name in sets if name not in UNSCORED}
    other = {f"{key}_mismatched": x for key, x in scores.pop("validation_mismatched", {}).items()}
    return scores.pop("validation") | other | {"evaluation": scores}


@torch.no_grad()
def measure_costs(model, sets, tokenizer, settings):
    """What a model costs: layers, parameters, bytes, and milliseconds for the first training
    example (median of 30 forward passes)."""
    model.eval()
    batch = make_batch(sets["train"], tokenizer, [0], model.device)
    # .cpu() waits for the device.
    timer = timeit.Timer(lambda: model_outputs(model, batch, settings.precision)[0].cpu())
    return {"layers": model.config.num_hidden_layers, "parameters": model.num_parameters(),
            "bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
            "milliseconds_per_sentence": 1000 * float(np.median(timer.repeat(30, number=1)))}


def warn_of_weak_teacher(logits, labels):
    """Warns if a teacher is no better than predicting the most frequent class, or the mean."""
    regression = logits.shape[1] == 1
    error = np.mean((logits[:, 0] - labels) ** 2 if regression else logits.argmax(1) != labels)
    guessing = labels.var() if regression else 1 - np.bincount(labels).max() / len(labels)
    if error >= guessing:
        print(f"\n!!! The teacher's error is {error:.3g}; guessing gives {guessing:.3g}. "
              "It is weak, or its labels are in another order.\n")


# ---- 8. Settings -------------------------------------------------------------------------------


def option(default, text):
    """A field of Settings: its default (or a function that makes it) and its --help text."""
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"help": text})


@dataclasses.dataclass
class Settings:
    """Everything a run depends on. HfArgumentParser turns each field into a flag."""

    task: Literal[("toy", *GLUE)] | None = option(None, "The toy (default), or a GLUE task.")
    train_file: str | None = option(None, "CSV or JSON Lines: sentence, label, perhaps sentence2.")
    validation_file: str | None = option(None, "Your validation data, with the same columns.")
    eval_file: list[str] = option(list, "Further files to score, such as text from another domain.")
    max_train_examples: int | None = option(None, "Training examples to sample (toy: to generate).")
    max_length: int = option(128, "Cut longer inputs to this many tokens.")
    teacher: str | None = option(None, "Folder or hub name (default: BERT-base, or the toy's).")
    teacher_epochs: int | None = option(None, "Epochs to fine-tune a teacher (default: 3, toy 5).")
    student_layers: int | None = option(None, "Layers to keep from the teacher (default: a third).")
    student: str | None = option(None, "Folder or hub name of a student to use instead.")
    mapping: Literal[("random", *MAPS)] = option(
        "random", "Which teacher layers teach; none: no RAIL; finetune: the labels alone.")
    variant: Literal["layerwise", "concat"] = option("layerwise", "RAIL-KD^l or RAIL-KD^c.")
    resample: Literal["epoch", "step"] = option("epoch", "When to draw a new map.")
    centre: bool = option(False, "Subtract the batch mean from both sides of RAIL (see section 2).")
    projection_size: int = option(128, "Width u of the projections.")
    projection_learning_rate: float | None = option(None, "Default: same as --learning-rate.")
    temperature: float = option(2.0, "Softens both output distributions in KD.")
    weights: list[float] = option(lambda: [1 / 3] * 3, "For CE, KD, RAIL; must sum to 1.")
    epochs: int | None = option(None, "Epochs of distillation (default: 10, toy 8).")
    batch_size: int = option(32, "Examples per step, across all processes.")
    learning_rate: float | None = option(None, "Peak rate of AdamW (default: 5e-5, toy 5e-4).")
    seed: int = option(0, "Seed for all randomness.")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: CUDA, MPS or CPU.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "auto: 16 bits on CUDA.")
    output_dir: str | None = option(None, "New folder for the results (default: one in runs/).")
    resume: str | None = option(None, "Folder of a run to finish; add only --device, --precision.")

    def resolve(self):
        """A copy with its values checked and defaults filled in. Raises ValueError."""
        for name, value in vars(self).items():
            flag, low = f"--{name.replace('_', '-')}", {"seed": -1, "max_length": 3}.get(name, 0)
            choices = get_args(Settings.__annotations__[name])      # if it is a Literal
            if value in ("", [""]) or (str in map(type, choices) and value not in choices):
                raise ValueError(f"{flag} can't be {value!r}: leave it out, or see --help")
            # NaN is refused too, since every comparison with it is false.
            if type(value) in (int, float) and not low < value < 2 ** 63:
                raise ValueError(f"{flag} {value!r} must be above {low} and below 2^63")
        own_files = [self.train_file, self.validation_file]
        toy = self.task in (None, "toy") and own_files == [None, None]
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        best = "cuda" if cuda else "mps" if mps else "cpu"
        device = best if self.device == "auto" else self.device
        # A T4 emulates bf16, which is slow.
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        data = Path(self.train_file or self.task or "toy").stem
        run_name = f"{data}-{self.mapping}-seed{self.seed}-{time.time():.0f}-{os.getpid()}"
        defaults = {"task": "toy" if toy else None, "teacher": None if toy else "bert-base-uncased",
                    "epochs": 8 if toy else 10, "teacher_epochs": 5 if toy else 3,
                    "learning_rate": 5e-4 if toy else 5e-5, "output_dir": f"runs/{run_name}",
                    "device": best, "precision": half if device == "cuda" else "fp32"}
        unset = [name for name in defaults if getattr(self, name) == getattr(Settings, name)]
        new = dataclasses.replace(self, **{name: defaults[name] for name in unset})
        # A loss that the mapping does not use gets weight 0; the others then sum to 1 again.
        used = {"none": [1, 1, 0], "finetune": [1, 0, 0]}.get(new.mapping, [1, 1, 1])
        used_weight = combined_loss(*used, new.weights)        # raises for invalid weights
        problems = [
            (device not in (best, "cpu"), f"--device {device} is not available here"),
            (new.precision == "fp16" and device != "cuda", "--precision fp16 needs a CUDA GPU"),
            (own_files.count(None) != (2 if new.task else 0),
             "--train-file and --validation-file belong together, and exclude --task"),
            (new.student and new.student_layers, "--student excludes --student-layers"),
            (new.mapping == "attention" and new.variant == "concat",
             "--mapping attention needs --variant layerwise"),
            (used_weight == 0, f"--weights leave --mapping {new.mapping} nothing to learn from"),
            (toy and (new.max_train_examples or 0) > 100_000,
             "--max-train-examples: the toy makes at most 100,000"),
            ({*UNSCORED, "validation", "validation_mismatched"} & {*new.eval_file},
             "--eval-file: rename the file; its name is reserved for another data set"),
            (not new.resume and any(Path(new.output_dir).glob("*")),
             f"--output-dir {new.output_dir} is in use: name a new folder")]
        if messages := [message for applies, message in problems if applies]:
            raise ValueError("; ".join(messages))
        if used_weight < 1 - 1e-6:                 # else a second call alters the last digits
            new.weights = [use * weight / used_weight for use, weight in zip(used, new.weights)]
        return new


# ---- 9. The whole job --------------------------------------------------------------------------


def run(settings):
    """Trains a student from Settings; returns the contents of metrics.json.

    The run's folder holds that file, student/ and, if the teacher was fine-tuned here, teacher/,
    both ready for transformers' pipeline. The student is the last epoch's, not the best. The table
    of section 4 stays, in the teacher's folder or here. While a model is training, teacher.pt or
    student.pt holds the state after the last complete epoch. A resumed run goes through the same
    stages, but skips those whose results are on disk. Raises ValueError, OSError or
    FloatingPointError, each with a message for the user."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    results = {"teacher": {}, "student": {}, "epochs": [], "evaluation": {}}
    if settings.resume:
        settings, results = load_run(settings)
    settings = settings.resolve()
    folder = Path(from_rank_0(settings.output_dir))
    if (folder / "student").is_dir():
        print(f"The run in {folder} is already finished.")
        return results

    # Data and models. Most problems surface here, before anything slow starts or is written.
    sets = load_task(settings)
    feature = sets["train"].features["label"]
    hashes = {name: fingerprint(data) for name, data in sets.items()}
    if settings.resume and results["versions"].get("data") != hashes:
        raise ValueError(f"{folder}: the data have changed since the run began; restore them")
    source = str(folder / "teacher") if (folder / "teacher").is_dir() else settings.teacher
    teacher, tokenizer, trained = load_classifier(source, feature, settings.seed, "teacher")
    n = teacher.config.num_hidden_layers
    if settings.student:
        student, student_tokenizer, _ = load_classifier(
            settings.student, feature, settings.seed, "student")
    else:
        settings.student_layers = settings.student_layers or min(n, max(n // 3, 2))
        student, student_tokenizer = build_student(teacher, settings.student_layers), tokenizer
    m, rail_loss = student.config.num_hidden_layers, None
    if settings.mapping not in ("none", "finetune"):
        if not 2 <= m <= n:
            raise ValueError(f"{m} student layers do not fit {n} teacher layers: use 2 to {n}")
        variant = "attention" if settings.mapping == "attention" else settings.variant
        torch.manual_seed(settings.seed)
        with one_line_error(f"--projection-size {settings.projection_size} is too large"):
            rail_loss = RailLoss(teacher.config.hidden_size, student.config.hidden_size, m - 1,
                                 variant, settings.projection_size, settings.centre)
            rail_loss.to(settings.device)
    models = {"teacher": encode_and_check(teacher, tokenizer, sets, settings, "teacher"),
              "student": encode_and_check(student, student_tokenizer, sets, settings, "student")}

    rank, world = rank_and_world()
    results["settings"] = dataclasses.asdict(settings) | {"resume": None}
    results["versions"] = {x.__name__: x.__version__ for x in (torch, transformers, datasets, np)}
    results["versions"]["data"] = hashes
    results["device"] = f"{settings.device}, {torch.get_num_threads()} threads x {world}"
    if not settings.resume and rank == 0:          # claim the folder: only one run can do so
        with one_line_error(f"--output-dir {folder} is in use or can't be written to"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.json").touch(exist_ok=False)
        kind = f"classes {', '.join(feature.names)}" if hasattr(feature, "names") else "regression"
        print(f"{len(sets['train']):,} training examples, {kind}\nteacher {n} layers, student {m}; "
              f"mapping {settings.mapping}, {settings.epochs} epochs in {settings.precision} on "
              f"{settings.device}; results go to {folder}")
    save_json(folder / "metrics.json", results)    # from here on, --resume works

    # One call trains one model by the loop of section 3: the teacher if it has no trained
    # classifier yet, otherwise the student.
    teacher_logits = teacher_outputs = None
    if trained:
        role, record, encoded = "student", results, models["teacher"][1]
        teacher_logits = {name: predict(teacher, data, tokenizer, settings.precision)
                          for name, data in encoded.items() if name not in UNSCORED}
        warn_of_weak_teacher(teacher_logits["validation"], np.array(sets["validation"]["label"]))
        results["teacher"] |= score_all(*models["teacher"], settings)
        if settings.mapping != "finetune":
            parent = Path(source) if os.access(source, os.W_OK) else folder
            teacher_outputs = teacher_table(teacher, encoded["train"], tokenizer, settings, parent)
    else:                                          # it learns from the labels alone
        role, record, rail_loss = "teacher", results["teacher"], None
        settings = dataclasses.replace(settings, mapping="finetune", weights=[1.0, 0.0, 0.0],
                                       epochs=settings.teacher_epochs)
    print(f"The {role} learns{'' if trained else ' first, as it has no trained classifier yet'}:")
    model, sets, tokenizer = models[role]
    data = sets.get(f"{role}_train", sets["train"])            # the toy has a "teacher_train"

    def after_epoch(history, layers):
        """Adds scores to the history of section 3, prints a line, and updates metrics.json."""
        record["epochs"], entry = history, history[-1]
        scores = score_all(model, sets, tokenizer, settings, teacher_logits)
        entry |= scores
        results[role] |= scores
        if layers is not None:
            entry["cosine"] = rail_loss.cosine(teacher_outputs(range(len(data))[:256], layers)[1])
        pairs = " ".join(f"{i}←{j}" for i, j in enumerate(entry["layers"] or [], 1))
        names = [x for x in ("ce", "kd", "rail", "cosine") if entry.get(x)]     # 0: not in use
        numbers = "  ".join(f"{x} {entry[x]:.3f}" for x in [*names, next(iter(scores))])
        print(f"  epoch {entry['epoch']:2}  {pairs}  {numbers}  "
              f"{entry['examples_per_second']:,.0f} examples/s")
        save_json(folder / "metrics.json", results)

    train(Distiller(model, rail_loss, settings), data, tokenizer, settings, folder / f"{role}.pt",
          after_epoch, teacher_outputs, n)
    if trained:
        results["evaluation"] = {path: {name: results[name]["evaluation"][path] for name in models}
                                 for path in settings.eval_file}
        metric = next(iter(results["student"]))
        print(f"\n         layers  parameters  megabytes  ms per sentence  {metric}")
        for name in models:
            row = results[name] = results[name] | measure_costs(*models[name], settings)
            print(f"{name}  {row['layers']:6}  {row['parameters']:10,}  {row['bytes'] / 1e6:9.1f}  "
                  f"{row['milliseconds_per_sentence']:15.2f}  {row[metric]:.4f}")
        save_json(folder / "metrics.json", results)
    save(folder / role, model.save_pretrained, tokenizer.save_pretrained)
    print(f"The {role} is in {folder / role}; its scores are in {folder / 'metrics.json'}.")
    for name in models:
        (folder / f"{name}.pt").unlink(missing_ok=True)
    if trained:                                    # student/ marks the run as finished
        return results
    # Start again as a resumed run, which finds teacher/ already trained. Free the memory first.
    del teacher, student, model, models
    return run(Settings(resume=str(folder)))


# ---- 10. Files and command line ----------------------------------------------------------------


@contextlib.contextmanager
def one_line_error(what, error_type=ValueError):
    """Re-raises any error in the block as a one-line message: what can't be done, and why."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise error_type(f"{what} ({why})") from error


def rank_and_world():
    """(rank, world): (0, 1) for one process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def progress(items, text):
    """A progress bar, shown by the first process only, and only on a terminal (disable=None)."""
    return tqdm(items, text, leave=False, disable=rank_and_world()[0] > 0 or None)


def own_rows(rows):
    """This process's rows of a batch, and their share of it. A process left without rows takes the
    batch's first one, with share 0, because every process must take part in every step."""
    rank, world = rank_and_world()
    own = rows[rank::world]
    return own or rows[:1], len(own) / len(rows)


def from_rank_0(value=None):
    """The first process's value, in all processes; the others wait here for the first."""
    values = [value]
    if rank_and_world()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def sum_over_processes(tensor, what):
    """The sum of a tensor over all processes. Raises FloatingPointError if it is not finite."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(f"NaN or infinity in {what}: try a lower --learning-rate or "
                                 "--precision fp32, or check the model")
    return tensor


def save(path, *writers):
    """Calls each writer with the same temporary path, in the first process. The file or folder that
    they make appears at `path` complete or not at all. Raises OSError; `path` is then unchanged."""
    tmp = path.with_name(f"{path.name}.part")
    with one_line_error(f"{path} could not be written, and is unchanged", OSError):
        if rank_and_world()[0] == 0:
            for write in writers:
                write(tmp)
            os.replace(tmp, path)
    from_rank_0()                                  # all processes wait until it is written


def save_json(path, content):
    """Writes a JSON file, as `save` does (in ASCII, so the encoding does not matter)."""
    save(path, lambda tmp: tmp.write_text(json.dumps(content, indent=2, allow_nan=False)))


def load_state(file, *parts):
    """Restores `parts` (modules, an optimizer, ...) and the history of a killed run from `file`, if
    it exists. Returns the history, a list, and a function that saves both in their current state.
    Raises ValueError if the file belongs to another run."""
    state = {"history": []}
    if file.exists():
        with one_line_error(f"{file} does not belong to this run: delete it to train from scratch"):
            state = torch.load(file, map_location="cpu", weights_only=True)      # runs no code
            for part, saved in zip(parts, state.pop("parts")):
                if saved:                          # the scaler's is empty, except in fp16
                    part.load_state_dict(saved)

    def save_state():
        state["parts"] = [part.state_dict() for part in parts]
        save(file, lambda tmp: torch.save(state, tmp))
    return state["history"], save_state


def load_run(settings):
    """(settings, metrics.json) of the run in `settings.resume`. Raises ValueError if there is none,
    or if flags other than --resume, --device and --precision are given."""
    flags = {x: value for x, value in vars(settings).items() if value != getattr(Settings(), x)}
    if flags.keys() - {"resume", "device", "precision"}:
        raise ValueError("--resume takes no flags other than --device and --precision")
    with one_line_error(f"--resume {settings.resume}: no run can be resumed there"):
        saved = json.loads((Path(settings.resume) / "metrics.json").read_text())
        stored = saved["settings"] | {"output_dir": settings.resume}       # it may have been moved
        if settings.device not in ("auto", stored["device"]):
            stored["precision"] = "auto"           # the stored one may not work on this device
        return Settings(**stored | flags), saved


def main(argv=None):
    """The command line. Returns 0, 2 for an expected error (one line on stderr; raised if
    RAIL_KD_DEBUG is set in the environment), or 130 after Ctrl-C."""
    parser = transformers.HfArgumentParser(
        Settings, description=__doc__.splitlines()[0], allow_abbrev=False, exit_on_error=False)
    settings = Settings()
    try:
        settings, = parser.parse_args_into_dataclasses(argv)
        if "LOCAL_RANK" in os.environ:                         # started by torchrun
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group()
            if rank_and_world()[0] > 0:                             # only the first one prints
                sys.stdout = open(os.devnull, "w")
        if not settings.resume:
            settings = settings.resolve()          # here too, so that Ctrl-C can name the folder
        run(settings)
        return 0
    except KeyboardInterrupt:
        folder = shlex.quote(settings.resume or settings.output_dir or "FOLDER")
        print(f"stopped; if the folder exists, continue with --resume {folder}", file=sys.stderr)
        return 130
    except (argparse.ArgumentError, ValueError, OSError, FloatingPointError,
            torch.OutOfMemoryError) as error:
        if os.environ.get("RAIL_KD_DEBUG"):                    # to debug your changes
            raise
        print(f"rail_kd.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # Some terminals can't print the arrow in 1←3, and a log file should grow line by line.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    sys.exit(main())
