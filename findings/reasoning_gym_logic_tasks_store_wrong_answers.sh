#!/usr/bin/env bash
# reasoning-gym 0.1.25: three tasks of pure logic store wrong answers, and refuse the right ones.
#
# family_relationships asks what A is to B. For relations by marriage it stores what B is to A: a daughter-in-law is
# stored as a mother-in-law or a father-in-law. syllogism accepts a middle term that neither premise distributes, so
# that "all ants are dolphins, some dolphins are not spiders, so some ants are not spiders" is stored as valid. aiw asks
# for the female colleagues of a woman in two circles and counts one circle.
#
# Seen in 300 problems each, with seed 0: all 50 stored "mother-in-law" and "father-in-law" are roles of the other person;
# 38 stored "Yes" have a counterexample in which no term is empty; 80 of 94 stored numbers of colleagues differ from
# those of both circles together.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q reasoning-gym==0.1.25
"$folder/venv/bin/python" - <<'PYTHON'
import itertools
import re

import reasoning_gym


def problems(task):
    made = reasoning_gym.create_dataset(task, seed=0, size=300)
    return made, [made[number] for number in range(300)]


# ---- family_relationships: read who is married to whom, and whose child is whose
made, family = problems("family_relationships")
swapped = in_law = 0
for problem in family:
    if problem["answer"] not in ("mother-in-law", "father-in-law"):
        continue
    in_law += 1
    spouse, parents = {}, {}
    for one, other in re.findall(r"(\w+) is married to (\w+)", problem["question"]):
        spouse |= {one: other, other: one}
    for one, other, names in re.findall(
        r"(\w+) is married to (\w+)\. They have (?:a child|children) called ([^.]+)\.", problem["question"]
    ):
        parents |= {name: {one, other} for name in re.findall(r"[A-Z]\w+", names)}
    first, second = problem["metadata"]["person1"], problem["metadata"]["person2"]
    swapped += second in parents.get(spouse.get(first), ()) and first not in parents.get(spouse.get(second), ())
print("family_relationships:", swapped, "of", in_law, "are roles of the other person")

# ---- syllogism: look for a world that has members of every term, satisfies the premises and not the conclusion
FORM = re.compile(r"(All|No|Some) (\w+) are (not )?(\w+)")


def holds(statement, world):
    quantifier, subject, negated, predicate = statement
    having = [predicate in member for member in world if subject in member]
    if quantifier == "Some":
        return any(one != bool(negated) for one in having)
    return all(one == (quantifier == "All") for one in having)


def has_counterexample(premises, conclusion):
    terms = {term for _, one, _, other in [*premises, conclusion] for term in (one, other)}
    members = [set(some) for n in range(len(terms) + 1) for some in itertools.combinations(sorted(terms), n)]
    for size in range(1, len(members) + 1):
        for world in itertools.combinations(members, size):
            everything = set().union(*world)
            if everything == terms and all(holds(p, world) for p in premises) and not holds(conclusion, world):
                return True
    return False


made, syllogisms = problems("syllogism")
invalid = 0
for problem in syllogisms:
    first, second, conclusion = (
        FORM.fullmatch(problem["metadata"][name]).groups() for name in ("premise1", "premise2", "conclusion")
    )
    if problem["answer"] == "Yes" and has_counterexample([first, second], conclusion):
        invalid += 1
        assert made.score_answer("No", problem) < 1 == made.score_answer("Yes", problem)
print("syllogism:", invalid, "stored conclusions have a counterexample")

# ---- aiw: Matilda is one of A's n women and one of B's k women, so she knows A, n - 1 women there and k - 1 here
made, aiw = problems("aiw")
colleagues = [problem for problem in aiw if problem["metadata"]["task_type"] == "colleagues"]
forgotten = 0
for problem in colleagues:
    _, n, _, k = map(int, re.findall(r"\d+", problem["question"]))
    forgotten += int(problem["answer"]) != 1 + (n - 1) + (k - 1)
print("aiw:", forgotten, "of", len(colleagues), "forget the second circle")
assert in_law > 20 and swapped == in_law and invalid > 20 and forgotten > len(colleagues) / 2
PYTHON
