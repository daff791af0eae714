"""What does a folder of many small files cost, step by step, without training? Linux only.

    python tests/benchmarks/many_files.py [--images 500000] [--form classes|patients|table]

Draws JPEGs of 32 x 32 pixels and a tiny ViT, then runs finetune_vit.py on them twice: the second run should
find everything. Prints the CPU time and the most memory so far at the end of each step. The search for
near-duplicates is left out: see near_duplicates.py. Needs no network, and 4 KB per image in TMPDIR.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import simplejpeg
from transformers import ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from draw_sample import save_processor
from story import ROOT
from whole_job import STEPS


def draw(folder: Path, count: int, form: str) -> list[str]:
    """Fill `folder` with `count` JPEGs; return the flags that say how to read it."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        label, patient = f"class_{number % 10}", f"p{number // 200:05}"
        places = {"classes": label, "patients": f"{label}/{patient}", "table": f"{number // 5000:03}"}
        file = f"{places[form]}/{number:06}.jpg"
        cells = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(simplejpeg.encode_jpeg(cells, quality=80))
        rows.append((file, label, patient))
    table = folder.with_suffix(".csv")
    pd.DataFrame(rows, columns=["file", "label", "patient"]).to_csv(table, index=False)
    return {"classes": [], "patients": ["--group_by", "folder"], "table": ["--metadata", str(table)]}[form]


def make_model(folder: Path) -> str:
    """Save a tiny ViT for 32 x 32 pixels and return its folder."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    save_processor(folder, 32)
    return str(folder)


def used(process: subprocess.Popen) -> tuple[float, float]:
    """Return the CPU time of a process so far, in seconds, and the most memory it held, in GB."""
    times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[11:13]
    peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    return sum(map(int, times)) / 100, int(peak[1]) * 1024 / 1e9


def run(flags: list[str], report: Path) -> pd.DataFrame:
    """Run the script; return what it has `used` at the end of each step."""
    rows, pairs = {}, report / "near_duplicates.csv"
    command = [sys.executable, "-u", "finetune_vit.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "reading the checkpoint" in line and not pairs.exists():  # the folder is now this run's
                report.mkdir(exist_ok=True)
                pairs.write_text("file_a,file_b,distance,label_a,label_b\n")
            for step, words in STEPS.items():
                if step not in rows and re.search(words, line):
                    rows[step] = used(process)
    if process.returncode:
        sys.exit(f"error: the script ended with status {process.returncode}; its last words are above")
    return pd.DataFrame.from_dict(rows, "index", columns=["CPU s", "peak GB"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=500_000)
    parser.add_argument("--form", choices=["classes", "patients", "table"], default="classes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        flags = draw(work / "drawn", options.images, options.form)
        flags += ["--data_dir", str(work / "drawn"), "--data_root", str(work / "data"), "--report_to", "none"]
        flags += ["--model_name_or_path", make_model(work / "vit"), "--output_dir", str(work / "model")]
        flags += ["--num_train_epochs", "0", "--linear_probe", "false"]
        for name in ("first run", "second run"):
            print(name, run(flags, work / "model" / "report").round(2).to_string(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
