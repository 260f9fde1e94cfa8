"""The choice that a wrong name probably means, also for the words of other tools."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

SYNONYMS: Mapping[str, str] = {
    # values
    "valid validation dev": "val",
    "training": "train",
    "evaluation testing": "test",
    "fp16 amp half float16 mixed": "16-mixed | fp16",
    "bfloat16": "bf16-mixed | bf16",
    "fp32 float32 full single": "32 | fp32",
    "baseline vanilla": "plain",
    "tb": "tensorboard",
    "adam": "adamw",
    "gpu": "cuda",
    "pt torchscript torch pytorch": "torch-export",
    "imagefolder image_folder images": "folder",
    "csv": "table",
    # verbs
    "train training finetune fine_tune finetuning trainer learn": "fit",
    "resume continue restart": "fit --resume",
    "eval evaluate evaluation val valid validate validation score accuracy benchmark": "test",
    "infer inference classify classification pred label detect recognize run": "predict",
    "embed embeddings features extract": "predict --features",
    "deploy server api app host": "serve",
    "convert onnx openvino quantize compile": "export",
    "push upload publish hub": "share",
    "cam gradcam visualize visualise attention heatmap saliency": "explain",
    "tune sweep search hpo": "ablate",
    "demo tutorial example examples start": "quickstart",
    "models zoo configs config": "recipes",
    "data dataset download": "datasets",
    "check verify": "datasets check",
    "diff leaderboard": "compare",
    "temperature": "calibrate",
    "import": "import-released",
    "summary html": "report",
    "list ls": "recipes",
    "v version": "--version",
    "h": "--help",
    # options
    "epochs epoch num_epochs n_epochs max_epoch num_train_epochs e": "--trainer.max_epochs",
    "steps num_steps iterations iters num_iterations": "--trainer.max_steps",
    "lr learning_rate base_lr lr0": "--optim.lr",
    "wd decay": "--optim.weight_decay",
    "opt optim": "--optim.optimizer",
    "sched scheduler lr_scheduler lr_schedule lr_scheduler_type": "--optim.schedule",
    "warmup": "--optim.warmup_epochs",
    "smoothing": "--optim.label_smoothing",
    "ema model_ema": "--optim.ema_decay",
    "freeze": "--optim.freeze_backbone",
    "gradient_checkpointing grad_checkpointing": "--optim.recompute_activations",
    "dropout drop": "--model.backbone_args.drop_rate",
    "drop_path": "--model.backbone_args.drop_path_rate",
    "torchcompile": "--optim.compile",
    "bs b batch batchsize train_batch_size per_device_train_batch_size": "--data.batch_size",
    "val_batch_size test_batch_size validation_batch_size per_device_eval_batch_size": "--data.eval_batch_size",
    "model arch architecture a m net network model_name": "--model.backbone",
    "weights checkpoint ckpt initial_checkpoint": "--model.backbone_weights",
    "data d dir data_dir data_path dataset_path dataset_dir train_dir path root_dir val_dir test_dir": "--data.root",
    "data_name": "--data.dataset",
    "workers worker j num_worker dataloader_num_workers": "--data.num_workers",
    "imgsz img_size imagesize input_size size resolution crop_size img": "--data.image_size",
    "resize": "--data.resize_size",
    "val_split validation_split val_ratio": "--data.val_fraction",
    "test_split test_ratio": "--data.test_fraction",
    "augment aug aa auto_augment": "--data.augmentation",
    "reprob": "--data.random_erasing",
    "gpu gpus gpu_ids gpu_id num_gpus ngpus": "--trainer.devices | --device",
    "device cuda cpu": "--device | --trainer.accelerator",
    "amp fp16 half mixed_precision bf16 amp_dtype dtype": "--trainer.precision | --precision",
    "accum accumulate grad_accum grad_accum_steps gradient_accumulation_steps": "--trainer.accumulate_grad_batches",
    "clip_grad max_grad_norm clip": "--trainer.gradient_clip_val",
    "nodes nnodes": "--trainer.num_nodes",
    "sync_bn syncbn": "--trainer.sync_batchnorm",
    "save_every save_period save_steps": "--trainer.checkpoint_every_n_steps",
    "quiet silent no_progress": "--trainer.enable_progress_bar",
    "log log_wandb report_to wandb tensorboard": "--trainer.logger",
    "random_seed manual_seed random_state s": "--seed",
    "out o output_dir save_dir outdir output_path out_dir save name project run_name experiment exp exp_name logdir "
    "log_dir save_path results_dir dest target": "--output",
    "cfg c yaml recipe conf": "--config",
    "resume_from resume_from_checkpoint ckpt_path": "--resume",
    "k topk top_k": "--top",
    "tta": "--flip",
    "p": "--port",
    "repo repo_id": "--hub",
    "fmt": "--format",
}
"""Words of other tools, with underscores -> what to suggest for them, the first that is a choice."""
_SYNONYMS = [(frozenset(words.split()), names.split(" | ")) for words, names in SYNONYMS.items()]


def nearest(name: object, choices: Iterable[object]) -> str:
    """Return `` Did you mean 'x'?`` for the choice closest to ``name``, or an empty string.

    The words of other tools (``SYNONYMS``) are close; case, and hyphens for underscores, make no difference. ``name``
    itself is never suggested, and what only looks like it, in another Unicode form, is written with escapes.
    """
    # comparing long texts takes minutes
    name = str(name)[:200]
    others = [choice for choice in map(str, choices) if choice != name]
    composed = unicodedata.normalize("NFC", name)
    for choice in others:
        if unicodedata.normalize("NFC", choice) == composed:
            return f" Did you mean {choice!a}, which is written with other characters than {name!a}?"
    by_plain = {_plain(choice): choice for choice in reversed(others)}
    word = _plain(name)
    close = [by_plain[word]] if word in by_plain else _synonyms(word, others)
    if not close:
        close = [by_plain[key] for key in difflib.get_close_matches(word, by_plain, n=1, cutoff=0.5)]
    return f" Did you mean {close[0]!r}?" if close else ""


def _plain(name: str) -> str:
    return name.strip().lstrip("-").casefold().replace("-", "_")


def _synonyms(word: str, choices: Sequence[str]) -> list[str]:
    """Return what to suggest for a word of another tool: a choice, or one with an option or argument of its own."""
    section, _, last = word.rpartition(".")
    suggested = [name for words, names in _SYNONYMS if last in words for name in names]
    return [
        name
        for name in suggested
        if name.lstrip("-").startswith(section)
        and {name, name.split()[0], name.rpartition(".")[0]} & {*choices}
    ]
