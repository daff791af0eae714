"""Step 10: to the Hub in one commit, and back again to see whether it answers as the run did."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import numpy as np
import pandas as pd
import transformers

from .console import MAIN, hidden_cause, log, may_pass, retry, stop
from .files import PREFIX, read_json, sha256_of, write_json
from .report import write_card
from .workspace import Workspace

PUBLISHED = """config.json preprocessor_config.json model.safetensors README.md all_results.json
trainer_state.json report/metrics.json report/split.csv report/confusion_matrix.png report/per_class.png
report/reliability.png report/roc.png report/precision_recall.png report/training_curves.png
report/public.html""".split()


def open_hub(work: Workspace) -> str:
    """Make the model's repository if need be, check that we may push to it, return its full name.

    "" without --push_to_hub. Raises SystemExit if we may not, or another model has that name.
    """
    training, space = work.training, work.settings.hub_space_id
    wanted, training.push_to_hub = training.push_to_hub, False  # the Trainer's own push has no card
    if not (wanted and MAIN):
        return ""
    name, private = training.hub_model_id or work.output_dir.resolve().name, training.hub_private_repo
    revision = training.hub_revision
    if not hub.get_token():
        stop("--push_to_hub finds no token of the Hub", "run `hf auth login`, or set HF_TOKEN")
    try:
        name = hub.create_repo(name, private=private, exist_ok=True).repo_id
        if revision:
            hub.create_branch(name, branch=revision, exist_ok=True)
        may_write(name, revision)
        found = hub.get_paths_info(name, ["model.safetensors"], revision=revision)
        if space:
            hub.create_repo(space, exist_ok=True, repo_type="space", space_sdk="gradio", private=private)
            may_write(space, repo_type="space")
    except Exception as problem:  # of many kinds: those of HTTP, of the Hub, of a name
        stop(f"cannot push to {name}: {explain(problem)}", "check the token, the name and the network")
    if found and not is_ours(name, found[0], work):
        remedy = "give another --hub_model_id, or a --hub_revision (branch) for this"
        stop(f"{name} holds another model", remedy)
    return name


def may_write(name: str, revision: str | None = None, repo_type: str = "model") -> None:
    """Raise what the Hub answers if we may not write there. It is asked how a file would be sent, no more."""
    file = hub.CommitOperationAdd("README.md", b"#")
    hub.preupload_lfs_files(name, [file], revision=revision, repo_type=repo_type)


def is_ours(name: str, found: hub.RepoFile, work: Workspace) -> bool:
    """Say whether the weights on the Hub are those of this run, or of an earlier model of it."""
    weights, metrics = work.output_dir / "model.safetensors", read_json(work.report / "metrics.json")
    same = weights.exists() and found.lfs and found.lfs.sha256 == sha256_of(weights)
    return bool(same) or metrics.get("published", {}).get("repo") == name


def explain(problem: BaseException) -> str:
    """Return what went wrong, as text."""
    return str(hidden_cause(problem)) or type(problem).__name__


def publish(name: str, predictions: pd.DataFrame, image_folder: Path, work: Workspace) -> None:
    """Push the finished run to the Hub as `name`, check what the Hub gives back, add that to the card."""
    revision, results = work.training.hub_revision, read_json(work.report / "metrics.json")
    commit = push(work.output_dir, name, revision, allow_patterns=PUBLISHED)
    what = {"repo": name, "revision": revision, "weights": sha256_of(work.output_dir / "model.safetensors")}
    if not what.items() <= results.get("published", {}).items():
        tested = predictions[predictions["split"] == "test"]
        tested = tested.assign(path=[str(image_folder / file) for file in tested["file"]])
        agreement = read_back(name, commit, tested, work.training.device)
        results["published"] = what | {"commit": commit} | agreement
        write_json(work.report / "metrics.json", results)
        write_card(results, work)
        push(work.output_dir, name, revision, allow_patterns=PUBLISHED)
    if work.settings.hub_space_id:
        push(work.report / "space", work.settings.hub_space_id, repo_type="space")


def push(folder: Path, name: str, revision: str | None = None, **options: Any) -> str:
    """Upload what has changed in one commit, return its id. Raises SystemExit if that fails."""
    options |= {"repo_id": name, "folder_path": folder, "revision": revision}
    options |= {"commit_message": "Add what finetune_vit.py made"}
    kind = "spaces/" if options.get("repo_type") == "space" else ""
    log.info("pushing %s to %s/%s%s", folder, hub.constants.ENDPOINT, kind, name)
    try:
        return retry(hub.upload_folder, when=may_pass, **options).oid
    except Exception as problem:  # of many kinds: those of HTTP, of the Hub, of the card's header
        remedy = f"all is safe in {folder}; run the same command again: only the push is left to do"
        stop(f"cannot push to {name}: {explain(problem)}", remedy)


def read_back(name: str, commit: str, tested: pd.DataFrame, device: Any) -> dict[str, Any]:
    """Ask the model that the Hub gives back about up to 32 test images; return how far it agrees.

    `tested` are predictions with a column path. Returns images, agreeing and largest_difference (of a
    probability). Raises SystemExit if it does not agree.
    """
    rows = tested.iloc[np.unique(np.linspace(0, len(tested) - 1, 32).astype(int))]
    try:
        with tempfile.TemporaryDirectory() as empty:
            fetch = functools.partial(hub.snapshot_download, name, revision=commit, cache_dir=empty)
            folder = retry(fetch, when=may_pass)
            classifier = transformers.pipeline("image-classification", folder, device=device)
            answers = classifier(rows["path"].tolist(), top_k=classifier.model.config.num_labels)
    except Exception as problem:
        text = f"{name} was pushed, but cannot be read back: {explain(problem)}"
        stop(text, "run the same command again to check it")
    answers = [{PREFIX + row["label"]: row["score"] for row in answer} for answer in answers]
    answers = pd.DataFrame(answers, rows.index)
    largest = float((answers - rows[answers.columns]).abs().to_numpy().max())
    agreeing = int((answers.idxmax(axis=1) == PREFIX + rows["prediction"]).sum())
    log.info("read back: %s of %s predictions agree, at most %.4f apart", agreeing, len(rows), largest)
    if largest > 0.05:  # mixed precision explains 0.01
        stop(f"{name} answers unlike this run did: {largest:.3f} apart", "do not use it; report this")
    return {"images": len(rows), "agreeing": agreeing, "largest_difference": largest}
