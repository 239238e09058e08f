"""RAIL-KD in one file: random intermediate layer mapping for knowledge distillation.

A small Transformer (the *student*) learns to imitate a large one (the *teacher*). It learns from three things at once:

    L  =  l1 * CE    the labels,
       +  l2 * KD    the teacher's output distribution, softened by a temperature,
       +  l3 * RAIL  the teacher's intermediate layers.

The third term needs to know which teacher layer teaches which student layer. RAIL-KD's answer is to *draw* the teacher
layers at random, anew in every epoch, and to sort them, so that deeper student layers learn from deeper teacher layers:

    teacher layer   1  2  3  4  5  6  7  8  9  10  11  12          this epoch's draw, written 1←2 2←7 3←9:
                       |              |     |          |
                       |  mean over the real tokens    |           both sides are pooled to one vector a sentence,
                       |  projection, unit length      |           projected to a shared width, scaled to length 1,
                       v              v     v          v           and compared by their squared distance
    student layer      1              2     3          4           (the last layers meet through the logits, in KD)

The teacher is frozen, so it will say the same about a sentence in every epoch. It is asked once, before the training, and
what it says (a row of logits and pooled layers for each example) is kept in a table on disk: the loop reads it from there.

Source: Haidar, Anchuri, Rezagholizadeh, Ghaddar, Langlais, Poupart, "RAIL-KD: RAndom Intermediate Layer Mapping for
Knowledge Distillation", Findings of NAACL 2022, arXiv 2109.10164. Where the sources leave a choice open, the comment says
"this reference's choice".

    python rail_kd.py --task toy                           # two minutes on a laptop, offline
    python rail_kd.py --task sst2 --student-layers 4       # BERT-base, 12 layers -> 4, on a GPU

The file is to be read from top to bottom, in the order of the method:

     1  settings                 5  the random map            9  the score
     2  tools (skip them)        6  the losses               10  the whole job
     3  data                     7  asking the teacher       11  the command line
     4  teacher and student      8  the loop

Letters in shapes:  B sentences in a batch,  L tokens in a sentence,  N training examples,  C classes (1 for a regression),
n teacher layers of width d_t, c of them candidates (n-1, or n with --include-last),  m student layers of width d_s,
k pairs of layers,  u the width of the projections.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.trainer_pt_utils import get_length_grouped_indices

# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings
# ---------------------------------------------------------------------------------------------------------------------

# GLUE's tasks: the columns that hold the text, and the metrics that the benchmark reports.
GLUE = {
    "cola": (["sentence"], ["matthews_correlation"]),
    "sst2": (["sentence"], ["accuracy"]),
    "mrpc": (["sentence1", "sentence2"], ["accuracy", "f1"]),
    "stsb": (["sentence1", "sentence2"], ["pearson", "spearmanr"]),
    "qqp": (["question1", "question2"], ["accuracy", "f1"]),
    "mnli": (["premise", "hypothesis"], ["accuracy"]),
    "qnli": (["question", "sentence"], ["accuracy"]),
    "rte": (["sentence1", "sentence2"], ["accuracy"]),
    "wnli": (["sentence1", "sentence2"], ["accuracy"]),
}

# Defaults that depend on the task: (real text with a pretrained teacher, the toy with a teacher trained from scratch). Ten
# and eight epochs: with one draw in each and 12 -> 4 layers, a given teacher layer then teaches with a probability of 96 and 92 %.
DEFAULTS = {
    "teacher": ("bert-base-uncased", None),
    "epochs": (10, 8),
    "teacher_epochs": (3, 5),
    "learning_rate": (5e-5, 5e-4),
    "warmup_ratio": (0.0, 0.1),
    "max_train_examples": (None, 1000),
}

# What numbers may be; `resolve` checks it.
AT_LEAST = {"student_layers": 1, "projection_size": 1, "epochs": 1, "teacher_epochs": 1, "batch_size": 1, "max_length": 4,
            "max_train_examples": 1, "seed": 0, "weight_decay": 0, "warmup_ratio": 0}
ABOVE = {"learning_rate": 0, "projection_learning_rate": 0, "temperature": 0}
BELOW = {"warmup_ratio": 1, "seed": 2 ** 63}


def option(default, text, choices=None, **more):
    """A field of `Settings`: its default, the sentence that `--help` shows, and the values it may have."""
    more |= {"help": text} | ({"choices": choices} if choices else {})
    if isinstance(default, list):  # each Settings its own list
        return dataclasses.field(default_factory=default.copy, metadata=more)
    return dataclasses.field(default=default, metadata=more)


@dataclasses.dataclass
class Settings:
    """Everything that a run depends on. `transformers.HfArgumentParser` makes a command-line flag of each field."""

    # What to learn.
    task: str | None = option(None, "'toy' (the default, made on the spot) or a GLUE task from the hub.", ["toy", *GLUE])
    train_file: str | None = option(None, "Own CSV or JSON lines instead: columns sentence (or sentence1), perhaps sentence2, label.")
    validation_file: str | None = option(None, "Own validation data with the same columns.")
    eval_file: list[str] = option([], "Further files to score teacher and student on, say of another domain.", action="extend")
    max_train_examples: int | None = option(None, "Use at most the first N training examples. Default: all; the toy makes 1000.")
    max_length: int = option(128, "Cut longer inputs to this many tokens.")
    # From whom, and who.
    teacher: str | None = option(None, "Hub name or folder. Default: bert-base-uncased; for the toy, 12 layers made on the spot.")
    teacher_epochs: int | None = option(None, "Epochs of fine-tuning for a teacher that has no trained classifier. Default: 3; toy 5.")
    student_layers: int | None = option(None, "Cut a student with this many layers from the teacher. Default: a third of its layers, at least 2.")
    student: str | None = option(None, "Instead: hub name or folder of a student of any width, architecture and tokenizer.")
    # How: the method.
    mapping: str = option("random", "Teacher layers: a sorted random draw (random: RAIL-KD), evenly spaced ones (skip), the last ones "
                          "(last), all of them weighted (attention), or none (CE and KD only); finetune: the labels alone, from the "
                          "same start.",
                          ["random", "skip", "last", "attention", "none", "finetune"])
    variant: str = option("layerwise", "Compare pair by pair (RAIL-KD^l) or concatenated (RAIL-KD^c).", ["layerwise", "concat"])
    resample: str = option("epoch", "Draw a new random map for each epoch or for each step.", ["epoch", "step"])
    include_last: bool = option(False, "Let the last layers of both sides take part in the map.")
    projection_size: int = option(128, "Width u to which the pooled layers of both sides are projected.")
    projection: list[str] = option([], "Changes to the projections, all off by default: a map for each pair of layers (separate), no "
                                   "bias (no-bias), a teacher's map that stays as drawn (frozen-teacher), the mean over the batch (in "
                                   "each process) taken off both sides before they get unit length (centred).",
                                   ["separate", "no-bias", "frozen-teacher", "centred"])
    projection_learning_rate: float | None = option(None, "Peak learning rate of the projections. Default: --learning-rate.")
    temperature: float = option(2.0, "Softens both output distributions in KD.")
    weights: list[float] = option([1 / 3] * 3, "The weights of CE, KD and RAIL; they must sum to 1. --mapping none rescales the first two, "
                                  "finetune has CE alone.")
    # How: the training.
    epochs: int | None = option(None, "Epochs of distillation. Default: 10; toy 8.")
    batch_size: int = option(32, "Examples in a step, over all processes together.")
    learning_rate: float | None = option(None, "Peak learning rate of AdamW, also for fine-tuning a teacher. Default: 5e-5; toy 5e-4.")
    warmup_ratio: float | None = option(None, "Share of the steps in which the rate rises; then it falls to 0. Default: 0; toy 0.1.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    teacher_table: str = option("on", "Ask the teacher once, before the training (on), or again in each step (off).", ["on", "off"])
    seed: int = option(0, "Everything random comes from this number.")
    # Where.
    device: str = option("auto", "Where to compute; auto: CUDA, else MPS, else the CPU.", ["auto", "cuda", "mps", "cpu"])
    precision: str = option("auto", "Of the forward pass; auto: on CUDA bf16, or fp16 where the chip has no bf16; else fp32.",
                            ["auto", "fp32", "bf16", "fp16"])
    compile: bool = option(False, "Run the student through torch.compile.")
    output_dir: str | None = option(None, "Folder for the results, new or empty. Default: a new one in runs/.")
    resume: str | None = option(None, "Folder of an interrupted run, to go on after its last finished epoch.")

    def resolve(self):
        """These settings with every default filled in and every value checked. Raises ValueError, one sentence."""
        new, own_files = dataclasses.replace(self), self.train_file or self.validation_file
        if own_files and new.task:
            raise ValueError(f"--task {new.task} and own files exclude each other: give one of them")
        if own_files and not (new.train_file and new.validation_file):
            raise ValueError("--train-file and --validation-file belong together: give both")
        new.task = new.task or (None if own_files else "toy")
        for name, values in DEFAULTS.items():
            if getattr(new, name) is None:
                setattr(new, name, values[new.task == "toy"])
        for field in dataclasses.fields(new):
            name, value, flag = field.name, getattr(new, field.name), f"--{field.name.replace('_', '-')}"
            if value is None:
                continue
            for one in value if isinstance(value, list) else [value]:
                if one not in field.metadata.get("choices", [one]):
                    raise ValueError(f"{flag} {one}: choose from {', '.join(field.metadata['choices'])}")
            # Written so that NaN, which fails every comparison, is refused too.
            if name in AT_LEAST and not AT_LEAST[name] <= value < math.inf:
                raise ValueError(f"{flag} {value}: must be a number of at least {AT_LEAST[name]}")
            if name in ABOVE and not ABOVE[name] < value < math.inf:
                raise ValueError(f"{flag} {value}: must be a number above {ABOVE[name]}")
            if name in BELOW and not value < BELOW[name]:
                raise ValueError(f"{flag} {value}: must be below {BELOW[name]}")
        if new.task == "toy" and new.max_train_examples > 100_000:  # its teacher needs 8 times as many, and no two are the same
            raise ValueError("--max-train-examples: the toy makes at most 100000 training examples")
        if new.student and new.student_layers:
            raise ValueError("--student and --student-layers exclude each other: a named student has its own layers")
        if new.mapping == "attention" and new.variant == "concat":
            raise ValueError("--mapping attention needs --variant layerwise: a concatenation has no pairs to weigh")
        if "separate" in new.projection and (new.mapping == "attention" or new.variant == "concat"):
            raise ValueError("--projection separate needs --variant layerwise and one teacher layer for each pair, which --mapping "
                             "attention does not have")
        objective_weights(new.mapping, new.weights)
        new.device, new.precision = resolve_device(new.device, new.precision)
        if not new.resume:  # a resumed run writes where it wrote before
            kind = [new.mapping, new.variant] if new.mapping == "random" else [new.mapping]
            name = "-".join([new.task or Path(new.train_file).stem, *kind, f"seed{new.seed}", time.strftime("%Y%m%d-%H%M%S")])
            folder = Path(new.output_dir or Path("runs") / name)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(f"--output-dir {folder} is in use: nothing is ever overwritten, so name a new folder")
            home = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
            if not home.is_dir() or not os.access(home, os.W_OK):
                raise ValueError(f"--output-dir {folder}: {home} is not a folder that can be written to")
            new.output_dir = str(folder)
        return new


def objective_weights(mapping, weights):
    """The weights of (CE, KD, RAIL) that a mapping leaves: `none` has no RAIL and `finetune` no teacher at all.

    Raises ValueError unless there are three weights >= 0 that sum to 1, with something left to learn from.
    """
    combined_loss(0.0, 0.0, 0.0, weights)  # what three weights must be is said there, in section 6
    if mapping == "finetune":
        return [1.0, 0.0, 0.0]
    if mapping == "none":
        if weights[0] + weights[1] == 0:
            raise ValueError("--mapping none leaves nothing to learn from: the weights of CE and KD are both 0")
        return [weights[0] / (weights[0] + weights[1]), weights[1] / (weights[0] + weights[1]), 0.0]
    return list(weights)


def resolve_device(device, precision):
    """("auto", "auto") -> for example ("cuda", "bf16"). Raises ValueError where the machine has no such thing."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, found in here.items() if found)
    if not here[device]:
        raise ValueError(f"--device {device}: this machine has none that torch can use; try --device auto")
    if precision == "auto":
        # A T4 computes in bf16 too when asked, by emulation and slowly. Only the chip's generation tells (8 = Ampere).
        precision = "fp32" if device != "cuda" else "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    if (precision == "fp16" and device != "cuda") or (precision == "bf16" and device == "mps"):
        raise ValueError(f"--precision {precision} is not offered on {device}; use fp32" + ", or bf16" * (device == "cpu"))
    return device, precision


# ---------------------------------------------------------------------------------------------------------------------
# 2. Tools
# ---------------------------------------------------------------------------------------------------------------------
# Printing, and writing files so that they appear whole or not at all. On a first reading, skip to section 3.

def quiet():
    """Switches off what the libraries say about things that a user can't change; their errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # The schedule counts a step that fp16 scaling had to skip; a handful of such steps at the start does no harm.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")


def processes():
    """(rank, world): (0, 1) for one process, and what torchrun says for several. A first reader can skip what uses it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def agree(value):
    """The value that process 0 has, for all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def say(text="", file=None):
    """Prints, in one process of all (also before they have joined)."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=file or sys.stdout)
        (file or sys.stdout).flush()


def progress(iterable, text, total):
    """A progress bar that disappears when it is done; none where the output is not a terminal."""
    return tqdm(iterable, text, total, leave=False, disable=True if processes()[0] else None, dynamic_ncols=True)


@contextlib.contextmanager
def whole(path, owner=""):
    """Yields a temporary path; the file or folder written there appears as `path` whole, or not at all.

    Every process enters, process 0 writes (or all of them share the work), and all leave when it is there. A folder that is
    there already stays: it was whole. A full disk or a crash leaves what was at `path` before. Raises OSError.
    """
    part, rank = path.with_name(f"{path.name}{owner}.part"), processes()[0]

    def remove():
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)

    try:
        if rank == 0:
            remove()  # what a killed process left
        yield part
        barrier()
        if rank == 0:
            for file in [part] if part.is_file() else part.rglob("*"):
                with open(file, "r+b") as written:
                    os.fsync(written.fileno())  # first all bytes reach the disk, then the name changes, in one step
            remove() if path.is_dir() else os.replace(part, path)
        barrier()
    except (OSError, SafetensorError) as error:
        remove()
        raise OSError(f"{path} could not be written ({first_line(error)}); what was there before is unchanged") from error
    except BaseException:
        remove()
        raise


def save_json(path, content):
    """Writes a JSON file whole or not at all."""
    with whole(path) as part:
        if processes()[0] == 0:
            part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def first_line(error):
    """An exception's first line of text, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def human_bytes(size):
    """1234567 -> '1.2 MB'."""
    power = min(int(math.log10(max(size, 1))) // 3, 4)
    return f"{size / 1000 ** power:.1f} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


# ---------------------------------------------------------------------------------------------------------------------
# 3. Data
# ---------------------------------------------------------------------------------------------------------------------
# Every source (the toy, GLUE, own files) ends as a `datasets.Dataset` with the columns sentence1, sometimes sentence2, and
# label. The label column knows its own type: a ClassLabel with the names of the classes, or a float for a regression. So
# nothing else about the task has to be carried around.
#
# The toy exists so that the method can be seen at work in two minutes without a network. It tells the story that distillation
# is for: somebody had 8,000 carefully labelled sentences and trained a large model on them. You have that model, 1,000 other
# sentences, and labels of which a fifth is wrong. What the model thinks of your sentences is worth more than your labels.

TOPICS = "acting plot music ending dialogue cast pacing script humour story".split()
ADJECTIVES = ["dull clumsy stale silly cold weak tedious messy".split(),         # label 0, negative
              "clever moving fresh funny warm sharp gripping charming".split()]  # label 1, positive
DEGREES = ["", "", "very", "quite", "rather"]
NEGATIONS = ["not", "never", "hardly"]
FORMS = ["the {main}.", "the {main}, although the {side}.", "although the {side}, the {main}.", "the {side}, but the {main}.",
         "the {side}, yet the {main}."]


def toy_sentences(seed, sizes):
    """Short reviews in which the words alone do not decide the label. Returns one Dataset for each number in `sizes`.

    Most sentences have two clauses, each with an adjective, often a degree or a negation: "Although the plot is very clever,
    the acting is hardly moving." The main clause decides (here: negative). Which one that is depends on the word order, and
    what it says on its negation, so counting words says little: a reader has to combine. All sentences differ, so none of the
    validation set can have been trained on. Some have one clause only: a stepping stone, without which a deep model that starts
    from random weights often finds nothing to hold on to.

    Args:
        seed: the sentences depend on it alone.
        sizes: how many sentences each Dataset shall have.
    Returns:
        List of Datasets with the columns sentence1 (text) and label (ClassLabel: negative, positive).
    """
    rng = np.random.default_rng([seed, 0x7071])
    found = {}  # sentence -> label; a dict keeps the order and drops repeats
    while len(found) < sum(sizes):
        clauses, labels = {}, {}
        for part, topic in zip(("main", "side"), rng.choice(TOPICS, 2, replace=False)):
            polarity, negated = rng.integers(2), rng.random() < 1 / 3
            words = [topic, "is", rng.choice(NEGATIONS) if negated else rng.choice(DEGREES), rng.choice(ADJECTIVES[polarity])]
            clauses[part], labels[part] = " ".join(filter(None, words)), int(polarity ^ negated)
        found.setdefault(rng.choice(FORMS).format(**clauses).capitalize(), labels["main"])
    features = datasets.Features(sentence1=datasets.Value("string"), label=datasets.ClassLabel(names=["negative", "positive"]))
    rows, parts = iter(found.items()), []
    for size in sizes:
        texts, labels = zip(*(next(rows) for _ in range(size)))
        parts.append(datasets.Dataset.from_dict({"sentence1": texts, "label": labels}, features=features))
    return parts


def read_file(path):
    """A CSV or JSON-lines file -> Dataset with the columns sentence1, perhaps sentence2, and label as the file has it.

    The columns are those that Hugging Face's own examples use. Further columns are ignored.

    Raises:
        ValueError: a file that is missing, empty, unreadable or not UTF-8, has not the right columns, or lacks a text or label.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    # keep_default_na=False: else a review that reads "NA" or "None" would become a missing value. chunksize=None: else the
    # type of a column is guessed from its first 10,000 rows.
    csv = Path(path).suffix.lower() == ".csv"
    kind, more = ("csv", {"keep_default_na": False, "chunksize": None}) if csv else ("json", {})
    try:
        data = datasets.load_dataset(kind, data_files=str(path), split="train", **more)
    except Exception as error:  # the reader's own complaint is the cause; around it the library says only that it failed
        raise ValueError(f"{path}: not a readable {'CSV' if csv else 'JSON lines'} file in UTF-8 with at least one row "
                         f"({first_line(error.__cause__ or error)})") from error
    if len(data) == 0:
        raise ValueError(f"{path}: has column names and not even one row")
    if "sentence" in data.column_names and "sentence1" not in data.column_names:
        data = data.rename_column("sentence", "sentence1")
    texts = [name for name in ("sentence1", "sentence2") if name in data.column_names]
    if "sentence1" not in texts or "label" not in data.column_names:
        raise ValueError(f"{path}: needs the columns sentence (or sentence1) and label, but has {', '.join(data.column_names)}")
    data = data.select_columns([*texts, "label"])
    for row, label in enumerate(data["label"], 1):
        if not isinstance(label, (str, int, float)) or label == "" or label != label:  # only NaN differs from itself
            raise ValueError(f"{path}: example {row} has no label")
    for name in texts:
        data = data.cast_column(name, datasets.Value("string"))
        if None in data[name]:
            raise ValueError(f"{path}: example {list(data[name]).index(None) + 1} has no {name}")
    return data


def set_labels(data, feature, source):
    """`data` with its label column turned into `feature` (a ClassLabel, or a float Value for a regression).

    Classes are found by their name; by their number too, where the names are not numbers themselves. So a file with the labels
    0 and 1 can be scored by a model that was trained on GLUE's "negative" and "positive".

    Raises:
        ValueError: a label that is unknown, or a name where numbers are needed. `source` is what the message calls the data.
    """
    labels = list(data["label"])
    if isinstance(feature, datasets.ClassLabel):
        names = [str(name) for name in feature.names]
        known = {} if names[0].lstrip("-").isdigit() else {str(number): number for number in range(len(names))}
        known |= {name: number for number, name in enumerate(names)}
        unknown = [label for label in labels if str(label) not in known]
        if unknown:
            raise ValueError(f"{source}: the label {unknown[0]!r} is unknown; the training data has {', '.join(names)}")
        labels = [known[str(label)] for label in labels]
    elif any(isinstance(label, str) for label in labels):
        raise ValueError(f"{source}: the labels must be numbers, as in the training data")
    return data.remove_columns("label").add_column("label", labels).cast_column("label", feature)


def match(data, train, source):
    """`data` with the label type of the training data; it must have the same text columns. Raises ValueError."""
    if data.column_names != train.column_names:
        raise ValueError(f"{source}: has the columns {', '.join(data.column_names)} and the training data {', '.join(train.column_names)}")
    return set_labels(data, train.features["label"], source)


def load_task(settings, for_teacher=False):
    """(training Dataset, {name: validation Dataset}): columns sentence1, perhaps sentence2, label; text not yet encoded.

    MNLI has two validation sets, "matched" and "mismatched"; elsewhere the one name is "". GLUE's test split is never
    touched: its labels are all -1, and a score on them is a number without a meaning. The toy has two training sets: the
    teacher's (`for_teacher`) and the student's. The latter has an eighth as many sentences, other ones, and one label in five
    is wrong.

    Args:
        settings: `Settings`; task, train_file, validation_file, max_train_examples and, for the toy, seed count.
        for_teacher: the toy only: the training set of the teacher instead.
    Raises:
        ValueError: the hub is out of reach, a file can't be used, labels are unknown or of one class only.
    """
    limit = settings.max_train_examples
    if settings.task == "toy" or not (settings.task or settings.train_file):
        size = limit or DEFAULTS["max_train_examples"][1]
        validation, train, teacher_train = toy_sentences(settings.seed, [1000, size, 8 * size])
        if for_teacher:
            return teacher_train, {"": validation}
        wrong = np.random.default_rng([settings.seed, 0xBAD]).permutation(size) < size // 5
        labels = (np.array(train["label"]) ^ wrong).tolist()
        feature = train.features["label"]
        return train.remove_columns("label").add_column("label", labels).cast_column("label", feature), {"": validation}
    if settings.task:
        try:
            splits = datasets.load_dataset("nyu-mll/glue", settings.task)
        except Exception as error:
            raise ValueError(f"the task {settings.task} could not be loaded from the hub, nyu-mll/glue ({first_line(error)}); "
                             "--task toy and own files (--train-file, --validation-file) work without it") from error
        names = dict(zip(GLUE[settings.task][0], ("sentence1", "sentence2")))
        splits = {split: data.select_columns([*names, "label"]).rename_columns({k: v for k, v in names.items() if k != v})
                  for split, data in splits.items() if not split.startswith("test")}
        train = splits.pop("train")
        validation = {split.removeprefix("validation").removeprefix("_"): data for split, data in splits.items()}
    else:
        train, source = read_file(settings.train_file), settings.train_file
        values = set(train["label"])
        if any(isinstance(value, float) for value in values):
            feature = datasets.Value("float32")
        elif len(values) == 1:
            raise ValueError(f"{source}: every example has the label {values.pop()!r}, so there is nothing to tell apart")
        else:  # numbers in the order of numbers, names in that of the alphabet
            feature = datasets.ClassLabel(names=[str(value) for value in sorted(values)])
        train = set_labels(train, feature, source)
        validation = {"": match(read_file(settings.validation_file), train, settings.validation_file)}
    return (train.select(range(min(limit, len(train)))) if limit else train), validation


def encode(data, tokenizer, model, max_length):
    """Dataset of text -> Dataset of token numbers (input_ids, attention_mask, ...) and label, not yet padded.

    A pair is encoded as a pair, so that the tokenizer puts its separator between the two. Columns that the model's forward
    does not know (a DistilBERT has no token_type_ids) are left out.

    Args:
        data: Dataset with sentence1, perhaps sentence2, and label.
        tokenizer, model: of the same side; the tokens are for this model.
        max_length: inputs are cut to this many tokens, or to fewer where the tokenizer's limit is lower.
    """
    limit = tokenizer.model_max_length
    if limit > 10 ** 6:  # the tokenizer does not know; RoBERTa and its kin need two of the model's positions for themselves
        limit = (getattr(model.config, "max_position_embeddings", None) or limit) - 2
    texts = [name for name in ("sentence1", "sentence2") if name in data.column_names]
    data = data.map(lambda rows: dict(tokenizer(*[rows[name] for name in texts], truncation=True, max_length=min(max_length, limit))),
                    batched=True, remove_columns=texts)
    known = inspect.signature(model.forward).parameters
    return data.select_columns([name for name in data.column_names if name in known or name == "label"])


def lengths_of(data):
    """The number of tokens of each row of an encoded Dataset."""
    return [len(tokens) for tokens in data["input_ids"]]


def length_batches(lengths, batch_size, generator=None):
    """Row numbers in batches of similar length: each row in exactly one batch, only the last batch may be smaller.

    Attention costs what the longest sentence of a batch costs; padding every batch to --max-length would waste four fifths
    of the work on sentences of 25 tokens. Without a generator, all rows by length: for passes in which the order is free.
    With one, the library's mix of randomness and length: it shuffles all rows, sorts them in groups of at most fifty batches
    and cuts them. A group comes longest first, so the batches are shuffled once more.

    Args:
        lengths: N numbers of tokens.
        batch_size: B.
        generator: torch.Generator, the only source of randomness; or None.
    Returns:
        List of lists of row numbers.
    """
    if generator is None:
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
    else:
        order = get_length_grouped_indices(lengths, batch_size, generator=generator)
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return batches if generator is None else [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _collate(data, pad, rows):  # a plain function, since a worker process may have to receive it by pickle
    return dict(pad(data[rows]))


def batches_on(device, data, tokenizer, row_batches):
    """Yields (rows, batch): row numbers and the padded batch on the device, {input_ids (B, L), ..., labels (B,)}.

    A batch is padded to its own longest sentence. On CUDA two workers pad the coming batches while the GPU computes, and
    the copy from pinned memory does not make the CPU wait.

    Args:
        device: where the tensors shall lie.
        data, tokenizer: encoded Dataset, and what pads it.
        row_batches: list of lists of row numbers, as `length_batches` makes them.
    """
    cuda = torch.device(device).type == "cuda"
    loader = torch.utils.data.DataLoader(row_batches, batch_size=None, num_workers=2 * cuda, pin_memory=cuda,
                                         collate_fn=functools.partial(_collate, data, DataCollatorWithPadding(tokenizer)))
    for rows, batch in zip(row_batches, loader):
        yield rows, {name: tensor.to(device, non_blocking=cuda) for name, tensor in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 4. Teacher and student
# ---------------------------------------------------------------------------------------------------------------------
# Any encoder with a classifier that transformers knows can teach. The student is cut from its teacher, or it is another model
# altogether: another width, architecture, even another tokenizer, since only one vector a sentence and layer is ever compared.
# Cut to 4 of its 12 layers, BERT-base goes from 109 million parameters to 53 million, of which 24 million are the embeddings.

def toy_teacher(seed, num_layers=12):
    """(model, tokenizer): an untrained 12-layer BERT of width 64 and a tokenizer of whole words for the toy's language.

    Deep post-norm Transformers that learn from scratch easily stay at chance. What helps here: no dropout, weights that start
    larger than BERT's usual 0.02 (which was made for a width of 768), and warm-up.
    """
    words = sorted(set(" ".join(TOPICS + ADJECTIVES[0] + ADJECTIVES[1] + DEGREES + NEGATIONS + ["the is but yet although"]).split()))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "."] + words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.normalizer = tokenizers.normalizers.Lowercase()
    raw.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=64, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=num_layers, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.05)
    return transformers.BertForSequenceClassification(config), tokenizer


def load_classifier(name, feature, role):
    """(model, tokenizer, trained) from a hub name or a folder; `trained` tells whether it came with a trained classifier.

    An encoder that was only pretrained has no classifier. transformers then makes a new one and says which weights it had to
    invent: those are the `missing_keys`.

    Args:
        name: what `from_pretrained` takes.
        feature: the type of the data's label column: it says how many outputs there are and what they are called.
        role: "teacher" or "student". A student may have been trained for other classes: it gets a new classifier.
    Raises:
        ValueError: nothing can be loaded, a trained teacher has another number of classes than the data, or the model is not an
            encoder with a padding token and an attention mask.
    """
    try:  # code from the hub is never run (without the False, a terminal is asked), and weights can't hold any: safetensors, or
          # read with weights_only, which is the library's default
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=False, num_labels=getattr(feature, "num_classes", 1), ignore_mismatched_sizes=True,
            output_loading_info=True)
    except Exception as error:
        raise ValueError(f"no {role} could be loaded from {name!r} ({first_line(error)}); give a folder that holds a model and "
                         "its tokenizer, or a hub name while the hub is in reach") from error
    if info["mismatched_keys"] and role == "teacher":
        raise ValueError(f"the teacher {name!r} was trained for another number of classes than the {model.config.num_labels} outputs "
                         "that the data needs")
    masked = "attention_mask" in inspect.signature(model.forward).parameters  # an FNet, say, mixes the padding in
    if model.config.is_encoder_decoder or tokenizer.pad_token is None or not masked:
        raise ValueError(f"the {role} {name!r} is no encoder with a padding token and an attention mask; take one of the kind of BERT")
    use_labels_of(model, feature)
    # .float(): a checkpoint may be stored in half precision, but these are the weights that the optimizer updates.
    return model.float(), tokenizer, not info["missing_keys"] and not info["mismatched_keys"]


def use_labels_of(model, feature):
    """Gives a model (in place) the data's label names, and its logits the data's order.

    MNLI checkpoints on the hub number the classes differently from GLUE, each in its own way. Distilling from such a teacher
    teaches the student the wrong classes, without any error. Where the model's own names are the data's in another order,
    the rows of its last linear layer are put in the data's order. Names like LABEL_0 tell nothing and are replaced; if another
    order makes such a teacher no better than chance, `warn_of_weak_teacher` says so aloud.
    """
    if not isinstance(feature, datasets.ClassLabel):
        model.config.problem_type = "regression"
        return
    own = [str(model.config.id2label[i]).lower() for i in range(model.config.num_labels)]
    wanted = [name.lower() for name in feature.names]
    if own != wanted and sorted(own) == sorted(wanted):
        order = [own.index(name) for name in wanted]
        head = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == len(own)][-1]
        for parameter in head.parameters():  # weight (C, d) and bias (C,)
            parameter.data = parameter.data[order]
    model.config.problem_type = "single_label_classification"  # whatever it was before: a pipeline then shows probabilities
    model.config.id2label = dict(enumerate(feature.names))
    model.config.label2id = {label: i for i, label in enumerate(feature.names)}


def build_student(teacher, num_layers):
    """A student cut from its teacher: the same configuration with `num_layers` layers, weights copied, nothing shared.

    Embeddings and classifier are copied as they are, student layer i from the evenly spaced teacher layer round(i * n / m):
    the layer that will also teach it, on average (see `sample_layer_map`). So each student layer starts where it shall stay,
    and the last one feeds the classifier as the teacher's last one does. Which layers to copy is this reference's choice.

    Args:
        teacher: a transformers model for sequence classification with n layers in one nn.ModuleList.
        num_layers: m, from 1 to n.
    Returns:
        A model of the same class, in train mode, with gradients, on the CPU.
    Raises:
        ValueError: more layers than the teacher has, or an architecture whose layers can't be told apart or differ by design
            (ALBERT's twelve layers are one layer used twelve times).
    """
    n, kind = teacher.config.num_hidden_layers, type(teacher)
    if not 1 <= num_layers <= n:
        raise ValueError(f"a student of {num_layers} layers can't be cut from a teacher of {n}: choose 1 to {n}")
    stack = next((name for name, part in teacher.named_modules() if isinstance(part, nn.ModuleList) and len(part) == n), None)
    if stack is None:
        raise ValueError(f"can't tell the layers of a {kind.__name__} apart; name a --student instead")
    kept = [round(i * n / num_layers) - 1 for i in range(1, num_layers + 1)]  # layers count from 1, positions in a ModuleList from 0
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):  # where layers differ by design, each keeps its design
        config.layer_types = [config.layer_types[i] for i in kept]
    copied = {}
    for key, tensor in teacher.state_dict().items():
        if not key.startswith(f"{stack}."):
            copied[key] = tensor                                        # for example bert.embeddings.word_embeddings.weight
            continue
        old, rest = key.removeprefix(f"{stack}.").split(".", 1)         # for example "5", "attention.self.query.weight"
        if int(old) in kept:
            copied[f"{stack}.{kept.index(int(old))}.{rest}"] = tensor
    student = kind(config)
    try:
        student.load_state_dict(copied)  # strict: a weight that is left over or missing is an error
    except RuntimeError as error:
        raise ValueError(f"the layers of a {kind.__name__} differ too much to cut a student; name a --student instead") from error
    return student.train()


def freeze(teacher):
    """The teacher in eval mode and without gradients. Left in train mode, its dropout would make every target noisy."""
    return teacher.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The random map
# ---------------------------------------------------------------------------------------------------------------------
# Three facts about the draw, which the tests and the notebook check:
#
#   On average it is the evenly spaced map. The i-th smallest of k uniform draws from 1..n-1 has the mean i * n / (k+1) = i * n / m:
#   for 12 -> 4 the layers 3, 6, 9. That is the map that PKD (Sun et al. 2019) calls "skip"; RAIL-KD is skip with noise around it.
#
#   All layers teach. A candidate is left out of one epoch with the probability 1 - k/(n-1), of E epochs with that to the power E:
#   for 12 -> 4, 72.7 % after one epoch, 20.3 % after 5, 4.1 % after 10. A fixed map leaves the same 8 of 11 out for ever.
#
#   It costs nothing. However many layers the teacher has, a step pays for k pairs.

def sample_layer_map(num_teacher_layers, num_student_layers, rng, include_last=False):
    """RAIL-KD's draw: the teacher layers that teach student layers 1, 2, ..., k in this epoch.

    k distinct layers are drawn uniformly from the candidates, without replacement, and sorted ascending, so that deeper
    student layers learn from deeper teacher layers. The candidates are the intermediate layers 1..n-1 of the teacher, for the
    student's 1..m-1: the last layers already meet through the logits. Layers count from 1, as the positions of `hidden_states`
    do, where position 0 holds the output of the embeddings.

    Args:
        num_teacher_layers: n.
        num_student_layers: m.
        rng: a np.random.Generator, the only source of randomness (a global one would let the order of the data change the map).
        include_last: candidates 1..n and student layers 1..m instead.
    Returns:
        Ascending int array (k,), k = m-1, or m with `include_last`.
    Raises:
        ValueError: more student than teacher layers, or a student without a layer to teach (m = 1 has no intermediate one).
    """
    ### BEGIN SOLUTION
    num_candidates = num_teacher_layers if include_last else num_teacher_layers - 1
    num_pairs = num_student_layers if include_last else num_student_layers - 1
    if num_pairs < 1:
        raise ValueError(f"a student of {num_student_layers} layers has no intermediate layer to teach: it needs at least 2, "
                         "or the last layers in the map (--include-last)")
    if num_student_layers > num_teacher_layers:
        raise ValueError(f"a student of {num_student_layers} layers can't learn from a teacher of {num_teacher_layers}: it must "
                         "not have more layers than the teacher")
    return np.sort(rng.choice(num_candidates, size=num_pairs, replace=False) + 1)
    ### END SOLUTION


def choose_layers(settings, num_teacher_layers, num_student_layers, epoch, step=0):
    """The teacher layers for one step, as `--mapping` says: int array (k,), or all candidates (c,) for attention, or None.

    Only the map changes between the methods; pooling, projection and loss stay, so that a comparison isolates the map. `skip`
    and `last` are the maps of PKD (Sun et al. 2019), `attention` is that of ALP-KD (Passban et al. 2021), not their full recipes.

    The random map depends on (seed, epoch) alone, and on the step with `--resample step`. A generator that was drawn from all
    along would make the map depend on how many draws came before: a resumed run would continue with other layers.

    Args:
        settings: `Settings`; mapping, resample, include_last and seed count.
        num_teacher_layers, num_student_layers: n and m.
        epoch, step: counted from 1 and from 0.
    Raises:
        ValueError: as `sample_layer_map`, also for the fixed maps.
    """
    n, m, last = num_teacher_layers, num_student_layers, settings.include_last
    if settings.mapping in ("none", "finetune"):
        return None
    rng = np.random.default_rng([settings.seed, epoch] + [step] * (settings.resample == "step"))
    drawn = sample_layer_map(n, m, rng, last)
    candidates = np.arange(1, n + 1 if last else n)
    evenly = np.array([round(i * n / m) for i in range(1, len(drawn) + 1)])
    return {"random": drawn, "skip": evenly, "last": candidates[-len(drawn):], "attention": candidates}[settings.mapping]


# ---------------------------------------------------------------------------------------------------------------------
# 6. The losses
# ---------------------------------------------------------------------------------------------------------------------
# Shapes on the way from two models to one number, for layer-wise RAIL-KD:
#
#   student:  k layers (B, L, d_s)  -- mean over real tokens -->  (B, k, d_s)  -- student_proj -->  (B, k, u)  -- / norm -->  s
#   teacher:  k layers (B, L, d_t)  -- mean over real tokens -->  (B, k, d_t)  -- teacher_proj -->  (B, k, u)  -- / norm -->  t
#
#   RAIL = mean over the batch of  sum_i a_i * || s_i - t_i ||^2,  with a_i = 1/k
#
# Between unit vectors || s - t ||^2 = 2 - 2 cos(s, t), so the loss lies between 0 (same direction) and 4 (opposite), and 2 means
# unrelated. A low value is no proof of learning: both maps are trained, so the loss also falls when both send every sentence in
# the same direction. If different sentences have a mean cosine of c after the teacher's map (`projected_cosine`), a student that
# gives the same vector for all of them comes down to 2 - 2 sqrt(c). A value above that is no sign of any learning about sentences.
#
# The bodies of the method's five core functions (these, and `sample_layer_map` above) stand between markers, so that a course can
# blank them out; see the README. Each can be lifted into another file as it stands (`RailLoss` with `PairwiseLinear`).

def mean_pool(hidden_states, attention_mask):
    """One vector a sentence: the mean of a layer's output over the real tokens.

    Padding must stay out, whatever it holds, NaN and infinity included. It would pull short sentences towards whatever the model
    computes at padded positions, and the loss of a sentence would depend on how long its neighbours in the batch are. Both
    public re-implementations average it in.

    Args:
        hidden_states: (B, L, d), any float type.
        attention_mask: (B, L) of any type, 1 for a real token and 0 for padding.
    Returns:
        (B, d) in float32; zeros for a row without any real token.
    Raises:
        ValueError: shapes that do not belong together.
    """
    ### BEGIN SOLUTION
    if hidden_states.dim() != 3 or hidden_states.shape[:2] != attention_mask.shape:
        raise ValueError(f"hidden states {tuple(hidden_states.shape)} and mask {tuple(attention_mask.shape)} do not belong "
                         "together: they must be (B, L, d) and (B, L)")
    mask = attention_mask.bool().unsqueeze(-1)                         # (B, L, 1)
    total = hidden_states.float().masked_fill(~mask, 0.0).sum(dim=1)   # (B, d)
    return total / mask.sum(dim=1).clamp(min=1)                        # (B, d) / (B, 1)
    ### END SOLUTION


def pool_layers(hidden_states, attention_mask, layers):
    """The pooled outputs of some layers: n+1 tensors (B, L, d) and a mask (B, L) -> (B, k, d).

    hidden_states[0] is the output of the embeddings and hidden_states[j] that of layer j: no "- 1" here.
    """
    return torch.stack([mean_pool(hidden_states[j], attention_mask) for j in layers], dim=1)


class PairwiseLinear(nn.ModuleList):
    """A linear map for each pair of layers, instead of one for all pairs: (B, k, d) -> (B, k, u)."""

    def forward(self, pooled):
        return torch.stack([linear(pooled[:, i]) for i, linear in enumerate(self)], dim=1)


class RailLoss(nn.Module):
    """The intermediate-layer loss: project, normalise, compare. Layer-wise (RAIL-KD^l) or concatenated (RAIL-KD^c).

    Layer-wise, one linear map per side serves every pair of layers. Concatenated, the k pooled vectors of a side become one
    of width k * d first. The variant "attention" is layer-wise with all teacher candidates for every student layer, weighted
    as in ALP-KD (Passban et al. 2021). Both maps are trained with the student and thrown away afterwards.

    Args:
        teacher_dim, student_dim: d_t and d_s.
        num_pairs: k, the number of student layers that are taught.
        variant: "layerwise", "concat" or "attention".
        projection_size: u.
        projection: changes for ablations, any of "separate" (a map for each pair of layers), "no-bias", "frozen-teacher" (the
            teacher's map stays as it was drawn) and "centred" (each side loses its mean over the batch before it gets unit length;
            a batch of one sentence then has nothing left to compare).
    Raises:
        ValueError: an unknown variant or change, a size below 1, or separate maps without pairs.
    """

    def __init__(self, teacher_dim, student_dim, num_pairs, variant="layerwise", projection_size=128, projection=()):
        super().__init__()
        if variant not in ("layerwise", "concat", "attention"):
            raise ValueError(f"unknown variant {variant!r}: choose layerwise, concat or attention")
        if not set(projection) <= {"separate", "no-bias", "frozen-teacher", "centred"}:
            raise ValueError(f"projection {' '.join(projection)}: choose from separate, no-bias, frozen-teacher and centred")
        if "separate" in projection and variant != "layerwise":
            raise ValueError(f"separate projections need one teacher layer for each pair, which the variant {variant} has not")
        if min(teacher_dim, student_dim, num_pairs, projection_size) < 1:
            raise ValueError("widths, the number of pairs and the projection size must be at least 1")
        self.num_pairs, self.variant, self.centred = num_pairs, variant, "centred" in projection

        def linear(width):
            joined, bias = num_pairs if variant == "concat" else 1, "no-bias" not in projection
            maps = [nn.Linear(joined * width, projection_size, bias) for _ in range(num_pairs if "separate" in projection else 1)]
            return PairwiseLinear(maps) if "separate" in projection else maps[0]

        # Attributes, not items of a Python list: a module in a plain list is never moved to the GPU, trained or saved.
        self.teacher_proj, self.student_proj = linear(teacher_dim), linear(student_dim)
        self.teacher_proj.requires_grad_("frozen-teacher" not in projection)

    def project(self, linear, pooled):
        """One side's vectors before they get unit length: (B, k, d) -> (B, k, u); concatenated, end to end first, (B, u)."""
        vectors = linear(pooled.flatten(1) if self.variant == "concat" else pooled)   # concat: (B, k * d) -> (B, u)
        return vectors - vectors.mean(dim=0) if self.centred else vectors

    @torch.no_grad()
    def projected_cosine(self, teacher_pooled):
        """How far the teacher's map sends all sentences in one direction: the mean cosine of different sentences, a scalar.

        `teacher_pooled` is that of `forward`: (B, k, d_t), or (B, c, d_t) with attention. At 1 the loss has found its trivial
        answer: it can fall to 0 and has nothing to teach. Only sentences of this batch are compared; centred vectors come out
        slightly below 0, at -1 / (B-1) if all have one length. With B = 1 there are no different sentences, and it is 0.
        """
        t = F.normalize(self.project(self.teacher_proj, teacher_pooled), dim=-1)      # (B, k, u), concat (B, u)
        pairs = len(t) * (len(t) - 1)                                                 # || sum of t ||^2 = B + what the pairs add
        return ((t.sum(dim=0).pow(2).sum(dim=-1) - len(t)) / max(pairs, 1)).mean()

    def forward(self, student_pooled, teacher_pooled):
        """Mean over the batch of the squared distances between unit vectors, averaged over the pairs: a number in [0, 4].

        Both sides are projected (`self.project` with `self.student_proj` or `self.teacher_proj`) and divided by their L2 norm.
        Layer-wise, pair i compares row i of both sides, and the k squared distances are averaged (a_i = 1/k). Concatenated, each
        side is one vector of width u, and there is one distance. With attention, the projected teacher vector of pair i is the
        sum of all projected candidates, weighted by the softmax (over the candidates) of their dot products with the
        projected student vector i: plain dot products, and both sides are normalised only after that.

        Args:
            student_pooled: (B, k, d_s), pooled layer outputs of the student.
            teacher_pooled: (B, k, d_t), those of the mapped teacher layers; (B, c, d_t), all candidates, with attention.
        Returns:
            Scalar.
        Raises:
            ValueError: another number of pairs than k on a side (on the student's side only, with attention), or batches of
                different size.
        """
        ### BEGIN SOLUTION
        pairs = (student_pooled.shape[1], self.num_pairs if self.variant == "attention" else teacher_pooled.shape[1])
        if pairs != (self.num_pairs, self.num_pairs) or len(student_pooled) != len(teacher_pooled):
            raise ValueError(f"student {tuple(student_pooled.shape)} and teacher {tuple(teacher_pooled.shape)} do not make "
                             f"{self.num_pairs} pairs for each sentence")
        s = self.project(self.student_proj, student_pooled)                                        # (B, k, u), concat (B, u)
        t = self.project(self.teacher_proj, teacher_pooled)                                        # the same; attention (B, c, u)
        if self.variant == "attention":
            t = torch.softmax(s @ t.transpose(1, 2), dim=-1) @ t                                   # (B, k, c) @ (B, c, u)
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)                                      # all of length 1
        return (s - t).pow(2).sum(dim=-1).mean()                                                   # over sentences and pairs
        ### END SOLUTION


def kd_loss(student_logits, teacher_logits, temperature):
    """Distillation through the outputs: T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), mean over the batch (Hinton 2015).

    A higher temperature shows more of what the teacher thinks of the wrong classes. The gradient of the softened KL shrinks as
    1/T^2; the factor T^2 keeps the weight of the term the same for every T. (B, 1) is a regression: the mean squared error.

    Args:
        student_logits, teacher_logits: (B, C).
        temperature: T > 0; without meaning for a regression.
    Returns:
        Scalar.
    Raises:
        ValueError: shapes that differ, or a temperature that is not a positive finite number, also for a regression.
    """
    ### BEGIN SOLUTION
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must "
                         "have the same shape (B, C)")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature}: must be a positive number")
    if student_logits.shape[1] == 1:
        return F.mse_loss(student_logits, teacher_logits)
    # F.kl_div(a, b) is KL(b || a): the student comes first, both as *log*-probabilities. "batchmean" divides by B; the
    # default "mean" divides by B * C, and the weight of the term would depend on the number of classes.
    student_log_probs = F.log_softmax(student_logits / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature ** 2 * F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    ### END SOLUTION


def combined_loss(ce, kd, rail, weights):
    """The objective L = l1 * CE + l2 * KD + l3 * RAIL, equation (4) of the paper.

    Args:
        ce, kd, rail: scalars, tensors or plain numbers.
        weights: (l1, l2, l3), each >= 0, together 1.
    Returns:
        Scalar.
    Raises:
        ValueError: not three weights, a negative one, NaN, or a sum other than 1 (by more than 1e-6).
    """
    ### BEGIN SOLUTION
    if len(weights) != 3 or not all(weight >= 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights {' '.join(map(str, weights))}: must be three numbers >= 0, for CE, KD and RAIL, that sum to 1")
    return weights[0] * ce + weights[1] * kd + weights[2] * rail
    ### END SOLUTION


def label_loss(logits, labels):
    """CE: cross-entropy of (B, C) against class numbers (B,); for (B, 1), a regression, the mean squared error."""
    return F.mse_loss(logits.squeeze(1), labels) if logits.shape[1] == 1 else F.cross_entropy(logits, labels)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Asking the teacher
# ---------------------------------------------------------------------------------------------------------------------
# All that RAIL-KD ever wants of the teacher is its logits and its pooled layer outputs, and a frozen teacher answers the same in
# every epoch. So it is asked once. Its answers are two arrays on disk, and a step reads the few rows and layers that it needs:
#
#   logits.npy  (N, C)           float32
#   pooled.npy  (N, c, d_t)      float16, layer j in column j-1
#
# What that saves: a training step costs about three forward passes of the student (one forward, two for the backward pass), and
# the live teacher, n/m times as deep, adds n/m passes to it in every step of every epoch. With the table it adds them once. Other
# mappings, variants, seeds and students find the table again, and it does not matter what tokenizer the student has.
#
# `ask(rows, layers)` is the interface: row numbers of the training data in, logits (B, C) and pooled layers (B, k, d_t) out. There
# are two that the loop can't tell apart: `table_teacher` and `live_teacher`.

def autocast(device, precision):
    """The context for a forward pass in bf16 or fp16; it changes nothing in fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.float16 if precision == "fp16" else torch.bfloat16)


def inputs_of(batch):
    """What the model's forward gets of a batch: all but the labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()  # not inference_mode: the projection's backward pass must be able to keep these tensors
def teacher_answers(teacher, batch, layers, precision="fp32"):
    """What the teacher says about a batch: logits (B, C) and the pooled outputs (B, k, d_t) of some layers, both in float32.

    Args:
        teacher: a frozen model, see `freeze`.
        batch: {input_ids (B, L), attention_mask (B, L), ...}; labels are not looked at.
        layers: layer numbers, counted from 1, or None: then no hidden states are kept, and None comes back for them.
        precision: "fp32", "bf16" or "fp16", of the forward pass.
    """
    with autocast(teacher.device, precision):
        output = teacher(**inputs_of(batch), output_hidden_states=layers is not None)
    return output.logits.float(), (None if layers is None else
                                   pool_layers(output.hidden_states, batch["attention_mask"], layers))


def live_teacher(teacher, data, tokenizer, precision):
    """ask(rows, layers) -> (logits (B, C), pooled (B, k, d_t)), computed by the teacher each time."""
    pad = DataCollatorWithPadding(tokenizer)

    def ask(rows, layers):
        batch = {name: tensor.to(teacher.device) for name, tensor in pad(data[rows]).items()}
        return teacher_answers(teacher, batch, layers, precision)
    return ask


def table_teacher(folder, device):
    """ask(rows, layers) -> (logits (B, C), pooled (B, k, d_t)), looked up in a teacher table.

    The files are mapped anew for each look-up, which takes a fraction of a millisecond. With a map that stayed open, all pages
    that were ever touched would count as this process's memory: in the end, the whole table.

    Args:
        folder: of logits.npy (N, C) and pooled.npy (N, c, d_t).
        device: the torch.device on which the answers shall lie.
    """
    def move(array):
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        return tensor.to(device, non_blocking=device.type == "cuda").float()

    def ask(rows, layers):
        rows = np.asarray(rows)
        logits = move(np.load(folder / "logits.npy", mmap_mode="r")[rows])
        if layers is None:
            return logits, None
        # Column 0 holds layer 1: the embeddings (hidden_states[0]) are no candidate and not in the table.
        return logits, move(np.load(folder / "pooled.npy", mmap_mode="r")[rows[:, None], np.asarray(layers) - 1])
    return ask


def fingerprint(teacher, data, *more):
    """16 hex digits that change with the teacher's weights and with what it is shown: its tokenizer, the data, their length.

    The token numbers stand for those three. The labels do not count, since the teacher does not see them: a copy of the data
    with other labels shares the table. `more` is whatever else makes the answers different.
    """
    digest = hashlib.sha256(repr((type(teacher).__name__, getattr(teacher.config, "num_attention_heads", None), more)).encode())
    for name, tensor in teacher.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    for rows in data.remove_columns("label").iter(batch_size=1000):
        digest.update(json.dumps(rows, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def find_or_write_table(teacher, data, tokenizer, settings, home):
    """The folder of the teacher table: logits.npy (N, C) and pooled.npy (N, c, d_t).

    It lies in `home`. A table that an earlier run made of the same teacher and data, there or in the folder of a run beside
    this one, is used as it is: a folder with the final name is always whole, see `whole`. Otherwise the teacher is asked, once
    about each example. Several processes share that work. Memory does not grow with the table: a batch of rows is written and
    forgotten, so MNLI with a 24-layer teacher of width 1024, a table of 18 GB, is made on a machine of 16 GB.

    Args:
        teacher, data, tokenizer: the frozen model, the encoded training data (N examples), and what pads it.
        settings: resolved `Settings`; include_last, precision, teacher and output_dir count.
        home: the folder in which a new table shall lie: that of the teacher, or the run's.
    Raises:
        ValueError: too little disk, before the pass starts, or a teacher that answers NaN or infinity.
    """
    n, run_folder, (rank, world) = teacher.config.num_hidden_layers, Path(settings.output_dir), processes()
    layers = np.arange(1, n + 1 if settings.include_last else n)
    name = f"table-{fingerprint(teacher, data, len(layers), settings.precision)}"
    runs = run_folder.absolute().parent  # the folders of all runs: each may hold a table, or a teacher with one
    places = [home / name, Path(settings.teacher or "") / name, *runs.glob(f"*/{name}"), *runs.glob(f"*/teacher/{name}")]
    found = agree(next((folder for folder in places if folder.is_dir()), None))
    if found:
        say(f"teacher table: found {found}, so the teacher is not asked again")
        return found
    batches = length_batches(lengths_of(data), 64)
    (_, batch), = batches_on(teacher.device, data, tokenizer, batches[:1])  # one batch tells C and d_t
    logits, pooled = teacher_answers(teacher, batch, layers, settings.precision)           # (64, C), (64, c, d_t)
    shapes = {"logits": (len(data), *logits.shape[1:]), "pooled": (len(data), *pooled.shape[1:])}
    owner = hashlib.sha256(str(run_folder.absolute()).encode()).hexdigest()[:8]  # runs side by side may share `home`
    with whole(home / name, f".{owner}") as part:
        # Half precision is enough for vectors that will be normalised, unless a layer's output does not fit its range.
        for half in (np.float16, np.float32):
            kinds = {"logits": np.dtype(np.float32), "pooled": np.dtype(half)}
            if rank == 0:
                size, free = sum(math.prod(shapes[key]) * kinds[key].itemsize for key in shapes), shutil.disk_usage(home).free
                say(f"teacher table: {len(data):,} examples x {len(layers)} layers x {pooled.shape[2]} -> {human_bytes(size)} "
                    f"in {home / name}")
                if size > free:
                    raise ValueError(f"the teacher table needs {human_bytes(size)} and {home} has {human_bytes(free)} free; make "
                                     "room, or ask the teacher in each step with --teacher-table off")
                part.mkdir(exist_ok=True)
                for key in shapes:
                    np.lib.format.open_memmap(part / f"{key}.npy", "w+", kinds[key], shapes[key])
                    if hasattr(os, "posix_fallocate"):  # a disk that fills up says so here, and not by a crash in the middle
                        with open(part / f"{key}.npy", "r+b") as file:
                            os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
            barrier()
            largest, share = torch.zeros((), device=teacher.device), batches[rank::world]
            for rows, batch in progress(batches_on(teacher.device, data, tokenizer, share), "asking the teacher", len(share)):
                logits, pooled = teacher_answers(teacher, batch, layers, settings.precision)
                largest = torch.maximum(largest, pooled.abs().max()) + 0 * logits.sum()  # NaN and infinity of both stay in it
                for key, values in (("logits", logits), ("pooled", pooled)):
                    with np.errstate(over="ignore"):
                        np.load(part / f"{key}.npy", mmap_mode="r+")[rows] = values.cpu().numpy().astype(kinds[key])
            largest = largest.nan_to_num(nan=math.inf)  # a maximum over processes might lose a NaN
            if world > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            if not torch.isfinite(largest):
                raise ValueError("the teacher's answers contain NaN or infinity: its weights are broken, or its numbers are too large "
                                 "for --precision fp16 (then fp32 helps)")
            if largest <= np.finfo(half).max:
                break
    return home / name


# ---------------------------------------------------------------------------------------------------------------------
# 8. The loop
# ---------------------------------------------------------------------------------------------------------------------
# A step, in the order in which it happens: a batch of similar lengths; the student's forward pass; CE against the labels; the
# teacher's answers for these rows; KD against its logits; RAIL against the layers that this epoch's map names; the weighted sum;
# backward; AdamW on the student and the two projections. The rest of `train` is about speed, resuming and several processes, and
# says so where it stands.

def train(model, data, tokenizer, settings, validate, state_file, ask=None, rail=None,
          num_teacher_layers=None, report=lambda history: None):
    """Trains `model` in place and returns the history: a list with one dict for each epoch.

    One loop for everything. With `ask` it distils; without it, it learns from the labels alone, which is the baseline
    `finetune` and also how a teacher is fine-tuned. All that is random in an epoch (map, order, dropout) is seeded by
    (seed, epoch), and the state is written at the end of each epoch. So a run that was killed and is resumed ends where it
    would have ended: on a CPU bit for bit.

    Args:
        model: the student, on its device.
        data, tokenizer: encoded training data (N examples), and what pads it.
        settings: resolved `Settings`; all count that are about the method or the training.
        validate: a function of no arguments that returns the validation metrics of `model`.
        state_file: where the state is kept. If it is there already, the training goes on from it.
        ask: ask(rows, layers) -> teacher logits (B, C) and pooled layers (B, k, d_t), see section 7; or None.
        rail: a `RailLoss` on the same device, or None where the mapping has no intermediate loss.
        num_teacher_layers: n, needed with `ask`.
        report: a function that gets the history after each epoch.
    Raises:
        FloatingPointError: a loss became NaN or infinite. The state of the epochs before is kept.
    """
    (rank, world), device, m = processes(), model.device, model.config.num_hidden_layers
    student_layers = range(1, m + 1 if settings.include_last else m)
    weights = objective_weights(settings.mapping, settings.weights)
    lengths, num_steps = lengths_of(data), math.ceil(len(data) / settings.batch_size)

    # What is trained, and everything that changes while it is. The projections of RailLoss are trained with the student, at the
    # same learning rate unless --projection-learning-rate gives them their own. `fused` updates all weights in one kernel: for 17
    # million of them on two CPU cores that takes 12 ms, and a loop over the tensors 81 ms. In fp16 small gradients would
    # underflow to zero, so the scaler multiplies the loss before backward and divides the gradients after it.
    trained = nn.ModuleList([model] if rail is None else [model, rail])
    rates = [settings.learning_rate, settings.projection_learning_rate or settings.learning_rate]
    optimizer = torch.optim.AdamW([{"params": list(part.parameters()), "lr": rate} for part, rate in zip(trained, rates)],
                                  weight_decay=settings.weight_decay, fused=device.type in ("cpu", "cuda"))
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, round(settings.warmup_ratio * num_steps * settings.epochs), num_steps * settings.epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    parts, history = {"trained": trained, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}, []
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)  # never runs code that a file brings along
        history = state["history"]
        for name, item in parts.items():
            item.load_state_dict(state[name])
        report(history)

    # The same two modules, perhaps with gradients averaged over processes, perhaps compiled. Validation uses the bare model.
    forward, rail_forward = model, rail
    if world > 1:
        devices = [device.index] if device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(model, devices)
        rail_forward = rail and nn.parallel.DistributedDataParallel(rail, devices)
    if settings.compile:
        forward = torch.compile(forward, dynamic=True)

    for epoch in range(len(history) + 1, settings.epochs + 1):
        start = time.perf_counter()
        seed = int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0])
        torch.manual_seed(seed + rank)  # for dropout: each process its own
        batches = length_batches(lengths, settings.batch_size, torch.Generator().manual_seed(seed))
        mine, share = zip(*(share_of(rows, rank, world) for rows in batches))  # all rows, and 1.0, for one process
        # The losses of each step stay on the device. Reading a number makes the CPU wait for the GPU, in every step.
        losses = torch.zeros(num_steps, 5, device=device)  # columns: CE, KD, RAIL, their weighted sum, the projected cosine
        model.train()
        for step, (rows, batch) in enumerate(progress(batches_on(device, data, tokenizer, mine), f"epoch {epoch}", num_steps)):
            with autocast(device, settings.precision):
                output = forward(**inputs_of(batch), output_hidden_states=rail is not None)
            logits = output.logits.float()                                           # (B, C); the losses are computed in fp32
            ce = label_loss(logits, batch["labels"])
            kd = rail_loss = cosine = torch.zeros((), device=device)                 # what a mapping does not have counts 0
            if ask is not None:
                layers = choose_layers(settings, num_teacher_layers, m, epoch, step)
                teacher_logits, teacher_pooled = ask(rows, layers)                   # (B, C), (B, k, d_t) or None
                kd = kd_loss(logits, teacher_logits, settings.temperature)
            if rail is not None:
                student_pooled = pool_layers(output.hidden_states, batch["attention_mask"], student_layers)      # (B, k, d_s)
                rail_loss, cosine = rail_forward(student_pooled, teacher_pooled), rail.projected_cosine(teacher_pooled)
            loss = combined_loss(ce, kd, rail_loss, weights)
            scaler.scale(loss * share[step]).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses[step] = torch.stack([ce, kd, rail_loss, loss, cosine]).detach() * share[step]
            if step % 50 == 49 or step == num_steps - 1:  # now and then the CPU may wait
                bad = (~torch.isfinite(losses).all(dim=1)).nonzero()
                if len(bad):
                    raise FloatingPointError(f"a loss became NaN or infinite at step {int(bad[0]) + 1} of epoch {epoch}; what was "
                                             "finished before is kept. A new run with a lower --learning-rate or --precision fp32 "
                                             "may help")
        if world > 1:
            dist.all_reduce(losses)  # of a batch, the weights of `share_of` sum to `world` over the processes
        sizes = torch.tensor([len(rows) for rows in batches], device=device)
        means = (losses / world * sizes[:, None]).sum(dim=0) / len(data)  # (5,) over examples: the last batch may be smaller
        seconds, drawn = time.perf_counter() - start, None
        if rail is not None and settings.mapping != "attention" and settings.resample == "epoch":
            drawn = choose_layers(settings, num_teacher_layers, m, epoch).tolist()
        record = {"epoch": epoch, "layers": drawn} | dict(zip(("ce", "kd", "rail", "total", "projected_cosine"), means.tolist())) | {
            "seconds": seconds, "examples_per_second": len(data) / seconds} | validate()
        history.append(record)
        with whole(state_file) as part:
            if rank == 0:
                state = io.BytesIO()  # so that a full disk is an OSError of the write
                torch.save({"history": history} | {name: item.state_dict() for name, item in parts.items()}, state)
                part.write_bytes(state.getbuffer())
        say_epoch(record, settings)
        report(history)
    return history


def share_of(rows, rank, world):
    """(rows, weight): what process `rank` of `world` does of a batch, and how much its mean loss counts.

    It takes every world-th row. All processes must take part in every step, so one that gets no row computes some row with
    weight 0. DistributedDataParallel averages the gradients over the processes; the weights make that average the gradient of
    the mean over the whole batch, also where the rows can't be shared evenly.
    """
    own = rows[rank::world]
    return own or rows[:1], len(own) * world / len(rows)


def say_epoch(record, settings):
    """One line for an epoch: the map in readable form, the losses that there are, the validation score, the speed."""
    pairs = " ".join(f"{i}←{j}" for i, j in enumerate(record["layers"] or [], 1))
    pairs = pairs or settings.mapping + ", redrawn in each step" * (settings.mapping == "random")
    losses = "  ".join(f"{name} {record[name]:.4f}" for name in ("ce", "kd", "rail") if record[name] != 0)
    metric = main_metric(record)
    say(f"  epoch {record['epoch']:2}/{settings.epochs}  {pairs}   {losses}   {metric} {record[metric]:.4f}   "
        f"{record['examples_per_second']:,.0f} examples/s")


# ---------------------------------------------------------------------------------------------------------------------
# 9. The score
# ---------------------------------------------------------------------------------------------------------------------
# Metrics are computed once over a whole set, never as a mean over batches: the last batch is smaller, and F1 or a correlation
# of the whole is not the mean of those of its parts.

def ranks(values):
    """Ranks from 1; equal values share the mean of their ranks, as Spearman's correlation wants it."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)   # (distinct,), (N,), (distinct,)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(a, b):
    """Pearson's r of two arrays (N,); 0 where one of them is constant, since then it tells nothing."""
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale > 0 else 0.0


def compute_metrics(logits, labels, task=None, teacher_logits=None):
    """The metrics of a task, over a whole set at once: (N, C), (N,) -> {"accuracy": ..., ...}.

    GLUE's own metrics for its tasks, accuracy for other classes, the two correlations for a regression. Then `eval_loss`
    (cross-entropy in nats, or mean squared error) and, for classes, `ece`: the expected calibration error, the gap between
    confidence and accuracy over 15 bins of confidence (Guo et al. 2017). With the teacher's logits (N, C) for the same
    examples also `agreement`: the share of the examples, right or wrong, for which both choose the same class.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.shape[1] == 1:
        output = logits[:, 0]
        return {"pearson": correlation(output, labels), "spearmanr": correlation(ranks(output), ranks(labels)),
                "eval_loss": float(np.mean((output - labels) ** 2))}
    log_probs = logits - logits.max(axis=1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))                 # (N, C)
    predicted, confidence = logits.argmax(axis=1), np.exp(log_probs.max(axis=1))      # (N,), (N,)
    correct = predicted == labels
    hits, claims, positives = np.sum((predicted == 1) & (labels == 1)), np.sum(predicted == 1), np.sum(labels == 1)
    values = {"accuracy": correct.mean(), "f1": 2 * hits / max(claims + positives, 1),
              "matthews_correlation": correlation((predicted == 1).astype(float), (labels == 1).astype(float))}
    bins = np.minimum((confidence * 15).astype(int), 14)                              # (N,) from 0 to 14
    gaps = np.abs(np.bincount(bins, weights=correct - confidence))                    # (up to 15,) |hits - expected hits| a bin
    wanted = GLUE[task][1] if task in GLUE else ["accuracy"]
    if teacher_logits is not None:
        values["agreement"] = np.mean(predicted == teacher_logits.argmax(axis=1))
        wanted = [*wanted, "agreement"]
    return {name: float(values[name]) for name in wanted} | {
        "eval_loss": float(-log_probs[np.arange(len(labels)), labels].mean()), "ece": float(gaps.sum() / len(labels))}


@torch.no_grad()
def predict(model, data, tokenizer, precision="fp32"):
    """The model's logits for an encoded Dataset, in the order of the Dataset: float32 array (N, C). Leaves it in eval mode."""
    model.eval()
    batches, logits = length_batches(lengths_of(data), 64), None
    for rows, batch in batches_on(model.device, data, tokenizer, batches):
        with autocast(model.device, precision):
            output = model(**inputs_of(batch)).logits.float().cpu().numpy()
        logits = np.empty((len(data), output.shape[1]), np.float32) if logits is None else logits
        logits[rows] = output
    if not np.isfinite(logits).all():
        raise FloatingPointError("a model's outputs became NaN or infinite; a new run with --precision fp32 or a lower "
                                 "--learning-rate may help")
    return logits


def evaluate(model, data, tokenizer, task=None, precision="fp32", teacher_logits=None):
    """The metrics of a model over a whole encoded Dataset, {"accuracy": ..., "eval_loss": ..., ...}, see `compute_metrics`.

    Args:
        model, data, tokenizer: a classifier, an encoded Dataset with its labels, and the tokenizer that pads it.
        task: the name of a GLUE task, which says what the metrics are; None for own data.
        precision: "fp32", "bf16" or "fp16", of the forward pass.
        teacher_logits: (N, C), for the agreement with the teacher.
    """
    return compute_metrics(predict(model, data, tokenizer, precision), data["label"], task, teacher_logits)


def milliseconds_per_sentence(model, data, tokenizer, precision="fp32", repeats=30):
    """Median time of a forward pass with a single sentence, in milliseconds, on the model's device, tokenization not counted."""
    model.eval()
    rows, times = [[i % len(data)] for i in range(repeats + 5)], []
    for _, batch in batches_on(model.device, data, tokenizer, rows):
        start = time.perf_counter()
        with torch.no_grad(), autocast(model.device, precision):
            model(**inputs_of(batch)).logits.cpu()  # .cpu() waits for the device
        times.append((time.perf_counter() - start) * 1000)
    return float(np.median(times[5:]))  # the first ones warm up


# ---------------------------------------------------------------------------------------------------------------------
# 10. The whole job
# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves in its folder:
#
#   student/        weights (safetensors), tokenizer, label names, model card: pipeline("text-classification", model=".../student")
#   teacher/        the same for a teacher that was fine-tuned here, and in it table-.../, its answers
#   metrics.json    settings as used, versions, device; layers, parameters, bytes, milliseconds and scores of both models; for each
#                   epoch the map, the losses, the projected cosine, the seconds and every validation metric; scores on
#                   --eval-file; the seconds in all and the peak memory (of the last process, where a run was resumed)
#   *.pt            while it runs: the state after the last finished epoch, for --resume

@dataclasses.dataclass
class Side:
    """Teacher or student, and all data as its own tokenizer encodes it."""

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    train: datasets.Dataset = None
    validation: dict = None  # name -> Dataset; the name is "" for most tasks, "matched" and "mismatched" for MNLI
    evaluation: dict = None  # file -> Dataset

    def encode(self, train, validation, evaluation, max_length):
        """Fills the three data fields from Datasets of text."""
        def encoded(data):
            return encode(data, self.tokenizer, self.model, max_length)
        self.train = encoded(train)
        self.validation = {name: encoded(data) for name, data in validation.items()}
        self.evaluation = {name: encoded(data) for name, data in evaluation.items()}

    def validate(self, settings, teacher_logits=None):
        """(metrics, logits by name) of all validation sets. MNLI's second set has its name behind each of its metrics."""
        metrics, logits = {}, {}
        for name, data in self.validation.items():
            logits[name] = predict(self.model, data, self.tokenizer, settings.precision)
            found = compute_metrics(logits[name], data["label"], settings.task, teacher_logits and teacher_logits[name])
            metrics |= {key if name in ("", "matched") else f"{key}_{name}": value for key, value in found.items()}
        return metrics, logits

    def costs(self, settings):
        """{"layers", "parameters", "bytes" of the weights on disk, "milliseconds_per_sentence" at batch size 1}."""
        data = next(iter(self.validation.values()))
        return {"layers": self.model.config.num_hidden_layers, "parameters": self.model.num_parameters(),
                "bytes": sum(tensor.nbytes for tensor in self.model.state_dict().values()),
                "milliseconds_per_sentence": milliseconds_per_sentence(self.model, data, self.tokenizer, settings.precision)}

    def save(self, folder, card):
        """Writes a folder that `transformers.pipeline` loads as it is: safetensors, tokenizer, label names, model card."""
        with whole(folder) as part:
            if processes()[0] == 0:
                self.model.save_pretrained(part)
                self.tokenizer.save_pretrained(part)
                (part / "README.md").write_text(card, encoding="utf-8")


def peak_memory():
    """The most memory that this process has used so far, in bytes: of the GPU if it used one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resume_settings(folder, given):
    """The settings of the run in `folder`, to go on with it.

    Args:
        folder: of the run; it may have been moved.
        given: {name: value} of settings that a user gave beside --resume.
    Raises:
        ValueError: no run lies there, or something given contradicts its settings; the message names the first.
    """
    file = Path(folder) / "metrics.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))["settings"]
        settings = Settings(**saved | {"resume": str(folder), "output_dir": str(folder)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume {folder}: no run can be resumed there ({file.name}: {first_line(error)})") from error
    for name, value in given.items():
        if name not in ("resume", "output_dir") and value not in ("auto", saved.get(name)):
            raise ValueError(f"--{name.replace('_', '-')} {value} contradicts the run being resumed, which has {saved.get(name)}; "
                             "leave it out, or start a new run")
    return settings


def run(settings):
    """The whole job, from `Settings` to a distilled student on disk. Returns what metrics.json holds.

    Raises ValueError or OSError, with one sentence, for what a user can mend, and FloatingPointError for a loss that diverged.
    """
    quiet()
    if settings.resume:
        default = Settings()
        settings = resume_settings(settings.resume, {name: value for name, value in dataclasses.asdict(settings).items()
                                                     if value != getattr(default, name)})
    settings = settings.resolve()
    settings.output_dir = agree(settings.output_dir)  # its default holds the time
    out = Path(settings.output_dir)
    if settings.resume:
        finished = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        if "evaluation" in finished:
            say(f"{out} is finished already: its student lies in {out / 'student'}, its numbers in {out / 'metrics.json'}")
            return finished
    try:
        return distil(settings, out)
    except KeyboardInterrupt:
        hint = f"; go on with:  python rail_kd.py --resume {out}" if (out / "metrics.json").exists() else ""
        raise KeyboardInterrupt(f"stopped{hint}") from None


def distil(settings, out):
    """What `run` does once the settings are checked and the folder `out` is known. Five steps, each a paragraph."""
    begin, device = time.perf_counter(), torch.device(settings.device)

    # 1. Data and models. Whatever can be wrong with them shows here, before the slow part and before anything is written.
    train_set, validation = load_task(settings)
    evaluation = {path: match(read_file(path), train_set, path) for path in settings.eval_file}
    feature = train_set.features["label"]
    torch.manual_seed(settings.seed)  # for classifiers that are new
    if settings.teacher is None:
        (model, tokenizer), has_classifier = toy_teacher(settings.seed), False
        use_labels_of(model, feature)
    else:
        model, tokenizer, has_classifier = load_classifier(settings.teacher, feature, "teacher")
    teacher = Side(model.to(device), tokenizer)
    teacher.encode(train_set, validation, evaluation, settings.max_length)
    n = model.config.num_hidden_layers
    if settings.student:
        student = Side(*load_classifier(settings.student, feature, "student")[:2])
        student.encode(train_set, validation, evaluation, settings.max_length)
    else:  # same tokenizer, same data. This cut shows whether it is possible; it is done again when the teacher has learned
        settings.student_layers = settings.student_layers or min(n, max(n // 3, 2))
        student = dataclasses.replace(teacher, model=build_student(model, settings.student_layers))
    m = student.model.config.num_hidden_layers
    choose_layers(settings, n, m, epoch=1)  # raises where the two have no layers to map
    if n == 1 and not settings.include_last:
        raise ValueError("a teacher of one layer has no intermediate layers; --include-last makes its only layer a candidate")

    # 2. From here on there is a folder, and what happens can be resumed. The settings are kept with the numbers, always: without
    # them nobody can repeat a result.
    if processes()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    results = {
        "settings": dataclasses.asdict(settings) | {"resume": None},
        "versions": {"python": platform.python_version()} | {lib.__name__: lib.__version__ for lib in (torch, transformers, datasets, np)},
        "device": f"{device.type} ({chip}, {torch.get_num_threads()} threads, processes: {processes()[1]})",
        "teacher": {}, "student": {}, "epochs": []}
    save_json(out / "metrics.json", results)
    say_plan(settings, teacher, student, train_set, validation, results["device"])

    # 3. The teacher. One without a trained classifier is fine-tuned by the same loop, with CE alone. Then it is frozen and scored:
    # a weak teacher must not go unnoticed.
    if not has_classifier:
        say(f"The teacher ({settings.teacher or 'made on the spot'}) has no trained classifier yet, so it is fine-tuned first:")
        own_set = teacher.train
        if settings.task == "toy":
            own_set = encode(load_task(settings, for_teacher=True)[0], tokenizer, model, settings.max_length)
        plan = dataclasses.replace(settings, mapping="finetune", epochs=settings.teacher_epochs, compile=False)
        history = train(model, own_set, tokenizer, plan, lambda: teacher.validate(settings)[0], out / "teacher.pt")
        teacher.save(out / "teacher", model_card(settings, "Teacher", history[-1]))
        say(f"  saved; further runs can use it with  --teacher {out / 'teacher'}")
        results["teacher"]["epochs"] = history
    freeze(model)
    scores, teacher_logits = teacher.validate(settings)
    results["teacher"] |= teacher.costs(settings) | scores
    warn_of_weak_teacher(teacher_logits, validation)

    # 4. The teacher's answers, the student, the projections, and the loop that brings them together.
    ask = rail = None
    if settings.mapping != "finetune":
        if settings.teacher_table == "off":
            ask = live_teacher(model, teacher.train, tokenizer, settings.precision)
        else:  # the table lies beside the teacher, or in the run's folder for a teacher from the hub
            home = out / "teacher" if not has_classifier else Path(settings.teacher) if os.access(settings.teacher, os.W_OK) else out
            ask = table_teacher(find_or_write_table(model, teacher.train, tokenizer, settings, home), device)
    if not settings.student:
        student.model = build_student(model, m)
    student.model.to(device)
    if settings.mapping not in ("none", "finetune"):
        torch.manual_seed(settings.seed)
        rail = RailLoss(model.config.hidden_size, student.model.config.hidden_size, m if settings.include_last else m - 1,
                        "attention" if settings.mapping == "attention" else settings.variant, settings.projection_size,
                        settings.projection).to(device)
    say("Distillation:" if ask else "Training on the labels alone:")
    results["epochs"] = train(student.model, student.train, student.tokenizer, settings,
                              lambda: student.validate(settings, teacher_logits)[0], out / "student.pt", ask, rail, n,
                              lambda history: save_json(out / "metrics.json", results | {"epochs": history}))

    # 5. The student is saved, its cost measured, and both are scored on further files, such as text of another domain.
    student.save(out / "student", model_card(settings, "Student", results["epochs"][-1]))
    results["student"] = student.costs(settings) | student.validate(settings, teacher_logits)[0]
    results["evaluation"] = {path: {
        name: evaluate(side.model, side.evaluation[path], side.tokenizer, settings.task, settings.precision)
        for name, side in (("teacher", teacher), ("student", student))} for path in evaluation}
    results |= {"seconds": time.perf_counter() - begin, "peak_memory_bytes": peak_memory()}
    save_json(out / "metrics.json", results)
    if processes()[0] == 0:
        for state in ("teacher.pt", "student.pt"):
            (out / state).unlink(missing_ok=True)
    say_results(results, out, device.type)
    return results


def say_plan(settings, teacher, student, train_set, validation, device):
    """Prints what is about to happen."""
    if settings.task == "toy":
        say("The toy: short reviews in which the main clause decides, so that counting words says little.")
        for row in validation[""].select(range(3)):
            say(f"    {validation[''].features['label'].names[row['label']]:8}  {row['sentence1']}")
        say(f"The teacher learns from {8 * len(train_set):,} of them. The student gets {len(train_set):,} others, and a fifth of their "
            "labels is wrong.")
    for name, side in (("teacher", teacher), ("student", student)):
        say(f"{name}:   {side.model.config.num_hidden_layers} layers, {side.model.num_parameters():,} parameters")
    steps = settings.epochs * math.ceil(len(train_set) / settings.batch_size)
    say(f"training:  {len(train_set):,} examples x {settings.epochs} epochs = {steps:,} steps of {settings.batch_size}, {settings.precision} "
        f"on {device}")
    rail = f"RAIL({', '.join([settings.variant, settings.mapping + ' map', f'u={settings.projection_size}', *settings.projection])})"
    terms = zip(objective_weights(settings.mapping, settings.weights), ("CE", f"KD(T={settings.temperature:g})", rail))
    say("objective: " + " + ".join(f"{weight:.3g} {name}" for weight, name in terms if weight))


def warn_of_weak_teacher(teacher_logits, validation):
    """Says so, prominently, where the teacher is no better than always naming the largest class, or the mean of a regression."""
    for name, logits in teacher_logits.items():
        labels = np.array(validation[name]["label"])
        if logits.shape[1] > 1:
            right, share = np.mean(logits.argmax(1) == labels), np.bincount(labels).max() / len(labels)
            weak, found = right <= share, f"right on {right:.1%} of the validation examples; the largest class alone is {share:.1%}"
        else:
            error, spread = np.mean((logits[:, 0] - labels) ** 2), labels.var()
            weak, found = error >= spread, f"off by {error:.3g} (mean squared error); the validation labels' own variance is {spread:.3g}"
        if weak:
            say(f"\n!!! The teacher is {found}.\n!!! It is weak or broken, or its labels mean something else: a student can't learn "
                "from it.\n")


def say_results(results, out, device):
    """Prints the small table at the end, and where everything lies."""
    metric = main_metric(results["student"])
    say(f"\n          layers   parameters   on disk   {metric:>21}   ms a sentence ({device})")
    for name in ("teacher", "student"):
        row = results[name]
        say(f"{name}   {row['layers']:6}   {row['parameters']:10,}   {human_bytes(row['bytes']):>7}   {row[metric]:21.4f}   "
            f"{row['milliseconds_per_sentence']:.2f}")
    for path, scores in results["evaluation"].items():
        say(f"{path}: " + ", ".join(f"{name} {metric} {scores[name][metric]:.4f}" for name in ("teacher", "student")))
    say(f"\nThe student lies in {out / 'student'}, all numbers in {out / 'metrics.json'}.")


def main_metric(metrics):
    """The name of the metric that the terminal shows: the first of those that GLUE knows."""
    return next(name for name in metrics if name in {metric for _, names in GLUE.values() for metric in names})


def model_card(settings, title, metrics):
    """A short README for a saved model: what made it, and what it scored."""
    used = "\n".join(f"| {name} | {value} |" for name, value in dataclasses.asdict(settings).items() if value not in (None, []))
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
    return (f"# {title} for {settings.task or Path(settings.train_file).stem}\n\nMade by `rail_kd.py`, a reference implementation of "
            f"RAIL-KD (arXiv 2109.10164).\n\nLast epoch: {numbers}\n\n| setting | value |\n|---|---|\n{used}\n")


# ---------------------------------------------------------------------------------------------------------------------
# 11. The command line
# ---------------------------------------------------------------------------------------------------------------------

def parse(argv):
    """Command line -> Settings. Raises ValueError in one sentence, where argparse would print a page of usage."""
    def fail(message):
        raise ValueError(f"{message}; python rail_kd.py --help lists all settings")

    parser = transformers.HfArgumentParser(
        Settings, prog="rail_kd.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    # With None already in the namespace, argparse keeps its defaults to itself: what is not None then was really given.
    names = [field.name for field in dataclasses.fields(Settings)]
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names))))
    given = {name: value for name, value in given.items() if value is not None}
    return resume_settings(given["resume"], given) if "resume" in given else Settings(**given)


def main(argv=None):
    """The command line. Returns the exit status: 0, 2 for what a user can mend (one line on stderr), 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no arrow for 1←3 shows a question mark instead of failing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        settings = parse(argv)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun: join the others, each with a GPU of its own
            settings.device = "cuda" if resolve_device(settings.device, "fp32")[0] == "cuda" else "cpu"
            if settings.device == "cuda":
                if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                    raise ValueError(f"--nproc-per-node: this machine has only {torch.cuda.device_count()} GPUs")
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if settings.device == "cuda" else "gloo")
        run(settings)
        return 0
    except KeyboardInterrupt as stop:
        say(str(stop) or "stopped", sys.stderr)
        return 130
    except torch.cuda.OutOfMemoryError:
        print("rail_kd.py: the GPU's memory is full; start a new run with a lower --batch-size or --max-length", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        if not isinstance(error, ValueError) or os.environ.get("RANK", "0") == "0":  # a wrong setting is wrong in every process
            print(f"rail_kd.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
