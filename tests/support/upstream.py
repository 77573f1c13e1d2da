"""What upstream's YAMLs say (yangjianxin1/LongQLoRA at ade0d97, train_args/), key by key, and its DeepSpeed file."""

PRETRAIN = {
    "output_dir": "./output/LongQLoRA-Llama2-7b-8k", "model_name_or_path": "NousResearch/Llama-2-7b-hf",
    "train_file": "./data/pretrain/pretrain_dummy_data.jsonl",
    "deepspeed": "./train_args/deepspeed/deepspeed_config_s2.json", "sft": False,
    "num_train_epochs": 1, "max_steps": 1000, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16,
    "max_seq_length": 8192, "model_max_length": 8192, "learning_rate": 0.0002, "logging_steps": 50, "save_steps": 100,
    "save_total_limit": 3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20,
    "lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.05, "gradient_checkpointing": True, "disable_tqdm": False,
    "optim": "paged_adamw_32bit", "seed": 42, "fp16": True, "report_to": "tensorboard", "dataloader_num_workers": 0,
    "save_strategy": "steps", "weight_decay": 0, "max_grad_norm": 0.3, "remove_unused_columns": False,
}  # fmt: skip
SFT = {
    **{key: value for key, value in PRETRAIN.items() if key != "max_steps"},
    "output_dir": "./output/LongQLoRA-Vicuna-13b-8k", "model_name_or_path": "lmsys/vicuna-13b-v1.5",
    "train_file": "./data/pretrain/sft_dummy_data.jsonl", "sft": True, "learning_rate": 0.0001,
}  # fmt: skip
DEEPSPEED_S2 = {
    "zero_optimization": {
        "stage": 2, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": True, "overlap_comm": True
    },
    "fp16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
}  # fmt: skip
