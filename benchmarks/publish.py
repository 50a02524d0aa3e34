"""Publish a run to a hub and load it back: each command with its output, for docs/publishing.md.

    PYTHONPATH=tests python benchmarks/publish.py        # two minutes on a CPU

The hub is the tests' server on the loopback, which keeps what `huggingface_hub` sends it. The model is tiny and made
here. A real hub only needs HF_TOKEN.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from common.report import printed
from common.tiny import save
from helpers.hub_server import TOKEN, HubServer

PUSHED = "from tbrm_trl import load_rollouts; load_rollouts('run').push_to_hub('me/rollouts', private=True)"
ASKED = "--benchmarks sums.jsonl --reward_funcs my_reward.letters --samples 4 --max_new_tokens 16"
COMMANDS = [
    "tbrm train --model_name_or_path base --dataset_name sums.jsonl --reward_funcs my_reward.letters --max_steps 4 "
    "--per_device_train_batch_size 8 --max_completion_length 16 --beta 0.1 --learning_rate 0.01 --save_rollouts true "
    "--output_dir run --push_to_hub true --hub_model_id me/letters --hub_private_repo true",
    f'python -c "{PUSHED}"',
    f"tbrm eval --model_name_or_path run {ASKED} --output_dir local",
    f"tbrm eval --model_name_or_path me/letters {ASKED} --output_dir pulled",
    "tbrm eval --compare local pulled",
    "tbrm train --model_name_or_path base --dataset_name me/rollouts --max_steps 1 --per_device_train_batch_size 8 "
    "--beta 0.1 --output_dir again",
]
# Options added to the printed commands, which a user with a GPU does not need: half precision is slow on a CPU.
HERE = {"tbrm train": " --use_cpu true --bf16 false", "tbrm eval": " --use_cpu true"}


def main() -> None:
    hub, root = HubServer(), Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "base", "qwen2")
        rows = [{"problem": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
        (Path(folder) / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (Path(folder) / "my_reward.py").write_text(
            "def letters(completions, **columns):\n"
            "    return [float(sum(map(str.islower, one[0]['content'])) >= 6) for one in completions]\n"
        )
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": f"{folder}/home", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": f"{root / 'src'}",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        for command in COMMANDS:
            print(f"$ {command}", flush=True)
            words = shlex.split(command + HERE.get(command[: command.find(" ", 5)], ""))
            words = [sys.executable, *(["-m", "tbrm_trl.cli", *words[1:]] if words[0] == "tbrm" else words[1:])]
            done = subprocess.run(
                words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            print("\n".join(printed(done.stdout.replace(folder, ""))) + "\n", flush=True)
            if done.returncode:
                sys.exit(done.stdout)
        for name, repo in hub.repos.items():
            files = ", ".join(f"{path} ({len(data):,})" for path, data in sorted(repo.files.items()))
            print(f"On the hub: {name}, private: {repo.private}, {len(repo.commits)} commits, bytes by file: {files}\n")
        print(hub.repos["me/letters"].files["README.md"].decode())
    hub.close()


if __name__ == "__main__":
    main()
