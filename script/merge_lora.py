"""Merge a trained adapter into its base model and save a model that stock transformers loads.

    python script/merge_lora.py --adapter_name_or_path output/run/checkpoint-1000 --save_path output/merged

Works through the base weights shard by shard on the CPU: memory holds the adapter and one shard of the result. The base
model is the one the adapter names unless --model_name_or_path gives another; context and RoPE come from the adapter's
config.json, or from --context_size where the adapter has none (released LongQLoRA and LongLoRA adapters).

With --load_in_4bit the adapter is merged into the dequantised NF4 weights, which are what a QLoRA
adapter was trained against; then give as --dtype the dtype that training loaded the base in.
"""

import argparse

from longqlora.cli import DTYPES, dtype_of, require_folder, run_main
from longqlora.model.context_request import add_context_arguments, context_request


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", "--base_model", help="base model (default: the one the adapter names)")
    parser.add_argument("--adapter_name_or_path", "--peft_model", required=True, help="folder of the trained adapter")
    parser.add_argument("--save_path", required=True, help="folder for the merged model")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="default: auto, that of the base")
    parser.add_argument("--load_in_4bit", action=argparse.BooleanOptionalAction, default=False,
                        help="merge into the dequantised NF4 weights (default: no)")  # fmt: skip
    parser.add_argument("--max_shard_size", default="4GB", help="largest weight file (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a --save_path that is not empty")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add_context_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    require_folder(args.adapter_name_or_path, "--adapter_name_or_path")
    context = context_request(args)

    from longqlora.device import parse_size
    from longqlora.model.merge import merge

    record = merge(
        args.model_name_or_path,
        args.adapter_name_or_path,
        args.save_path,
        context=context,
        dtype=dtype_of(args.dtype),
        load_in_4bit=args.load_in_4bit,
        max_shard_size=parse_size(args.max_shard_size, "--max_shard_size"),
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
    )
    print(
        f"merged {record['num_lora_weights']} LoRA weights and {len(record['replaced_weights'])} whole weights into "
        f"{args.save_path} ({record['dtype']}, context of {record['context_size']} tokens)"
    )


if __name__ == "__main__":
    run_main(main)
