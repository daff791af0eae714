"""Step 0: the command line, the YAML file, and the mistakes that people make in them."""

import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import transformers
import yaml
from conftest import ROOT, run_script

import finetune_vit
from finetune_vit import RECIPES, TRAINING, Settings, choose_precision, images_a_step, read_settings


@pytest.fixture
def folder(tmp_path):
    """Flags that are right as they stand, so that a test can add one that is wrong."""
    (tmp_path / "images").mkdir()
    return ["--data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "model")]


def test_defaults_are_the_tutorials_data_and_model():
    settings, training = read_settings([])
    assert settings.data_url == "https://datasets.simula.no/downloads/kvasir/kvasir-dataset-v2.zip"
    assert settings.model_name_or_path == "google/vit-base-patch16-224-in21k"
    assert (settings.test_size, settings.validation_size, settings.split_by) == (
        0.15,
        0.15,
        "near-duplicates",
    )
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (4, 8)
    assert settings.min_steps == 300
    assert settings.linear_probe and settings.class_weights and settings.augment == "flip,turn"
    assert training.output_dir == "model" and training.load_best_model_at_end


def test_yaml_is_read_first_and_flags_win(tmp_path, folder):
    config = tmp_path / "run.yaml"
    text = "learning_rate: 1e-4\nseed: 7\nload_best_model_at_end: false\ndata_root: null\nbf16: false\n"
    config.write_text(text)
    settings, training = read_settings([*folder, "--config", str(config), "--seed", "8"])
    assert training.learning_rate == 1e-4 and training.seed == 8
    assert training.load_best_model_at_end is False and training.bf16 is False
    assert settings.data_root == "data"


def test_recipe_of_the_tutorial_is_what_it_did(folder):
    settings, training = read_settings([*folder, "--recipe", "tutorial"])
    assert (settings.split_by, settings.test_size, settings.validation_size) == ("random", 0.15, 0)
    assert (settings.linear_probe, settings.layer_decay, settings.augment) == (False, 1, "")
    assert settings.min_steps == 0
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (5, 16)
    assert (training.learning_rate, training.warmup_steps, training.weight_decay) == (2e-5, 500, 0.01)
    assert training.lr_scheduler_type == "linear" and training.optim.startswith("adamw")
    assert training.metric_for_best_model == "accuracy" and training.load_best_model_at_end


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_name_every_value_and_any_of_them_can_be_overridden(tmp_path, folder, recipe):
    assert RECIPES[recipe].keys() >= RECIPES["default"].keys()  # or those of another one would shine through
    settings, training = read_settings([*folder, "--recipe", recipe])
    for name, value in RECIPES[recipe].items():
        assert getattr(settings if hasattr(settings, name) else training, name) == value, name
    other = not RECIPES[recipe]["linear_probe"]
    (tmp_path / "run.yaml").write_text(f"recipe: {recipe}\nlayer_decay: 0.9\nlinear_probe: {other}\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--learning_rate", "3e-5", "--augment", "crop"]
    settings, training = read_settings([*folder, *flags])
    assert (settings.recipe, settings.layer_decay, settings.linear_probe) == (recipe, 0.9, other)
    assert (settings.augment, training.learning_rate) == ("crop", 3e-5)
    assert training.num_train_epochs == RECIPES[recipe]["num_train_epochs"]


def test_any_training_argument_is_a_setting(folder):
    flags = ["--label_smoothing_factor", "0.1", "--report_to", "none", "--fp16", "false"]
    _, training = read_settings([*folder, *flags])
    assert training.label_smoothing_factor == 0.1 and training.report_to == [] and training.fp16 is False


BAD = [
    (["--learning_rat", "1"], "learning_rat.*did you mean --learning_rate"),
    (["--learning_rate", "fast"], "learning_rate.*fast"),
    (["--num_train_epochs", "-1"], "num_train_epochs is -1"),
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0"),
    (["--num_train_epochs", "nan"], "num_train_epochs is nan"),
    (["--test_size", "nan"], "test_size"),
    (["--learning_rate", "-1"], "learning_rate is -1"),
    (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0"),
    (["--seed", "-1"], "seed is -1"),
    (["--dataloader_drop_last"], "dataloader_drop_last would change"),
    (["--prediction_loss_only"], "prediction_loss_only would change"),
    (["--label_names", "foo"], "label_names would change"),
    (["--test_size", "0"], "test_size"),
    (["--validation_size", "nan"], "validation_size"),
    (["--test_size", "0.6", "--validation_size", "0.5"], "less than 1"),
    (["--validation_size", "-0.1"], "validation_size"),
    (["--data_dir", "no/such/folder"], "no/such/folder is not a folder"),
    (["--augment", "flip,rotate"], "--augment does not know rotate; give any of flip,turn,crop,colour"),
    (["--recipe", "fastest"], "recipe: invalid choice: 'fastest'.*default"),
    (["--recipe"], "recipe.*expected one argument"),
    (["--min_steps", "-1"], "--min_steps is -1; give a number of steps"),
    (["--layer_decay", "0"], "--layer_decay is 0.0; give a share above 0"),
    (["--layer_decay", "1.5"], "--layer_decay is 1.5"),
    (["--layer_decay", "nan"], "--layer_decay is nan"),
    (["--linear_probe", "maybe"], "linear_probe.*maybe"),
    (["--split_by", "no.csv"], "no.csv is not a file; give near-duplicates, random"),
    (["--cross_validate", "2"], "cross_validate is 2; give 3 or more"),
    (["--cross_validate", "-5"], "cross_validate is -5"),
    (["--cross_validate", "5", "--recipe", "tutorial"], "cross_validate needs validation images; give a"),
    (["--cross_validate", "5", "--validation_size", "0"], "cross_validate needs validation images"),
    (["--cross_validate", "5", "--split_by", __file__], "cannot make folds from a CSV file"),
    (["--external_dir", "no/such/folder"], "external_dir no/such/folder is not a folder"),
    (["--save_strategy", "sometimes"], "sometimes"),
    (["--save_strategy", "no"], "save"),
    (["--metric_for_best_model", "macro_f2"], "macro_f2; use one of loss, accuracy"),
    (["--resume_from_checkpoint", "no/checkpoint"], "no/checkpoint is not a folder"),
    (["--bf16", "--fp16"], "fp16 and bf16"),
    (["--seed"], "seed.*expected"),
    (["nonsense"], "unknown argument nonsense"),
    (["--config", "no.yaml"], "cannot read --config no.yaml"),
    (["--report_to", "no_such_logger"], "pip install no_such_logger"),
    (["--report_to", ""], "report_to"),
    (["--learning_rate", "inf"], "learning_rate is inf; give 0 to 1e\\+06"),
    (["--weight_decay", "-1"], "weight_decay is -1"),
    (["--weight_decay", "inf"], "weight_decay is inf"),
    (["--warmup_steps", "nan"], "warmup_steps is nan"),
    (["--warmup_steps", "-1"], "warmup_steps"),
    (["--max_grad_norm", "-1"], "max_grad_norm is -1"),
    (["--label_smoothing_factor", "2"], "label_smoothing_factor is 2.0; give 0 to 1"),
    (["--num_train_epochs", "1e12"], "num_train_epochs is 10+.0; give 0 to"),
    (["--seed", "4294967296"], "seed is 4294967296"),
    (["--seed", "1e3"], "seed.*1e3"),
    (["--data_seed", "-1"], "data_seed is -1"),
    (["--save_total_limit", "0"], "save_total_limit is 0; give 1"),
    (["--save_total_limit", "-1"], "save_total_limit is -1"),
    (["--per_device_train_batch_size", "999999999"], "per_device_train_batch_size is 999999999"),
    (["--per_device_eval_batch_size", "-1"], "per_device_eval_batch_size is -1"),
    (["--eval_accumulation_steps", "0"], "eval_accumulation_steps is 0"),
    (["--dataloader_num_workers", "-1"], "dataloader_num_workers is -1"),
    (["--eval_steps", "0"], "eval_steps is 0"),
    (["--logging_strategy", "steps", "--logging_steps", "-1"], "logging_steps is -1"),
    (["--adam_beta1", "2"], "optimizer refuses these settings: Invalid beta"),
    (["--adam_epsilon", "-1"], "optimizer refuses these settings: Invalid epsilon"),
    (["--optim", "adamw_bnb_8bit"], "optimizer refuses these settings: You need to install `bitsandbytes`"),
    (["--optim", "sgdd"], "optim.*sgdd"),
    (["--optim_args", "foo"], "optimizer refuses these settings"),
    (["--lr_scheduler_type", "sinus"], "lr_scheduler_type.*sinus"),
    (["--lr_scheduler_type", "cosine_with_min_lr"], "optimizer refuses these settings.*min_lr"),
    (["--lr_scheduler_kwargs", "{bad"], "property name"),
    (["--torch_compile_backend", "nonsense"], "optimizer refuses these settings.*nonsense"),
    (["--torch_compile_mode", "nonsense"], "optimizer refuses these settings.*nonsense"),
    (["--use_cpu", "--fp16"], "--fp16 needs a GPU; leave it out"),
    (["--bf16", "maybe"], "bf16.*maybe"),
    (["--fsdp", "nonsense"], "fsdp would change"),
    (["--deepspeed", "no.json"], "deepspeed would change"),
    (["--accelerator_config", "no.json"], "no.json"),
    (["--save_only_model"], "save_only_model would change.*what a run can go on from"),
    (["--ignore_data_skip"], "ignore_data_skip would change"),
    (["--test_size", "half"], "test_size.*half"),
    (["--test_size", "inf"], "test_size"),
    (["--cross_validate", "2.5"], "cross_validate.*2.5"),
    (["--split_by", ""], "split_by"),
    (["--augment", "FLIP"], "--augment does not know FLIP"),
    (["--output_dir", ""], "--output_dir is empty"),
    (["--data_root", " "], "--data_root is empty"),
    (["--model_name_or_path", ""], "--model_name_or_path is empty"),
    (["--data_sha256", "abc"], "data_sha256 abc is no SHA-256; give 64"),
    (["--data_sha256", "0" * 64], "data_sha256 is for an archive"),
    (["--external_dir", __file__], "external_dir .* is not a folder"),
    (["--metric_for_best_model", ""], "metric_for_best_model"),
    (["--load_best_model_at_end", "true", "--eval_strategy", "no"], "load_best_model_at_end requires"),
    (["--hub_strategy", "foo"], "hub_strategy.*foo"),
    (["--hub_space_id", "me/page"], "page of a model that is published; add --push_to_hub"),
    (["--seed", "1", "2"], "unknown argument 2"),
    (["--no_such_thing=hf_" + "x" * 34], "unknown argument --no_such_thing; "),
    (["hf_" + "x" * 34], "unknown argument hf_\\.\\.\\.;"),
    (["--evaluation_strategy", "epoch"], "did you mean --eval_strategy"),
    (["--config"], "config.*expected one argument"),
    (["--max_steps", "-2"], "max_steps is -2; give -1 to"),
    (["--metric_for_best_model", "None"], "unknown --metric_for_best_model None"),
    (["--eval_do_concat_batches", "false"], "eval_do_concat_batches would change"),
    (["--use_liger_kernel"], "use_liger_kernel would change"),
    (["--external_dir", ""], "--external_dir is empty"),
    (["--data_dir", ""], "--data_dir is empty"),
    (["--data_dir", "x" * 5000], "is not a folder"),
    (["--split_by", "x" * 5000], "is not a file"),
    (["--resume_from_checkpoint", "x" * 5000], "is not a folder"),
    (["--output_dir", "caf\udce9"], "--output_dir is empty or no text"),
    (["--data_root", "caf\udce9"], "--data_root is empty or no text"),
    (["--data_root", "a\0b"], "--data_root is empty or no text"),
    (["--config", str(ROOT)], "cannot read --config"),
]
BAD_URLS = [
    ("", "--data_url is empty"),
    ("no.zip", "no.zip is not a file; give a URL or the path of an archive"),
    ("ftp://host/x.zip", "is not a file"),
    (str(ROOT), "is not a file"),
    (__file__, "is not named like an archive; give one that ends in"),
    ("http://", "is no URL: it names no server"),
    ("http:///a.zip", "is no URL: it names no server"),
    ("http://host:99999/a.zip", "is no URL: Port out of range 0-65535"),
    ("http://host/..zip", "is not named like an archive"),
    ("http://host/cache.zip", "would be unpacked where the pixels are cached; rename it"),
    ("http://host/download?id=7", "is not named like an archive"),
    ("http://[::1/x.zip", "is no URL: Invalid IPv6 URL"),
    ("https://user:hidden-word@host/x.zip", "--data_url has a password in it"),
]


@pytest.mark.parametrize("url, message", BAD_URLS)
def test_an_archive_that_cannot_be_is_one_error_line(tmp_path, url, message):
    with pytest.raises(SystemExit) as stopped:
        read_settings(["--data_url", url, "--output_dir", str(tmp_path / "model")])
    line = str(stopped.value)
    assert re.fullmatch(r"error: .+; .+", line) and message in line and "hidden-word" not in line


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_mistake_is_one_error_line(folder, flags, message):
    with pytest.raises(SystemExit) as stopped:
        read_settings([*folder, *flags])
    line = str(stopped.value)
    assert re.fullmatch(r"error: .+; .+", line), line
    assert re.search(message, line), line
    assert transformers.integrations.deepspeed.deepspeed_config() is None  # it would outlive the refusal


@pytest.mark.parametrize("name", ["output_dir", "data_root"])
@pytest.mark.parametrize("inside", [".", "model", "red/../model/deep"])
def test_folders_of_ours_may_not_lie_among_the_class_folders(tmp_path, name, inside):
    """The first run would work, the second one take report/ for images."""
    (tmp_path / "red").mkdir()
    flags = {"output_dir": tmp_path.parent / "model", "data_root": tmp_path.parent / "data"} | {name: inside}
    flags = [f"--{name}={tmp_path / value}" for name, value in flags.items()]
    with pytest.raises(
        SystemExit, match=f"error: --{name} .* lies in --data_dir, as if it were a class; choose"
    ):
        read_settings(["--data_dir", str(tmp_path), *flags])


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "unknown setting 'learning_rat'.*did you mean learning_rate"),
        ("- seed", "holds no settings"),
        ("seed: [1, 2", "cannot read"),
        ("seed: many", "seed.*many"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("output_dir: [a, b]", "unknown argument b"),
        ("seed: {a: 1}", "seed"),
        ("7: 8", "unknown setting '7'"),
        ('data_root: "a\\0b"', "--data_root is empty or no text"),
        ("[" * 5000, "cannot read"),
        ("seed: \x00", "cannot read"),
        ("!!python/object/apply:os.system ['true']", "cannot read"),
    ],
)
def test_a_mistake_in_the_yaml_file_is_one_error_line(tmp_path, folder, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit, match=message) as stopped:
        read_settings([*folder, "--config", str(tmp_path / "run.yaml")])
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
    for name in [*Settings.__annotations__, *TRAINING]:
        if not name.startswith("ddp_"):
            assert re.search(rf"--{name} .+?\(default: .+?\)", text), name
    assert "--adam_beta1" not in text and "no_load_best" not in text and len(text) < 5000


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
    "flags, images, rate",
    [
        ([], 8, 2e-5),
        (["--per_device_train_batch_size", "32"], 32, 4e-5),
        (["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "8"], 64, 5.66e-5),
        (["--recipe", "tutorial"], 16, 2e-5),
        (["--recipe", "tutorial", "--per_device_train_batch_size", "64"], 64, 4e-5),
        (["--per_device_train_batch_size", "64", "--learning_rate", "1e-4"], 64, 1e-4),
    ],
)
def test_learning_rate_follows_the_images_a_step(folder, flags, images, rate):
    _, training = read_settings([*folder, *flags])
    assert images_a_step(training) == images
    assert training.learning_rate == rate


def test_import_is_light():
    code = "import sys, finetune_vit; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "evaluate", "pandas", "sklearn", "scipy", "matplotlib"}
    assert not heavy & set(done.stdout.split())
    assert "finetune_vit" in done.stdout.split()


def test_import_runs_nothing():
    assert not finetune_vit.RUN and not hasattr(finetune_vit, "settings")
    assert (ROOT / "finetune_vit.py").samefile(finetune_vit.__file__)


def test_script_that_was_fetched_alone_says_so_at_once(tmp_path):
    (tmp_path / "finetune_vit.py").write_bytes((ROOT / "finetune_vit.py").read_bytes())
    done = subprocess.run([sys.executable, "finetune_vit.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "data/model_card.md is missing beside finetune_vit.py; fetch all of it: git clone" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["finetune_vit.py"]
