#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1: a JSON string that looks like a date is not loaded as a string.
#
# JSON has no dates, and `"answer": "2024-01-05"` is a string in the file. If all strings in that place look like ISO
# dates, `load_dataset("json")` gives datetimes, inside the messages of a chat too. The spelling is lost:
# "2024-01-05" and "2024-01-05 00:00:00" become equal, and as text both are the longer one, which is what a chat template
# writes or a reward function compares. One other string among them, and all stay strings: the type of every row depends
# on a single one. In CSV the same values stay text.
#
# Seen: the two spellings load as one datetime; a completion "2024-01-05" renders as "2024-01-05 00:00:00"; with a third
# row "unknown" the column is text again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 jinja2==3.1.6
cd "$folder"
HF_DATASETS_CACHE="$folder/cache" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import json
from datetime import datetime
from importlib.metadata import version

from datasets import load_dataset
from jinja2 import Template


def loaded(name, answers, kind="json"):
    rows = [{"answer": one, "completion": [{"role": "assistant", "content": one}]} for one in answers]
    with open(name, "w") as file:
        file.write("answer\n" + "\n".join(answers) if kind == "csv" else "\n".join(map(json.dumps, rows)))
    return load_dataset(kind, data_files=name, split="train")


two = ["2024-01-05", "2024-01-05 00:00:00"]
dates, mixed, csv = loaded("a.jsonl", two), loaded("b.jsonl", [*two, "unknown"]), loaded("c.csv", two, "csv")
template = Template("{% for message in messages %}{{ message.content }}{% endfor %}")
rendered = [template.render(messages=one) for one in dates["completion"]]
print(f"datasets {version('datasets')}, pyarrow {version('pyarrow')}")
print("JSON:", list(dates["answer"]), "rendered:", rendered)
print("JSON with one more row:", list(mixed["answer"]))
print("CSV:", list(csv["answer"]))
assert list(dates["answer"]) == [datetime(2024, 1, 5)] * 2
assert rendered == ["2024-01-05 00:00:00"] * 2
assert list(mixed["answer"]) == [*two, "unknown"] and list(csv["answer"]) == two
PYTHON
