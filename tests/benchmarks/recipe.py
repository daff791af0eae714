"""Which recipe makes the fewest mistakes on scenes that it has not seen, at which cost?

    python tests/benchmarks/recipe.py --protocol few --runs tutorial default --seeds 8 -- \
        --data_url IMAGES.zip --model_name_or_path CHECKPOINT

After `--` stand flags of finetune_vit.py, for all runs. Protocols:
groups   `--folds` of groups as the script makes them: near-duplicates, and patients with --metadata
scenes   `--folds` of strict scenes: connected components, cosine of the pretrained class tokens above 0.985
few      20 training images per class, tested on all scenes that none of them is from
uneven   the same, but of the most frequent class all images from two thirds of the scenes

Each seed is another division and another training. There is no validation: the last epoch counts, for every
run. What is done is kept in `--results` and not done again; without `--runs` it is only summed up. ECE and
log loss are after a temperature that the other folds or draws fit. `difference` and `relative` compare
1 - macro F1 with that of the run `tutorial` on the same seeds: 95 % percentile bootstrap, 2,000 draws of
groups and of seeds (a training is as much a matter of luck as the choice of its test scenes).
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import softmax
from sklearn.metrics import log_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from story import build_trainer, make_work, read_settings

from steps.architectures import check_checkpoint, pixel_shape
from steps.download import fetch_images
from steps.duplicates import find_scenes
from steps.files import atomic
from steps.finetune import fit_head
from steps.load import load_folder
from steps.preprocess import Collator, keep_readable, prepare_pixels
from steps.counts import count, scores_of
from steps.paired import Answers, Images, compare_scores, t_interval
from steps.scores import calibration_error, fit_temperature
from steps.split import deal
from steps.use import load_classifier
from steps.workspace import versions

TUTORIAL = ["--recipe", "tutorial", "--warmup_steps", "0.235"]  # its 500 of 2,125 steps, of shorter runs
SMALL_STEPS = [*TUTORIAL, "--per_device_train_batch_size", "8"]
FORMER = "--min_steps 300 --per_device_train_batch_size 8 --learning_rate 2e-5 --layer_decay 0.85".split()
FORMER += "--lr_scheduler_type cosine --warmup_steps 0.3 --weight_decay 0.05".split()
FORMER += "--class_weights true --augment flip,turn".split()
PROBE = [*TUTORIAL, "--linear_probe", "true"]
ANY_STEPS = ["--min_steps", "0"]  # few images make few steps


def of(images: int) -> list[str]:
    """Return the flags for so many images per step at the rate of the rule, however few steps that makes."""
    return [*ANY_STEPS, "--per_device_train_batch_size", str(images)]


FORMER_WITH = {
    "no probe": ["--linear_probe", "false"],
    "no layer decay": ["--layer_decay", "1"],
    "no augmentation": ["--augment", ""],
    "no class weights": ["--class_weights", "false"],
    "half the rate": ["--learning_rate", "1e-5"],
    "2.5 times the rate": ["--learning_rate", "5e-5"],
    "warm-up 0.1": ["--warmup_steps", "0.1"],
    "linear schedule": ["--lr_scheduler_type", "linear"],
    "2 images a step": of(2),
    "4 images a step, lower rate": [*of(4), "--learning_rate", "1.41e-5"],
    "8 images a step": of(8),
    "16 images a step": [*of(16), "--learning_rate", "2.83e-5"],
    "32 images a step": [*of(32), "--learning_rate", "4e-5"],
    "64 images a step": [*of(64), "--learning_rate", "5.66e-5"],
    "15 epochs": ["--num_train_epochs", "15"],
    "15 epochs, 8 images a step": ["--num_train_epochs", "15", *of(8)],
    "crops": ["--augment", "flip,turn,crop"],
    "crops and colours": ["--augment", "flip,turn,crop,colour"],
    "label smoothing 0.1": ["--label_smoothing_factor", "0.1"],
    "frozen backbone": ["--freeze_backbone"],
    "EMA 0.98": ["+ema"],
    "drop path 0.1": ["+drop_path"],
    "8 epochs, half the patches": ["--num_train_epochs", "8", "+patch_dropout"],
    "mixup 0.2": ["+mixup"],
    "cutmix 1": ["+cutmix"],
    "eight views averaged": ["+views"],
    "336 pixels": ["+336"],
}
RUNS = {  # flags; what begins with + is done here, as it is no setting of the script
    "tutorial": TUTORIAL,
    "tutorial, 8 images a step": SMALL_STEPS,
    "tutorial, class weights": [*TUTORIAL, "--class_weights"],
    "tutorial, 8 images a step, class weights": [*SMALL_STEPS, "--class_weights"],
    "tutorial, flips and turns": [*TUTORIAL, "--augment", "flip,turn"],
    "tutorial, probe": PROBE,
    "tutorial, probe, flips": [*PROBE, "--augment", "flip"],
    "tutorial, probe, flips and turns": [*PROBE, "--augment", "flip,turn"],
    "tutorial, probe, class weights": [*PROBE, "--class_weights"],
    "tutorial, probe, layer decay": [*PROBE, "--layer_decay", "0.85"],
    "tutorial, probe, 8 images a step, same rate": [*PROBE, *of(8), "--learning_rate", "2e-5"],
    "fast": ["--recipe", "fast"],
    "default": [],
    "default, 8 images a step": of(8),
    "default, 64 images a step": of(64),
    "default, turns": ["--augment", "flip,turn"],
    "default, class weights": ["--class_weights"],
    "default, layer decay": ["--layer_decay", "0.85"],
    "best": ["--recipe", "best"],
    "former default": FORMER,
    **{f"former default, {what}": [*FORMER, *flags] for what, flags in FORMER_WITH.items()},
}


def strict_scenes(model, images, shape) -> np.ndarray:
    """Return the scene, int (n,), of each image: connected components of the class tokens' cosines."""
    tokens = []
    with model.classifier.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0])):
        predict(model, images, shape)
    tokens = torch.nn.functional.normalize(torch.cat(tokens).float(), dim=-1)
    return connected_components(coo_array((tokens @ tokens.T > 0.985).numpy()), directed=False)[1]


def predict(model, images, shape, views: bool = False) -> np.ndarray:
    """Return logits (n, classes); with `views`, log of the mean of 4 turns and their mirrors."""
    logits, device, collate = [], model.device, Collator(shape)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for batch in images.select_columns(["pixel_values", "label"]).iter(64):
            rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
            pixels = collate(rows)["pixel_values"].to(device)
            turned = [pixels.rot90(k, (2, 3)) for k in range(4 if views else 1)]
            turned += [picture.flip(3) for picture in turned] if views else []
            parts = [model(pixel_values=picture).logits.float().log_softmax(-1) for picture in turned]
            logits.append(torch.stack(parts).logsumexp(0).cpu())
    return torch.cat(logits).numpy()


def divisions(options: argparse.Namespace, labels: np.ndarray, groups: np.ndarray, seed: int):
    """Yield the rows that train and the rows that test, of each fold or draw of one seed."""
    random, protocol, folds = np.random.RandomState(seed), options.protocol, options.folds
    if protocol in ("groups", "scenes"):
        fold = deal(labels, groups, [1 / folds] * folds, seed)
        for number in range(folds):
            yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        return
    chosen = [random.permutation(np.flatnonzero(labels == label))[:20] for label in np.unique(labels)]
    if protocol == "uneven":
        most = np.bincount(labels).argmax()
        scenes = random.permutation(np.unique(groups))
        kept = np.isin(groups, scenes[: len(scenes) * 2 // 3])
        chosen[most] = np.flatnonzero((labels == most) & kept)
    train = np.sort(np.concatenate(chosen))
    yield train, np.flatnonzero(~np.isin(groups, groups[train]))


def train(flags: list[str], common: list[str], splits, processor, seed: int):
    """Return the trained model, and the seconds that took."""
    extras = {flag[1:] for flag in flags if flag.startswith("+")}
    flags = [flag for flag in flags if not flag.startswith("+")]
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--seed", seed, "--output_dir", folder, "--report_to", "none", "--eval_strategy", "no"]
        fixed += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--logging_strategy", "no"]
        settings, training = read_settings([*common, *flags, *fixed])
        transformers.logging.set_verbosity_error()  # or a new head is reported as a mismatch
        trainer = build_trainer(
            settings.model_name_or_path, splits, training, settings=settings, processor=processor,
            class_names=splits["train"].features["label"].names, shape=pixel_shape(processor),
        )  # fmt: skip
        model = trainer.model
        if "drop_path" in extras:
            drop_path(model, 0.1)
        if "patch_dropout" in extras:
            patch_dropout(model, 0.5)
        if "336" in extras:  # the position embeddings are interpolated
            more = {"interpolate_pos_encoding": True}
            model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | more), with_kwargs=True)
        if extras & {"mixup", "cutmix"}:
            mix(trainer, "cutmix" in extras)
        start = time.perf_counter()
        if settings.linear_probe:
            fit_head(trainer, settings.augment)
        average = EMA(0.98) if "ema" in extras else None
        if average:
            trainer.add_callback(average)
        if training.num_train_epochs:
            trainer.train()
        if average:
            model.load_state_dict(average.weights)
        return model.eval(), time.perf_counter() - start


class EMA(transformers.TrainerCallback):
    """Exponential moving average of the weights; its decay is for runs of some hundred steps."""

    def __init__(self, decay: float) -> None:
        self.decay, self.weights = decay, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = model.state_dict()
        decay = min(self.decay, state.global_step / (state.global_step + 9))
        if self.weights is None:
            self.weights = {name: value.clone() for name, value in now.items()}
        for name, value in self.weights.items():
            value.lerp_(now[name], 1 - decay)


def drop_path(model, rate: float) -> None:
    """Leave whole blocks out, image by image, the deeper the more often: Huang et al. 2016."""
    count = model.config.num_hidden_layers
    (blocks,) = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    for number, block in enumerate(blocks):
        share = rate * number / (count - 1)

        def drop(module, inputs, output, share=share):
            if not module.training or not share:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            keep = (torch.rand(len(hidden), 1, 1, device=hidden.device) >= share).to(hidden.dtype)
            mixed = inputs[0] + (hidden - inputs[0]) * keep / (1 - share)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        block.register_forward_hook(drop)


def patch_dropout(model, rate: float) -> None:
    """Train on random patches of each image, which costs as much less: Liu et al. 2022, arXiv 2208.07220."""

    def drop(module, inputs, tokens):
        if not module.training:
            return tokens
        n, count, width = tokens.shape
        order = torch.rand(n, count - 1, device=tokens.device).argsort(1) + 1
        order = order[:, : round((count - 1) * (1 - rate))]
        kept = torch.nn.functional.pad(order, (1, 0))  # and the class token
        return tokens.gather(1, kept[..., None].expand(-1, -1, width))

    model.base_model.embeddings.register_forward_hook(drop)


def mix(trainer, cut: bool) -> None:
    """Mixup (Zhang et al. 2018, alpha 0.2) or cutmix (Yun et al. 2019, alpha 1) of each batch with itself."""
    state = {}

    def blend(module, args, kwargs):
        pixels = kwargs["pixel_values"]
        if not module.training:
            return None
        share, order = np.random.beta(*(1, 1) if cut else (0.2, 0.2)), torch.randperm(len(pixels))
        if cut:
            side, size = round((1 - share) ** 0.5 * pixels.shape[-1]), pixels.shape[-1]
            top, left = np.random.randint(0, size - side + 1, 2)
            pixels = pixels.clone()
            area = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
            pixels[area] = pixels[order][area]
            share = 1 - (side / size) ** 2
        else:
            pixels = share * pixels + (1 - share) * pixels[order]
        state.update(share=share, order=order)
        return args, kwargs | {"pixel_values": pixels}

    def loss(outputs, labels, num_items_in_batch=None):
        other = torch.nn.functional.cross_entropy(outputs.logits, labels[state["order"]])
        own = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return state["share"] * own + (1 - state["share"]) * other

    trainer.model.register_forward_pre_hook(blend, with_kwargs=True)  # after the pixels are normalised
    trainer.compute_loss_func = loss


def calibrated(parts: list, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and probabilities, each part's temperature fitted on the other parts."""
    probabilities = []
    for part in parts:
        others = [other for other in parts if other is not part] or [part]
        rows, logits = (np.concatenate([other[i] for other in others]) for i in range(2))
        probabilities.append(softmax(part[1] / fit_temperature(logits, labels[rows]), axis=1))
    return np.concatenate([part[0] for part in parts]), np.concatenate(probabilities)


def against_tutorial(results: dict, labels: np.ndarray, groups: np.ndarray) -> pd.DataFrame:
    """Return differences from the run `tutorial`, with 95 % intervals over groups, means of shared seeds.

    For divisions into folds, which test each image once, and the folds that both runs have; `results` as for
    `summarise`. The intervals are those of --compare; that of ECE is a jackknife over groups, without a group
    that was not seen.
    """
    table = {}
    for run in results:
        if run == "tutorial":
            continue
        differences = defaultdict(list)
        for seed in sorted(results[run].keys() & results["tutorial"].keys()):
            both, answers = (results["tutorial"][seed], results[run][seed]), []
            tested = set.intersection(*({part[0].tobytes() for part in parts} for parts in both))
            if not tested:
                continue
            for parts in both:
                shared = [part for part in parts if part[0].tobytes() in tested]
                rows, probabilities = calibrated(shared, labels)
                answers.append(Answers(probabilities.argmax(1), probabilities))
            group = np.unique(groups[rows], return_inverse=True)[1]
            images = Images(labels[rows], group, labels.max() + 1)
            for metric, found in compare_scores(images, *answers).items():
                differences[metric].append([*found.values()])
            (before, parts_before), (now, parts_now) = (ece_parts(images, one) for one in answers)
            difference = now - before, parts_now - parts_before
            differences["ece"].append([*t_interval(difference, 0.0, 1.0).values()])
        if not differences:
            continue
        for metric in ("macro_f1", "log_loss", "ece", "accuracy"):
            value, low, high = np.mean(differences[metric], axis=0)
            table.setdefault(run, {})[metric] = f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
    return pd.DataFrame(table).T


def ece_parts(images: Images, answers: Answers) -> tuple[float, np.ndarray]:
    """Return the calibration error, and what each group adds to it (groups,), as a jackknife finds it."""
    sure, right = answers.probabilities.max(1), answers.guesses == images.labels
    value = calibration_error(sure, right)
    rests = images.group != np.arange(images.groups)[:, None]
    without = np.array([calibration_error(sure[rest], right[rest]) for rest in rests])
    return value, (value - without) * (images.groups - 1) / images.groups


def summarise(results: dict, labels: np.ndarray, groups: np.ndarray, draws: int = 2000) -> pd.DataFrame:
    """Return a row per run; results[run][seed] is a list of (rows, logits, seconds), one per fold or draw."""
    random, group = np.random.RandomState(0), np.unique(groups, return_inverse=True)[1]
    n, classes = group.max() + 1, labels.max() + 1
    times = [np.bincount(random.randint(n, size=n), minlength=n) for _ in range(draws)]
    times = np.stack([np.ones(n), *times])  # the first draw is all groups, once
    errors, table = {}, {}
    for run, by_seed in sorted(results.items(), key=lambda item: item[0] != "tutorial"):
        accuracy, seconds = [], []
        for seed, parts in by_seed.items():
            rows, logits = (np.concatenate([part[i] for part in parts]) for i in range(2))
            guesses = logits.argmax(1)
            counts = count(labels[rows], guesses, group[rows], classes)
            drawn = scores_of(*(times[:, : len(table)] @ table for table in counts))
            errors[run, seed] = 1 - drawn["macro_f1"].to_numpy()
            accuracy.append((guesses == labels[rows]).mean())
            seconds.append(sum(part[2] for part in parts))
        scores = 1 - np.array([errors[run, seed][0] for seed in by_seed])
        table[run] = {"seeds": len(scores), "accuracy": np.mean(accuracy), "macro F1": scores.mean()}
        table[run]["sd"] = scores.std(ddof=1) if len(scores) > 1 else np.nan
        rows, probabilities = calibrated([part for parts in by_seed.values() for part in parts], labels)
        sure, right = probabilities.max(1), probabilities.argmax(1) == labels[rows]
        table[run]["ECE"] = calibration_error(sure, right)
        table[run]["log loss"] = log_loss(labels[rows], probabilities, labels=range(classes))
        shared = sorted(by_seed.keys() & results.get("tutorial", {}).keys())
        if run != "tutorial" and shared:
            n = len(shared)
            drawn = np.vstack([np.arange(n), np.random.RandomState(0).randint(n, size=(draws, n))]).T
            ours, theirs = (
                np.take_along_axis(np.stack([errors[name, seed] for seed in shared]), drawn, 0).mean(0)
                for name in (run, "tutorial")
            )
            with np.errstate(all="ignore"):  # a draw without a mistake has no relative difference
                compared = {"difference": ours - theirs, "relative": ours / theirs - 1}
            for name, value in compared.items():
                ends = np.nanquantile(value[1:], [0.025, 0.975])
                table[run] |= {name: value[0], f"{name} low": ends[0], f"{name} high": ends[1]}
        table[run]["seconds"] = np.mean(seconds)
    return pd.DataFrame(table).T


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__.replace("%", "%%"))
    parser.add_argument("--protocol", choices=["groups", "scenes", "few", "uneven"], required=True)
    parser.add_argument("--runs", nargs="*", default=[], choices=[*RUNS])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("data/recipes"))
    parser.add_argument("common", nargs="*")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        work = make_work([*options.common, "--output_dir", temporary])
    name, left_out = work.settings.model_name_or_path, options.results / "left_out.csv"
    check_checkpoint(name)
    folder, _ = fetch_images(work)
    model, processor = load_classifier(name)
    shape, (listed, found) = pixel_shape(processor), load_folder(folder, work.settings, work.cache)
    images = keep_readable(prepare_pixels(listed, folder, processor, work.cache), found, left_out)
    labels = np.array(images["label"])
    options.results.mkdir(parents=True, exist_ok=True)
    if options.protocol == "groups":
        groups = find_scenes(images, shape, options.results / "near_duplicates.csv").groups.to_numpy()
    else:
        scenes = options.results / "scenes.npy"
        if not scenes.exists():
            np.save(scenes, strict_scenes(model, images, shape))
        groups = np.load(scenes)

    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for fold, (taught, tested) in enumerate(divisions(options, labels, groups, seed)):
            for run in options.runs:
                path = options.results / f"{options.protocol}_{run}_{seed}_{fold}.npz".replace(" ", "-")
                if path.exists():
                    with np.load(path) as kept:
                        if not np.array_equal(kept["rows"], tested):
                            sys.exit(f"error: {path} tested other images; choose another --results")
                    continue
                own, pixels = processor, images
                if "+336" in RUNS[run]:
                    size = {"size": {"height": 336, "width": 336}}
                    own = transformers.ViTImageProcessor.from_pretrained(name, **size)
                    pixels = keep_readable(prepare_pixels(listed, folder, own, work.cache), found, left_out)
                parts = datasets.DatasetDict(train=pixels.select(taught), validation=pixels.select(tested))
                model, seconds = train(RUNS[run], options.common, parts, own, seed)
                logits = predict(model, parts["validation"], pixel_shape(own), "+views" in RUNS[run])
                with atomic(path) as part, part.open("wb") as file:
                    np.savez(file, rows=tested, logits=logits, seconds=seconds, key=json.dumps([run, seed]))
                accuracy = (logits.argmax(1) == labels[tested]).mean()
                print(f"{path.stem}: accuracy {accuracy:.3f}, {seconds:.0f} s", flush=True)

    results = {}
    for path in sorted(options.results.glob(f"{options.protocol}_*.npz")):
        with np.load(path) as found:
            run, seed = json.loads(str(found["key"]))
            part = found["rows"], found["logits"], float(found["seconds"])
        results.setdefault(run, {}).setdefault(seed, []).append(part)
    print(f"\n{options.protocol}: {len(labels)} images, {len(np.unique(groups))} groups, {versions()}")
    print(summarise(results, labels, groups).sort_values("macro F1").round(3).to_string())
    if options.protocol in ("groups", "scenes") and len(results) > 1 and "tutorial" in results:
        print("\nminus tutorial, 95 % intervals over groups; less log loss and ECE is better")
        print(against_tutorial(results, labels, groups).to_string())


if __name__ == "__main__":
    main()
