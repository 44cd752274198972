"""Settings of every test: nothing is fetched from the hub, and forked helpers do not warn about tokenizer threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
