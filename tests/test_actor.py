"""The actor against a server with real weights: what it draws, under which policy, and what faults of either do."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from common.policy_server import PolicyServer
from common.tiny import VOCABULARY, perturb, save, save_value_model, tokenizer
from helpers.runs import CHATS, DATA, TOKENIZER, before_each_update, build, digits, kept_returns, letters, logged
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.chat_template_utils import qwen3_chat_template

from tbrm_trl.actor.__main__ import main
from tbrm_trl.actor.child import ActorProcess
from tbrm_trl.actor.ledger import Ledger, window_file
from tbrm_trl.actor.plan import Plan
from tbrm_trl.actor.server import Server, ServerError
from tbrm_trl.actor.work import LOG_PROBS, Actor, describe
from tbrm_trl.model.publisher import Version, read_latest
from tbrm_trl.resume.checkpoint import mark_complete
from tbrm_trl.sources.parquet import from_row
from tbrm_trl.trajectory import End, Trajectory

LORA = LoraConfig(r=4, target_modules="all-linear")
UPDATES, ROWS = 6, 4  # of the run, and of a window


@pytest.fixture
def server(llama) -> Iterator[PolicyServer]:
    served = PolicyServer(llama)
    yield served
    served.stop()


class Run:
    """A run that publishes its policy when the test says so, and the windows of its actor."""

    def __init__(self, model: str, server: PolicyServer, folder: Path, reward=letters, lora=True, **options: Any):
        options = {"max_staleness": 2, "per_device_train_batch_size": ROWS, "max_steps": UPDATES, **options}
        self.trainer = build(
            model, folder, reward, rollouts="async", async_server=server.url,
            **({"peft_config": LORA} if lora else {}), **options,
        )  # fmt: skip
        self.output = Path(self.trainer.args.output_dir)
        self.trainer._actor.plan(UPDATES, 0).write(self.output)
        self.versions: list[Version] = []
        self.said: list[str] = []
        self.publish()

    def publish(self) -> None:
        """Make an update that is much larger than any of training's, and publish the policy."""
        step = len(self.versions)
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        perturb(torch.nn.ParameterList(trained), scale=0.1, seed=step)
        self.versions.append(self.trainer._publisher.publish(step))

    def actor(self, concurrency: int = 8) -> Actor:
        return Actor(self.output, None, concurrency, self.said.append)

    @contextmanager
    def drawing(self, concurrency: int = 8) -> Iterator[threading.Thread]:
        """Run an actor during the block. At the end it must have written every window."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self.actor(concurrency).run()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield thread
        thread.join(60)
        assert not failed, failed
        assert not thread.is_alive(), self.said

    def publish_all(self) -> None:
        """Publish one version after the other, each when no more rows may start under the one before."""
        while len(self.versions) < UPDATES:
            allowed = self.bounds.last_row(len(self.versions) - 1) // ROWS
            until(lambda: all(self.file(window).exists() for window in range(min(allowed + 1, UPDATES))))  # noqa: B023
            self.publish()

    @property
    def bounds(self):
        return self.trainer._actor.plan(UPDATES, 0).bounds

    def file(self, window: int) -> Path:
        return window_file(self.output / "records", window)

    def rows(self) -> list[dict[str, Any]]:
        return [row for window in range(UPDATES) for row in pq.read_table(self.file(window)).to_pylist()]

    def expected_prompts(self) -> list[str]:
        sampler = self.trainer._get_train_sampler()
        return [DATA[index]["prompt"] for window in range(UPDATES) for index in sampler.window(window)]


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@torch.no_grad()
def distance(policy: torch.nn.Module, rows: list[dict[str, Any]]) -> float:
    """Mean difference, in nats, between the log-probabilities that the server gave for its tokens and a policy's."""
    differences = []
    for row in rows:
        ids, first = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["prompt_ids"])
        own = policy(ids).logits[0, first - 1 : -1].log_softmax(-1)  # (T, V)
        own = own.gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0]  # (T,)
        differences.append((own - torch.tensor(row[LOG_PROBS])).abs())
    return torch.cat(differences).mean().item()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_every_row_is_of_the_version_that_it_says(lora, llama, server, tmp_path):
    """Rows have the sampler's order, and start as early as the bound allows. Neighbouring versions differ clearly."""
    run = Run(llama, server, tmp_path, lora=lora)
    with run.drawing():
        run.publish_all()
    rows = run.rows()
    assert [row["prompt"] for row in rows] == run.expected_prompts()
    assert [row["group"] for row in rows] == list(range(UPDATES * ROWS))
    assert len(set(server.seen.seeds)) == len(rows)
    for number, row in enumerate(rows):
        stale = run.bounds.staleness(number, row["first_policy_step"])
        assert stale == min(2, number // ROWS)  # the first windows are drawn before any update
        assert row["policy_version"] == row["first_policy_version"] == run.versions[row["policy_step"]].name
    drawn_by = {row["policy_step"]: [r for r in rows if r["policy_step"] == row["policy_step"]] for row in rows}
    assert sorted(drawn_by) == [0, 1, 2, 3]
    for step, drawn in drawn_by.items():
        folder = run.output / "policy" / run.versions[step].name
        if not folder.exists():
            continue  # too old to be kept
        assert distance(policy_of(llama, folder, lora), drawn) < 1e-4
        if (other := run.output / "policy" / run.versions[step + 1].name).exists():
            assert distance(policy_of(llama, other, lora), drawn) > 0.05
    assert run.versions[-1] == read_latest(run.output / "policy")
    kept = sorted(int(one.name.split("-")[1]) for one in (run.output / "policy").glob("step-*"))
    assert kept == [2, 3, 4, 5]  # the latest, and max_staleness + 1 before it


def policy_of(base: str, folder: Path, lora: bool) -> torch.nn.Module:
    """Load a version as a user would."""
    if not lora:
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def test_kills_lose_and_repeat_no_row(llama, server, tmp_path):
    """The actor is killed at random moments and started again until all rows are drawn."""
    run, moments, kills = Run(llama, server, tmp_path, max_staleness=UPDATES), random.Random(3), 0
    server.delay = 0.1
    while not all(run.file(window).exists() for window in range(UPDATES)):
        child = os.fork()
        if not child:
            try:
                run.actor(concurrency=3).run()
            finally:
                os._exit(0)
        if kills < 5:  # after at most 15 of the 24 rows, however fast the machine is
            enough = len(server.seen.seeds) + moments.randint(1, 3)
            until(lambda: len(server.seen.seeds) >= enough)  # noqa: B023
            time.sleep(moments.uniform(0, server.delay / 2))
            os.kill(child, signal.SIGKILL)
            kills += 1
        os.waitpid(child, 0)
    rows = run.rows()
    assert [row["prompt"] for row in rows] == run.expected_prompts()
    assert [row["group"] for row in rows] == list(range(UPDATES * ROWS))
    # Only rows under way at a kill are requested again: at most four for each of three requests.
    assert len(set(server.seen.seeds)) == len(rows) <= len(server.seen.seeds) <= len(rows) + 12 * kills
    assert not list((run.output / "actor/unfinished").glob("*"))


def test_a_line_that_a_kill_has_cut_short_was_never_written(tmp_path):
    written: list[Any] = []

    def ledger() -> Ledger:
        return Ledger(
            tmp_path / "unfinished", tmp_path / "records", 2, range(2), lambda file, *rest: written.append(rest)
        )

    first = ledger()
    pending = first.pending()
    assert [next(pending), next(pending)] == [0, 1]
    first.add(1, {"text": "b"})
    (file,) = (tmp_path / "unfinished").iterdir()
    with file.open("a") as opened:
        opened.write('{"row": 0, "te')
    second = ledger()
    pending = second.pending()
    assert next(pending) == 0
    second.add(0, {"text": "a"})
    assert written == [(0, [{"text": "a"}, {"text": "b"}])] and not file.exists()
    assert list(pending) == [2, 3]


def test_a_server_that_dies_and_comes_back(llama, server, tmp_path):
    """It has lost its adapters. They are loaded again, rows under way are requested again, and messages say so."""
    run = Run(llama, server, tmp_path, max_staleness=UPDATES)
    server.delay = 0.1
    with run.drawing(concurrency=2):
        until(lambda: len(server.seen.seeds) > 4)
        server.stop()
        time.sleep(0.5)
        server.start()
    assert [row["prompt"] for row in run.rows()] == run.expected_prompts()
    assert server.seen.loaded.count(run.versions[0].name) == 2
    assert any("does not answer" in line for line in run.said) and any("is back" in line for line in run.said)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_server_with_another_base_is_found_out(lora, llama, server, tmp_path, monkeypatch):
    run = Run(llama, server, tmp_path, lora=lora, follow_timeout=3.0)
    other = save(tmp_path / "other", "llama", initializer_range=0.4, tie_word_embeddings=True)
    server.stop()
    server.model = other
    if not lora:  # such a server would take the new weights; this one only claims to, and keeps its own
        monkeypatch.setattr(server, "reload", lambda asked: (200, {"results": [None]}))
    server.start()
    with pytest.raises(
        ServerError, match=rf"serves another policy than step-00000000.* start it on {llama}.*Waited \d"
    ):
        run.actor().run()
    assert len(run.said) == 1 and "nats away" in run.said[0]


def test_a_server_without_adapters_says_how_to_start_it(llama, server, tmp_path):
    server.adapters = False
    run = Run(llama, server, tmp_path)
    with pytest.raises(ServerError, match=r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.*--enable-lora"):
        run.actor().run()


def test_a_request_that_does_not_end(llama, server, tmp_path):
    """It is made three times, each time for a third of the time that the run waits. Then it is an error."""
    server.delay = 5.0
    version = Version("step-0", 0, adapter=False)
    said: list[str] = []
    asked = Server(server.url, tmp_path, lambda: version, 0.9, llama, said.append)
    asked._loaded = {"step-0"}
    began = time.monotonic()
    with pytest.raises(ServerError, match="did not end a completion of at most 4 tokens within 0 seconds, 3 times"):
        asked.draw([5], {"max_tokens": 4, "seed": 0, "temperature": 1.0, "stop_token_ids": [1]})
    assert 0.9 <= time.monotonic() - began < 2 and len(said) == 2


async def later(completions, **kwargs):
    return [None] * len(completions)


def test_slow_rewards_overlap(llama, server, tmp_path):
    """At half a second a row, 24 rows in sequence would take 12 seconds. Rows are still drawn two at a time."""

    def slow(completions, **kwargs):
        time.sleep(0.5)
        return [0.25] * len(completions)

    run = Run(llama, server, tmp_path, [slow, later], max_staleness=UPDATES, reward_weights=[2.0, 1.0])
    began = time.monotonic()
    with run.drawing(concurrency=2):
        pass
    assert time.monotonic() - began < 6
    assert server.seen.most_at_once == 2
    assert {row["reward"] for row in run.rows()} == {0.5}


@pytest.mark.parametrize(("on_error", "reward"), [("raise", None), ("skip", None), ("-1", -1.0)])
def test_rewards_that_fail(on_error, reward, llama, server, tmp_path):
    """The same happens as in a run without an actor. A row that no function scored has no reward, instead of 0."""

    def failing(prompts, **kwargs):
        raise KeyError("no such answer")

    run = Run(llama, server, tmp_path, [failing], max_staleness=UPDATES, reward_on_error=on_error)
    if on_error == "raise":
        with pytest.raises(KeyError, match="no such answer"):
            run.actor().run()
        return
    with run.drawing():
        pass
    rows = run.rows()
    assert {row["reward"] for row in rows} == {reward}
    assert {(row["metrics/rewards/failing/raised"], row["metrics/rewards/failing/late"]) for row in rows} == {(1, 0)}


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_reward_model_that_gives_no_number(weight, llama, server, tmp_path):
    """Its NaN is an unknown verdict, whatever the other function says, unless it only watches."""
    judge = AutoModelForSequenceClassification.from_pretrained(save_value_model(tmp_path / "judge"))
    torch.nn.init.constant_(judge.score.weight, float("nan"))
    options = dict(reward_processing_classes=[TOKENIZER, None], reward_weights=[weight, 1.0])
    run = Run(llama, server, tmp_path, [judge, letters], max_staleness=UPDATES, **options)
    with run.drawing():
        pass
    assert {row["reward"] is None for row in run.rows()} == {bool(weight)}


def test_what_rewards_log_and_know(llama, server, tmp_path):
    """A row's record has what its reward logged, and reward functions know the length of the run."""

    def telling(completion_ids, log_metric, log_extra, trainer_state, **kwargs):
        log_metric("tokens", float(len(completion_ids[0])))
        log_extra("first", [completion_ids[0][0]])
        return [float(trainer_state.max_steps)]

    run = Run(llama, server, tmp_path, [telling], max_staleness=UPDATES)
    with run.drawing():
        pass
    for row in run.rows():
        drawn = row["completion_ids"]
        assert (row["metrics/tokens"], row["extra/first"], row["reward"]) == (len(drawn), drawn[0], UPDATES)


def test_a_resumed_run_is_drawn_for_from_its_next_window_on(llama, server, tmp_path):
    """In a new folder nobody would read the earlier windows."""
    run = Run(llama, server, tmp_path, max_staleness=UPDATES)
    run.trainer._actor.plan(UPDATES, 2).write(run.output)
    run.actor().run()
    assert [run.file(window).exists() for window in range(UPDATES)] == [window >= 2 for window in range(UPDATES)]


# ---- tools and environments ------------------------------------------------------------------------------------------

CALL, CALL_ID = '<tool_call>\n{"name": "double", "arguments": {"x": 21}}\n</tool_call>', VOCABULARY
DESCRIPTION = "Double a number.\n\nArgs:\n    x: the number."


class Till:
    """An environment that owns its reward: its start plus what its tool added. No two begin alike.

    Where it starts at an odd number, the tool exits.
    """

    numbers = itertools.count()

    def reset(self, start: int, **kwargs) -> str:
        self.total = start
        return f" from {start}, {next(self.numbers)}"

    def double(self, x: int) -> int:
        if self.total % 2:
            sys.exit()
        self.total += 2 * x
        return 2 * x

    double.__doc__ = DESCRIPTION

    def get_reward(self) -> float:
        return float(self.total)


def test_environments_and_their_tools(tmp_path):
    """Many rows run at once, each with an environment of its own. A row's last call is not made.

    The server has room for a prompt and a completion, but not for tokens that a later turn may not write. The
    environment's reward is added to those of the functions, without changing the user's list. A tool's exit is an error
    that the policy reads.
    """
    words = tokenizer()
    words.chat_template = qwen3_chat_template
    words.add_tokens([CALL])
    model = save(tmp_path / "caller", "llama", vocab_size=VOCABULARY + 1, max_position_embeddings=2048)
    words.save_pretrained(model)
    served = PolicyServer(model)
    functions = [letters]

    def call(prompt: list[int]) -> list[int]:
        served.context = served.context or len(prompt) + 230  # prompts differ by up to 25 tokens
        return [CALL_ID, 1]

    served.script = call
    try:
        run = Run(
            model, served, tmp_path, functions, environment_factory=Till, train_dataset=CHATS, max_staleness=UPDATES,
            max_completion_length=200, max_tool_calling_iterations=1, num_generations=2,
        )  # fmt: skip
        with run.drawing():
            pass
    finally:
        served.stop()
    assert functions == [letters] and len(run.trainer._followed.take(ROWS)[1]) == ROWS
    sampler = run.trainer._get_train_sampler()
    starts = [CHATS[i]["start"] for window in range(UPDATES) for i in sampler.window(window)]
    for row, start in zip(run.rows(), starts, strict=True):
        drawn: Trajectory = from_row(row)
        added, said = (0, "{'error': 'it called sys.exit()'}") if start % 2 else (42, "42")
        assert drawn.rewards.keys() == {"letters", "Till"} and drawn.rewards["Till"] == start + added
        assert drawn.end is End.TOOL_LIMIT
        assert drawn.completion_ids[drawn.loss_mask].tolist() == [CALL_ID, 1, CALL_ID, 1]
        assert f"<tool_response>\n{said}\n</tool_response>" in TOKENIZER.decode(drawn.completion_ids[~drawn.loss_mask])
        assert f"from {start}, " in TOKENIZER.decode(drawn.prompt_ids)
        assert [one != 0 for one in row[LOG_PROBS]] == drawn.loss_mask.tolist()


# ---- the actor as a child of the run ---------------------------------------------------------------------------------


def test_functions_of_the_script_go_by_value(llama, server, tmp_path):
    """They are pickled with the globals that they name, and no others. What cannot be pickled is refused."""
    script: dict[str, Any] = {"__name__": "__main__", "answers": (i for i in range(3))}
    exec("BONUS = 3.0\ndef bonus(completions, **kwargs):\n    return [BONUS] * len(completions)", script)
    exec("def told(completions, **kwargs):\n    return [next(answers) for _ in completions]", script)
    run = Run(llama, server, tmp_path, script["bonus"])
    assert Plan.read(run.output).reward_funcs(completions=["a", "b"]) == [3.0, 3.0]
    with pytest.raises(TypeError, match=r"cannot be given what this run was.*generator"):
        Run(llama, server, tmp_path / "told", script["told"])


def test_a_function_of_the_script_is_sent_on_to_workers(tmp_path):
    """The actor, which runs another script, sends it on. This also works from a notebook, which is no script."""
    plan, program = tmp_path / "plan", "import sys, dill; print(dill.load(open(sys.argv[1], 'rb'))(['ab', 'abc']))"
    written = f"""
        import dill
        from tbrm_trl.rewards import InWorkers

        FACTOR = 2

        def doubled(completions, **columns):
            return [FACTOR * len(text) for text in completions]

        dill.dump(InWorkers(doubled, workers=1), open({str(plan)!r}, "wb"), recurse=True)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(written))
    subprocess.run([sys.executable, str(script)], check=True)
    ran = subprocess.run([sys.executable, "-c", program, str(plan)], capture_output=True, text=True, check=True)
    assert ran.stdout == "[4.0, 6.0]\n"


def test_what_the_actor_said_last_is_in_the_error_of_who_waits_for_it(llama, server, tmp_path):
    run = Run(llama, server, tmp_path, follow_timeout=0.1)
    run.trainer._actor.log.write_text("12:00:00 Began.\n12:00:01 http://localhost:1 does not answer. Waiting.\n")
    with pytest.raises(TimeoutError, match=r"of the 4 rows.*The actor said last.*12:00:01 http://localhost:1 does not"):
        run.trainer._followed.take(ROWS)


def test_an_actor_that_leaves_early_is_started_again(tmp_path, monkeypatch):
    """Also if it ends without an error. What it left behind is ended, and the error shows the latest actor's words."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho Began.\nsleep 1000 &\necho $! >> {tmp_path}/left\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    actor = ActorProcess(tmp_path, tmp_path / "records", lambda updates, made: None, starts=True)
    actor.log.parent.mkdir()
    actor.log.write_text("12:00:00 Of last week.\n")
    actor.start()

    def fails() -> bool:
        try:
            actor.check()
        except RuntimeError as error:
            raised.append(str(error))
        return bool(raised)

    raised: list[str] = []
    until(fails)
    assert "has ended (exit code 0)" in raised[0] and "\nBegan.\n" in raised[0] and "last week" not in raised[0]
    left = [Path("/proc") / number for number in (tmp_path / "left").read_text().split()]
    assert len(left) == 4
    until(lambda: not any(one.exists() and "Z" not in (one / "stat").read_text().split()[2] for one in left))


def leaving(completions, **columns):
    sys.exit()


def test_a_function_that_exits_is_an_error_of_the_actor(llama, server, tmp_path, capsys):
    run = Run(llama, server, tmp_path, leaving)
    assert main([str(run.output)]) == 1
    assert "in leaving" in (said := capsys.readouterr().out) and "it called sys.exit()" in said


def test_an_environment_that_brings_the_prompts_has_an_actor(llama, tmp_path):
    processing_class = tokenizer()
    processing_class.chat_template = qwen3_chat_template
    trainer = build(
        llama, tmp_path, None, rollouts="async", async_server="http://localhost:1", max_steps=2, train_dataset=None,
        environment_factory=Till, processing_class=processing_class,
    )  # fmt: skip
    assert trainer._actor is not None


def test_an_error_of_the_users_shows_where_it_is():
    def reset() -> None:
        raise TypeError("unsupported operand")

    with pytest.raises(TypeError) as raised:
        reset()
    assert "in reset" in describe(raised.value, draws=True)
    assert describe(raised.value, draws=False).startswith("The actor stops: unsupported operand")


def test_lines_that_a_full_disk_has_joined_are_drawn_again(tmp_path):
    whole, cut = '{"row": 5, "a": 1}\n', '{"row": 4, "a'
    (tmp_path / "00000001.jsonl").write_text(whole + cut + whole)
    ledger = Ledger(tmp_path, tmp_path / "records", ROWS, range(1, 2), lambda *given: None)
    assert list(ledger.pending()) == [4, 6, 7]


class KillActor(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.actor._process.kill()


class WaitForActor(TrainerCallback):
    """Lets the actor look for windows before the run restores its state, as a long evaluation at the start does."""

    def on_train_begin(self, args, state, control, **kwargs):
        until(lambda: (Path(args.output_dir) / "actor/status.json").exists())


class Interrupt(TrainerCallback):
    """Interrupts a run before its third update, when windows 2 to 4 are drawn ahead."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            until(lambda: (Path(args.output_dir) / "records/window-00000004.parquet").exists())
            raise KeyboardInterrupt


@pytest.mark.launch
@pytest.mark.parametrize("changed", ["rewards", "max_completion_length", "beta"])
def test_what_was_drawn_ahead_under_other_rewards_or_options_is_drawn_again(changed, llama, server, tmp_path):
    """A function of the same name with other code, too. A changed β is applied to the rows as they are."""

    def paying(reward: float):
        def judge(completions, **columns):
            return [reward] * len(completions)

        return judge

    options: dict[str, Any] = dict(
        rollouts="async", async_server=server.url, max_staleness=3, per_device_train_batch_size=ROWS, peft_config=LORA,
        save_strategy="steps", save_steps=2, follow_timeout=200.0, max_steps=UPDATES, max_completion_length=6,
    )  # fmt: skip
    first = build(llama, tmp_path, paying(1.0), **options)
    first.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    records = Path(first.args.output_dir) / "records"
    ahead = {file.name: file.read_bytes() for file in records.glob("window-*") if file.name >= "window-00000002"}

    options |= {"max_completion_length": 5} if changed == "max_completion_length" else {}
    options |= {"beta": 0.1} if changed == "beta" else {}
    second = build(llama, tmp_path, paying(5.0 if changed == "rewards" else 1.0), **options)
    windows = kept_returns(second, "_new_window")
    second.train(resume_from_checkpoint=True)
    trained = [one for window in windows for one in window]
    assert {one.reward for one in trained} == {5.0 if changed == "rewards" else 1.0}
    assert max(len(one.completion_ids) for one in trained) <= (5 if changed == "max_completion_length" else 6)
    kept = [(records / name).read_bytes() == content for name, content in ahead.items()]
    assert len(kept) >= 3 and set(kept) == {changed == "beta"}


@pytest.mark.parametrize(
    "changed",
    [{"generation_kwargs": {"logit_bias": {"5": -100}}}, {"max_prompt_length": 4}, {"long_prompts": "drop"}],
)
def test_what_was_drawn_ahead_for_other_requests_is_dropped(changed, llama, tmp_path):
    options: dict[str, Any] = dict(
        rollouts="async", async_server="http://localhost:1", per_device_train_batch_size=ROWS, peft_config=LORA,
        max_prompt_length=6, long_prompts="cut", max_steps=2,
    )  # fmt: skip
    checkpoint = tmp_path / "checkpoint-1"
    for given in ({}, changed):
        trainer = build(llama, tmp_path, **options | given)
        trainer._described = {"identity": trainer.run_identity(), "settings": trainer.run_settings()}
        window = Path(trainer.args.output_dir) / "records/window-00000001.parquet"
        window.parent.mkdir(exist_ok=True)
        window.touch()
        if not given:
            checkpoint.mkdir()
            mark_complete(checkpoint, trainer._described)
        trainer._redraw_what_changed(str(checkpoint), trainer._followed)
        assert window.exists() is not bool(given)


@pytest.mark.launch
def test_a_run_with_its_actor(llama, server, tmp_path):
    """The actor is killed once and started again. The run is resumed with another one. Each row is trained on once."""
    options: dict[str, Any] = dict(
        rollouts="async", async_server=server.url, max_staleness=1, per_device_train_batch_size=ROWS, peft_config=LORA,
        save_strategy="steps", save_steps=3, follow_timeout=200.0,
    )  # fmt: skip
    kills = KillActor()
    first = build(llama, tmp_path, max_steps=3, **options)
    kills.actor = first._actor
    first.add_callback(kills)
    trained = kept_returns(first, "_new_window")
    first.train()
    assert first._actor.restarts == 1 and first._actor._process is None
    policy = Path(first.args.output_dir) / "policy"
    last = read_latest(policy)

    second = build(llama, tmp_path, max_steps=UPDATES, **options)
    seen = before_each_update(second, lambda: read_latest(policy))
    rest = kept_returns(second, "_new_window")
    second.train(resume_from_checkpoint=True)
    assert last.step == 3 and seen[0] == last and second.state.global_step == UPDATES
    prompts = [TOKENIZER.decode(one.prompt_ids) for window in trained + rest for one in window]
    sampler = second._get_train_sampler()
    drawn = [[DATA[index]["prompt"] for index in sampler.window(window)] for window in range(UPDATES)]
    assert [sorted(prompts[i : i + ROWS]) for i in range(0, len(prompts), ROWS)] == list(map(sorted, drawn))
    rewarded_anew = build(llama, tmp_path, digits, max_steps=UPDATES, **options)
    rewarded_anew.add_callback(WaitForActor())
    rewarded_anew.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-3"))
    assert logged(rewarded_anew, "rewards/digits/mean") and rewarded_anew.state.global_step == UPDATES
    assert max(logged(first, "staleness/max") + logged(second, "staleness/max")) <= 1
    assert min(logged(second, "rollouts/actor_wait_time")) >= 0
    with pytest.raises(ValueError, match=r"holds .*of another run"):
        build(llama, tmp_path, max_steps=UPDATES, **options).train()
