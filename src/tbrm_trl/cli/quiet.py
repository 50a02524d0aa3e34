"""A run that prints what it has to say: no deprecations of libraries, no bar for each weight."""

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
