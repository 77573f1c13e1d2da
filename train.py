"""Extend the context of a Llama-family model: S2-Attn, RoPE interpolation and QLoRA.

    deepspeed train.py --train_args_file train_args/tiny-llama-pretrain.yaml [--key value ...]
    torchrun --nproc_per_node 2 train.py --train_args_file F
    python train.py --train_args_file F --dry_run

Settings come from the YAML; `--key value` overrides single ones. --dry_run checks everything, weights by
the headers of their files. Writes into output_dir: checkpoints, the final adapter (final/), the run record, a log,
tensorboard events and a loss curve.
"""

import argparse
from dataclasses import asdict

from longqlora.cli import run_main


def parse_command_line() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Every setting of the YAML is listed in docs/settings.md.",
    )
    parser.add_argument("--train_args_file", required=True, help="YAML with the settings of the run")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="check all but the values of the weights, then stop"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_known_args()


def main() -> None:
    args, overrides = parse_command_line()
    from longqlora.training.termination import end_with_launcher

    end_with_launcher()

    from longqlora.attention.binding import bind_attention
    from longqlora.data.collator import DataCollator
    from longqlora.data.dataset import build_datasets
    from longqlora.data.preview import NUM_SHOWN, show_row
    from longqlora.device import GIB
    from longqlora.memory.layer_binding import apply_policy
    from longqlora.memory.plan import plan_memory
    from longqlora.model.adapter import attach_adapter, trainable_table
    from longqlora.model.base import load_tokenizer, load_training_model
    from longqlora.model.context import context_length, load_extended_config
    from longqlora.model.loss_binding import bind_chunked_loss
    from longqlora.settings.config import Notice
    from longqlora.settings.reader import resolve_settings
    from longqlora.training.arguments import build_arguments
    from longqlora.training.checks import check_data, check_model, check_num_rows, check_settings
    from longqlora.training.dense_finish import DenseFinish
    from longqlora.training.dry_run import dry_run
    from longqlora.training.run import start_run
    from longqlora.training.trainer import LongContextTrainer

    settings, notices = resolve_settings(args.train_args_file, overrides)
    notices += check_settings(settings)
    config, context = load_extended_config(settings)
    empty_model, on_model = check_model(settings, config, needs_weights=not args.dry_run)
    plan, settings, on_memory = plan_memory(settings, config)
    notices += [*on_model, Notice(context), *on_memory]
    arguments = build_arguments(settings)
    tokenizer = load_tokenizer(
        settings.model.model_name_or_path,
        model_max_length=context_length(config),
        trust_remote_code=settings.model.trust_remote_code,
    )
    settings, on_data = check_data(settings, config, tokenizer)
    notices += on_data
    if args.dry_run:
        return dry_run(settings, arguments, empty_model, tokenizer, plan, notices)

    run = start_run(settings, arguments, empty_model, notices, mechanisms=asdict(plan.policy))
    size, is_packed = settings.parallel.sequence_parallel_size, settings.data.is_packed
    train_dataset, eval_dataset = build_datasets(tokenizer, settings.data, log=run.log, seed=arguments.seed)
    for row in train_dataset.select(range(min(NUM_SHOWN, len(train_dataset)))):
        run.log(f"row: {show_row(tokenizer, row['input_ids'], row['labels'])}")
    num_eval_rows = len(eval_dataset) if eval_dataset else None
    check_num_rows(arguments, len(train_dataset), num_eval_rows, processes_per_row=size)
    model = load_training_model(settings, config, arguments)
    length = settings.data.max_seq_length
    shared = {"sequence_parallel_size": size, "is_packed": is_packed}
    run.log(bind_attention(model, settings.attention, length, **shared))
    dense_finish = DenseFinish(model, settings.attention, length, note=run.note, **shared)
    run.log(bind_chunked_loss(model))
    model = attach_adapter(model, settings.adapter)
    apply_policy(model, plan.policy, arguments.device)
    run.log(trainable_table(model))

    trainer = LongContextTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[dense_finish],
        data_collator=DataCollator(tokenizer, num_parts=size),
        processing_class=tokenizer,
        run_record=run.record,
        folder=run.folder,
        sequence_parallel_size=size,
    )
    with plan.advice_on_out_of_memory(), trainer.failed_writes_explained(), run.log_above_bars():
        trainer.train(resume_from_checkpoint=run.checkpoint)
    run.finish(trainer, predicted_gib=plan.estimate.peak / GIB)


if __name__ == "__main__":
    run_main(main)
