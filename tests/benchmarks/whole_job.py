"""How long does the whole job take, step by step, at the size of Kvasir v2?

    python tests/benchmarks/whole_job.py [--images 8000] [--run "--recipe tutorial"] ... [--output FILE.json]

Draws JPEGs of Kvasir's sizes and 8 classes on all cores and a ViT-B/16 of random weights, then runs
finetune_vit.py on them once for each `--run`, a line of its flags. Prints the seconds at which each step
ended. The first run prepares the pixels, the others find them. Needs no network; on a GPU it takes minutes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from speed import draw_photos, make_model
from story import ROOT

from steps.workspace import versions

STEPS = {  # what the script says when a step has ended
    "load": r"[\d,]+ images in \d+ classes",
    "preprocess, duplicates, split": r"[\d,]+ groups; ",
    "model": r"million parameters",
    "linear probe": r"training on",
    "epoch 1": r"epoch 1 of",
    "last epoch": r"kept the weights",
    "calibrate, save": r"saved the model",
    "evaluate": r"test accuracy",
    "report": r"model and model card:",
}
RUNS = ["", "--per_device_train_batch_size 8", "--recipe tutorial"]


def run(flags: list[str], log: Path) -> dict[str, float]:
    """Run the script; return the seconds from its start to the end of each step, and of the whole."""
    ended, start = {}, time.perf_counter()
    command = [sys.executable, "finetune_vit.py", *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **options) as process, log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            for step, words in STEPS.items():
                if step not in ended and re.search(words, line):
                    ended[step] = time.perf_counter() - start
    ended["all"] = time.perf_counter() - start
    if process.returncode:
        print(log.read_text()[-2000:])
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--run", action="append", help='flags of the script; default: "", and two more')
    parser.add_argument("--model_name_or_path", help="default: a ViT-B/16 of random weights")
    parser.add_argument("--output", default="whole_job.json", help="where the figures go")
    options = parser.parse_args()
    table = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        start = time.perf_counter()
        draw_photos(work / "drawn", options.images, 8)
        print(f"drew {options.images} images in {time.perf_counter() - start:.0f} s", flush=True)
        checkpoint = make_model(options.model_name_or_path, work, base=True)
        for number, line in enumerate(options.run or RUNS):
            output, name = work / f"model-{number}", line or "default"
            flags = ["--data_dir", str(work / "drawn"), "--data_root", str(work / "data")]
            flags += ["--model_name_or_path", checkpoint, "--output_dir", str(output), "--report_to", "none"]
            table[name] = run([*flags, *line.split()], Path(options.output).with_suffix(f".{number}.log"))
            results = output / "report" / "metrics.json"
            if results.exists():
                table[name] |= json.loads(results.read_text())["speed"]
            print(pd.DataFrame(table)[[name]].to_string(float_format="{:,.1f}".format), flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    header = {"machine": f"{device}, {os.cpu_count()} CPU cores", "versions": versions(), "command": sys.argv}
    Path(options.output).write_text(json.dumps(header | {"seconds": table}, indent=1) + "\n")
    print(pd.DataFrame(table).to_string(float_format="{:,.1f}".format))


if __name__ == "__main__":
    main()
