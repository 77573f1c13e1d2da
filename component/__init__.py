"""Command lines, files, processes, plots: nothing here knows a model."""

import logging
import warnings

# Notices of the libraries that say nothing to a user of this one: a kernel package that is optional, and a
# method that transformers calls by its own old name.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
