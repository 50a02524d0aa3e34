import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may depend on a hub
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
