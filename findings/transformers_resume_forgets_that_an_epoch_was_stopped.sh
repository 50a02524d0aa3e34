#!/usr/bin/env bash
# transformers 5.23.0: a run in which a callback ended an epoch (`control.should_epoch_stop`) resumes in the wrong
# epoch, so some rows come twice and others not at all.
#
# The checkpoint holds the right epoch, as a fraction. Resuming does not read it: the epoch, and the place in it, are
# the number of updates divided by the updates of a whole epoch.
#
# Seen: epochs of 8 rows, the first ended after 2. The undisturbed run then draws all 8 rows in the second epoch. The
# run that is resumed after the 3rd update, so after one row of the second epoch, first draws 5 rows of the first
# epoch, among them none of the two that were drawn in it, and then begins the second epoch anew: its first row has
# been drawn before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

ROWS = [{"input_ids": [1, 2 + row], "labels": [1, 2 + row]} for row in range(8)]


class EndEpoch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_epoch_stop = True


class Noting(Trainer):
    """Notes the number of each row, and the epoch."""

    def training_step(self, model, inputs, *args, **kwargs):
        drawn.append(inputs["input_ids"][0, 1].item() - 2)
        return super().training_step(model, inputs, *args, **kwargs)


def rows_of(resume=None):
    drawn.clear()
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )
    args = TrainingArguments("out", num_train_epochs=3, save_steps=1, report_to="none", use_cpu=True,
                             disable_tqdm=True, per_device_train_batch_size=1)
    trainer = Noting(LlamaForCausalLM(config), args, train_dataset=ROWS, callbacks=[EndEpoch()])
    trainer.train(resume_from_checkpoint=resume)
    return list(drawn)


drawn = []
whole = rows_of()
resumed = rows_of("out/checkpoint-3")
print(f"transformers {transformers.__version__}")
print(f"undisturbed: {whole[:2]}, {whole[2:10]}, {whole[10:]}")
print(f"resumed after 3 updates: {resumed[:5]}, {resumed[5:13]}, {resumed[13:]}")
assert sorted(whole[2:10]) == sorted(whole[10:]) == list(range(8)) and len(whole) == 18
assert resumed != whole[3:]
assert resumed[5:13] == whole[2:10] and resumed[13:] == whole[10:]
assert set(resumed[:5]).isdisjoint(whole[:2])
PYTHON
