"""What the fork server imports once, so that each training run of a test starts in a fraction of a second."""

import os

# Given for these imports only (script_process.start_script).
os.environ.pop("PYTHONPATH", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import accelerate  # noqa: F401
import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import deepspeed  # noqa: F401
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import Trainer  # noqa: F401

import longqlora.training.trainer  # noqa: F401
