"""Cheaper layers do not change the loss: gradient checkpointing, torch.compile, Liger and Hub kernels."""

from __future__ import annotations

import pytest
import torch
from common.tiny import perturb, save
from helpers.oracle import TOLERANCE, distance
from helpers.scripted import script, scripted_trainer
from peft import LoraConfig
from torch._dynamo.utils import counters
from transformers import TrainerCallback
from transformers.utils import is_kernels_available, is_liger_kernel_available

COMPILED = dict(torch_compile=True, torch_compile_backend="aot_eager")  # everything except code generation
UPDATES = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, learning_rate=0.01,
    lr_scheduler_type="constant",
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(tmp_path, lora=False, architecture="qwen2", callback=None, **options):
    """Four updates on sixteen rows. In full fine-tuning the reference differs from the starting policy."""
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None
    trainer = scripted_trainer(
        save(tmp_path / "model", architecture), script(rows=16), tmp_path, peft_config=adapter, **UPDATES | options
    )
    if callback is not None:
        trainer.add_callback(callback)
    if not lora:
        perturb(trainer.ref_model)
    trainer.train()
    return trainer


def assert_same_updates(trainer, plain):
    """Assert that the first gradients agree up to rounding, which Adam amplifies over later updates."""
    assert len(trainer.losses) == len(plain.losses) == 8
    assert trainer.losses[:2] == pytest.approx(plain.losses[:2], rel=TOLERANCE)
    assert trainer.losses == pytest.approx(plain.losses, rel=1e-3)
    assert distance(trainer.recorder.gradients[0], plain.recorder.gradients[0]) <= TOLERANCE


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, lora, tmp_path):
    plain = trained(tmp_path, lora)
    layers = []
    forward = torch.nn.functional.silu

    def counted(*args, **kwargs):  # once per layer and pass: in every layer's activation
        layers.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "silu", counted)
        checkpointed = trained(
            tmp_path, lora, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
    assert_same_updates(checkpointed, plain)
    # Of 8 micro-batches and 2 layers, each layer runs once more with gradients than in a plain backward pass.
    references = 2 * 8  # forwards of the reference: of 16 rows in chunks of 2, through 2 layers
    with_gradient = 2 * 8 * (1 if use_reentrant else 2)
    checks = 3 * 2 * (1 if lora else 2)  # of each model's logits: two rows together, and each on its own
    without = checks + references + (2 * 8 if use_reentrant else 0)
    assert (sum(layers), len(layers) - sum(layers)) == (with_gradient, without)


class Graphs(TrainerCallback):
    """Records how many graphs there are after each update."""

    def __init__(self):
        self.compiled = []

    def on_step_end(self, args, state, control, **kwargs):
        self.compiled.append(counters["stats"]["unique_graphs"])


@pytest.mark.launch
def test_compiled(tmp_path):
    """Policy and reference are compiled, hook of the trajectory head included; the same updates come out.

    Once two updates have shown that lengths change, no batch is compiled anew.
    """
    plain = trained(tmp_path, architecture="gemma2")
    graphs = Graphs()
    compiled = trained(tmp_path, architecture="gemma2", callback=graphs, **COMPILED)
    assert type(compiled.model_wrapped).__name__ == type(compiled.ref_model).__name__ == "OptimizedModule"
    assert_same_updates(compiled, plain)
    assert len({max(map(len, window)) for window in compiled.windows}) > 1  # the lengths of batches do change
    assert 0 < graphs.compiled[1] == graphs.compiled[3]


@pytest.mark.launch
def test_compiled_reference_is_reset(tmp_path):
    """A sync finds the parameters inside the compiled reference, and makes its scores stale."""
    options = dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)
    plain, compiled = trained(tmp_path, **options), trained(tmp_path, **options, **COMPILED)
    assert_same_updates(compiled, plain)
    for reset in (plain, compiled):
        theirs = reset._reference._synced()
        assert theirs and all(torch.equal(p, theirs[name]) for name, p in reset._reference._trained().items())


@pytest.mark.launch
def test_compiled_lora(tmp_path):
    assert_same_updates(trained(tmp_path, lora=True, **COMPILED), trained(tmp_path, lora=True))


@pytest.mark.launch  # half a minute to two minutes of code generation
def test_compiled_by_inductor(tmp_path):
    short = dict(max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    plain, compiled = trained(tmp_path, **short), trained(tmp_path, **short, torch_compile=True)
    assert compiled.losses == pytest.approx(plain.losses, rel=TOLERANCE)
    assert distance(compiled.recorder.gradients[0], plain.recorder.gradients[0]) <= TOLERANCE


def test_liger_leaves_the_head_alone(tmp_path):
    """Its layer kernels use Triton and need a GPU. Its fused loss would replace the trajectory head."""
    folder = save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"fused_linear_cross_entropy.*is not supported"):
        scripted_trainer(
            folder, script(), tmp_path, use_liger_kernel=True,
            liger_kernel_config={"fused_linear_cross_entropy": True},
        )  # fmt: skip
    trainer = scripted_trainer(folder, script(), tmp_path, use_liger_kernel=True)
    assert trainer.args.liger_kernel_config == {"fused_linear_cross_entropy": False}
    if not is_liger_kernel_available():
        with pytest.raises(ImportError, match="pip install liger-kernel"):
            trainer.train()


@pytest.mark.skipif(is_kernels_available(), reason="would load kernels from the Hub")
def test_hub_kernels_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="Kernels are not available"):
        scripted_trainer(
            save(tmp_path / "model"), script(), tmp_path, model_init_kwargs={"use_kernels": True}
        )  # before any step
