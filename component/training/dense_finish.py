"""The last steps of a run with S2-Attn train with full attention (`dense_finish`).

S2-Attn shows a head no distance beyond its group. Position interpolation changes every distance, so a model that is
read dense afterwards has to see the far ones too.
"""

import logging
from collections.abc import Callable

from transformers import PreTrainedModel, TrainerCallback

from longqlora.attention.binding import bind_dense_finish
from longqlora.settings.config import AttentionConfig

logger = logging.getLogger("longqlora")


class DenseFinish(TrainerCallback):
    """Switches to full attention before the first of the last steps, also in a run that is resumed behind it.

    To be made after `bind_attention`, whose arguments it takes, and raising what that raises. note(first_dense_step=N)
    is called when training begins, None without dense steps.
    """

    def __init__(
        self, model: PreTrainedModel, config: AttentionConfig, max_seq_length: int, *, note: Callable, **options
    ) -> None:
        self.part, self.note = config.dense_part, note
        self.switch = bind_dense_finish(model, config, max_seq_length, **options) if self.part else None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # Not known before: the number of steps may follow from epochs.
        self.note(first_dense_step=num_sparse_steps(state.max_steps, self.part) + 1 if self.part else None)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.switch and state.global_step >= num_sparse_steps(state.max_steps, self.part):
            description = self.switch()
            logger.info("step %d: %s from here on (dense_finish: %g)", state.global_step + 1, description, self.part)
            self.switch = None


def num_sparse_steps(num_steps: int, part: float) -> int:
    """Steps before those of full attention, of which there is at least one."""
    return num_steps - max(1, round(part * num_steps))
