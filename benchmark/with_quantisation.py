"""Run a script with the base in another quantisation than its own, which is NF4 with double quantisation.

    python benchmark/with_quantisation.py int8 train.py --train_args_file F --memory null [more of its flags]
    python benchmark/with_quantisation.py int8 script/evaluate/evaluate.py --load_in_4bit [more of its flags]

  nf4_single   NF4 whose constants stay in 32 bit
  int8         LLM.int8 (arXiv 2208.07339); to train, it needs plain layers (no `memory` policy)

For the suite `quantisation` alone: nothing that is saved says what the base was.
"""

import argparse
import runpy
import sys
from pathlib import Path

from longqlora.cli import run_main

REPO = Path(__file__).resolve().parents[1]
QUANTISATIONS = {
    "nf4_single": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantisation", choices=QUANTISATIONS, help="of the base")
    parser.add_argument("script", help="train.py or a script that evaluates, from the repository's root")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="its own")
    args = parser.parse_args()
    from transformers import BitsAndBytesConfig

    from longqlora.model import base

    options = QUANTISATIONS[args.quantisation]
    base.quantization_config = lambda dtype: BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)
    script = REPO / args.script
    sys.argv = [str(script), *args.flags]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script))["main"]()


if __name__ == "__main__":
    run_main(main)
