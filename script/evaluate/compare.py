r"""Compare context methods on one base model: methods x lengths, one YAML, one table, one plot.

    python script/evaluate/compare.py --compare_args_file script/evaluate/compare.yaml \
        --output_file comparison.json --plot comparison.png
    torchrun --nproc_per_node 2 script/evaluate/compare.py ...        # the same numbers from two processes

The YAML names the base model, the lengths and, for each method, how RoPE is scaled (rope_type), which
attention reads (attention: dca) or which adapter was trained (peft_model); script/evaluate/compare.yaml
explains every key. measure: perplexity (default) or passkey. --base_model, --data_path and --max_windows
override the YAML. With --output_file a killed run goes on where it stopped.
"""

import argparse

from longqlora.cli import require_file, run_main
from longqlora.evaluation.frame import add_result_arguments, run_task
from longqlora.outputs import check_results

OVERRIDES = ("base_model", "data_path", "max_windows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare_args_file", required=True, help="YAML with the settings of the comparison")
    for name in OVERRIDES:
        parser.add_argument(f"--{name}", help=f"in place of the YAML's {name} (default: the YAML's)")
    add_result_arguments(parser, "perplexity by length, or passkey heat maps")
    args = parser.parse_args()
    require_file(args.compare_args_file, "--compare_args_file")

    import torch

    from longqlora.distributed import init_process_group
    from longqlora.evaluation.comparison import read_comparison
    from longqlora.run_record import software_versions

    overrides = {key: getattr(args, key) for key in OVERRIDES if getattr(args, key) is not None}
    task = read_comparison(args.compare_args_file, overrides)
    check_results(args, {"--compare_args_file": args.compare_args_file, **task.inputs})
    parts = task.make_trials()
    init_process_group()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    run_task(task, parts, args, name="", fingerprint={}, facts={"device": device, "versions": software_versions()})


if __name__ == "__main__":
    run_main(main)
