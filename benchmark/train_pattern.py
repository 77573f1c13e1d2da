"""Train as train.py does, with an attention pattern in place of S2-Attn that only this benchmark has.

    python benchmark/train_pattern.py --pattern rolled_ends --train_args_file F [train.py's other flags]

The ablations of LongLoRA (arXiv 2309.12307, tables 1 and 6 to 8). Settings must have `attention: s2`; groups are of
`group_size_ratio`, `dense_finish` follows as ever, and evaluation is dense. Every memory policy trains the patterns,
through autograd.

  no_shift            all heads attend within the same groups: nothing crosses their borders
  shift_by_layer      all heads of every other layer are shifted by half a group
  rolled_ends         S2-Attn as in LongLoRA's code: the shifted heads' first half group comes behind the last one, in
                      its group, and sees it. It leaks: a token there sees later ones, in training alone
  swapped_ends        the same two half groups in one group, in the order of the text: nothing leaks
  every_fourth_dense  S2-Attn, and every fourth step full attention

Ours (`attention: s2` with train.py) keeps the two half groups apart. Table 8 gives its swapped form no formula; the one
here is our reading. Packed documents stay apart under every pattern, so that rolled ends leak only in rows with both
ends in one document: take long texts for them. The memory plan is that of S2-Attn; the log names the pattern, the run
record does not.
"""

import argparse
import runpy
import sys
from functools import partial
from pathlib import Path

from longqlora.cli import run_main

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
EVERY_FOURTH_DENSE = "every_fourth_dense"
PATTERNS = ("no_shift", "shift_by_layer", "rolled_ends", "swapped_ends", EVERY_FOURTH_DENSE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pattern", choices=PATTERNS, required=True, help="the attention to train with")
    args, flags = parser.parse_known_args()
    import pattern_attention

    from longqlora.attention import binding
    from longqlora.training import dense_finish

    # train.py imports both when it runs.
    if args.pattern == EVERY_FOURTH_DENSE:
        dense_finish.DenseFinish = pattern_attention.EveryFourthDense
    else:
        binding.bind_attention = partial(pattern_attention.bind_pattern, binding.bind_attention, args.pattern)
    sys.argv = [str(TRAIN), *flags]
    runpy.run_path(str(TRAIN))["main"]()


if __name__ == "__main__":
    run_main(main)
