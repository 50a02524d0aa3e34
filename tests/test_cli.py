"""The command line: its errors, and that its commands do what they claim."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from common.launch import ROOT, free_port, run
from common.tiny import save
from helpers.examples import RECIPES, sums
from helpers.own_code import give_code
from trl import ModelConfig

from tbrm_trl.cli import COMMANDS, evaluate, main, train
from tbrm_trl.cli.parsing import Refused, Words, sorted_words
from tbrm_trl.evaluation.results import read_result

TBRM = [sys.executable, "-m", "tbrm_trl.cli"]


def said(capsys, *arguments: str) -> list[str]:
    """The error lines of a refused command."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("tbrm ")]  # not bars


# ---- the table -------------------------------------------------------------------------------------------------------


def test_help_needs_no_torch():
    """The commands are listed before anything heavy is imported."""
    code = "import sys, tbrm_trl.cli as cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_a_command_that_is_not_there():
    with pytest.raises(SystemExit, match=r"no command 'trian'\. Did you mean train"):
        main(["trian"])


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code is None and f"tbrm {command}" in capsys.readouterr().out


def test_a_reward_beside_the_recipe(tmp_path, monkeypatch):
    """The script of an installed command does not have the current folder on its path."""
    (tmp_path / "a_command_here.py").write_text("main = print")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
    monkeypatch.setitem(COMMANDS, "here", ("a_command_here", "prints"))
    main(["here"])


# ---- what is wrong, all of it at once --------------------------------------------------------------------------------


def test_one_value_where_several_may_stand(tmp_path):
    """In a recipe as on the command line. The recipe's file may follow an equals sign."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: d\nreward_funcs: my_rewards.math_score\nreward_weights: 0.5\noutput_dir: o\n")
    data, config, _ = train.parse([f"--config={recipe}", "--use_cpu", "true", "--bf16", "false"])
    assert data.reward_funcs == ["my_rewards.math_score"] and config.reward_weights == [0.5]


def test_rewards_with_their_weights_in_a_recipe(llama, tmp_path, monkeypatch):
    """They are a mapping, as for `rewards.load`. Weights of the command line come first."""
    path, file, built = tmp_path / "recipe.yaml", sums(tmp_path / "sums.json"), []
    path.write_text(json.dumps({"reward_funcs": {"math": 1.0, "format": 0.1}}))
    monkeypatch.setattr(train, "TBRMTrainer", lambda args, **given: built.append((args.reward_weights, given)) or 1 / 0)
    for options, expected in (([], [1.0, 0.1]), (["--reward_weights", "2", "3"], [2.0, 3.0])):
        given = ["--config", str(path), "--model_name_or_path", llama, "--dataset_name", str(file), *options]
        with pytest.raises(ZeroDivisionError):
            main(["train", *given, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"])
        weights, others = built.pop()
        assert weights == expected and len(others["reward_funcs"]) == 2


def test_switches_of_the_launcher_take_a_word(tmp_path):
    """They do so on the command line and in a recipe, though accelerate's own switches take none."""
    path = tmp_path / "recipe.yaml"
    for given, recipe, expected in (
        (["--multi_gpu", "true"], {}, ["--multi_gpu"]),
        (["--multi_gpu", "--num_processes=2"], {}, ["--multi_gpu", "--num_processes", "2"]),
        (["--use_deepspeed", "false"], {"multi_gpu": True, "cpu": False}, ["--multi_gpu"]),
    ):
        path.write_text(json.dumps({"dataset_name": "d", **recipe}))
        words = sorted_words(train.parser(), ["--config", str(path), *given], train.launcher_options())
        assert sorted(words.launcher) == sorted(expected)
    with pytest.raises(Refused, match="--multi_gpu takes true or false, not 'both'"):
        sorted_words(train.parser(), ["--dataset_name", "d", "--multi_gpu", "both"], train.launcher_options())


@pytest.mark.parametrize(
    ("environment", "options", "launches"),
    [
        ({}, [], True),
        ({}, ["--num_processes", "1"], True),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, [], False),  # by accelerate's launch of one process
        ({"LOCAL_RANK": "0"}, [], False),
        ({train.LAUNCHED: "1"}, [], False),
    ],
)
def test_who_starts_the_launcher_on_a_machine_of_several_gpus(environment, options, launches, monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", train.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    called: list[str] = []
    monkeypatch.setattr(train.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(train.Parser, "parse", lambda self, words: (train.DataArguments("d"), None, None))
    monkeypatch.setattr(train, "launch", lambda words: called.append("launch"))
    monkeypatch.setattr(train, "run", lambda *given: called.append("run"))
    train.main(["--dataset_name", "d", *options])
    assert called == ["launch" if launches else "run"]


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({}, "2,3"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "2"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "LOCAL_RANK": "0"}, "2,3"),
    ],
)
def test_who_was_launched_alone_sees_one_gpu(environment, seen, monkeypatch):
    """The import restricts it, before a library can use CUDA. The Trainer would spread the model over all GPUs."""
    for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"CUDA_VISIBLE_DEVICES": "2,3", **environment}.items():
        monkeypatch.setenv(name, value)
    imported = importlib.util.find_spec(train.__name__)
    imported.loader.exec_module(importlib.util.module_from_spec(imported))  # as its first import does
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize("code", [2, 143])
def test_the_exit_code_of_a_single_launched_process_is_the_commands(code, monkeypatch):
    """Accelerate waits for it and raises, but the process has already printed why it ended."""

    def ended(options):
        raise subprocess.CalledProcessError(code, "python")

    monkeypatch.setenv(train.LAUNCHED, "")
    monkeypatch.setattr("accelerate.commands.launch.launch_command", ended)
    with pytest.raises(SystemExit) as left:
        train.launch(Words(["--dataset_name", "d"], ["--num_processes", "1"]))
    assert left.value.code == code


def test_a_missing_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv(train.LAUNCHED, "")
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: False)
    with pytest.raises(Refused, match="accelerate: DeepSpeed is not installed"):
        train.launch(Words([], ["--config_file", str(ROOT / "examples/accelerate/zero2.yaml")]))


def test_every_wrong_field_is_named(tmp_path, capsys):
    """In the file and on the line: unknown with the nearest name, of another type, outside the choices, or missing."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lerning_rate: 1e-6\nmax_steps: many\nsave_strategy: step\nbeta: 1e-2\nnum_processes: 2\n")
    lines = said(
        capsys, "train", "--config", recipe, "--model_name_or_pth", "m", "--use_cpu", "perhaps", "--seed", "1", "2"
    )
    assert [line.removeprefix("tbrm train: ").removeprefix(f"{recipe}: ") for line in lines[:-1]] == [
        "there is no field lerning_rate. Did you mean learning_rate?",
        "max_steps takes int, not 'many'.",
        "save_strategy takes no, steps, epoch, best, not 'step'. Did you mean steps?",
        "there is no option --model_name_or_pth. Did you mean --model_name_or_path?",
        "--use_cpu takes true or false, not 'perhaps'.",
        "--seed takes one value, not '1 2'.",
    ]
    assert lines[-1].startswith("tbrm train: --dataset_name is missing: ")


def test_every_contradiction_is_named(capsys):
    lines = said(
        capsys, "train", "--dataset_name", "none", "--use_cpu", "true", "--bf16", "false", "--beta", "-1",
        "--temperature", "0", "--soft_value", "polcy",
    )  # fmt: skip
    assert len(lines) == 3
    assert all(
        name in line for name, line in zip(("beta=-1.0", "temperature=0.0", "soft_value='polcy'"), lines, strict=True)
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read (No such file"), ("a: [", "is not YAML"), ("- a", "must hold fields")],
)
def test_a_recipe_that_is_none(content, expected, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    line = said(capsys, "train", "--config", recipe, "--dataset_name", "none")[0]
    assert f"--config {recipe} {expected}" in line


TINY = ("--model_name_or_path", "TINY", "--max_completion_length", "8")
ALMOST = ("train", "--model_name_or_path", "m", "--use_cpu", "true", "--bf16", "false", "--dataset_name")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--reward_funcs", "no_module.reward"], "The reward 'no_module.reward' cannot be imported: No module named"),
        (["--reward_funcs", "helpers.reward_functions.absent"], "cannot be imported: module"),
        (["--reward_funcs", "mathh"], "There is no reward 'mathh'. Names: math, "),
        (["--reward_funcs", "math", "format", "--reward_weights", "1"], "--reward_weights has 1 numbers for 2"),
        (["--eval_benchmarks", "math500"], "but eval_strategy is no"),
        (["--eval_benchmarks", "aime24", "--eval_strategy", "steps", "--eval_steps", "1"], "cannot be loaded from the"),
        ([*TINY, "--attn_implementation", "flash_attention_2"], "FlashAttention2"),
        (["--reward_funcs", "helpers.runs.PROMPTS"], "The reward 'helpers.runs.PROMPTS' is no function, but ["),
        (["--eval_benchmarks", "NOTES.jsonl", "--eval_strategy", "steps", "--eval_steps", "1"], "Call the one of the"),
        (["--answer_column", "absent"], "There is no column 'absent'. Columns: "),
        (["--dataset_name", "none"], "none cannot be loaded from the Hub ("),
        (["--dataset_name", "none.csv"], "There is no file 'none.csv'."),
        (["--dataset_name", "EMPTY.jsonl"], "EMPTY.jsonl cannot be read (it is empty)."),
        (["--dataset_name", "CUT.jsonl"], "CUT.jsonl cannot be read (JSON parse error"),
        (["--dataset_name", "NOTES.jsonl"], "no column holds answers that can be read. Columns: prompt, note."),
        (["--dataset_name", "NOTES.jsonl", "--reward_funcs", "math", "format"], "no column holds answers"),
        (["--dataset_name", "FOLDER"], "No saved rollouts (step-*.parquet) in FOLDER"),
        ([], "The model 'm', no folder here, cannot be loaded: "),
    ],
)  # fmt: skip
def test_what_training_cannot_use(options, expected, llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("TINY").symlink_to(llama)
    Path("FOLDER").mkdir()
    for name, text in {"EMPTY": "", "CUT": '{"prompt": "1', "NOTES": '{"prompt": "1+1=", "note": "a sum"}'}.items():
        Path(f"{name}.jsonl").write_text(text)
    (line,) = said(capsys, *ALMOST, sums(tmp_path / "sums.json"), "--output_dir", tmp_path / "out", *options)
    assert expected in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--benchmarks math500", "--model_name_or_path is missing"),
        ("MODEL", "--benchmarks is missing"),
        ("MODEL --suite paper", "there is no suite 'paper'. Names: tbrm-paper"),
        ("MODEL --suite tbrm-paper --samples 2", "--suite sets samples"),
        ("MODEL --suite tbrm-paper --benchmarks math500 gsm8k", "--benchmarks gsm8k is not of --suite tbrm-paper"),
        ("MODEL --suite tbrm-paper --benchmarks aime42=a.csv", "aime42=a.csv is not of --suite tbrm-paper, which has"),
        ("MODEL --suite tbrm-paper --benchmarks amc23=a.csv amc23=b.csv", "--benchmarks names amc23 2 times"),
        ("--model_name_or_path none TWO_SUMS", "Several benchmarks are called sums"),
        ("--model_name_or_path none SUMS --output_dir FILE", "Cannot write to --output_dir, "),
        ("--model_name_or_path none SUMS --output_dir FILE/out", "Cannot write to the folder of --output_dir, "),
        ("MODEL SUMS --attn_implementation flash_attention_2", "cannot be loaded: "),
        ("MODEL --benchmarks aime24", "aime24: HuggingFaceH4/aime_2024 cannot be loaded from the Hub"),
        ("--model_name_or_path none SUMS", "none cannot be loaded: "),
        ("MODEL SUMS --temperature 0 --samples 2", "2 greedy samples of a prompt are all the same"),
        ("MODEL SUMS --prompt_template Q:", "no {question} in it"),
        ("MODEL SUMS", "Give 171 new tokens or less (--max_new_tokens of"),
        ("MODEL SUMS --reward_funcs no.reward", "The reward 'no.reward' cannot be imported"),
        ("MODEL SUMS --answer_column absent", "sums: There is no column 'absent'. Columns: "),
        ("MODEL SUMS --samples 0", "--samples 0 must be at least 1"),
        ("MODEL SUMS --batch_size 0", "--batch_size 0 must be at least 1"),
        ("MODEL SUMS --use_peft true --lora_r 8", "for training alone: --use_peft, --lora_r. Leave it out. To"),
        ("MODEL SUMS --use_dora true", "for training alone: --use_dora. Leave it out"),
        ("MODEL SUMS --load_in_8bit true --bnb_4bit_quant_type fp4", "--bnb_4bit_quant_type is for --load_in_4bit"),
        ("MODEL SUMS --use_cpu true --load_in_4bit true", "--use_cpu does not go with --load_in_4bit"),
        ("MODEL SUMS --use_cpu true --load_in_8bit true", "--use_cpu does not go with --load_in_8bit"),
        (
            "MODEL --benchmarks gym:chain_sum aime24=a.csv --answer_column answer",
            "--answer_column is for files of your",
        ),
        ("MODEL --suite tbrm-paper --answer_column answer", "--answer_column is for files of your own"),
        ("MODEL SUMS --answer_column answer --reward_funcs my.reward", "--answer_column is for math"),
        ("MODEL SUMS --prompt_template {question} --system_prompt s", "--system_prompt changes nothing beside"),
        (
            'MODEL SUMS --prompt_template {question} --chat_template_kwargs {"a":1}',
            "--chat_template_kwargs changes nothing",
        ),
        ("MODEL SUMS --chat_template_kwargs a", "--chat_template_kwargs takes a JSON object, such as"),
        ("MODEL SUMS --chat_template_kwargs [1]", "not '[1]'."),
        ("BARE SUMS", "has no chat template. Ask in plain text"),
        ("--compare a", "--compare takes two results, not 1"),
        ("--compare a.jsonl b.jsonl", "There is no result at a.jsonl"),
    ],
)
def test_what_cannot_be_evaluated(options, expected, llama, bare, tmp_path, capsys):
    names = {
        "MODEL": ["--model_name_or_path", llama],
        "BARE": ["--model_name_or_path", bare],
        "SUMS": ["--benchmarks", str(sums(tmp_path / "sums.json"))],
        "TWO_SUMS": ["--benchmarks", str(sums(tmp_path / "sums.json")), str(sums(tmp_path / "sums.jsonl"))],
        "FILE": [str(tmp_path / "sums.json")],
        "FILE/out": [str(tmp_path / "sums.json" / "out")],
    }
    words = [word for name in options.split() for word in names.get(name, [name])]
    results = [] if "--compare" in words else ["--output_dir", tmp_path / "out"]
    (line,) = said(capsys, "eval", *results, *words)
    assert line.startswith("tbrm eval: ") and expected in line
    assert not (tmp_path / "out").exists()


def test_what_vllm_does_not_take(capsys):
    """Options for transformers alone, which would have no effect."""
    given = "--load_in_4bit true --attn_implementation eager --use_cpu true --batch_size 8".split()
    lines = said(capsys, "eval", "--model_name_or_path", "m", "--benchmarks", "math500", "--backend", "vllm", *given)
    assert lines == [f"tbrm eval: {name} is for --backend transformers: leave it out." for name in given[::2]]


@pytest.mark.parametrize(
    ("given", "computed"),
    [([], torch.bfloat16), (["--dtype", "auto"], torch.bfloat16), (["--dtype", "float16"], torch.float16)],
)
def test_4_bits_compute_in_a_dtype(given, computed, monkeypatch):
    """The command's own default is "auto", which is no dtype to compute in. The weights are still loaded as given."""
    loaded = {}
    monkeypatch.setattr(evaluate.ModelPolicy, "load", lambda name, **options: loaded.update(options))
    reader = evaluate.Parser(evaluate.EvaluationArguments, ModelConfig, prog="tbrm eval", description="", dtype="auto")
    words = sorted_words(reader, ["--model_name_or_path", "m", "--benchmarks", "b", "--load_in_4bit", "true", *given])
    evaluate.policy_of(*reader.parse(words))
    assert loaded["quantization_config"].bnb_4bit_compute_dtype == computed
    assert loaded["dtype"] == (given or ["auto"])[-1] and "batch_size" not in loaded


@pytest.mark.parametrize(
    ("where", "absent", "expected"),
    [
        ("tbrm_trl.evaluation.run.version", "math-verify", 'needs math-verify: pip install "tbrm-trl[math]"'),
        ("tbrm_trl.cli.parsing.get_quantization_config", "bitsandbytes", "none cannot be loaded: No package metadata"),
        ("tbrm_trl.evaluation.run.AutoTokenizer.from_pretrained", "bitsandbytes", "none cannot be loaded: No package"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_installed(where, absent, expected, tmp_path, capsys, monkeypatch):
    """A judge's package is checked before a model is loaded. A model's error has the name of the model."""

    def raises(name, **options):
        if name == absent or absent == "bitsandbytes":
            raise PackageNotFoundError(absent)
        return version(name)

    monkeypatch.setattr(where, raises)
    (line,) = said(capsys, "eval", "--model_name_or_path", "none", "--benchmarks", sums(tmp_path / "sums.json"))
    assert expected in line


def test_an_evaluation_is_one_process(capsys, monkeypatch):
    """Several would write one file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = said(capsys, "eval", "--model_name_or_path", "m", "--benchmarks", "math500")
    assert "start `tbrm eval` without a launcher" in line


def test_a_checkpoint_that_is_none(llama, tmp_path, capsys):
    """It is refused before training, like everything else."""
    given = [
        *ALMOST,
        sums(tmp_path / "sums.json"),
        "--output_dir",
        tmp_path / "out",
        "--resume_from_checkpoint",
        tmp_path,
    ]
    given[2] = llama
    (line,) = said(capsys, *given, "--per_device_train_batch_size", "2", "--max_completion_length", "8")
    assert "is not a complete TBRM checkpoint" in line


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> str:
    """A model whose tokenizer has no chat template."""
    folder = save(tmp_path_factory.mktemp("bare"))
    (Path(folder) / "chat_template.jinja").unlink()
    return folder


# ---- what the commands do --------------------------------------------------------------------------------------------


def test_a_dry_run_stops_before_the_first_rollout(llama, tmp_path, capsys, monkeypatch):
    """A recipe and a model suffice. Everything is built; nothing is generated and nothing is written."""
    from tbrm_trl import TBRMTrainer

    monkeypatch.setattr(TBRMTrainer, "_roll_out", lambda *args: pytest.fail("rolled out"))
    out = tmp_path / "out"
    main([
        "train", "--config", str(RECIPES / "tbrm.yaml"), "--model_name_or_path", llama, "--dataset_name",
        str(sums(tmp_path / "sums.json")), "--output_dir", str(out), "--use_cpu", "true", "--bf16", "false",
        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--max_completion_length", "4",
        "--dry_run", "true",
    ])  # fmt: skip
    assert "everything up to the first rollout is in order" in capsys.readouterr().out
    assert not list(out.rglob("*.safetensors"))


def test_evaluated_compared_and_evaluated_again(llama, qwen2, tmp_path, capsys):
    """Two models on a file, with the user's own reward. A finished evaluation draws nothing again."""
    file = sums(tmp_path / "sums.json")

    def evaluate(model: str, out: Path) -> None:
        main([
            "eval", "--model_name_or_path", model, "--benchmarks", str(file), "--limit", "4", "--samples", "2",
            "--max_new_tokens", "8", "--reward_funcs", "helpers.reward_functions.letters", "--output_dir", str(out),
            "--use_cpu", "true",
        ])  # fmt: skip

    evaluate(llama, tmp_path / "a")
    evaluate(qwen2, tmp_path / "b")
    name = "sums-first4-avg2.jsonl"
    first, second = (read_result(tmp_path / folder / name) for folder in "ab")
    assert first.header["model"] == llama and len(first.rows) == 8
    assert {row.score for row in first.rows.values()} == {
        sum(map(str.islower, row.completion)) / 8 for row in first.rows.values()
    }
    before = (tmp_path / "a" / name).read_bytes()
    evaluate(llama, tmp_path / "a")
    assert (tmp_path / "a" / name).read_bytes() == before
    assert capsys.readouterr().out.count(f"sums-first4: avg@2 {first.metrics()['avg@2']:.4f}") >= 2

    main(["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    shown = capsys.readouterr().out
    assert f"{first.metrics()['avg@2']:.4f} → {second.metrics()['avg@2']:.4f}" in shown
    assert "paired over 4 problems" in shown


def test_a_model_with_code_of_its_own(tmp_path, capsys):
    """Its code is run if that is asked for, by `tbrm train` and by `tbrm eval`."""
    folder, file = give_code(save(tmp_path / "model", "qwen2")), str(sums(tmp_path / "sums.json"))
    train = [
        "train", "--config", str(RECIPES / "tbrm.yaml"), "--model_name_or_path", folder, "--dataset_name", file,
        "--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false", "--max_completion_length", "4",
        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--dry_run", "true",
    ]  # fmt: skip
    evaluate = [
        "eval", "--model_name_or_path", folder, "--benchmarks", file, "--limit", "1", "--max_new_tokens", "4",
        "--output_dir", str(tmp_path / "results"), "--use_cpu", "true", "--reward_funcs",
        "helpers.reward_functions.letters",
    ]  # fmt: skip
    for command, shown in ((train, "everything up to the first rollout is in order"), (evaluate, "first1: avg@1")):
        assert "trust_remote_code" in said(capsys, *command)[-1]
        main([*command, "--trust_remote_code", "true"])
        assert shown in capsys.readouterr().out


def test_a_reward_that_raises_ends_an_evaluation(llama, tmp_path, capsys):
    """The error says what was raised and where. There is no score."""
    (line,) = said(
        capsys, "eval", "--model_name_or_path", llama, "--benchmarks", sums(tmp_path / "sums.json"), "--limit", "1",
        "--max_new_tokens", "4", "--reward_funcs", "helpers.reward_functions.value_below_six", "--use_cpu", "true",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "The reward value_below_six raised ValueError: could not convert string to float" in line


@pytest.mark.parametrize(
    ("template", "asked"),
    [(r"Q: {question}\nA:", "Q: 0+0=\nA:"), ("2\n\\neq {question} A:", "2\n\\neq 0+0= A:")],
)
def test_a_plain_template(template, asked, bare, tmp_path):
    r"""Without a chat template the prompt is the plain template's; \n on one line is a line break."""
    file = sums(tmp_path / "sums.json")
    main([
        "eval", "--model_name_or_path", bare, "--benchmarks", str(file), "--limit", "1", "--temperature", "0",
        "--max_new_tokens", "4", "--prompt_template", template, "--output_dir", str(tmp_path / "out"),
        "--use_cpu", "true",
    ])  # fmt: skip
    assert read_result(tmp_path / "out/sums-first1-greedy.jsonl").header["template"] == asked


@pytest.mark.parametrize("in_a_file", [False, True])
def test_variables_of_the_chat_template(in_a_file, tmp_path):
    """JSON on the command line, a mapping in a file. The prompt is rendered with them."""
    model = save(tmp_path / "model")
    (Path(model) / "chat_template.jinja").write_text("{{ name }}:{{ messages[-1].content }}")
    (tmp_path / "how.yaml").write_text("chat_template_kwargs:\n  name: n\n")
    how = ["--config", str(tmp_path / "how.yaml")] if in_a_file else ["--chat_template_kwargs", '{"name": "n"}']
    main([
        "eval", "--model_name_or_path", model, "--benchmarks", str(sums(tmp_path / "sums.json")), "--limit", "1",
        "--temperature", "0", "--max_new_tokens", "4", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true", *how,
    ])  # fmt: skip
    header = read_result(tmp_path / "out/sums-first1-greedy.jsonl").header
    assert (header["template"], header["chat_template_kwargs"]) == ("n:0+0=", {"name": "n"})


def test_benchmarks_in_training_are_judged_in_the_runs_time(tmp_path):
    data, config, _ = train.parse([
        "--dataset_name", "d", "--eval_benchmarks", str(sums(tmp_path / "sums.json")), "--eval_strategy", "steps",
        "--eval_steps", "1", "--reward_time_limit", "1.5", "--output_dir", "o", "--use_cpu", "true", "--bf16", "false",
    ])  # fmt: skip
    (callback,) = train.evaluations(data, config)
    assert callback.judges["sums"].reward.time_limit == 1.5


@pytest.mark.launch
def test_two_processes_by_one_line(llama, tmp_path):
    """The launcher's options come from the line and from the recipe; the run evaluates, and picks the best by it."""
    file = sums(tmp_path / "sums.json")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset_name: {file}\nnum_processes: 2\nmixed_precision: 'no'\n")
    printed = run([
        *TBRM, "train", "--config", recipe, "--model_name_or_path", llama, "--output_dir", tmp_path / "out",
        "--multi_gpu", "--main_process_port", free_port(), "--use_cpu", "true", "--bf16", "false",
        "--per_device_train_batch_size", "2",
        "--max_completion_length", "4", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1",
        "--eval_strategy", "steps", "--eval_steps", "1", "--eval_benchmarks", file, "--load_best_model_at_end", "true",
        "--metric_for_best_model", "eval_sums/avg@1", "--report_to", "none",
    ])  # fmt: skip
    assert "× 2 process(es)" in printed and "DeprecationWarning" not in printed
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_sums/avg@1" in row] == [1, 2]
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{state['best_global_step']}")


def test_refusals_are_one_line_each():
    assert Refused(["a\n  b", "c"]).problems == ["a b", "c"]


@pytest.mark.parametrize(
    ("solution", "answer", "rewards", "told"),
    [
        ("We get \\boxed{4}.", None, ["math", "helpers.reward_functions.length"], "the answer in it"),
        ("We get \\boxed{4}.", "4", ["math", "helpers.reward_functions.length"], "the answer in 'answer'"),
        ("4", None, ["math", "helpers.reward_functions.length"], None),  # the text stays
        ("We get \\boxed{4}.", None, ["math", "length(limit=9)"], None),  # no other reward reads it
    ],
)
def test_a_solution_that_becomes_its_answer_is_said(solution, answer, rewards, told, tmp_path, capsys):
    """Rewards other than math get its text too: the 4 of the box, or of the column `answer`."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"problem": "2+2?", "solution": solution, **({"answer": answer} if answer else {})}]))
    column = "answer" if answer else "solution"
    loaded = train.load(train.DataArguments(str(file), reward_funcs=rewards, answer_column=column))
    assert loaded["solution"][:] == ["4"]
    printed = capsys.readouterr().out
    assert "column 'solution' becomes" not in printed if told is None else f"'solution' becomes {told}, " in printed
