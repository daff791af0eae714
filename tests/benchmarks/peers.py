"""How do other programs do with the same images, split, pretrained weights, epochs and precision?

    python tests/benchmarks/peers.py --data_dir FOLDER --model_name_or_path FOLDER --sources FOLDER
        [--programs default tutorial transformers timm autogluon] [--epochs 2] [--precision bf16]
        [--python timm=PYTHON] ... [--work peers] [--output peers.json]

Runs finetune_vit.py with its default recipe, takes its report/split.csv, and gives that split to the
tutorial's recipe and, as a folder of links, to each other program. Each runs by its own command, in the
Python that --python names, or in this one. Their answers for the test images are scored here, all alike.
A program that is not installed, or fails, gets a row that says so. --sources holds the scripts that are in
no package, of the versions installed: run_image_classification.py of transformers, train.py and inference.py
of timm; without network also accuracy/accuracy.py of evaluate. The model must be a ViT; timm and AutoGluon
start from the same weights in timm's form. What --output has of programs that are not run again stays there.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from peers_run import installed, join, run
from sklearn.metrics import accuracy_score, f1_score, log_loss

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- the split, for programs that want folders


def lay_out(split: pd.DataFrame, images: Path, folder: Path) -> None:
    """Link the images of a report/split.csv as folder/SPLIT/CLASS/NUMBER.EXT, and list the classes.

    CLASS is the number of the class and NUMBER that of the row, so no name clashes or sorts otherwise. What
    was there before is deleted: links of another split.
    """
    shutil.rmtree(folder, ignore_errors=True)
    classes = sorted(split["label"].unique())
    for number, row in enumerate(split.itertuples()):
        name = f"{number:06d}{Path(row.file).suffix.lower()}"
        link = folder / row.split / f"{classes.index(row.label):03d}" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(images / row.file)
    (folder / "classes.txt").write_text("".join(f"{number:03d}\n" for number in range(len(classes))))


def score(split: pd.DataFrame, answers: pd.DataFrame) -> dict[str, float]:
    """Return accuracy, macro F1 and log loss of `answers`: probabilities, a column per class in their order.

    Their index is the number of the image's row in `split`. Raises ValueError if a test image has no answer.
    """
    labels, classes = split.loc[split["split"] == "test", "label"], sorted(split["label"].unique())
    missing = labels.index.difference(answers.index)
    if len(missing):
        raise ValueError(f"{len(missing)} of {len(labels)} test images have no answer")
    known, chances = labels.map(classes.index), answers.loc[labels.index].to_numpy()
    guesses, numbers = chances.argmax(1), range(len(classes))
    return {
        "accuracy": accuracy_score(known, guesses),
        "macro F1": f1_score(known, guesses, labels=numbers, average="macro", zero_division=0),
        "log loss": log_loss(known, chances / chances.sum(1, keepdims=True), labels=numbers),
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_answers(path: Path) -> pd.DataFrame:
    """Read a table of file names and, class by class, probabilities: NUMBER.EXT, prob_0, prob_1, ..."""
    table = pd.read_csv(path, index_col=0)
    table.index = [int(Path(name).stem) for name in table.index]
    return table[[f"prob_{number}" for number in range(len(table.columns))]]


# ---------------------------------------------------------------- the programs


def start(job: argparse.Namespace, *command, **environment: str) -> dict[str, float]:
    """Run a command of a program, in its Python."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
    trained = PROGRAMS[job.program].trained
    return run([job.python, *command], job.folder / "log.txt", trained, cwd=job.sources, env=environment)


def start_inside(job: argparse.Namespace, function: str, *words) -> dict[str, float]:
    """Run a function of peers_inside.py in the program's Python."""
    return start(job, Path(__file__).with_name("peers_inside.py"), function, *words)


def run_ours(job: argparse.Namespace) -> tuple[dict, pd.DataFrame]:
    flags = ["--data_dir", job.data_dir, "--data_root", job.folder / "data"]
    flags += ["--output_dir", job.folder / "run", "--model_name_or_path", job.model_name_or_path]
    flags += ["--num_train_epochs", job.epochs]
    flags += ["--bf16", job.precision == "bf16", "--report_to", "none", "--recipe", job.program]
    if job.program == "tutorial":  # its own split is another; 500 steps of warm-up are for Kvasir
        flags += ["--split_by", "near-duplicates", "--validation_size", 0.15, "--warmup_steps", 0.1]
        flags += ["--metric_for_best_model", "macro_f1"]
    found = start(job, ROOT / "finetune_vit.py", *flags)
    report = job.folder / "run" / "report"
    split, answers = pd.read_csv(report / "split.csv"), pd.read_csv(report / "predictions.csv")
    if job.split is not None and not split.equals(job.split):
        raise RuntimeError("its split is another one")
    answers = answers[answers["split"] == "test"].set_index("file").filter(regex="^p_")
    answers.index = pd.Series(split.index, split["file"])[answers.index]
    return found, answers


def run_transformers(job: argparse.Namespace) -> tuple[dict, pd.DataFrame]:
    """The command of the example's README for folders, with its flags of the Hub's data set."""
    model, results = job.folder / "run", job.folder / "answers.csv"
    flags = ["--train_dir", job.images / "train", "--validation_dir", job.images / "validation"]
    flags += ["--output_dir", model, "--model_name_or_path", job.model_name_or_path]
    flags += ["--ignore_mismatched_sizes", "True", "--num_train_epochs", job.epochs, "--report_to", "none"]
    flags += ["--use_cpu", job.device == "cpu", "--bf16", job.precision == "bf16"]
    flags += """--remove_unused_columns False --do_train --do_eval --learning_rate 2e-5
        --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --logging_strategy steps
        --logging_steps 10 --eval_strategy epoch --save_strategy epoch --load_best_model_at_end True
        --save_total_limit 3 --seed 1337""".split()
    cache = str(job.folder / "cache")
    found = start(job, job.sources / "run_image_classification.py", *flags, HF_DATASETS_CACHE=cache)
    answered = start_inside(job, "answer_transformers", model, f"{job.images}/test", results)
    return join(found, answered), read_answers(results)


def run_timm(job: argparse.Namespace) -> tuple[dict, pd.DataFrame]:
    """The commands of its documentation; optimiser, rate and batch are those of transformers' example.

    The defaults of train.py are made for ImageNet: SGD at 0.1, 300 epochs, five of them to warm up.
    """
    weights, results = job.folder / "weights", job.folder / "answers.csv"
    start_inside(job, "write_timm_weights", job.model_name_or_path, job.timm_model, weights)
    size = json.loads((weights / "config.json").read_text())["input_size"][-1]
    shared = ["--model", job.timm_model, "--model-kwargs", f"img_size={size}", "--img-size", size]
    shared += ["--num-classes", job.split["label"].nunique(), "--class-map", job.images / "classes.txt"]
    shared += ["--device", job.device, "--workers", 2]
    shared += ["--amp", "--amp-dtype", "bfloat16"] if job.precision == "bf16" else []
    flags = ["--data-dir", job.images, "--pretrained", "--pretrained-path", weights / "pytorch_model.bin"]
    flags += "--opt adamw --lr 2e-5 --batch-size 8 --sched-on-updates --warmup-epochs 0".split()
    flags += ["--epochs", job.epochs, "--output", job.folder, "--experiment", "run"]
    found = start(job, job.sources / "train.py", *shared, *flags)
    flags = ["--data-dir", job.images / "test", "--checkpoint", job.folder / "run" / "model_best.pth.tar"]
    flags += "--topk 0 --label-type none --results-separate-col --no-console-results".split()
    flags += ["--results-dir", job.folder, "--results-file", results.name]
    answered = start(job, job.sources / "inference.py", *shared, *flags)
    return join(found, answered), read_answers(results)


def run_autogluon(job: argparse.Namespace) -> tuple[dict, pd.DataFrame]:
    weights = job.folder / "weights"
    start_inside(job, "write_timm_weights", job.model_name_or_path, job.timm_model, weights)
    settings = job.images, weights, job.timm_model, job.epochs, job.precision, job.folder
    return start_inside(job, "fit_autogluon", *settings), read_answers(job.folder / "answers.csv")


class Program(NamedTuple):
    run: Callable[[argparse.Namespace], tuple[dict, pd.DataFrame]]  # measurements and answers
    trained: tuple[str, str]  # what it prints when training begins, and when it has ended
    packages: str  # what pip installs
    sources: tuple[str, ...] = ()


OURS = Program(run_ours, (r"training on .* in ", "kept the weights"), "transformers torch")
PROGRAMS = {
    "default": OURS,
    "tutorial": OURS,
    "transformers": Program(
        run_transformers,
        ("Running training", "Training completed"),
        "transformers torch torchvision datasets evaluate accelerate scikit-learn",
        ("run_image_classification.py",),
    ),
    "timm": Program(
        run_timm,
        ("Scheduled epochs", "Best metric"),
        "timm torch torchvision transformers",
        ("train.py", "inference.py"),
    ),
    "autogluon": Program(
        run_autogluon, ("fit begins", "fit ended"), "autogluon.multimodal torch transformers"
    ),
}


# ---------------------------------------------------------------- all of them


def measure(job: argparse.Namespace) -> dict:
    """Run one program; return its row: scores, seconds, bytes and versions, or why it has none."""
    program, split_file = PROGRAMS[job.program], job.work / "default" / "run" / "report" / "split.csv"
    try:
        versions = installed(job.python, program.packages.split())
        lacking = [name for name in program.sources if not (job.sources / name).exists()]
        if lacking:
            raise RuntimeError(f"not in --sources: {', '.join(lacking)}")
        if job.program != "default":
            job.split = pd.read_csv(split_file)
            lay_out(job.split, job.data_dir, job.images)
        found, answers = program.run(job)
        split = pd.read_csv(split_file)
        found |= score(split, answers)
        count = int((split["split"] == "train").sum()) * job.epochs
        found |= {f"images/{unit}": count / found[f"training, {unit}"] for unit in ("s", "CPU s")}
    except (RuntimeError, ValueError, OSError) as problem:
        return {"state": str(problem)}
    return {"state": "ran"} | found | {"bytes on disk": size_of(job.folder), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="folder of class folders")
    add("--model_name_or_path", type=Path, required=True, help="folder of a ViT")
    add("--sources", type=Path, default=".", help="folder of the scripts that are in no package")
    add("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    add("--epochs", type=int, default=2)
    add("--precision", choices=["bf16", "float32"], default="bf16")
    add("--python", action="append", default=[], help="PROGRAM=PYTHON that it is installed in")
    add("--timm_model", default="vit_small_patch14_dinov2", help="timm's name of the ViT")
    add("--work", type=Path, default="peers", help="folder for what the programs write; they start anew")
    add("--output", type=Path, default="peers.json")
    job = parser.parse_args()
    for name in ("data_dir", "model_name_or_path", "sources", "work"):
        setattr(job, name, getattr(job, name).resolve())
    job.images, job.split = job.work / "images", None
    pythons = dict(word.split("=", 1) for word in job.python)
    job.device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = json.loads(job.output.read_text())["programs"] if job.output.exists() else {}
    header = {"machine": f"{job.device}, {os.cpu_count()} CPU cores", "command": sys.argv}
    for name in job.programs:
        job.program = name
        job.python, job.folder = pythons.get(name, sys.executable), job.work / name
        shutil.rmtree(job.folder, ignore_errors=True)  # or it would find itself finished
        job.folder.mkdir(parents=True)
        rows[name] = measure(job)
        job.output.write_text(json.dumps(header | {"programs": rows}, indent=1) + "\n")
        print(name, rows[name], flush=True)
    print(pd.DataFrame(rows).drop("versions", errors="ignore").to_string(float_format="{:,.3f}".format))


if __name__ == "__main__":
    main()
