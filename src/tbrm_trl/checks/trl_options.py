"""How each option of TRL's `GRPOConfig` is treated: kept, given a meaning, or refused."""

# A test fails on an option of GRPOConfig that is not in exactly one of these three.

KEPT = frozenset(
    """
    model_init_kwargs trust_remote_code router_aux_loss_coef cast_lm_head_to_fp32 remove_unused_columns
    num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset pad_to_multiple_of
    generation_batch_size generation_kwargs chat_template_kwargs cache_implementation
    use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url
    vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
    vllm_max_model_length vllm_tensor_parallel_size
    use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    reward_weights max_tool_calling_iterations
    log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    """.split()
)

GIVEN_A_MEANING = {
    "learning_rate": "The default is 2.5e-6, as published.",
    "beta": "The temperature of the Bellman residual. It must be positive; the default is 0.002.",
    "num_generations": "Rollouts per prompt, 1 by default, which soft values and baselines may compare.",
    "num_iterations": "Updates for each fresh one. The others replay, or take the same trajectories again. No ratio.",
    "steps_per_generation": "A multiple of gradient_accumulation_steps, so that a window holds whole updates.",
    "temperature": "It applies to sampling and to the soft value: the policy is softmax(logits / temperature).",
    "sync_ref_model": "It works with adapters too, where only a hard reset (ref_model_mixup_alpha=1) has a meaning.",
    "ref_model_mixup_alpha": "Share of the policy in the new reference, 0.6 by default. 1 is a hard reset.",
    "ref_model_sync_steps": "Updates between two syncs, 512 by default.",
    "disable_dropout": "Dropout is always off, since a noisy log-probability biases the squared residual.",
    "mask_truncated_completions": "It means truncation='mask'.",
    "top_p": "It is allowed with a warning: the scored policy is then not the sampled one.",
    "top_k": "It is allowed with a warning: the scored policy is then not the sampled one.",
    "min_p": "It is allowed with a warning: the scored policy is then not the sampled one.",
    "repetition_penalty": "It is allowed with a warning: the scored policy is then not the sampled one.",
}

_NO_RATIO = "TBRM has no importance ratio, so there is nothing to clip or weight"
_NO_ADVANTAGE = "TBRM uses the raw reward; there is no advantage to scale or normalise"
_NO_POLICY_LOSS = "TBRM has one loss, the squared trajectory Bellman residual"
_NO_SAMPLER_LOGPS = "TBRM uses no log-probabilities of the sampler, so there is no mismatch to correct"
_NO_ENTROPY_BONUS = "the residual is already entropy-regularised through its soft value, and carries no entropy bonus"

REFUSED = {
    **dict.fromkeys(("epsilon", "delta", "epsilon_high", "importance_sampling_level"), _NO_RATIO),
    **dict.fromkeys(
        ("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
        _NO_POLICY_LOSS,
    ),
    **dict.fromkeys(("vespo_lambda_neg", "loss_type"), _NO_POLICY_LOSS),
    **dict.fromkeys(("multi_objective_aggregation", "scale_rewards"), _NO_ADVANTAGE),
    **dict.fromkeys(
        ("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
        _NO_ENTROPY_BONUS,
    ),
    "entropy_target": _NO_ENTROPY_BONUS,
    "top_entropy_quantile": "a residual over part of the tokens is not the trajectory's Bellman residual",
    **dict.fromkeys(
        (
            "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
            "vllm_importance_sampling_cap",
        ),
        _NO_SAMPLER_LOGPS,
    ),
    "off_policy_mask_threshold": "off-policy trajectories are valid data for TBRM and are not masked",
    "use_bias_correction_kl": "the KL term is part of the residual and needs no estimator",
}
