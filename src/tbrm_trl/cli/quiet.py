"""What is settled before libraries are imported: what they print, and which GPUs they see."""

import logging
import os
import warnings


def silence() -> None:
    """Call it before libraries are imported. What the run itself warns of stays."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    logging.getLogger("torchao").setLevel(logging.ERROR)

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # while weights load; the Trainer's own bar is another


def see_one_gpu() -> None:
    """Hide the other GPUs from a process that trains alone. The Trainer would spread the model over all of them.

    Call it before libraries are imported: bitsandbytes begins to use CUDA then.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
