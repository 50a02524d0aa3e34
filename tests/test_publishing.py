"""What is pushed to a hub: its card, its files, and that they load back. The client is the real `huggingface_hub`."""

import hashlib
import os
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml
from common.launch import ROOT
from helpers.hub_server import TOKEN, HubServer
from helpers.runs import DATA, build, config
from huggingface_hub import ModelCard
from transformers.training_args import OptimizerNames
from transformers.utils import PushInProgress

from tbrm_trl.publishing import CardFacts, escaped, keep_at_home, last_evaluation, model_card, snippet

NASTY = "](http://x) <script>|`\n---\nname: *x*"


def facts(**changed) -> CardFacts:
    given = dict(
        name="tiny", repo="me/tiny", base_model="org/base", adapter=False, vision=False, dataset="org/data",
        rewards=["accuracy"], updates=4,
        settings={"beta": 0.02, "soft_value": "calibrated"}, tags=["trl", "tbrm"], versions={"trl": "1.16"},
        method={"id": "2505.15311", "title": "TBRM", "citation": "@x{y}"},
        log=[
            {"step": 2, "reward": 0.25, "residual/rms": 0.5}, {"step": 2, "eval_reward": 0.2},
            {"step": 4, "reward": 0.75, "kl": None}, {"step": 4, "eval_reward": 0.5, "eval_hard_reward": 0.125},
        ],
    )  # fmt: skip
    return CardFacts(**{**given, **changed})


def metadata(card: ModelCard) -> dict:
    return yaml.safe_load(str(card).split("---")[1])


# ---- in the background ----------------------------------------------------------------------------------------------


def test_a_push_that_fails_is_told_of_once(llama, tmp_path):
    """transformers starts a push at every checkpoint, and reads none of their errors."""
    trainer = build(llama, tmp_path)
    failed, done, under_way = Future(), Future(), Future()
    failed.set_exception(PermissionError("403: the quota is exceeded\nmore"))
    done.set_result("commit")
    trainer.push_in_progress = PushInProgress([failed, done, under_way])
    with pytest.warns(UserWarning, match=r"A push to the Hub failed \(403: the quota is exceeded\).*push_to_hub"):
        trainer._tell_of_failed_pushes()
    assert trainer.push_in_progress.jobs == [under_way]
    under_way.set_exception(ConnectionError("cut off"))
    with pytest.warns(UserWarning, match="cut off"):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer._tell_of_failed_pushes()


# ---- the card --------------------------------------------------------------------------------------------------------


def test_the_card_tells_of_the_run():
    card = model_card(facts())
    text, said = str(card), metadata(card)
    assert (
        said["base_model"] == "org/base" and said["datasets"] == "org/data" and said["library_name"] == "transformers"
    )
    (model,) = said["model-index"]
    found = [(r["dataset"]["name"], m["type"], m["value"]) for r in model["results"] for m in r["metrics"]]
    assert found == [("evaluation set", "reward", 0.5), ("hard", "reward", 0.125)]
    assert {r["dataset"]["type"] for r in model["results"]} == {"custom"}  # not the one that it was trained on
    for part in ("arxiv.org/abs/2505.15311", "| beta | 0.02 |", "| 2 | 0.25 | 0.5 | – | – | – |", "| trl | 1.16 |"):
        assert part in text
    assert 'name = "me/tiny"' in text and "@x{y}" in text


def test_values_of_options_are_as_they_are_given():
    assert r"| optim | adamw\_torch |" in str(model_card(facts(settings={"optim": OptimizerNames.ADAMW_TORCH})))


def test_the_card_is_of_the_weights_that_are_pushed(llama, tmp_path):
    """After training these are the best checkpoint's. The card names no file of this machine as its data."""
    data = tmp_path / "sums.jsonl"
    data.touch()
    trainer = build(
        llama, tmp_path, load_best_model_at_end=True, eval_dataset=DATA, eval_strategy="steps", save_strategy="steps"
    )
    trainer.state.log_history = [{"step": 2, "eval_reward": 0.9}, {"step": 4, "eval_reward": 0.5}]
    trainer.state.best_global_step, trainer.state.global_step = 2, 4
    card = trainer.args.output_dir + "/README.md"
    for in_train, value, updates in ((False, 0.9, 2), (True, 0.5, 4)):
        trainer.is_in_train = in_train
        trainer.create_model_card(dataset_name=str(data))
        said = ModelCard.load(card)
        assert said.data.eval_results[0].metric_value == value and f"trained by {updates} updates" in str(said)
        assert said.data.datasets is None and "sums" not in str(said)


def test_a_push_of_whole_checkpoints_is_warned_of():
    with pytest.warns(UserWarning, match=r"`hub_strategy='checkpoint'` pushes whole checkpoints.*`hub_private_repo=Tr"):
        config(push_to_hub=True, hub_strategy="checkpoint")


def test_the_last_evaluation_of_each_set_counts():
    log = [
        {"eval_reward": 1.0, "eval_rewards/f/mean": 0.5},
        {"eval_a_b_avg@8": 0.1, "eval_math500/avg@1": 0.3},
        {"eval_reward": 2.0, "eval_kl": 9},
    ]
    assert last_evaluation(log) == [
        ("", "reward", 2.0),
        ("", "rewards/f/mean", 0.5),
        ("a_b", "avg@8", 0.1),
        ("math500", "avg@1", 0.3),
    ]


def test_names_in_the_card_are_text():
    card = model_card(facts(name=NASTY, base_model=None, dataset=NASTY, rewards=[NASTY], settings={"beta": NASTY}))
    body = str(card).split("\n---\n", 1)[1]
    assert "<script" not in body and "](http://x)" not in body
    assert escaped(NASTY) == r"\]\(http://x\) &lt;script&gt;\|\` --- name: \*x\*"
    assert ModelCard(str(card)).data.model_name == " ".join(NASTY.split())


def test_what_stays_at_home_is_added_to_what_a_user_ignores(tmp_path):
    (tmp_path / ".gitignore").write_text("mine\nrollouts/\n")
    keep_at_home(tmp_path)
    keep_at_home(tmp_path)
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines[:2] == ["mine", "rollouts/"] and lines.count("rollouts/") == 1 and "updates/" in lines
    assert {"evaluations/", "records/"} <= set(lines)


def test_every_folder_that_a_run_makes_stays_at_home(llama, tmp_path):
    """The exception is checkpoints, which transformers leaves out itself."""
    trainer = build(
        llama, tmp_path, soft_value="optimal", soft_value_samples=2, save_rollouts=True, log_completions=True,
        publish_policy=True, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    out = Path(trainer.args.output_dir)
    keep_at_home(out)
    made = {f"{one.name}/" for one in out.iterdir() if one.is_dir() and not one.name.startswith("checkpoint-")}
    assert len(made) >= 5 and made <= set((out / ".gitignore").read_text().splitlines())


# ---- a push and a pull -----------------------------------------------------------------------------------------------

PUSH = """
    import json, sys
    from pathlib import Path
    from common.tiny import save
    from helpers.runs import build, DATA
    from tbrm_trl import TBRMTrainer, load_rollouts

    folder, token = Path(sys.argv[1]), sys.argv[2]
    model = save(folder / "model", hidden_size=256, intermediate_size=2048, num_hidden_layers=2)
    full = build(
        model, folder, trainer_class=TBRMTrainer, push_to_hub=True, hub_model_id="me/full", hub_token=token,
        hub_private_repo=True, save_strategy="steps", save_steps=1, save_rollouts=True, log_completions=True,
        eval_dataset=DATA, eval_strategy="steps", eval_steps=2,
    )
    full.train()
    full.push_to_hub(dataset_name="me/rollouts")
    load_rollouts(folder / "out").push_to_hub("me/rollouts", token=token, private=True)
    said = {}
    for name, push in {
        "bad token": lambda: full.push_to_hub(token="hf_wrong", dataset_name="me/rollouts"),
    }.items():
        try:
            push()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    from peft import LoraConfig
    adapter = build(model, folder / "lora", trainer_class=TBRMTrainer, peft_config=LoraConfig(r=4), learning_rate=0.1)
    adapter.train()
    adapter.push_to_hub(token=token)
    (folder / "said.json").write_text(json.dumps(said))
"""
PULL = """
    import sys
    from pathlib import Path
    import torch
    from datasets import load_dataset
    from helpers.benchmark_runs import LETTERS, SETTINGS
    from helpers.runs import build
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM
    from tbrm_trl import TBRMTrainer, load_rollouts
    from tbrm_trl.evaluation.run import ModelPolicy, evaluate

    folder, ids = Path(sys.argv[1]), torch.arange(3, 20)[None]
    for repo, out, loader in (
        ("me/full", "out", AutoModelForCausalLM), ("me/out", "lora/out", AutoPeftModelForCausalLM)
    ):
        logits = [loader.from_pretrained(name).eval()(ids).logits for name in (repo, folder / out)]
        assert torch.equal(*logits), repo
        policies = [ModelPolicy.load(str(name), use_cpu=True) for name in (repo, folder / out)]
        results = [
            evaluate(one, LETTERS, SETTINGS, folder / f"{repo}-{number}.jsonl") for number, one in enumerate(policies)
        ]
        assert results[0].rows == results[1].rows and len(set(map(ModelPolicy.weights, policies))) == 1, repo
    pulled, saved = load_dataset("me/rollouts", split="train"), load_rollouts(folder / "out")
    assert pulled.to_list() == saved.to_list()
    logged = build(str(folder / "model"), folder / "again", None, pulled, trainer_class=TBRMTrainer, max_steps=1)
    logged.train()
    assert "residual/logged_rms" in logged.state.log_history[0]
"""


def run(program: str, hub: HubServer, folder: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    paths = [ROOT / "src", ROOT / "tests", ROOT / "benchmarks", *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / "home"), "HF_TOKEN": token, "CI": "1", "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=280)


@pytest.fixture
def hub():
    server = HubServer()
    yield server
    server.close()


@pytest.mark.launch
def test_a_model_an_adapter_and_rollouts_go_to_a_hub_and_come_back(hub, tmp_path):
    """In and after training, one upload cut off in the middle, into a private repository; read by other processes."""
    hub.drop_uploads = 1
    pushed = run(PUSH, hub, tmp_path, str(tmp_path), TOKEN)
    assert not pushed.returncode, pushed.stderr[-3000:]
    assert hub.drop_uploads == 0

    full = hub.repos["me/full"]
    assert full.private and len(full.commits) >= 2 and "End of training" in full.commits
    local = {name: (tmp_path / "out" / name).read_bytes() for name in full.files if name != ".gitattributes"}
    digests = [{n: hashlib.sha256(data).hexdigest() for n, data in some.items()} for some in (full.files, local)]
    assert digests[0] == digests[1] and len(full.files["model.safetensors"]) > 10_000_000
    assert "model.safetensors" in full.lfs and any(one.startswith("PUT /lfs/") for one in hub.requests)
    home = ("rollouts", "updates", "completions", "checkpoint", "log.jsonl")
    assert not [name for name in full.files if name.startswith(home)]
    said = metadata(ModelCard(full.files["README.md"].decode()))
    assert said["datasets"] == "me/rollouts" and said["model-index"][0]["results"]
    everything = b"".join(data for repo in hub.repos.values() for data in repo.files.values())
    assert TOKEN.encode() not in everything and str(tmp_path).encode() not in full.files["README.md"]
    assert metadata(ModelCard(hub.repos["me/out"].files["README.md"].decode()))["library_name"] == "peft"
    assert "401" in (tmp_path / "said.json").read_text()

    pulled = run(PULL, hub, tmp_path, str(tmp_path))
    assert not pulled.returncode, pulled.stderr[-3000:]
    for program in (snippet("me/full", adapter=False), snippet("me/out", adapter=True)):
        shown = run(program, hub, tmp_path)
        # The tokenizer of these letters loses its spaces when it is loaded.
        assert not shown.returncode and shown.stdout.startswith(("2 + 2 =", "2+2=")), shown.stderr[-2000:]

    (tmp_path / "stranger").mkdir()
    refused = run(snippet("me/full", adapter=False), hub, tmp_path / "stranger", token="")
    assert refused.returncode and ("me/full" in refused.stderr)
