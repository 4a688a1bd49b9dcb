"""Names that other libraries have for run config keys."""

# PEFT's LoraConfig.
PEFT = {
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "target_modules": "lora.targets",
    "use_rslora": "lora.scaling",
    "init_lora_weights": "lora.start",
}
# transformers' TrainingArguments.
TRANSFORMERS = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.batch-size",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_checkpointing": "train.checkpointing",
    "optim": "train.optimizer",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup-rounds",
    "weight_decay": "train.weight-decay",
    "max_grad_norm": "train.clip-norm",
    "bf16": "train.precision",
    "output_dir": "run.dir",
    "resume_from_checkpoint": "run.resume",
    "save_total_limit": "run.keep",
    "eval_steps": "run.eval-every",
}
# The arguments of transformers' and datasets' `from_pretrained` and `load_dataset`, and
# those of their example scripts.
SCRIPTS = {
    "model_name_or_path": "model.name",
    "load_in_8bit": "model.quantize",
    "load_in_4bit": "model.quantize",
    "dataset_name": "data.name",
    "max_length": "data.max-length",
    "max_seq_length": "data.max-length",
    "text_column_name": "data.text",
    "label_column_name": "data.label",
}
# The run config of Flower's templates.
FLOWER = {
    "num_server_rounds": "rounds",
    "local_epochs": "train.epochs",
    "batch_size": "train.batch-size",
    "fraction_train": "clients.per-round",
    "fraction_fit": "clients.per-round",
    "min_available_nodes": "clients.min-nodes",
}
_ALL = FLOWER | SCRIPTS | TRANSFORMERS | PEFT


def translate(key: str) -> str | None:
    """Return the run config key that another library's name means; None if unknown.

    The name may follow a section, and its words may be joined by hyphens.
    """
    return _ALL.get(key.rpartition(".")[2].replace("-", "_"))
