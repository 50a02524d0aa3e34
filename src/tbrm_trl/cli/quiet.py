"""Settings to make before libraries are imported: what they print, and which GPUs they see."""

import logging
import os
import warnings


def silence() -> None:
    """Silence libraries; call this before importing them. The run's own warnings stay."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    logging.getLogger("torchao").setLevel(logging.ERROR)

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the bar for loading weights; the Trainer's bar is a separate one


def see_one_gpu() -> None:
    """Hide all GPUs but one from a process that trains alone, since the Trainer would spread the model over all.

    Call it before importing libraries: importing bitsandbytes already uses CUDA.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
