"""Step 0: mistakes in the settings; each ends in one line, before anything is made."""

import re
import sys

import pytest
import torch
import transformers
from conftest import ROOT, read_settings

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
    (["--split_by", "no.csv"], "--split_by does not know no.csv; give near-duplicates or random; a table"),
    (["--metadata", "no.csv"], "--metadata no.csv is not a file; give the path of a CSV file"),
    (["--dataset_name", "a/b", "--group_by", "folder"], "two sources|--group_by is for folders"),
    (["--group_by", "patient"], "--group_by does not know patient; give folder"),
    (["--cross_validate", "2"], "cross_validate is 2; give 3 or more"),
    (["--cross_validate", "-5"], "cross_validate is -5"),
    (["--cross_validate", "5", "--recipe", "tutorial"], "cross_validate needs validation images; give a"),
    (["--cross_validate", "5", "--validation_size", "0"], "cross_validate needs validation images"),
    (["--external_dir", "no/such/folder"], "external_dir no/such/folder is not a folder"),
    (["--save_strategy", "sometimes"], "sometimes"),
    (["--save_strategy", "no"], "save"),
    (["--metric_for_best_model", "macro_f2"], "macro_f2; use one of loss, accuracy"),
    (["--resume_from_checkpoint", "no/checkpoint"], "no/checkpoint is not a folder"),
    (
        ["--resume_from_checkpoint", "False"],
        "a run goes on where it stopped; to begin anew give another",
    ),
    (
        ["--do_eval"],
        "--do_train false, or --do_eval or --do_predict alone, ask for no training; to train, add "
        "--do_train; to evaluate only, --num_train_epochs 0 --linear_probe false$",
    ),
    (
        ["--do_train", "false", "--do_eval"],
        "--do_train false, or --do_eval or --do_predict alone, ask for no training",
    ),
    (["--do_train=false"], "--do_train false, or --do_eval or --do_predict alone, ask for no training"),
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
    (["--dataloader_num_workers", "2"], "^error: --dataloader_num_workers is 2; leave it out: "),
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
    (["--predictions_file", "x.csv"], "--predictions_file names the table of --predict; add --predict"),
    (["--data_dir", ""], "--data_dir is empty"),
    (["--data_dir", "x" * 5000], "is not a folder"),
    (["--metadata", "x" * 5000], "is not a file"),
    (["--metadata", ""], "--metadata is empty"),
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
    ("file:///no/such.zip", "is not a file"),
    (
        "http://host/x.7z",
        "x.7z is not a zip or tar archive; unpack it with another program and give the folder",
    ),
    ("http://host/", "names no archive; give the URL"),
    ("http://host/a%00.zip", "names no archive"),
    ("http://a..b/x.zip", "is no URL: "),
    ("http://", "is no URL: it names no server"),
    ("http:///a.zip", "is no URL: it names no server"),
    ("http://host:99999/a.zip", "is no URL: Port out of range 0-65535"),
    ("http://host/..zip", "names no archive"),
    ("http://host/cache.zip", "would be unpacked where the pixels are cached; rename it"),
    ("http://[::1/x.zip", "is no URL: Invalid IPv6 URL"),
    ("https://user:hidden-word@host/x.zip", "--data_url holds a user name or password"),
]


@pytest.mark.parametrize("url, message", BAD_URLS)
def test_an_archive_that_cannot_be_is_one_error_line(tmp_path, url, message):
    with pytest.raises(SystemExit) as stopped:
        read_settings(["--data_url", url, "--output_dir", str(tmp_path / "model")])
    line = str(stopped.value)
    assert re.fullmatch(r"error: .+; .+", line) and message in line and "hidden-word" not in line


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_mistake_is_one_error_line(right_flags, flags, message):
    with pytest.raises(SystemExit) as stopped:
        read_settings([*right_flags, *flags])
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
    message = f"error: --{name} .* lies in --data_dir, as if it were a class; choose"
    with pytest.raises(SystemExit, match=message):
        read_settings(["--data_dir", str(tmp_path), *flags])


REMEDY = "pip uninstall torchvision (it is not needed here), or pip install -U torch torchvision"


@pytest.mark.parametrize(
    "problem", ['RuntimeError("operator torchvision::nms does not exist")', 'OSError("symbol")']
)
def test_a_torchvision_that_does_not_fit_is_named_as_such(tmp_path, monkeypatch, right_flags, problem):
    """Transformers would say that it could not import something else."""
    (tmp_path / "site" / "torchvision").mkdir(parents=True)
    (tmp_path / "site" / "torchvision" / "__init__.py").write_text(f"raise {problem}")
    about = tmp_path / "site" / "torchvision-0.20.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(SystemExit) as stopped:
        read_settings(right_flags)
    line = f"error: torchvision 0.20.0 does not fit torch {torch.__version__}: {problem.split(chr(34))[1]}; "
    assert str(stopped.value) == line + REMEDY
