"""The parts of TRL that this library overrides or uses, pinned: an upgrade that changes one fails here first."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys

import pytest
import trl.trainer.utils
from helpers.signatures import signature
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers import GenerationMixin, Trainer
from trl import GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

import tbrm_trl
from tbrm_trl import TBRMTrainer
from tbrm_trl.resume import ExactResume

OVERRIDDEN = {
    "create_model_card": "(self, model_name=None, dataset_name=None, tags=None)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_tokenize_prompts": "(self, prompts)",
    "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    "_tool_call_loop": "(self, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields)",
    "_get_train_sampler": "(self, dataset=None)",
    "_get_dataloader": (
        "(self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None)"
    ),
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_get_per_token_logps_and_entropies": (
        "(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, "
        "compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, pixel_attention_mask=None, "
        "spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, mm_token_type_ids=None, "
        "image_position_ids=None)"
    ),
    "_prepare_inputs": "(self, generation_batch)",
    "_compute_loss": "(self, model, inputs)",
    "log": "(self, logs, start_time=None)",
    "evaluate": "(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')",
    "evaluation_loop": (
        "(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix='eval')"
    ),
    "predict": "(self, test_dataset, ignore_keys=None, metric_key_prefix='test')",
    "train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
    "_init_training_state": (
        "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)"
    ),
    "save_model": "(self, output_dir=None, _internal_call=False)",
    "_save_checkpoint": "(self, model, trial)",
    "_save_rng_state": "(self, output_dir)",
    "_determine_best_metric": "(self, metrics, trial)",
    "_maybe_log_save_evaluate": (
        "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None)"
    ),
    "_load_rng_state": "(self, checkpoint)",
    "_load_best_model": "(self)",
    "_load_callback_state": "(self)",
    "_run_epoch": (
        "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)"
    ),
    "_finalize_training": "(self, trial, num_train_samples, start_time)",
}
CALLED_METHODS = {
    "_generate_and_score_completions": "(self, inputs)",
    "_tokenize_prompts": "(self, prompts)",
    "_get_output_dir": "(self, trial)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
}
# The replacement of `generate`'s loop calls these methods of the model, as that loop does.
CALLED_OF_GENERATION = {
    "_prefill": "(self, input_ids, generation_config, model_kwargs, is_first_iteration=True)",
    "_sample": (
        "(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, "
        "**model_kwargs)"
    ),
    "_update_model_kwargs_for_generation": "(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1)",
    "_has_unfinished_sequences": "(self, this_peer_finished, synced_gpus, device)",
    "_prepare_generation_config": "(self, generation_config, **kwargs)",
    "_get_logits_processor": (
        "(self, generation_config, input_ids_seq_length=None, encoder_input_ids=None, prefix_allowed_tokens_fn=None, "
        "logits_processor=None, device=None, model_kwargs=None, negative_prompt_ids=None, "
        "negative_prompt_attention_mask=None)"
    ),
    "_supports_logits_to_keep": "(self)",
    "_supports_default_dynamic_cache": "()",
}
CALLED = {
    "add_fused_lm_head": "(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=('log_probs',))",
    "split_pixel_values_by_grid": "(batch)",
    "use_adapter": "(model, adapter_name)",
    "print_prompt_completions_sample": (
        "(prompts, completions, rewards, advantages, step, num_samples=None, extra=None)"
    ),
    "nanstd": "(tensor, dim=None, keepdim=False)",
    "get_config_model_id": "(config)",
}


@pytest.mark.parametrize(("name", "expected"), [*OVERRIDDEN.items(), *CALLED_METHODS.items()])
def test_methods(name, expected):
    assert signature(getattr(GRPOTrainer, name)) == expected


@pytest.mark.parametrize("name", CALLED_OF_GENERATION)
def test_methods_of_generation(name):
    assert signature(getattr(GenerationMixin, name)) == CALLED_OF_GENERATION[name]


@pytest.mark.parametrize("name", CALLED)
def test_called_functions(name):
    assert signature(getattr(trl.trainer.utils, name)) == CALLED[name]


def test_the_sync_that_resets_use():
    assert signature(SyncRefModelCallback.sync_target_model) == "(model, target_model, alpha)"


def test_the_docstrings_name_every_override():
    overridden = set()
    for layer in (TBRMTrainer, ExactResume):
        ours = {
            name
            for name, member in vars(layer).items()
            if inspect.isfunction(member) and name != "__init__" and hasattr(GRPOTrainer, name)
        }
        assert all(f"`{name}`" in layer.__doc__ for name in ours)
        overridden |= ours
    assert overridden == set(OVERRIDDEN)


def test_the_trainer_leaves_loss_scaling_to_us():
    assert GRPOTrainer.loss_is_scaled_for_ga is True
    assert "loss_is_scaled_for_ga" in inspect.getsource(Trainer.training_step)


def test_declared_range():
    declared = [Requirement(line) for line in importlib.metadata.requires("tbrm-trl")]
    assert [r.specifier for r in declared if r.name == "trl" and not r.extras] == [SpecifierSet(tbrm_trl.SUPPORTED_TRL)]


@pytest.mark.parametrize("found", ["1.15.0", "1.17.0"])
def test_unsupported_trl_is_one_clear_error(found):
    program = (
        "import importlib.metadata as m; real = m.version;"
        f"m.version = lambda name: '{found}' if name == 'trl' else real(name); import tbrm_trl"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: tbrm_trl works with trl>=1.16,<1.17, but trl {found} is installed. "
        'Install a supported one with: pip install "trl>=1.16,<1.17"'
    )
