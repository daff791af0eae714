"""Step 0: the command line, the YAML file, the recipe; what decides if several do."""

import ast
import dataclasses
import os
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import yaml
from conftest import RECIPES, REPOSITORY, ROOT, read_settings, run_script

from steps.options import EXAMPLE, TRAINING, WORDS, Settings
from steps.settings import choose_precision, for_trainer, images_per_step, known_names, without_token


def test_defaults_are_the_tutorials_data_and_model():
    settings, training = read_settings([])
    assert settings.data_url == "https://datasets.simula.no/downloads/kvasir/kvasir-dataset-v2.zip"
    assert settings.model_name_or_path == "google/vit-base-patch16-224-in21k"
    assert (settings.test_size, settings.validation_size) == (0.15, 0.15)
    assert settings.split_by is None
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (4, 64)
    assert settings.min_steps == 150
    assert settings.linear_probe and not settings.class_weights and settings.augment == "flip"
    assert training.output_dir == "model" and training.load_best_model_at_end


def test_yaml_is_read_first_and_flags_win(tmp_path, right_flags):
    config = tmp_path / "run.yaml"
    text = "learning_rate: 1e-4\nseed: 7\nload_best_model_at_end: false\ndata_root: null\nbf16: false\n"
    config.write_text(text)
    settings, training = read_settings([*right_flags, "--config", str(config), "--seed", "8"])
    assert training.learning_rate == 1e-4 and training.seed == 8
    assert training.load_best_model_at_end is False and training.bf16 is False
    assert settings.data_root == "data"


def test_recipe_of_the_tutorial_is_what_it_did(right_flags):
    settings, training = read_settings([*right_flags, "--recipe", "tutorial"])
    assert (settings.split_by, settings.split_otherwise) == (None, "random")  # a given split is stronger
    assert (settings.test_size, settings.validation_size) == (0.15, 0)
    assert (settings.linear_probe, settings.layer_decay, settings.augment) == (False, 1, "")
    assert settings.min_steps == 0
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (5, 16)
    assert (training.learning_rate, training.warmup_steps, training.weight_decay) == (2e-5, 500, 0.01)
    assert training.lr_scheduler_type == "linear" and training.optim.startswith("adamw")
    assert training.metric_for_best_model == "accuracy" and training.load_best_model_at_end


def taken(name, settings, training):
    """The value of a recipe's setting in a run."""
    name = "split_otherwise" if name == "split_by" else name
    return getattr(settings if hasattr(settings, name) else training, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_name_every_value_and_any_of_them_can_be_overridden(tmp_path, right_flags, recipe):
    assert RECIPES[recipe].keys() >= RECIPES["default"].keys()  # or those of another one would shine through
    settings, training = read_settings([*right_flags, "--recipe", recipe])
    for name, value in RECIPES[recipe].items():
        assert taken(name, settings, training) == value, name
    other = not RECIPES[recipe]["linear_probe"]
    (tmp_path / "run.yaml").write_text(f"recipe: {recipe}\nlayer_decay: 0.9\nlinear_probe: {other}\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--learning_rate", "3e-5", "--augment", "crop"]
    settings, training = read_settings([*right_flags, *flags])
    assert (settings.recipe, settings.layer_decay, settings.linear_probe) == (recipe, 0.9, other)
    assert (settings.augment, training.learning_rate) == ("crop", 3e-5)
    assert training.num_train_epochs == RECIPES[recipe]["num_train_epochs"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_that_is_named_by_a_flag_overrides_the_file(tmp_path, right_flags, recipe):
    text = "recipe: tutorial\nnum_train_epochs: 40\nlearning_rate: 1e-3\nlinear_probe: false\naugment: crop\n"
    (tmp_path / "run.yaml").write_text(text + "layer_decay: 0.7\nmin_steps: 7\nseed: 3\ntest_size: 0.2\n")
    flags = [*right_flags, "--config", str(tmp_path / "run.yaml"), "--recipe", recipe]
    settings, training = read_settings(flags)
    assert (settings.recipe, settings.test_size, training.seed) == (recipe, 0.2, 3)
    for name, value in RECIPES[recipe].items():
        assert taken(name, settings, training) == value, name
    settings, training = read_settings([*flags, "--min_steps", "5", "--num_train_epochs", "2"])
    assert (settings.min_steps, training.num_train_epochs) == (5, 2)  # flags are stronger than any recipe


def test_recipe_fast_trains_no_epoch_of_the_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sample = ["--config", "data/sample.yaml", "--output_dir", str(tmp_path / "model")]
    assert read_settings(sample)[1].num_train_epochs == 40
    settings, training = read_settings([*sample, "--recipe", "fast"])
    assert training.num_train_epochs == 0 and settings.linear_probe
    assert settings.data_url == "data/sample.zip"  # no recipe names it


def test_any_training_argument_is_a_setting(right_flags):
    flags = ["--label_smoothing_factor", "0.1", "--report_to", "none", "--fp16", "false"]
    _, training = read_settings([*right_flags, *flags])
    assert training.label_smoothing_factor == 0.1 and training.report_to == [] and training.fp16 is False


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "unknown setting 'learning_rat'.*did you mean learning_rate"),
        ("epochs: 3", "unknown setting 'epochs'.*did you mean num_train_epochs\\?"),
        ("- seed", "holds no settings"),
        ("seed: [1, 2", "cannot read"),
        ("seed: many", "seed.*many"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("output_dir: [a, b]", "unknown argument b"),
        ("seed: {a: 1}", "seed"),
        ("7: 8", "unknown setting '7'.*; see python finetune_vit.py --help$"),
        ('data_root: "a\\0b"', "--data_root is empty or no text"),
        ("[" * 5000, "cannot read"),
        ("seed: \x00", "cannot read"),
        ("!!python/object/apply:os.system ['true']", "cannot read"),
    ],
)
def test_a_mistake_in_the_yaml_file_is_one_error_line(tmp_path, right_flags, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit, match=message) as stopped:
        read_settings([*right_flags, "--config", str(tmp_path / "run.yaml")])
    assert "\n" not in str(stopped.value)


NAMES = [
    *Settings.__annotations__,
    *TRAINING,
    "weight_decay",
    "max_steps",
    "optim",
    "warmup_steps",
    "data_seed",
]
VALUES = st.one_of(
    st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.none(),
    st.sampled_from(["epoch", "no", "steps", "true", "random", ".", "/dev/null", "\u0663", "{}", "[]"]),
)  # fmt: skip


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(chosen=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3), yaml_file=st.booleans())
def test_no_setting_ends_in_a_traceback(tmp_path_factory, chosen, yaml_file):
    """Whatever is given: settings, or one line."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "images").mkdir()
    flags = [f"--{name}={value}" for name, value in chosen.items()]
    if yaml_file:
        (folder / "run.yaml").write_text(yaml.safe_dump(chosen), encoding="utf-8")
        flags = ["--config", str(folder / "run.yaml")]
    try:
        settings, training = read_settings(["--data_dir", str(folder / "images"), *flags])
        assert 0 < settings.test_size < 1 and training.learning_rate >= 0
    except SystemExit as stopped:
        assert re.fullmatch(r"error: .+; .+", str(stopped)), stopped
    assert [path.name for path in folder.iterdir() if path.name != "run.yaml"] == ["images"]


def test_error_goes_to_standard_error_without_a_traceback():
    done = run_script("--learning_rat", "1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == "error: unknown argument --learning_rat; did you mean --learning_rate?"


def test_help_explains_our_settings_with_defaults_and_hides_the_rest():
    text = " ".join(run_script("--help").stdout.split())
    for name in [*(field.name for field in dataclasses.fields(Settings) if field.init), *TRAINING]:
        if not name.startswith("ddp_"):
            assert re.search(rf"--{name} .+?\(default: .+?\)", text), name
    assert "--adam_beta1" not in text and "no_load_best" not in text and len(text) < 5000
    assert "--arguments" not in text


@pytest.mark.parametrize(
    "device_type, capability, amx, avx512_bf16, expected",
    [
        ("cuda", (7, 5), False, False, "fp16"),  # T4
        ("cuda", (8, 0), False, False, "bf16"),  # A100
        ("cuda", (9, 0), True, True, "bf16"),  # H100
        ("mps", None, False, False, "fp32"),
        ("cpu", None, True, False, "bf16"),
        ("cpu", None, False, True, "bf16"),
        ("cpu", None, False, False, "fp32"),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, device_type, capability, amx, avx512_bf16, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert choose_precision(device_type) == expected


@pytest.mark.parametrize(
    "flags, images, per_step, rate",
    [
        ([], 5600, 64, 4e-5),  # Kvasir v2: 350 steps
        ([], 2400, 64, 4e-5),
        ([], 2399, 32, 2.83e-5),
        ([], 800, 16, 2e-5),
        ([], 599, 8, 1.41e-5),
        ([], 200, 4, 1.41e-5),  # no lower rate for less than 8
        ([], 20, 1, 1.41e-5),
        (["--num_train_epochs", "15"], 600, 32, 2.83e-5),
        (["--num_train_epochs", "15"], 10**6, 64, 4e-5),
        (["--learning_rate", "1e-4"], 800, 16, 1e-4),
        (["--per_device_train_batch_size", "32"], 5600, 32, 2.83e-5),
        (["--per_device_train_batch_size", "12"], 5600, 12, 1.73e-5),
        (["--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "4"], 10**5, 128, 5.66e-5),
        (["--per_device_train_batch_size", "100"], 3000, 64, 4e-5),
        (["--num_train_epochs", "0"], 20, 64, 4e-5),
        (["--max_steps", "20"], 20, 64, 4e-5),
        (["--min_steps", "0"], 20, 64, 4e-5),
        (["--recipe", "tutorial"], 20, 16, 2e-5),
        (["--recipe", "tutorial", "--per_device_train_batch_size", "64"], 20, 64, 4e-5),
        (["--per_device_train_batch_size", "64", "--learning_rate", "1e-4"], 9999, 64, 1e-4),
    ],
)
def test_images_per_step_and_rate_follow_the_number_of_images(right_flags, flags, images, per_step, rate):
    settings, given = read_settings([*right_flags, *flags])
    training = for_trainer(given, images, settings)
    assert (images_per_step(training), training.learning_rate) == (per_step, rate)
    if settings.min_steps and training.max_steps <= 0 < training.num_train_epochs:
        assert training.per_device_train_batch_size == min(per_step, 32)
        least = images * training.num_train_epochs / per_step
        assert per_step == 1 or least >= 150


WORDS_OF_THE_ISSUE = {
    "--lr": "learning_rate", "--epochs": "num_train_epochs", "--batch_size": "per_device_train_batch_size",
    "--model": "model_name_or_path", "--train_dir": "data_dir", "--patients": "group_column_name",
    "--image_size": "model_name_or_path",
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS_OF_THE_ISSUE)
def test_what_people_write_meets_the_setting(right_flags, word):
    hint = re.escape(f"; did you mean --{WORDS_OF_THE_ISSUE[word]}?") + "$"
    for written in (word, word.replace("_", "-").upper()):
        for flags in ([written, "1"], [f"{written}=1"]):
            with pytest.raises(SystemExit, match=f"^error: unknown argument {written}{hint}"):
                read_settings([*right_flags, *flags])


def test_every_word_is_none_of_our_settings_and_leads_to_one():
    assert not WORDS.keys() & known_names() and set(WORDS.values()) <= known_names()


@pytest.mark.parametrize("value", ["true", "True"])
def test_resume_from_checkpoint_true_is_the_newest_as_always(right_flags, value):
    assert read_settings([*right_flags, "--resume_from_checkpoint", value])[1].resume_from_checkpoint is None


def test_the_flags_of_the_example_train_and_evaluate(right_flags):
    assert read_settings([*right_flags, "--do_train", "--do_eval", "--do_predict"])[1].do_train
    assert read_settings([*right_flags, "--do_train"])[1].num_train_epochs == 4


@pytest.mark.parametrize("word", EXAMPLE)
def test_what_the_example_has_and_we_have_not_is_refused_with_what_to_do(right_flags, word):
    assert word not in known_names() and word not in WORDS
    for flags in ([f"--{word}", "true"], [f"--{word.replace('_', '-')}"], ["--do_train", f"--{word}=1"]):
        with pytest.raises(SystemExit, match=f"^error: unknown argument --.*; {re.escape(EXAMPLE[word])}$"):
            read_settings([*right_flags, *flags])
    named = set(re.findall(r"--(\w+)", EXAMPLE[word])) - {"config", "revision"}
    assert named <= known_names()


@pytest.mark.parametrize("word", ["--nonsense", "--gpu_id", "--dropout", "--num_workers", "nonsense"])
def test_a_word_that_nothing_is_like_gets_no_wrong_hint(right_flags, word):
    message = f"^error: unknown argument {word}; see python finetune_vit.py --help$"
    with pytest.raises(SystemExit, match=message):
        read_settings([*right_flags, word])


SECRET = "hf_" + "x" * 34


@pytest.mark.parametrize(
    "arguments, kept",
    [
        ([], []),
        (["--seed", "1", "--hub_token", SECRET, "--demo"], ["--seed", "1", "--demo"]),
        (["--hub_token", SECRET], []),
        (["--hub-token", SECRET, "--seed", "1"], ["--seed", "1"]),
        ([f"--hub_token={SECRET}", "--seed", "1"], ["--seed", "1"]),
        ([f"--hub-token={SECRET}", "--seed", "1"], ["--seed", "1"]),
        (["--hub_token=", "--seed", "1"], ["--seed", "1"]),
        (["--hub_token", "a", "--hub_token", "b", "c"], ["c"]),
        (["--predict", "--hub_tokens", "hub_token"], ["--predict", "--hub_tokens", "hub_token"]),
        (["--output_dir", "a b", "--hub_model_id=me/x"], ["--output_dir", "a b", "--hub_model_id=me/x"]),
    ],
)
def test_the_token_is_taken_out_of_the_arguments(arguments, kept):
    before = [*arguments]
    assert without_token(arguments) == kept and arguments == before


@pytest.mark.parametrize("form", ["--hub_token {}", "--hub_token={}", "--hub-token {}", "--hub-token={}"])
def test_settings_hold_the_arguments_as_given_but_for_the_token(right_flags, monkeypatch, form):
    monkeypatch.setenv("HF_TOKEN", "another")
    settings, training = read_settings([*right_flags, *form.format(SECRET).split(), "--seed", "1"])
    assert settings.arguments == [*right_flags, "--seed", "1"]
    assert os.environ["HF_TOKEN"] == SECRET and training.hub_token is None  # where the Hub's client finds it
    assert SECRET not in str(dataclasses.asdict(settings)) + str(training.to_dict())


@pytest.mark.parametrize("flags", [["--help"], ["--learning_rat", "1"], ["--recipe", "fastest"]])
def test_help_and_mistakes_are_answered_without_heavy_packages(flags):
    done = run_script(*flags, launcher=("-X", "importtime"))
    lines = done.stderr.splitlines()
    imported = {line.rsplit("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert {"steps.settings", "torch", "transformers"} <= imported
    for package in ("datasets", "sklearn", "matplotlib"):
        assert not [name for name in imported if name.split(".")[0] == package]
    said = [line for line in lines if not line.startswith("import time:")]
    if flags == ["--help"]:
        assert done.returncode == 0 and "usage: python finetune_vit.py" in done.stdout and said == []
    else:
        assert done.returncode == 1 and len(said) == 1 and said[0].startswith("error: ")


def test_no_room_imports_the_story():
    rooms = [*(ROOT / "steps").rglob("*.py")]
    assert len(rooms) > 20
    for room in rooms:
        imported = set()
        for node in ast.walk(ast.parse(room.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {node.module or "", *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                imported |= {word.value for word in node.args if isinstance(word, ast.Constant)}
        assert not [name for name in imported if name.split(".")[0] == "finetune_vit"], room


def test_script_that_was_fetched_alone_says_so_at_once(tmp_path):
    (tmp_path / "finetune_vit.py").write_bytes((ROOT / "finetune_vit.py").read_bytes())
    done = subprocess.run([sys.executable, "finetune_vit.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: the folder steps is missing beside ")
    assert done.stderr.endswith(f"finetune_vit.py; fetch all of it: git clone {REPOSITORY}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["finetune_vit.py"]
