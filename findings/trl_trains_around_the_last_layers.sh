#!/usr/bin/env bash
# TRL trains a model on another model's loss where its logits are more than the last states times one matrix.
#
# To spare the memory of the logits, `SFTTrainer` does not ask the model for its loss. It multiplies the backbone's last
# states by `get_output_embeddings().weight` itself. Scales and caps are read off the config by the names that some
# families have for them, so that Gemma, Cohere and Granite are right. What has another name is left out: the layer
# before the last matrix of ModernBERT's decoder, the width by which Inkling divides its states, RecurrentGemma's cap.
# The reported loss falls, and so does `eval_loss`, which is computed the same way; the model that is saved, called as
# everybody calls it, has learned something else or next to nothing. The trainers of DPO and GRPO share that head.
# Nothing warns.
# Seen 2026-11-29 with trl 1.16.0, transformers 5.24.0 and torch 2.14.1 on a CPU: random weights, logits up to 40 before
# any cap, 30 steps on 4 rows; loss by the model itself and by `SFTTrainer`, before, and both afterwards:
#     Llama:                           23.09 23.09     0.00 0.00
#     Gemma 2, which caps at 30:       29.92 29.92     6.39 6.39
#     Granite, which divides by 8:     23.07 23.07     0.00 0.00
#     RecurrentGemma, which caps too:  24.80 36.49     4.40 4.68
#     Inkling, which divides by 24:    25.95 617.21    0.05 0.00
#     ModernBERT's decoder:            27.87 63.56    25.56 5.82
# What helps: a subclass of `SFTTrainer` with `compute_loss = Trainer.compute_loss`, which asks the model for its loss.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.24.0 torch==2.14.1 accelerate==1.15.0 datasets==5.2.0
export HF_HOME="$work/hub" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"$work/venv/bin/python" -W ignore - "$work" <<'PY'
import sys

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer

disable_progress_bars()
words = Tokenizer(models.WordLevel({str(place): place for place in range(64)}, unk_token="0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1", eos_token="2")
ids = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(0))
rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
sizes |= {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 2}
groups = {"num_key_value_heads": 2, "head_dim": 8}
inkling = {f"swa_{name}": number for name, number in (groups | {"num_attention_heads": 4}).items()}
inkling |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
families = {
    "Llama": groups,
    "Gemma2": groups,
    "Granite": groups | {"logits_scaling": 8.0},
    "RecurrentGemma": {"num_key_value_heads": 1, "head_dim": 8, "lru_width": 32},
    "InklingText": groups | inkling,
    "ModernBertDecoder": {"cls_token_id": 2, "sep_token_id": 2},
}


class AsksTheModel(SFTTrainer):
    compute_loss = Trainer.compute_loss


def losses(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes, **families[family]))
    with torch.no_grad():
        matrix = model.get_output_embeddings().weight
        matrix *= 40 / model.eval()(ids).logits.abs().max()

        def own():
            return model.eval()(ids, labels=ids, use_cache=False).loss.item()

        def trainer(kind):
            options = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
            options |= {"learning_rate": 0.01, "max_steps": 30, "per_device_train_batch_size": 4}
            options |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
            config = SFTConfig(sys.argv[1], per_device_eval_batch_size=4, **options)
            made = kind(model, config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
            made.remove_callback(PrinterCallback)
            return made

        before = own()
        helped = trainer(AsksTheModel).evaluate()["eval_loss"]
        trl = trainer(SFTTrainer)
        seen = trl.evaluate()["eval_loss"]
    trl.train()
    with torch.no_grad():
        after, believed = own(), trl.evaluate()["eval_loss"]
    print(f"{family:20} {before:.2f} {seen:.2f}, {after:.2f} {believed:.2f}, asked: {helped:.2f}", flush=True)
    return before, seen, after, believed, helped


found = {family: losses(family) for family in families}
same = all(abs(before - helped) < 1e-3 for before, *_, helped in found.values())
for family, (before, seen, after, believed, _) in found.items():
    if family in ("Llama", "Gemma2", "Granite"):
        same &= abs(before - seen) < 1e-3 and abs(after - believed) < 1e-3
    else:
        same &= seen > before + 5
same &= found["ModernBertDecoder"][2] > 15 and found["ModernBertDecoder"][3] < 8
sys.exit(0 if same else "this has changed")
PY
