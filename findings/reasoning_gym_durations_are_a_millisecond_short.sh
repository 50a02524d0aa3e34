#!/usr/bin/env bash
# reasoning-gym 0.1.25: nearly half of the answers of time_intervals in milliseconds are one millisecond too few.
#
# The task has the duration as a float of seconds and cuts its fraction off. A completion with the right duration gets
# 0.99999999, the stored answer 1. Whoever counts only a full score as solved rewards the wrong answer and refuses the
# right one.
#
# Seen in 500 problems with seed 0: 230 stored answers are one less than the difference of the two times in the
# question; no right answer to them scores 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q reasoning-gym==0.1.25
"$folder/venv/bin/python" - <<'PYTHON'
import re

import reasoning_gym

TIME = re.compile(r"(\d\d):(\d\d):(\d\d)\.(\d{3})")


def milliseconds(parts):
    hours, minutes, seconds, rest = map(int, parts)
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + rest


problems = reasoning_gym.create_dataset("time_intervals", seed=0, size=500, task_types=["time_ms"])
short, shown = 0, []
for problem in problems:
    start, end = map(milliseconds, TIME.findall(problem["question"]))
    stored = milliseconds(TIME.fullmatch(problem["answer"]).groups())
    if stored != end - start:
        assert stored == end - start - 1, problem
        minutes, rest = divmod(end - start, 60_000)
        right = f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"
        score = problems.score_answer(right, problem)
        assert score < 1 == problems.score_answer(problem["answer"], problem)
        short += 1
        shown.append((problem["question"], problem["answer"], right, score))
print(short, "of 500", *shown[:2], sep="\n")
assert 150 < short < 260
PYTHON
