"""Models that come with code of their own, as some on the Hub do."""

import json
from pathlib import Path

_CODE = """
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Model


class Config(Qwen2Config):
    model_type = "ones_own"


class Model(Qwen2ForCausalLM):
    config_class = Config


class Backbone(Qwen2Model):
    config_class = Config


class Classifier(Qwen2ForSequenceClassification):
    config_class = Config


AutoModel.register(Config, Backbone, exist_ok=True)  # the classifier asks it for its backbone
"""
_CLASSES = {
    "AutoConfig": "ones_own.Config",
    "AutoModelForCausalLM": "ones_own.Model",
    "AutoModelForSequenceClassification": "ones_own.Classifier",
}


def give_code(folder: str) -> str:
    """Make a saved model one that loads by its own code alone, as a Qwen2."""
    file = Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "ones_own", "auto_map": _CLASSES}))
    file.with_name("ones_own.py").write_text(_CODE)
    return folder
