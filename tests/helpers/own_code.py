"""Models that come with code of their own, as some on the Hub do."""

import json
from pathlib import Path

_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class Config(Qwen2Config):
    model_type = "ones_own"


class Model(Qwen2ForCausalLM):
    config_class = Config
"""


def give_code(folder: str) -> str:
    """Make a saved Qwen2 model one that loads by its own code alone."""
    file = Path(folder, "config.json")
    classes = {"AutoConfig": "ones_own.Config", "AutoModelForCausalLM": "ones_own.Model"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "ones_own", "auto_map": classes}))
    file.with_name("ones_own.py").write_text(_CODE)
    return folder
