"""RAIL-KD in one file: random intermediate layer mapping for knowledge distillation.

A small Transformer, the *student*, learns to imitate a large and frozen one, the *teacher*:

    L  =  l1 * CE  +  l2 * KD  +  l3 * RAIL

CE compares the student's output with the labels, KD with the teacher's output, and RAIL compares
intermediate layers. Which teacher layer teaches which student layer? RAIL-KD draws the teacher
layers at random, afresh in each epoch, and sorts them, so that deeper learns from deeper:

    teacher layer    1    2    3    4    5    6    7    8    9   10   11   12
                          |                        |         |              :
                          v                        v         v              :
    student layer         1                        2         3              4   <--  labels: CE

    arrows: RAIL. This epoch's draw is 2, 7, 9; the next epoch has another one.
    dots:   KD. The last layers meet through the logits and take no part in the draw.

At each arrow both outputs are averaged over the tokens of a sentence, projected to a shared width
by a trained linear layer, and scaled to length 1. RAIL is their mean squared distance.

    python rail_kd.py --task toy --student-layers 4        # two minutes on a laptop, offline
    python rail_kd.py --task sst2 --student-layers 4       # BERT-base, cut from 12 layers to 4

The toy ends with these lines (1←3: student layer 1 learned from teacher layer 3 in that epoch):

      epoch  8  1←3 2←8 3←11  ce 0.7655  kd 0.1946  rail 0.0591  accuracy 1.0000  1,283 examples/s

             layers  parameters  megabytes  ms per sentence  accuracy
    teacher      12     413,122        1.7             6.57  1.0000
    student       4     145,346        0.6             2.87  1.0000

Source: Haidar, Anchuri, Rezagholizadeh, Ghaddar, Langlais, Poupart, "RAIL-KD: RAndom Intermediate
Layer Mapping for Knowledge Distillation", Findings of NAACL 2022, arXiv 2109.10164. This file is
unofficial, and was written without the paper's full text: from its abstract, its first table and
two public re-implementations (aitsc/GLMKD and TKC002/CILDA-plus-minILD). Who decided what:

    draw once per epoch, sorted; weighted sum of the losses, equation (4)     the paper
    weights 1/3 each; u = 128; mean over tokens, projection, unit length      both implementations
    candidates 1..n-1, k = m-1 pairs: the last layers stay out of the draw    one of them (GLMKD)
    one projection per side, shared by all pairs; squared distance            one of them (GLMKD)
    mean over the k pairs, so that RAIL lies in [0, 4]                        ours
    padding is left out of the mean over tokens (both include it)             ours
    projections with a bias, at the learning rate of the student              ours
    temperature 2 (the factor T^2 is standard)                                ours (theirs: 10, 1)
    10 epochs, learning rate 5e-5, a tenth of the steps is warm-up            ours (one: 20, 2e-5)
    the student starts from evenly spaced layers of its teacher               ours
    --centre rules out the trivial solution of section 2; off by default      ours

Letters: B sentences in a batch, S tokens in a sentence, N training examples, C classes (1 for a
regression), n teacher layers of width d_t, m student layers of width d_s, k = m-1 pairs, u the
width of the projections, T the temperature. The method is in sections 1 to 3, the draw, the losses,
one step and the loop, and a reader can stop there. The rest serves it: 4 the teacher's outputs,
5 models, 6 data, 7 scores, 8 settings, 9 the whole job, 10 files and command line. A course blanks
what stands between the SOLUTION markers, see the README.
"""
import contextlib
import copy
import csv
import dataclasses
import inspect
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

# ---- 1. The draw -------------------------------------------------------------------------------
# Two facts, which the tests and the notebook check:
#
#   The mean is evenly spaced. The i-th smallest of k uniform draws from 1..n-1 has mean
#   i*n/(k+1) = i*n/m: for 12 -> 4 the layers 3, 6, 9, the map that PKD calls "skip". Only the
#   means agree: student layer 1's most likely partner is 1, and 3, 6, 9 is one of 165 equally
#   likely draws.
#
#   All layers teach, though each step costs only k pairs. A layer is left out of one epoch with
#   probability 1 - k/(n-1), of E epochs with that to the power E: for 12 -> 4, 72.7 % after one
#   epoch, 20.3 % after 5, 4.1 % after 10.


def sample_layer_map(num_teacher_layers, num_student_layers, rng):
    """RAIL-KD's draw: the teacher layers that teach the student layers 1, 2, ..., m-1.

    k = m-1 distinct layers are drawn uniformly, without replacement, from the intermediate layers
    1..n-1 of the teacher, and sorted ascending. Layers count from 1, like the positions of
    `hidden_states`; position 0 holds the embeddings.

    Args:
        num_teacher_layers, num_student_layers: n and m.
        rng: np.random.Generator, the only source of randomness.
    Returns:
        Ascending int array (k,).
    Raises:
        ValueError: m < 2 (no intermediate layer to teach) or m > n. Here and in the functions
            below, the message is a sentence that says what is wrong.
    """
    ### BEGIN SOLUTION
    if not 2 <= num_student_layers <= num_teacher_layers:
        raise ValueError(f"{num_student_layers} student layers and {num_teacher_layers} teacher "
                         "layers: the student needs 2 or more, and not more than its teacher")
    candidates = np.arange(1, num_teacher_layers)                               # 1..n-1
    return np.sort(rng.choice(candidates, size=num_student_layers - 1, replace=False))
    ### END SOLUTION


def choose_layers(settings, num_teacher_layers, num_student_layers, epoch, step=0):
    """The teacher layers of an epoch, as `settings.mapping` says: int array (k,), or None.

    Only the map changes between mappings. `skip` and `last` are the maps of PKD (Sun et al. 2019),
    `attention` that of ALP-KD (Passban et al. 2021), all n-1 candidates for each student layer;
    pooling, projection and loss stay. They are not the full recipes of those papers.
    """
    n, m = num_teacher_layers, num_student_layers
    if settings.mapping == "random":
        # Not one generator for the whole run: a resumed run would go on with other layers.
        key = [settings.seed, epoch] + ([step] if settings.resample == "step" else [])
        return sample_layer_map(n, m, np.random.default_rng(key))
    if settings.mapping == "skip":
        return np.array([round(i * n / m) for i in range(1, m)])   # round() takes halves to even
    if settings.mapping == "last":
        return np.arange(n - m + 1, n)
    return np.arange(1, n) if settings.mapping == "attention" else None


# ---- 2. The losses -----------------------------------------------------------------------------
#   student: k layers (B, S, d_s) - mean -> (B, k, d_s) - student_proj -> (B, k, u) - unit -> s
#   teacher: k layers (B, S, d_t) - mean -> (B, k, d_t) - teacher_proj -> (B, k, u) - unit -> t
#
#   RAIL = mean over the batch of  sum_i a_i * || s_i - t_i ||^2,  with a_i = 1/k
#
# Between unit vectors || s - t ||^2 = 2 - 2 cos(s, t): 0 for equal directions, 4 for opposite ones.
#
# The trivial solution. Both projections are trained, so the loss also falls when both send every
# sentence in one direction. It is then near 0 but teaches nothing. A low loss does not show this;
# the mean cosine of *different* sentences after the teacher's projection does. If that is c, one
# vector for all sentences already brings the loss down to about 2 - 2 sqrt(c).
# Centring rules this out: the batch mean is subtracted from each side before it gets unit length.
# What all sentences share is gone, and one vector for all of them no longer lowers the loss.


def mean_pool(hidden_states, attention_mask):
    """One vector per sentence: the mean of a layer's output over the real tokens.

    Padding is ignored, whatever its values, even NaN. Otherwise the loss of a sentence would
    depend on how long its neighbours in the batch are.

    Args:
        hidden_states: (B, S, d), any float type.
        attention_mask: (B, S), any type: 1 for a real token, 0 for padding.
    Returns:
        (B, d) in float32, summed in float32 too; zeros for a row without real tokens.
    Raises:
        ValueError: shapes other than (B, S, d) and (B, S).
    """
    ### BEGIN SOLUTION
    if hidden_states.dim() != 3 or hidden_states.shape[:2] != attention_mask.shape:
        raise ValueError(f"hidden states {tuple(hidden_states.shape)} and attention mask "
                         f"{tuple(attention_mask.shape)} must be (B, S, d) and (B, S)")
    mask = attention_mask.bool().unsqueeze(-1)                                  # (B, S, 1)
    # Not multiplied by the mask: 0 * NaN is NaN.
    total = hidden_states.float().masked_fill(~mask, 0.0).sum(dim=1)            # (B, d)
    return total / mask.sum(dim=1).clamp(min=1)                                 # (B, d) / (B, 1)
    ### END SOLUTION


class RailLoss(nn.Module):
    """The intermediate loss: project, normalise, compare.

    Variant "layerwise" (RAIL-KD^l) compares pair by pair, "concat" (RAIL-KD^c) joins the k vectors
    of a side first, "attention" is layer-wise with all teacher candidates for each student layer.
    The projections are trained with the student and thrown away afterwards.

    Args:
        teacher_dim, student_dim, num_pairs, projection_size: d_t, d_s, k and u.
        centre: subtract the batch mean from both sides; a batch of one then has loss 0.
    Raises:
        ValueError: an unknown variant, or a size below 1.
    """

    def __init__(self, teacher_dim, student_dim, num_pairs, variant="layerwise",
                 projection_size=128, centre=False):
        super().__init__()
        if variant not in ("layerwise", "concat", "attention"):
            raise ValueError(f"variant {variant!r} is not one of layerwise, concat, attention")
        if min(teacher_dim, student_dim, num_pairs, projection_size) < 1:
            raise ValueError("widths, number of pairs and projection size must be at least 1")
        self.num_pairs, self.variant, self.centre = num_pairs, variant, centre
        joined = num_pairs if variant == "concat" else 1
        # As attributes: in a plain list they would not be moved to the GPU, trained or saved.
        self.teacher_proj = nn.Linear(joined * teacher_dim, projection_size)
        self.student_proj = nn.Linear(joined * student_dim, projection_size)

    def project(self, linear, pooled):
        """One side before it gets unit length: (B, k, d) -> (B, k, u), or (B, u) for concat."""
        vectors = linear(pooled.flatten(1) if self.variant == "concat" else pooled)
        if self.centre:
            vectors = vectors - vectors.mean(dim=0)
        return vectors

    def forward(self, student_pooled, teacher_pooled):
        """Mean squared distance of the projected unit vectors, over pairs and batch: in [0, 4].

        Both sides go through `self.project`, each with its own projection, and are then divided by
        their L2 norm (zero vectors stay zero). Layer-wise, row i of one side meets row i of the
        other. With attention, the teacher's vector of pair i is the sum of all projected
        candidates, weighted by the softmax of their dot products with the projected student vector
        i, before the norm is taken. Returns a scalar; no gradient flows into `teacher_pooled`.

        Args:
            student_pooled: (B, k, d_s).
            teacher_pooled: (B, k, d_t), the mapped layers; with attention (B, n-1, d_t), all.
        Raises:
            ValueError: a side without exactly k rows (with attention: the student's side), or
                batches of different size.
        """
        ### BEGIN SOLUTION
        k = self.num_pairs if self.variant == "attention" else teacher_pooled.shape[1]
        if k != self.num_pairs or student_pooled.shape[:2] != (len(teacher_pooled), k):
            raise ValueError(f"student {tuple(student_pooled.shape)} and teacher "
                             f"{tuple(teacher_pooled.shape)} do not make {self.num_pairs} pairs "
                             "of layers for each sentence")
        s = self.project(self.student_proj, student_pooled)                     # (B, k, u)
        t = self.project(self.teacher_proj, teacher_pooled.detach())            # (B, k, u)
        if self.variant == "attention":                                         # t: (B, n-1, u)
            t = torch.softmax(s @ t.transpose(1, 2), dim=-1) @ t                # (B, k, u)
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)                   # length 1
        return (s - t).pow(2).sum(dim=-1).mean()
        ### END SOLUTION


def kd_loss(student_logits, teacher_logits, temperature):
    """T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), batch mean, a scalar (Hinton et al. 2015).

    A higher T shows more of what the teacher thinks of the wrong classes. The gradient of the
    softened KL shrinks as 1/T^2; the factor T^2 keeps the weight of the term the same. For a
    regression, (B, 1): the mean squared error. No gradient flows into `teacher_logits`.

    Args:
        student_logits, teacher_logits: (B, C).
        temperature: T > 0, finite; checked for a regression too, though unused.
    Raises:
        ValueError: shapes that differ or are not (B, C), or another temperature.
    """
    ### BEGIN SOLUTION
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(f"student logits {tuple(student_logits.shape)} and teacher logits "
                         f"{tuple(teacher_logits.shape)} must have one shape (B, C)")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be a positive finite number")
    if student_logits.shape[1] == 1:
        return F.mse_loss(student_logits, teacher_logits.detach())
    # F.kl_div(a, b) is KL(b || a): the student comes first, both as *log*-probabilities. The
    # default reduction "mean" divides by B * C: the weight would depend on the number of classes.
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    return temperature ** 2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    ### END SOLUTION


def combined_loss(ce, kd, rail, weights):
    """The objective l1 * CE + l2 * KD + l3 * RAIL, a scalar: equation (4) of the paper.

    Args:
        ce, kd, rail: scalars, tensors (gradients flow back) or plain numbers.
        weights: (l1, l2, l3), each >= 0, together 1.
    Raises:
        ValueError: not three weights, a negative one, NaN, or a sum other than 1 (by over 1e-6).
    """
    ### BEGIN SOLUTION
    if len(weights) != 3 or not all(w >= 0 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights {' '.join(map(str, weights))}: must be three numbers >= 0, for "
                         "CE, KD and RAIL, that sum to 1")
    return weights[0] * ce + weights[1] * kd + weights[2] * rail
    ### END SOLUTION


# ---- 3. One step, and the loop -----------------------------------------------------------------


class Distiller(nn.Module):
    """All that is trained: student and projections. Its forward pass is the method in one step."""

    def __init__(self, student, rail, settings):
        super().__init__()
        self.student, self.rail, self.settings = student, rail, settings

    def forward(self, batch, teacher_logits=None, teacher_pooled=None):
        """CE, KD and RAIL of a batch {input_ids (B, S), ..., labels (B,)}, given the teacher's
        outputs for it: logits (B, C), pooled layers (B, k, d_t). A loss without them is 0."""
        layers = range(1, self.student.config.num_hidden_layers) if self.rail is not None else ()
        logits, pooled = outputs_of(self.student, batch, self.settings.precision, layers)
        ce = label_loss(logits, batch["labels"])
        kd = rail = torch.zeros_like(ce)
        if teacher_logits is not None:
            kd = kd_loss(logits, teacher_logits, self.settings.temperature)
        if self.rail is not None:
            rail = self.rail(pooled, teacher_pooled)                            # (B, k, d) each
        return ce, kd, rail


def train(distiller, data, tokenizer, settings, state_file, score, report,
          teacher_outputs=lambda rows, layers: (), num_teacher_layers=None):
    """Trains a Distiller in place; returns the history, one dict per epoch.

    `teacher_outputs` is (rows, layers) -> logits (B, C), pooled layers (B, k, d_t), see section 4;
    without it the labels alone teach. `score(layers)` and `report(history)` are called after each
    epoch. All randomness is seeded from (seed, epoch), and the state goes to `state_file`: a run
    that was killed continues after its last full epoch and ends, on a CPU, bit for bit the same.
    Raises FloatingPointError for a loss that is not finite, ValueError for a state of other data.
    """
    (rank, world), m = processes(), distiller.student.config.num_hidden_layers
    steps, lengths = math.ceil(len(data) / settings.batch_size), lengths_of(data)
    optimizer, schedule, scaler = make_optimizer(distiller, settings, steps * settings.epochs)
    parts = {"distiller": distiller, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = load_state(state_file, parts, data)
    model = distiller
    if world > 1:                          # XLNet, say, has weights that a classifier never uses
        model = nn.parallel.DistributedDataParallel(distiller, find_unused_parameters=True)

    for epoch in range(len(history) + 1, settings.epochs + 1):
        start = time.perf_counter()
        layers = choose_layers(settings, num_teacher_layers, m, epoch)          # the draw: (k,)
        seed = int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0])
        torch.manual_seed(seed + rank)                                          # for dropout
        losses = torch.zeros(4, device=distiller.student.device)   # sums, read after the epoch
        distiller.train()
        batches = length_batches(lengths, settings.batch_size, seed)
        for step, rows in enumerate(progress(batches, f"epoch {epoch}")):
            if settings.resample == "step":
                layers = choose_layers(settings, num_teacher_layers, m, epoch, step)
            # Each process takes its share; without one, a dummy row with weight 0.
            own, factor = rows[rank::world] or rows[:1], len(rows[rank::world]) / len(rows)
            batch = make_batch(data, tokenizer, own, losses.device)
            ce, kd, rail = model(batch, *teacher_outputs(own, layers))
            loss = combined_loss(ce, kd, rail, settings.weights)
            scaler.scale(loss * factor * world).backward()     # DDP takes the mean of gradients
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            losses += torch.stack([ce, kd, rail, loss]).detach() * factor * len(rows) / len(data)
        record = epoch_record(settings, epoch, layers, losses, len(data), start)
        history.append(record | score(layers))
        save_state(state_file, parts, data, history)
        report(history)
    return history


def label_loss(logits, labels):
    """CE of logits (B, C) and class numbers (B,); the squared error for a regression, (B, 1)."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits.squeeze(1), labels)
    return F.cross_entropy(logits, labels)


def outputs_of(model, batch, precision="fp32", layers=()):
    """Logits (B, C) and pooled outputs of `layers` (B, k, d), or None without any; in float32."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(model.device.type, kind, enabled=precision != "fp32"):
        output = model(**inputs, output_hidden_states=len(layers) > 0)
    # hidden_states[0] is the output of the embeddings, hidden_states[j] that of layer j.
    pooled = [mean_pool(output.hidden_states[j], batch["attention_mask"]) for j in layers]
    return output.logits.float(), torch.stack(pooled, dim=1) if pooled else None


def make_optimizer(distiller, settings, steps):
    """AdamW, its schedule (a tenth of the steps is warm-up, then down to 0), and fp16's scaler.

    New projections start from random numbers, so they may have a rate of their own. In fp16 small
    gradients would become 0: the scaler multiplies the loss, and divides the gradients again.
    """
    rates = [settings.learning_rate, settings.projection_learning_rate or settings.learning_rate]
    groups = [{"params": p.parameters(), "lr": r} for p, r in zip(distiller.children(), rates)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    kind = distiller.student.device.type
    return optimizer, schedule, torch.amp.GradScaler(kind, enabled=settings.precision == "fp16")


def length_batches(lengths, batch_size, seed):
    """Row numbers in batches of similar length, in random order; each row is in exactly one.

    A batch costs what its longest sentence costs: 25 tokens padded to 128 waste four fifths.
    """
    generator = torch.Generator().manual_seed(seed)
    order = get_length_grouped_indices(lengths, batch_size, generator=generator)
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def epoch_record(settings, epoch, layers, losses, num_examples, start):
    """What the history keeps of an epoch; the losses are means over examples."""
    if processes()[1] > 1:
        torch.distributed.all_reduce(losses)
    if not torch.isfinite(losses).all():
        raise FloatingPointError(f"the loss is NaN or infinite in epoch {epoch}: start anew with a "
                                 "lower --learning-rate, or with --precision fp32")
    one_map = settings.mapping in ("random", "skip", "last") and settings.resample == "epoch"
    record = {"epoch": epoch, "layers": layers.tolist() if one_map else None}
    record |= dict(zip(("ce", "kd", "rail", "total"), losses.tolist()))
    seconds = time.perf_counter() - start
    return record | {"seconds": seconds, "examples_per_second": num_examples / seconds}


# ---- 4. The teacher's outputs ------------------------------------------------------------------
# A frozen teacher gives the same outputs for a sentence in every epoch, and RAIL-KD needs only its
# logits and one pooled vector per layer. So it runs over the training data once, and the loop looks
# its outputs up. A step costs about three forward passes of the student (one forward, two for the
# backward pass); a live teacher, n/m times as deep, would add n/m in every epoch. Since only
# sentence vectors are compared, the two may differ in width, architecture and even tokenizer.


def make_batch(data, tokenizer, rows, device):
    """Rows of encoded data, padded to their longest: {input_ids (B, S), ..., labels (B,)}."""
    batch = transformers.DataCollatorWithPadding(tokenizer)(data[rows])
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def predict(model, data, tokenizer, precision="fp32", pooled=None):
    """The logits of a model for encoded data, in their order: float32 array (N, C).

    If `pooled` (N, n, d) is given, it is filled with the pooled outputs of all layers. Several
    processes share the work. Raises FloatingPointError for outputs that are NaN or infinite.
    """
    model.eval()                                   # with dropout, a teacher would be noisy
    rank, world = processes()
    layers = () if pooled is None else range(1, pooled.shape[1] + 1)
    logits = torch.zeros(len(data), model.config.num_labels, device=model.device)
    order = np.argsort(lengths_of(data)).tolist()  # from short to long: little padding
    batches = [order[i:i + 64] for i in range(0, len(order), 64)]
    for rows in progress(batches[rank::world], "forward passes"):
        batch = make_batch(data, tokenizer, rows, model.device)
        logits[rows], vectors = outputs_of(model, batch, precision, layers)
        if layers:
            pooled[rows] = vectors.to(pooled)
            # 0, or NaN if a vector is not finite in half precision
            logits[rows] += 0 * pooled[rows].sum(dtype=torch.float32).to(logits)
    if world > 1:
        torch.distributed.all_reduce(logits)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("a model produced NaN or infinity: it is broken, or it diverged")
    return logits.cpu().numpy()


def teacher_table(teacher, data, tokenizer, settings, place):
    """Runs the frozen teacher over the training data once, and returns a function that looks up:
    (rows, layers) -> logits (B, C), pooled layers (B, k, d_t), in float32.

    The layers lie in a file that is mapped into memory, in half precision: MNLI and 24 layers of
    width 1024 make 19 GB. A table that an earlier run left in the folder `place` is used again.
    Its name is a hash of all it depends on: tokens, weights, configuration and pooling. Raises
    ValueError where the disk has too little space.
    """
    weights = [tensor.cpu() for tensor in teacher.state_dict().values()]
    name = fingerprint(data.remove_columns("label"), weights, teacher.config.to_json_string(),
                       tokenizer.padding_side, settings.precision, mean_pool.__code__)
    folder, device = place / f"table-{name}", teacher.device
    shape = len(data), teacher.config.num_hidden_layers, teacher.config.hidden_size

    def layers_in(folder, write=False):                                         # (N, n, d_t)
        path, size = str(folder / "pooled.bin"), math.prod(shape)
        return torch.from_file(path, write, size, dtype=torch.float16).view(shape)

    def write(part):
        part.mkdir(exist_ok=True)
        pooled = layers_in(part, write=True)
        np.save(part / "logits.npy", predict(teacher, data, tokenizer, settings.precision, pooled))

    if not from_rank_0(folder.is_dir()):
        log(f"The teacher runs once; {2e-6 * math.prod(shape):,.1f} MB of outputs go to {folder}")
        if 2 * math.prod(shape) > shutil.disk_usage(place).free:
            raise ValueError(f"{place} has too little space for them: lower --max-train-examples")
        save(folder, write, everywhere=True)
    pooled, logits = layers_in(folder), torch.from_numpy(np.load(folder / "logits.npy"))

    def teacher_outputs(rows, layers):
        if layers is None:                         # a mapping without RAIL
            return logits[rows].to(device), None
        # One joint index: pooled[rows][:, layers - 1] would read all layers of a row first.
        found = pooled[torch.as_tensor(rows)[:, None], torch.as_tensor(layers) - 1]
        return logits[rows].to(device), found.to(device).float()
    return teacher_outputs


# ---- 5. Teacher and student --------------------------------------------------------------------
# Any encoder with a classifier that transformers knows can teach. The student is cut from it, or
# it is another model. Cut to 4 of its 12 layers, BERT-base goes from 109 million parameters to 53
# million, of which 24 million are the embeddings.


def toy_teacher(seed, num_layers=12):
    """(model, tokenizer): an untrained BERT of width 64, with the toy's words as its vocabulary.

    Deep Transformers that learn from scratch easily stay at chance. What helps here: no dropout,
    warm-up, and weights that start larger than BERT's 0.02, which was made for a width of 768.
    """
    words = " ".join(TOPICS + NEGATIVE + POSITIVE + DEGREES + NEGATIONS).split()
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] , .".split() + sorted(words + LINKS)
    vocabulary = {word: number for number, word in enumerate(words)}
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, initializer_range=0.05,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return model, transformers.BertTokenizer(vocabulary, model_max_length=64)


def load_classifier(name, feature, role):
    """(model, tokenizer, trained) from a hub name or a folder, with the outputs of the data.

    An encoder that was only pretrained gets a new classifier, and `trained` is False. So does a
    student (`role`) that was trained for other classes. `feature` is the type of the label column.
    Raises ValueError where nothing can be loaded, or nothing that fits.
    """
    with refuse(f"no {role} can be loaded from {name!r}"):
        # Code from the hub is never run, and weights hold none: safetensors, or weights_only.
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=getattr(feature, "num_classes", 1), ignore_mismatched_sizes=True,
            trust_remote_code=False, output_loading_info=True)
        # What a checkpoint lacks, transformers fills with random numbers. That is right for a new
        # classifier and for BERT's pooler, which belongs to it, but not for the encoder.
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        new, encoder = mismatched | set(info["missing_keys"]), f"{model.base_model_prefix}."
        lost = [key for key in new if key.startswith(encoder) and "pooler" not in key]
        if lost:
            raise ValueError(f"its weights do not fit its configuration, such as {lost[0]}")
        if mismatched and role == "teacher":
            raise ValueError("it was trained for another number of classes than the data have")
    use_labels(model, feature)
    return model.float(), tokenizer, not new       # float: it may be stored in half precision


def use_labels(model, feature):
    """Gives a model, in place, the data's label names, and its logits the data's order.

    MNLI checkpoints on the hub number the classes differently from GLUE. A student of such a
    teacher would learn the wrong classes, without any error. Where the model's names are the
    data's in another order, the rows of its last linear layer are put in the data's order. Names
    like LABEL_0 say nothing and are replaced.
    """
    model.config.problem_type = "regression"
    if isinstance(feature, datasets.ClassLabel):
        own, wanted = [model.config.id2label[i] for i in range(feature.num_classes)], feature.names
        if sorted(own) != sorted(wanted):          # perhaps they differ in case only
            own, wanted = [x.lower() for x in own], [x.lower() for x in wanted]
        if own != wanted and sorted(own) == sorted(wanted) and len(set(own)) == len(own):
            linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
            head = [part for part in linear if part.out_features == len(own)][-1]
            for parameter in head.parameters():                        # weight (C, d), bias (C,)
                parameter.data = parameter.data[[own.index(name) for name in wanted]]
        model.config.problem_type = "single_label_classification"
        model.config.id2label = dict(enumerate(feature.names))
        model.config.label2id = {name: i for i, name in enumerate(feature.names)}


def build_student(teacher, num_layers):
    """A student cut from its teacher: `num_layers` of its layers, weights copied, nothing shared.

    Student layer i is teacher layer round(i*n/m), so the last one feeds the classifier as the
    teacher's last one does; embeddings and classifier are copied as they are.

    Args:
        teacher: a transformers model with n layers in one nn.ModuleList.
        num_layers: m, from 1 to n.
    Returns:
        A model of the same class, in train mode, with gradients, on the CPU.
    Raises:
        ValueError: more layers than the teacher has, or an architecture that can't be cut.
    """
    n, cut = teacher.config.num_hidden_layers, copy.deepcopy(teacher)
    if not 1 <= num_layers <= n:
        raise ValueError(f"{num_layers} layers can't be cut from a teacher of {n}: choose 1 to {n}")
    kept = [round(i * n / num_layers) - 1 for i in range(1, num_layers + 1)]   # counted from 0
    with refuse(f"a {type(teacher).__name__} can't be cut: name another model as the student"):
        cut.config.num_hidden_layers = num_layers
        if getattr(cut.config, "layer_types", None):           # layers that differ keep their type
            cut.config.layer_types = [cut.config.layer_types[i] for i in kept]
        stacks = [part for part in cut.modules() if isinstance(part, nn.ModuleList)]
        layers = next(stack for stack in stacks if len(stack) == n)    # ALBERT has just one layer
        for i in sorted(set(range(n)) - set(kept), reverse=True):
            del layers[i]
        # Not `cut` itself but a new model of its config, since that is what the saved student is
        # loaded into. Each weight must have its place there.
        student = type(teacher)(cut.config)
        student.load_state_dict(cut.state_dict())
    return student.train()


def prepare(model, tokenizer, sets, settings, role):
    """All data as the tokens of one model, after the longest and the shortest input went through.

    Raises ValueError, before anything slow begins, where the method can't use the model: no
    attention mask, hidden states that are missing or of another shape, too few positions, a
    precision that it can't compute in.
    """
    model.to(settings.device)
    hint = "" if settings.precision == "fp32" else ", --precision fp32 may help"
    with refuse(f"the {role}, a {type(model).__name__}, can't be used{hint}"):
        sets = {name: encode(x, tokenizer, model, settings.max_length) for name, x in sets.items()}
        if "attention_mask" not in sets["train"].column_names:
            raise ValueError("it has no attention mask, so padding would count as text")
        order = np.argsort(lengths_of(sets["train"]))
        pooled = torch.zeros(2, model.config.num_hidden_layers, model.config.hidden_size)
        two = sets["train"].select([int(order[0]), int(order[-1])])
        predict(model, two, tokenizer, settings.precision, pooled)
    return sets


# ---- 6. Data -----------------------------------------------------------------------------------
# Every source ends as Datasets with the columns sentence1, sometimes sentence2, and label. The
# label column knows its own type: a ClassLabel with names, or a float for a regression.
#
# The toy shows the method at work in two minutes, without a network. Somebody had 8,000 carefully
# labelled sentences and trained a large model with them. You have that model, 1,000 other
# sentences, and labels of which a fifth is wrong.

GLUE = "cola sst2 mrpc stsb qqp mnli qnli rte wnli".split()
METRICS = {"cola": ["matthews_correlation"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}
TOPICS = "acting plot music ending dialogue cast pacing script humour story".split()
NEGATIVE = "dull clumsy stale silly cold weak tedious messy".split()
POSITIVE = "clever moving fresh funny warm sharp gripping charming".split()
DEGREES, NEGATIONS = ["", "", "very", "quite", "rather"], ["not", "never", "hardly"]
LINKS = ["the", "is", "but", "yet", "although"]
FORMS = ["the {main}.", "the {main}, although the {side}.", "although the {side}, the {main}.",
         "the {side}, but the {main}.", "the {side}, yet the {main}."]


def toy_sentences(seed, sizes):
    """Short reviews in which the words alone do not decide the label: a Dataset for each size.

    "Although the plot is very clever, the acting is hardly moving": the main clause decides (here:
    negative). Word order tells which clause that is, and a negation turns it round, so counting
    words says little. Some sentences have one clause only, a stepping stone for a deep model that
    starts from random weights. All sentences differ, and they depend on the seed alone.
    """
    rng = np.random.default_rng([seed, 0x7071])
    found = {}                                     # sentence -> label, without repeats, in order
    while len(found) < sum(sizes):
        clauses, labels = {}, {}
        for part, topic in zip(("main", "side"), rng.choice(TOPICS, 2, replace=False)):
            positive, negated = rng.integers(2), rng.random() < 1 / 3
            degree = rng.choice(NEGATIONS if negated else DEGREES)
            adjective = rng.choice(POSITIVE if positive else NEGATIVE)
            clauses[part] = " ".join(f"{topic} is {degree} {adjective}".split())
            labels[part] = int(positive ^ negated)
        found.setdefault(rng.choice(FORMS).format(**clauses).capitalize(), labels["main"])
    data = datasets.Dataset.from_dict({"sentence1": list(found), "label": list(found.values())})
    data = data.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
    return [data.select(range(end - size, end)) for size, end in zip(sizes, np.cumsum(sizes))]


def read_file(path):
    """A file of CSV or JSON lines -> Dataset of text: sentence1, maybe sentence2, label.

    Not by `datasets.load_dataset`: that takes [ and * in a path for a pattern, rewrites 007 as 7,
    and gives the old rows of a file that was replaced by one with the same time stamp.
    """
    with refuse(f"{path} is not a file of CSV or JSON lines in UTF-8 with sentence and label"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.lower().endswith(".csv"):
                rows = list(csv.DictReader(file, strict=True))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
        data = datasets.Dataset.from_list(rows)
        if "sentence1" not in data.column_names:
            data = data.rename_column("sentence", "sentence1")
        names = ["sentence1", "sentence2"] if "sentence2" in data.column_names else ["sentence1"]
        data = data.select_columns([*names, "label"])
        for name in data.column_names:
            data = data.cast_column(name, datasets.Value("string"))
            missing = (None, "", "NA", "N/A", "NaN", "nan", "null") if name == "label" else (None,)
            for number, value in enumerate(data[name], 1):
                if value in missing:
                    raise ValueError(f"example {number} has no {name}")
    return data


def with_labels(data, path, feature=None):
    """`data` with its labels, which are text, turned into `feature`, or what they seem to be.

    Names are classes, in the order of the alphabet, and so are whole numbers, in theirs; any
    decimal makes a regression. Later files may name a class by its number, where the names are not
    numbers: 0 and 1 for "negative" and "positive". Raises ValueError for labels that do not fit.
    """
    labels = set(data["label"])
    numbers = {x for x in labels if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", x)}
    if feature is None:
        if len(labels) == 1 or numbers not in (set(), labels):
            raise ValueError(f"{path}: labels must differ, and be all names or all numbers")
        feature = datasets.Value("float32")
        if all(re.fullmatch(r"[+-]?\d+", x) for x in numbers):
            feature = datasets.ClassLabel(names=sorted(labels, key=int if numbers else None))
    known = set(getattr(feature, "names", numbers))
    if isinstance(feature, datasets.ClassLabel) and not feature.names[0].lstrip("+-").isdigit():
        known |= {str(number) for number in range(len(known))}
    if labels - known:
        raise ValueError(f"{path}: the training data have no label {min(labels - known)!r}")
    return data.cast_column("label", feature)


def load_task(settings, for_teacher=False):
    """All data of a task, as text: {"train": ..., "validation": ..., file name: ...}.

    Everything but "train" is scored. MNLI has "validation_mismatched" too. GLUE's test splits are
    left out: their labels are all -1. The toy's student gets an eighth as many sentences as its
    teacher (`for_teacher`), other ones, and a fifth of its labels is wrong.

    Returns:
        Dict of Datasets with the columns sentence1, maybe sentence2, and label.
    Raises:
        ValueError: the hub is out of reach, or a file can't be used.
    """
    sets, files = {}, {path: path for path in settings.eval_file}
    if settings.task == "toy":
        size = settings.max_train_examples or 1000
        validation, train, teacher_train = toy_sentences(settings.seed, [1000, size, 8 * size])
        wrong = np.random.default_rng([settings.seed, 0xBAD]).permutation(size) < size // 5
        noisy = train.map(lambda row, i: {"label": row["label"] ^ int(wrong[i])}, with_indices=True)
        sets = {"train": teacher_train if for_teacher else noisy, "validation": validation}
    elif settings.task:
        with refuse(f"{settings.task} can't be loaded from the hub (--task toy needs none)"):
            splits = datasets.load_dataset("nyu-mll/glue", settings.task)
        for split, data in splits.items():
            texts = [name for name in data.column_names if name not in ("label", "idx")]
            data = data.select_columns([*texts, "label"])
            data = data.rename_columns(dict(zip(texts, ("sentence1", "sentence2"))))
            if not split.startswith("test"):
                sets[split.replace("_matched", "")] = data
    else:
        files = {"train": settings.train_file, "validation": settings.validation_file} | files
    for name, path in files.items():
        feature = sets["train"].features["label"] if sets else None
        sets[name] = with_labels(read_file(path), path, feature)
        if sets[name].column_names != sets["train"].column_names:
            raise ValueError(f"{path} must have the text columns of the training data")
    if settings.max_train_examples and settings.task != "toy":       # a file may be sorted by label
        size = min(settings.max_train_examples, len(sets["train"]))
        sets["train"] = sets["train"].shuffle(seed=settings.seed).select(range(size))
    return sets


def encode(data, tokenizer, model, max_length):
    """Dataset of text -> Dataset of token numbers (input_ids, attention_mask, ...) and label.

    Not padded yet. A pair is encoded as a pair. Columns that the model's forward pass does not
    know (a DistilBERT has no token_type_ids) are left out. Inputs are cut to `max_length` tokens,
    or to fewer where tokenizer or model allow no more.
    """
    limit = min(max_length, tokenizer.model_max_length)
    positions = getattr(model.config, "max_position_embeddings", None) or -1     # XLNet has -1
    if 0 < positions < limit:
        limit = positions - 2          # RoBERTa and its kin keep two positions for themselves
    texts = [name for name in data.column_names if name != "label"]

    def tokenize(rows):
        return dict(tokenizer(*[rows[name] for name in texts], truncation=True, max_length=limit))

    data = data.map(tokenize, batched=True, remove_columns=texts)
    known = [*inspect.signature(model.forward).parameters, "label"]
    return data.select_columns([name for name in data.column_names if name in known])


def lengths_of(data):
    """The number of tokens of each row of an encoded Dataset."""
    return [len(tokens) for tokens in data["input_ids"]]


def fingerprint(data, *more):
    """16 hex digits that change with an encoded Dataset, and with whatever else is given."""
    hasher = datasets.fingerprint.Hasher()
    for item in [*(json.dumps(rows).encode() for rows in data.iter(batch_size=1000)), *more]:
        hasher.update(item)
    return hasher.hexdigest()


# ---- 7. Scores ---------------------------------------------------------------------------------
# A metric is computed once over a whole set, never as a mean over batches: the last batch is
# smaller, and F1 or a correlation of the whole is not the mean of those of its parts.


def ranks(values):
    """Ranks from 1; equal values share the mean of their ranks, as Spearman's correlation wants."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(a, b):
    """Pearson's r of two arrays (N,); 0 where one of them is constant: it tells nothing then."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.nan_to_num(np.corrcoef(a, b)[0, 1]))


def compute_metrics(logits, labels, task=None, teacher_logits=None):
    """The metrics of GLUE for arrays (N, C) and (N,): {"accuracy": ..., "eval_loss": ...}.

    Your own data get accuracy, or the two correlations for a regression. `eval_loss` is CE in nats
    or the mean squared error; `agreement` the share of the examples, right or wrong, for which the
    teacher, with logits (N, C), chooses the same class.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    loss = {"eval_loss": float(label_loss(torch.tensor(logits), torch.tensor(labels)))}
    if logits.shape[1] == 1:
        output = logits[:, 0]
        spearman = correlation(ranks(output), ranks(labels))
        return {"pearson": correlation(output, labels), "spearmanr": spearman} | loss
    predicted, positive = logits.argmax(axis=1), labels == 1                    # (N,), (N,)
    f1 = 2 * np.sum((predicted == 1) & positive) / max(np.sum(predicted == 1) + positive.sum(), 1)
    values = {"accuracy": float(np.mean(predicted == labels)), "f1": float(f1),
              "matthews_correlation": correlation(predicted == 1, positive)}
    scores = {name: values[name] for name in METRICS.get(task, ["accuracy"])}
    if teacher_logits is not None:
        scores["agreement"] = float(np.mean(predicted == np.argmax(teacher_logits, axis=1)))
    return scores | loss


def evaluate(model, data, tokenizer, task=None, precision="fp32", teacher_logits=None):
    """The metrics of a model for an encoded Dataset with labels, see `compute_metrics`."""
    logits = predict(model, data, tokenizer, precision)
    return compute_metrics(logits, data["label"], task, teacher_logits)


def score(model, sets, tokenizer, settings, teacher_logits={}):
    """The metrics of all sets but "train". Those of MNLI's second set end in _mismatched, and
    those of further files stand under "evaluation"."""
    found = {name: evaluate(model, sets[name], tokenizer, settings.task, settings.precision,
                            teacher_logits.get(name)) for name in sets if name != "train"}
    other = {f"{key}_mismatched": x for key, x in found.pop("validation_mismatched", {}).items()}
    return found.pop("validation") | other | {"evaluation": found}


@torch.no_grad()
def projected_cosine(rail, teacher_pooled):
    """The mean cosine of different sentences after the teacher's projection, see section 2.

    teacher_pooled: (B, k, d_t). Near 1, the loss has found its trivial solution.
    """
    t = F.normalize(rail.project(rail.teacher_proj, teacher_pooled), dim=-1)
    # || sum of t ||^2 is B, from each vector with itself, plus the cosines of B (B - 1) pairs.
    return float(((t.sum(dim=0).pow(2).sum(-1) - len(t)) / max(len(t) * (len(t) - 1), 1)).mean())


def costs(model, data, tokenizer, precision):
    """What a model costs: layers, parameters, bytes, and the median time of one sentence in ms."""
    batch, times = make_batch(data, tokenizer, [0], model.device), [time.perf_counter()]
    for _ in range(30):
        with torch.no_grad():
            outputs_of(model, batch, precision)[0].cpu()       # .cpu() waits for the device
        times.append(time.perf_counter())
    return {"layers": model.config.num_hidden_layers, "parameters": model.num_parameters(),
            "bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
            "milliseconds_per_sentence": 1000 * float(np.median(np.diff(times)))}


def warn_of_weak_teacher(logits, labels):
    """Says so where a teacher knows no more than the largest class, or the mean of a regression."""
    labels = np.array(labels)
    error, floor = np.mean((logits[:, 0] - labels) ** 2), labels.var()
    if logits.shape[1] > 1:
        error = np.mean(logits.argmax(1) != labels)
        floor = 1 - np.bincount(labels).max() / len(labels)
    if error >= floor:
        log(f"\n!!! The teacher's error is {error:.3g}; without reading the text it is {floor:.3g}."
            "\n!!! It is weak or broken, or its labels mean something else.\n")


# ---- 8. Settings -------------------------------------------------------------------------------


def option(default, text):
    """A field of Settings: its default, and the sentence that --help shows."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Settings:
    """Everything that a run depends on. HfArgumentParser makes a flag of each field."""

    task: Literal[("toy", *GLUE)] | None = option(None, "The toy (default), or a task of GLUE.")
    train_file: str | None = option(None, "CSV or JSON lines: sentence, maybe sentence2, label.")
    validation_file: str | None = option(None, "Own validation data with the same columns.")
    eval_file: list[str] = option([], "Further files to score, such as text of another domain.")
    max_train_examples: int | None = option(None, "Draw this many training examples (toy: make).")
    max_length: int = option(128, "Cut longer inputs to this many tokens.")
    teacher: str | None = option(None, "Folder or hub name (default: BERT-base, or the toy's).")
    teacher_epochs: int | None = option(None, "To fine-tune it, if needed (default: 3, toy 5).")
    student_layers: int | None = option(None, "Cut so many from the teacher (default: a third).")
    student: str | None = option(None, "Instead: folder or hub name of a student of any kind.")
    mapping: Literal["random", "skip", "last", "attention", "none", "finetune"] = option(
        "random", "Teacher layers: drawn, evenly spaced, last, all; none: CE and KD; finetune: CE.")
    variant: Literal["layerwise", "concat"] = option("layerwise", "RAIL-KD^l or RAIL-KD^c.")
    resample: Literal["epoch", "step"] = option("epoch", "When to draw a new map.")
    centre: bool = option(False, "Subtract the batch mean from both sides of RAIL (see section 2).")
    projection_size: int = option(128, "Width u of the projections.")
    projection_learning_rate: float | None = option(None, "Of the projections (default: the same).")
    temperature: float = option(2.0, "Softens both output distributions in KD.")
    weights: list[float] = option([1 / 3] * 3, "Of CE, KD, RAIL (none: rescaled); together 1.")
    epochs: int | None = option(None, "Epochs of distillation (default: 10, toy 8).")
    batch_size: int = option(32, "Examples in a step, over all processes together.")
    learning_rate: float | None = option(None, "Peak rate of AdamW (default: 5e-5, toy 5e-4).")
    seed: int = option(0, "Everything random comes from it.")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: CUDA, MPS or CPU.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "auto: half on CUDA.")
    output_dir: str | None = option(None, "New folder for the results (default: one in runs/).")
    resume: str | None = option(None, "Folder of a run to finish; beside it, device and precision.")

    def resolve(self):
        """A copy with all defaults filled in and all values checked. Raises ValueError."""
        new, files = dataclasses.replace(self), [self.train_file, self.validation_file]
        new.task = self.task or ("toy" if files == [None, None] else None)
        # With one draw per epoch and 12 -> 4 layers, 10 epochs let 96 % of the layers teach.
        defaults = {"teacher": ("bert-base-uncased", None), "epochs": (10, 8),
                    "teacher_epochs": (3, 5), "learning_rate": (5e-5, 5e-4)}        # text, toy
        for name, value in dataclasses.asdict(new).items():
            flag, least = f"--{name.replace('_', '-')}", {"seed": 0, "max_length": 4}.get(name, 1)
            if value is None and name in defaults:
                setattr(new, name, defaults[name][new.task == "toy"])
            if value in ("", [""]):
                raise ValueError(f"{flag} is empty: give a value, or leave it out")
            if type(value) is int and not least <= value < 2 ** 63:
                raise ValueError(f"{flag} {value}: must be at least {least}")
            if type(value) is float and not 0 < value < math.inf:                   # also NaN
                raise ValueError(f"{flag} {value}: must be a positive number")
        share = combined_loss(1.0, 1.0, 0.0, new.weights)      # CE and KD; all that `none` has
        if new.mapping == "none" and share > 0:
            new.weights = [new.weights[0] / share, new.weights[1] / share, 0.0]
        if new.mapping == "finetune":
            new.weights = [1.0, 0.0, 0.0]
        new.device, new.precision = resolve_device(new.device, new.precision)
        name = f"{new.task or Path(new.train_file or '').stem}-{new.mapping}-seed{new.seed}"
        new.output_dir = new.output_dir or f"runs/{name}-{time.time():.0f}-{os.getpid()}"
        out = Path(new.output_dir)
        pair, limit = (new.mapping, new.variant), new.max_train_examples or 0
        in_use = out.exists() and (out.is_file() or any(out.iterdir()))
        conflicts = {
            "--task and own files exclude each other": new.task and files != [None, None],
            "--train-file and --validation-file belong together": files.count(None) == 1,
            "--student and --student-layers exclude each other": new.student and new.student_layers,
            "--mapping attention needs --variant layerwise": pair == ("attention", "concat"),
            "--mapping none leaves nothing to learn from": new.mapping == "none" and share == 0,
            "--max-train-examples: the toy makes 100000": new.task == "toy" and limit > 100_000,
            f"--output-dir {out} is in use: name a new folder": in_use and not new.resume}
        for text in conflicts:
            if conflicts[text]:
                raise ValueError(text)
        return new


def resolve_device(device, precision):
    """("auto", "auto") -> for example ("cuda", "bf16"). Raises ValueError for what is not there."""
    mps = torch.backends.mps.is_available()
    found = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if device == "auto":
        device = next(name for name in found if found[name])
    offered = {"cuda": ["bf16", "fp16", "fp32"], "mps": ["fp32"], "cpu": ["fp32", "bf16"]}[device]
    if found[device] and device == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        offered = ["fp16", "fp32", "bf16"]         # a T4 only emulates bf16, slowly
    if not found[device] or precision not in ["auto", *offered]:
        raise ValueError(f"--device {device} --precision {precision} is not available here")
    return device, offered[0] if precision == "auto" else precision


# ---- 9. The whole job --------------------------------------------------------------------------


def run(settings):
    """From Settings to a student on disk; returns what metrics.json holds.

    The folder of a run holds student/ and, if it was fine-tuned here, teacher/, both as
    transformers' pipeline loads them, and metrics.json; *.pt is the state after the last epoch. A
    resumed run does the same again and finds what is there. student/ is written last.
    Raises ValueError, OSError or FloatingPointError, with a sentence for the user.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    settings = (resumed(settings) if settings.resume else settings).resolve()
    settings.output_dir = from_rank_0(settings.output_dir)
    out, first = Path(settings.output_dir), processes()[0] == 0
    if (out / "student").is_dir():
        log(f"{out} is finished already.")
        return json.loads((out / "metrics.json").read_text(encoding="utf-8"))

    # 1. Data and models. What is wrong with them shows here, before anything is slow or written.
    sets = load_task(settings)
    feature = sets["train"].features["label"]
    made_here, given = out / "teacher", Path(settings.teacher or out)
    source = str(made_here) if made_here.is_dir() else settings.teacher
    if source is None:
        (teacher, tokenizer), trained = toy_teacher(settings.seed), False
        use_labels(teacher, feature)
    else:
        torch.manual_seed(settings.seed)                       # for a new classifier
        teacher, tokenizer, trained = load_classifier(source, feature, "teacher")
    n = teacher.config.num_hidden_layers
    if settings.student:
        torch.manual_seed(settings.seed)
        student, words, _ = load_classifier(settings.student, feature, "student")
    else:
        settings.student_layers = settings.student_layers or min(n, max(n // 3, 2))
        student, words = build_student(teacher, settings.student_layers), tokenizer
    m, rail = student.config.num_hidden_layers, None
    if settings.mapping not in ("none", "finetune"):
        if not 2 <= m <= n:
            raise ValueError(f"{m} student layers have no map to {n} teacher layers: take 2 to {n}")
        variant = "attention" if settings.mapping == "attention" else settings.variant
        torch.manual_seed(settings.seed)
        rail = RailLoss(teacher.config.hidden_size, student.config.hidden_size, m - 1, variant,
                        settings.projection_size, settings.centre)
    teacher_sets = prepare(teacher, tokenizer, sets, settings, "teacher")
    student_sets = prepare(student, words, sets, settings, "student")

    # 2. A folder, claimed by a file that only one run can create. From here on, --resume works.
    results = {
        "settings": dataclasses.asdict(settings) | {"resume": None},
        "versions": {lib.__name__: lib.__version__ for lib in (torch, transformers, datasets, np)},
        "device": f"{settings.device}, {torch.get_num_threads()} threads x {processes()[1]}",
        "teacher": {}, "student": {}, "epochs": []}
    if settings.resume:
        text = (out / "metrics.json").read_text(encoding="utf-8")
        results["teacher"] = json.loads(text)["teacher"]       # the history of its fine-tuning
    elif first:
        with refuse(f"--output-dir {out} is in use, or can't be written to"):
            out.mkdir(parents=True, exist_ok=True)
            open(out / "metrics.json", "x").close()
    save_json(out / "metrics.json", results)
    kind = f"classes {', '.join(feature.names)}" if hasattr(feature, "names") else "a regression"
    log(f"data      {len(sets['train']):,} training examples, {kind}\n"
        f"teacher   {n} layers, {teacher.num_parameters():,} parameters\n"
        f"student   {m} layers, {student.num_parameters():,} parameters\n"
        f"training  {settings.epochs} epochs, mapping {settings.mapping}, {settings.precision} on "
        f"{settings.device}\nresults   {out}")
    metric = "pearson"
    if hasattr(feature, "names"):
        metric = METRICS.get(settings.task, ["accuracy"])[0]

    def log_epoch(history):
        last = history[-1]
        pairs = " ".join(f"{i}←{j}" for i, j in enumerate(last["layers"] or [], 1))
        losses = "  ".join(f"{x} {last[x]:.4f}" for x in ("ce", "kd", "rail") if last[x])
        log(f"  epoch {last['epoch']:2}  {pairs}  {losses}  {metric} {last[metric]:.4f}  "
            f"{last['examples_per_second']:,.0f} examples/s")

    # 3. The teacher. One without a trained classifier is fine-tuned first, by the same loop.
    if not trained:
        log("The teacher has no trained classifier yet, so it is fine-tuned first:")
        data = teacher_sets["train"]
        if settings.task == "toy":
            data = load_task(settings, for_teacher=True)["train"]
            data = encode(data, tokenizer, teacher, settings.max_length)
        plan = dataclasses.replace(settings, mapping="finetune", weights=[1.0, 0.0, 0.0],
                                   epochs=settings.teacher_epochs)
        results["teacher"]["epochs"] = train(
            Distiller(teacher, None, plan), data, tokenizer, plan, out / "teacher.pt",
            lambda layers: score(teacher, teacher_sets, tokenizer, plan), log_epoch)
        save_json(out / "metrics.json", results)
        save_model(made_here, teacher, tokenizer)
        teacher, tokenizer, _ = load_classifier(str(made_here), feature, "teacher")
        teacher.to(settings.device)                # as each further run will find it
        log(f"It can be used again with --teacher {shlex.quote(str(made_here))}")
        if not settings.student:                   # cut again, now that it has learned
            student = build_student(teacher, m)
    teacher.requires_grad_(False)
    results["teacher"] |= score(teacher, teacher_sets, tokenizer, settings)
    results["teacher"] |= costs(teacher, teacher_sets["train"], tokenizer, settings.precision)
    teacher_logits = {name: predict(teacher, data, tokenizer, settings.precision)
                      for name, data in teacher_sets.items() if name != "train"}
    warn_of_weak_teacher(teacher_logits["validation"], teacher_sets["validation"]["label"])

    # 4. The loop that brings teacher, student and projections together.
    outputs = {}
    if settings.mapping != "finetune":
        place = next(x for x in (made_here, given, out) if x.is_dir() and os.access(x, os.W_OK))
        table = teacher_table(teacher, teacher_sets["train"], tokenizer, settings, place)
        outputs = {"teacher_outputs": table, "num_teacher_layers": n}

    def student_scores(layers=None):
        found = score(student, student_sets, words, settings, teacher_logits)
        if rail is not None and layers is not None:
            _, pooled = table(range(min(256, len(sets["train"]))), layers)
            found["projected_cosine"] = projected_cosine(rail, pooled)
        return found

    def report(history):
        log_epoch(history)
        save_json(out / "metrics.json", results | {"epochs": history})

    log("The student learns:")
    distiller = Distiller(student, rail, settings).to(settings.device)
    results["epochs"] = train(distiller, student_sets["train"], words, settings,
                              out / "student.pt", student_scores, report, **outputs)
    results["student"] |= student_scores()
    results["student"] |= costs(student, student_sets["train"], words, settings.precision)
    results["evaluation"] = {
        path: {role: results[role]["evaluation"][path] for role in ("teacher", "student")}
        for path in settings.eval_file}
    save_json(out / "metrics.json", results)
    save_model(out / "student", student, words)                # last: the mark of a finished run
    log(f"\n         layers  parameters  megabytes  ms per sentence  {metric}")
    for role in ("teacher", "student"):
        row = results[role]
        log(f"{role}  {row['layers']:6}  {row['parameters']:10,}  {row['bytes'] / 1e6:9.1f}  "
            f"{row['milliseconds_per_sentence']:15.2f}  {row[metric]:.4f}")
    log(f"\nThe student is saved in {out / 'student'}, all numbers in {out / 'metrics.json'}.")
    for file in out.glob("*.pt") if first else ():
        file.unlink()
    return results


# ---- 10. Files and command line ----------------------------------------------------------------


@contextlib.contextmanager
def refuse(what, kind=ValueError):
    """Turns whatever goes wrong inside into one line: what can't be done, and why."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise kind(f"{what} ({why})") from error


def processes():
    """(rank, world): (0, 1) for one process."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


def from_rank_0(value=None):
    """The value of the first process, in all of them. It also waits until all are here."""
    values = [value]
    if processes()[1] > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def log(text):
    """Prints, in the first process."""
    if processes()[0] == 0:
        print(text, flush=True)


def progress(iterable, text):
    """A progress bar that disappears when it is done; none where stderr is not a terminal."""
    return tqdm(iterable, text, leave=False, disable=processes()[0] > 0 or None)


def save(path, write, everywhere=False):
    """Calls write(part); the file or folder that it makes appears at `path` whole, or not at all.

    The first process writes, or all of them do (`everywhere`). Raises OSError, and then what was
    at `path` is unchanged.
    """
    part, first = path.with_name(f"{path.name}.part"), processes()[0] == 0
    try:
        if first or everywhere:
            write(part)
        from_rank_0()
        if first:
            os.replace(part, path)
    except FloatingPointError:                     # from a model, not from the disk
        raise
    except Exception as error:
        if not path.is_dir():                      # a folder that another run finished is as good
            raise OSError(f"{path} could not be written ({error}); no change there") from error
    from_rank_0()


def save_json(path, content):
    """Writes a JSON file."""
    text = json.dumps(content, indent=2, allow_nan=False)
    save(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_model(folder, model, tokenizer):
    """Writes a folder that `transformers.pipeline` loads: weights (safetensors) and tokenizer."""
    save(folder, lambda part: [item.save_pretrained(part) for item in (model, tokenizer)])


def load_state(file, parts, data):
    """Puts the state in `file`, if it is there, into the parts; returns the history."""
    if not file.exists():
        return []
    with refuse(f"{file} can't be read: delete it to train from the start"):
        state = torch.load(file, map_location="cpu", weights_only=True)       # never runs code
    if state["data"] != fingerprint(data):
        raise ValueError(f"{file}: the training data are not those that this run began with")
    for name, part in parts.items():
        if state[name]:                            # the scaler's is empty, except in fp16
            part.load_state_dict(state[name])
    return state["history"]


def save_state(file, parts, data, history):
    """Writes what `load_state` reads."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"history": history, "data": fingerprint(data)}
    save(file, lambda part: torch.save(state, part))


def resumed(settings):
    """The settings of the run in `settings.resume`. Raises ValueError for others beside it."""
    given = {name: value for name, value in dataclasses.asdict(settings).items()
             if value != getattr(Settings(), name)}
    if given.keys() - {"resume", "device", "precision"}:
        raise ValueError("--resume takes no other flags than --device and --precision")
    with refuse(f"--resume {settings.resume}: no run can be resumed there"):
        text = (Path(settings.resume) / "metrics.json").read_text(encoding="utf-8")
        saved = json.loads(text)["settings"] | {"output_dir": settings.resume}
        if "device" in given:
            saved["precision"] = "auto"
        return Settings(**saved | given)


def main(argv=None):
    """The command line. Returns 0, 2 for what a user can mend (one line on stderr), or 130."""
    def fail(message):
        raise ValueError(f"{message}; --help lists all settings")

    parser = transformers.HfArgumentParser(
        Settings, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    try:
        settings, = parser.parse_args_into_dataclasses(argv)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:           # started by torchrun
            device, _ = resolve_device(settings.device, "auto")
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        settings = settings if settings.resume else settings.resolve()
        run(settings)
        return 0
    except KeyboardInterrupt:
        folder = str(settings.resume or settings.output_dir)
        hint = f"; go on with: python rail_kd.py --resume {shlex.quote(folder)}"
        print("stopped" + hint * Path(folder).exists(), file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"rail_kd.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")       # for terminals without an arrow for 1←3
    sys.exit(main())
