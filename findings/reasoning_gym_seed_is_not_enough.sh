#!/usr/bin/env bash
# reasoning-gym 0.1.25: the same seed gives other problems in another process.
#
# Some tasks draw from sets, and the order of a set of strings changes with PYTHONHASHSEED, which Python draws anew for
# each process. Whoever makes "the same" data set in a trainer and in its workers, or again after a restart, scores
# completions against other problems.
#
# Seen: list_functions, ransom_note and isomorphic_strings with seed 3 differ between two processes with different
# PYTHONHASHSEED; chain_sum does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q reasoning-gym==0.1.25
questions() {
    PYTHONHASHSEED=$2 "$folder/venv/bin/python" -c "
import hashlib, reasoning_gym
questions = [entry['question'] for entry in reasoning_gym.create_dataset('$1', size=8, seed=3)]
print(hashlib.sha256(repr(questions).encode()).hexdigest()[:12])"
}
"$folder/venv/bin/pip" list 2>/dev/null | grep reasoning
for task in list_functions ransom_note isomorphic_strings chain_sum; do
    first=$(questions $task 1) second=$(questions $task 2)
    echo "$task: $first $second"
    if [ $task = chain_sum ]; then [ "$first" = "$second" ]; else [ "$first" != "$second" ]; fi
done
echo "three of four tasks differ"
