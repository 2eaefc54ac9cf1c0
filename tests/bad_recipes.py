"""Kinds of bad input: what a user wrote, and what the message must say."""

STUB_LAST = '# """; from medusa_ds.train import main; main(__file__)'
SECRET = "hf_" + "aB3" * 12
GOOD = """\
model:
  name: owner/model
heads:
  num: 3
stage: 1
data:
  path: chat.jsonl
train:
  global_batch_size: 8
  micro_batch_size: 2
  lr: 1e-3
deepspeed: zero.json
output: out
"""


def edit(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


FILES: dict[str, tuple[str, list[str]]] = {
    "syntax": (edit("num: 3", "num: [3"), ["r.yaml:5", "not valid YAML"]),
    "tab": (edit("  num: 3", "\tnum: 3"), ["r.yaml:4", "not valid YAML", "write spaces in place of the tab"]),
    "duplicate key": (edit("  num: 3", "  num: 3\n  num: 4"), ["r.yaml:5", "duplicate key heads.num", "line 4"]),
    "alias": (edit("num: 3", "num: &n 3\n  layers: *n"), ["r.yaml:5", "alias"]),
    "tag": (edit("num: 3", "num: !!python/object/apply:os.system [id]"), ["r.yaml:4", "tag"]),
    "two documents": (GOOD + "---\nx: 1\n", ["r.yaml:14", "not valid YAML"]),
    "list": ("- model\n", ["r.yaml", "found list", "mapping"]),
    "empty": ("", ["r.yaml", "found NoneType", "mapping"]),
    "number as key": (edit("num: 3", "3: 3"), ["r.yaml:4", "not text"]),
    "too deep": (edit("num: 3", "num: " + "[" * 100 + "]" * 100), ["not valid YAML", "deep"]),
    "number out of range": (edit("1e-3", "1e999"), ["1e999 is out of range"]),
    "half a surrogate": (edit("owner/model", '"\\ud800"'), ["r.yaml:2", "surrogate"]),
    "damaged stub": ('_: r"""  # stub\n' + GOOD, ["r.yaml:1", "stub is damaged", STUB_LAST]),
    "quotes inside the stub": ('_: r"""  # stub\n' + GOOD + 'x: """\n' + STUB_LAST, ["stub is damaged", "3"]),
    "stub not first": (GOOD + '_: r"""  # stub\n' + STUB_LAST, ["r.yaml:14", "stub is damaged"]),
    "unknown key": (edit("num: 3", "nums: 3"), ["r.yaml:4: heads.nums", "did you mean num?"]),
    "unknown section": (edit("heads:", "head:"), ["r.yaml:3: head", "did you mean heads?"]),
    "key of another section": (edit("num: 3", "global_batch_size: 3"), ["train.global_batch_size?"]),
    "unknown without a neighbour": (edit("num: 3", "qqq: 3"), ["allowed are kind, num, layers, lm_head"]),
    "missing section": (edit("model:\n  name: owner/model\n", ""), ["r.yaml: model: missing"]),
    "missing key": (edit("  lr: 1e-3\n", ""), ["r.yaml:8: train.lr: missing"]),
    "text for a number": (edit("1e-3", "fast"), ["r.yaml:11: train.lr", 'found "fast"', "a number"]),
    "fraction for a count": (edit("num: 3", "num: 3.0"), ["heads.num", "found 3.0", "whole number"]),
    "boolean for a count": (edit("num: 3", "num: true"), ["heads.num", "found true", "whole number"]),
    "stage 3": (edit("stage: 1", "stage: 3"), ["stage", "found 3", "allowed is 1 or 2"]),
    "no for false": (edit("jsonl", "jsonl\n  packing: no"), ["r.yaml:8: data.packing", "true or false"]),
    "list for a section": (edit("heads:\n  num: 3", "heads: [3]"), ["r.yaml:3: heads", "found [3]"]),
    "null for a section with needed keys": (edit("  name: owner/model\n", ""), ["model.name: missing"]),
    "no for a switch of the template": (
        edit("jsonl", "jsonl\n  template_args: {enable_thinking: no}"),
        ["r.yaml:8", "found no, which is text here", "write true or false, or quote it"],
    ),
    "below range": (edit("num: 3", "num: 0"), ["heads.num", "found 0", "of at least 1"]),
    "above range": (edit("num: 3", "num: 99"), ["heads.num", "found 99", "at most 16"]),
    "zero rate": (edit("1e-3", "0"), ["train.lr", "found 0", "above 0"]),
    "unknown choice": (GOOD + "loss: {impl: cuda}\n", ["r.yaml:14: loss.impl", "liger, torch or eager"]),
    "three betas": (edit("1e-3", "1e-3\n  betas: [1, 2, 3]"), ["train.betas"]),
    "bad split": (edit("jsonl", "jsonl\n  split: 'train[a:b]'"), ["data.split", "train[a:b]"]),
    "number as data path": (edit("chat.jsonl", "3"), ["r.yaml:7: data.path", "found 3", "text"]),
    "wrong source in a list": (
        edit("path: chat.jsonl", "path:\n  - path: chat.jsonl\n    wieght: 2"),
        ["r.yaml:9: data.path.0.wieght", "did you mean weight?"],
    ),
    "a key called like a type": (edit("num: 3", "int: 3"), ["r.yaml:4: heads.int: unknown key"]),
    "bad hash": (
        edit("model\n", "model\n  package: {requirement: a, file: b, sha256: xyz}\n"),
        ["r.yaml:3: model.package.sha256", 'found "xyz"'],
    ),
    "stage 1 trains the backbone": (
        edit("model\n", "model\n  frozen: false\n"),
        ["r.yaml:3: model.frozen", "found false with stage 1"],
    ),
    "batch that does not divide": (
        edit("micro_batch_size: 2", "micro_batch_size: 3"),
        ["r.yaml:9: train.global_batch_size", "found 8", "micro_batch_size 3"],
    ),
    "no DeepSpeed file": (edit("zero.json", "zero9.json"), ["r.yaml:12: deepspeed", "zero9.json", "zero3.json"]),
    "no data file": (edit("chat.jsonl", "chats.jsonl"), ["r.yaml:7: data.path", "chats.jsonl", "not exist"]),
    "data file of another kind": (edit("chat.jsonl", "r.yaml"), ["data.path", ".parquet"]),
    "data directory without data": (edit("chat.jsonl", "empty"), ["data.path", "without a JSON"]),
    "no model directory": (edit("owner/model", "./model"), ["r.yaml:2: model.name", "./model", "owner/name"]),
    "no model name": (edit("owner/model", '""'), ["model.name", "found ''"]),
    "output is a file": (edit("output: out", "output: chat.jsonl"), ["r.yaml:13: output", "a directory"]),
    "secret token": (edit("owner/model", SECRET), ["r.yaml:2: model.name", "secret (not shown)", "HF_TOKEN"]),
    "secret by its name": (
        edit("jsonl", "jsonl\n  template_args: {api_key: abcd1234}"),
        ["data.template_args.api_key", "secret (not shown)"],
    ),
    "password in a URL": (edit("owner/model", "https://me:pa55word@hub.co/x"), ["model.name", "not shown"]),
}
"""What stands in the recipe's file, and in the message."""

OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    "fp8 in fp32": (
        ["model.frozen_precision=fp8", "train.precision=fp32"],
        ["model.frozen_precision", "found fp8 with train.precision: fp32"],
    ),
    "fp8 in stage 2": (
        ["model.frozen_precision=fp8", "stage=2"],
        ["found fp8 with stage 2, which trains the backbone; use bf16"],
    ),
    "fp8 with Liger's layers": (
        ["model.frozen_precision=fp8", "model.liger_kernels=true"],
        ["model.liger_kernels", "found true with frozen_precision: fp8"],
    ),
    "off for a switch of the template": (
        ["data.template_args.enable_thinking=off"],
        ["data.template_args.enable_thinking (from the command line)", "found off, which is text here"],
    ),
    "number in a list of sources": (
        ["data.path=[chat.jsonl, 3]"],
        ["data.path.1 (from", "found 3; allowed is text or a section of the keys path, split, weight"],
    ),
    "number for a text": (["model.revision=1234567"], ["found 1234567", "allowed is text in quotes"]),
    "comment on the command line": (
        ["output=runs/my #2"],
        ["output (from the command line): found a #, which begins a comment in YAML; quote the value"],
    ),
    "comment in place of a value": (["output=#2"], ["output (from the command line): found a #, which"]),
    "text for the positions": (
        ["model.config={model_type: llama, max_position_embeddings: '64'}", "data.max_length=8"],
        ["data.max_length", "found 8"],
    ),
    "neither a switch nor a section": (["train.wandb=[1]"], ["train.wandb (from", "found [1]", "project"]),
    "unknown key of a switch's section": (["train.wandb={projekt: x}"], ["train.wandb.projekt", "mean project?"]),
    "neither auto nor a number": (
        ["train.activation_checkpointing=fast"],
        ["train.activation_checkpointing", 'found "fast"', "auto, true or false or a whole number of at least 1"],
    ),
    "stage 2 freezes the backbone": (
        ["stage=2", "heads.init_from=old", "heads.num=5", "model.frozen=true"],
        ["model.frozen (from the command line", "found true with stage 2"],
    ),
    "stage 2 without heads": (["stage=2"], ["heads.init_from", "missing", "stage-1 run"]),
    "stage 2 with a shared LM head": (
        ["stage=2", "heads.lm_head=shared", "heads.init_from=old"],
        ["heads.lm_head", "found shared with stage 2"],
    ),
    "nothing to learn": (["heads.lm_head=shared", "heads.layers=0"], ["heads.layers", "nothing to learn"]),
    "Hydra heads without a step": (
        ["heads.kind=hydra", "heads.layers=0"],
        ["heads.layers", "found 0 with kind: hydra"],
    ),
    "few tokens of a shared LM head": (
        ["heads.lm_head=shared", "heads.vocab=8192"],
        ["heads.vocab", "found 8192 with lm_head: shared", "use own"],
    ),
    "vocabulary of nothing": (["heads.vocab=8"], ["heads.vocab", "found 8", "64"]),
    "hidden cache of a moving backbone": (
        ["stage=2", "heads.init_from=old", "heads.num=5", "data.hidden_cache=auto"],
        ["data.hidden_cache", "found auto with stage 2"],
    ),
    "predictions beside a cache": (
        ["loss.target=argmax", "data.hidden_cache=auto"],
        ["loss.target", "found argmax with data.hidden_cache"],
    ),
    "precision of no cache": (["data.hidden_cache_dtype=fp8"], ["data.hidden_cache_dtype", "with hidden_cache: off"]),
    "coefficient in stage 1": (["loss.coefficient=0.2"], ["loss.coefficient (from", "found 0.2 with stage 1"]),
    "coefficient schedule in stage 1": (["loss.coefficient_schedule=sine"], ["found sine with stage 1"]),
    "least rate of a constant one": (
        ["train.schedule=constant", "train.min_lr_ratio=0.1"],
        ["train.min_lr_ratio", "found 0.1 with schedule: constant"],
    ),
    "multiplier in stage 1": (
        ["train.lr_multiplier=4"],
        ["train.lr_multiplier", "found 4", "with stage 1", "set train.lr"],
    ),
    "recomputation in stage 1": (["train.activation_checkpointing=true"], ["no backward pass"]),
    "rise of a constant coefficient": (
        ["loss.coefficient_warmup_ratio=0.5"],
        ["loss.coefficient_warmup_ratio", "found 0.5 with a coefficient_schedule that does not"],
    ),
    "chunks of a loss without any": (
        ["loss.impl=eager", "loss.chunk_mib=64"],
        ["loss.chunk_mib", "found 64 with impl: eager", "remove it"],
    ),
    "revision of a directory": (
        ["model.name=./empty", "model.revision=main"],
        ["model.revision", "found main beside a local directory"],
    ),
    "most of a whole source": (
        ["data.validation=sample", "data.validation_max=9"],
        ["data.validation_max", "found 9 beside a source of validation"],
    ),
    "most of nothing": (
        ["data.validation=0", "data.validation_max=9"],
        ["data.validation_max", "found 9 with validation: 0"],
    ),
    "endless epochs": (["train.epochs=1e9"], ["train.epochs", "at most 1000"]),
    "validation of nothing": (["train.eval_every=5", "data.validation=0"], ["train.eval_every", "holds noth"]),
    "sequence shorter than the heads": (["heads.num=16", "data.max_length=16"], ["data.max_length", "17"]),
    "split of a local file": (["data.split=test"], ["data.split", "only data sets of the hub have splits"]),
    "split of a local file in a list": (
        ["data.path=[{path: owner/chat, split: test}, {path: sample, split: test}]"],
        ["data.path.1.split (from", "only data sets of the hub have splits"],
    ),
    "split beside a list": (["data.path=[{path: sample}]", "data.split=test"], ["data.split", "its own split"]),
    "no source": (["data.path=[]"], ["data.path", "at least one source"]),
    "attention that no twin on a CPU has": (
        ["model.attention=flash_attention_2"],
        ["model.attention", "found flash_attention_2 to train with", "use sdpa"],
    ),
    "config of a pretrained model": (["model.config={num_hidden_layers: 2}"], ["model.config", "init: random"]),
    "strangers' code unpinned": (["model.trust_remote_code=true"], ["model.revision", "pin the commit"]),
    "heads from the own output": (["heads.init_from=old", "heads.num=5", "output=old"], ["would overwrite"]),
    "heads of another shape": (["heads.init_from=old"], ["r.yaml:4: heads.num", "found 3", "has 5", "equal"]),
    "heads of another model": (
        ["heads.init_from=old", "heads.num=5", "model.name=meta-llama/Llama-3.1-8B-Instruct"],
        ["heads.init_from", "of owner/model for model.name meta-llama/Llama", "hidden_size 32 and 4096", "two models"],
    ),
    "more tokens than positions": (
        ["model.name=lmsys/vicuna-7b-v1.5", "data.max_length=8192"],
        ["data.max_length", "found 8192", "4096 positions"],
    ),
    "no heads": (["heads.init_from=nowhere"], ["heads.init_from", "nowhere", "run stage 1 first"]),
    "directory without heads": (["heads.init_from=empty"], ["heads.init_from", "no heads.json"]),
    "override without =": (["train.lr"], ["train.lr: not an override", "key.path=value"]),
    "override of a value's key": (["train.lr.x=1"], ["train.lr is not a section"]),
    "override of an unknown key": (["train.step=1"], ["train.step (from the command line", "mean steps?"]),
    "override of a wrong type": (["heads.num=x"], ["heads.num (from the command line", 'found "x"']),
    "override that is no YAML": (["heads.num=[1"], ["heads.num (from the command line)", "not valid YAML"]),
    "secret in an override": ([f"heads.num={SECRET}"], ["heads.num", "secret (not shown)"]),
    "secret as an override alone": ([SECRET], ["(not shown): not an override"]),
    "distillation of some tokens in stage 2": (
        ["stage=2", "heads.init_from=old", "heads.num=5", "heads.vocab=64", "loss.target=argmax"],
        ["loss.target", "found argmax with heads.vocab", "use label"],
    ),
    "temperature of first choices": (
        ["stage=2", "heads.init_from=old", "heads.num=5", "loss.target=argmax", "loss.temperature=2.0"],
        ["loss.temperature", "found 2.0 with target: argmax"],
    ),
    "distillation onto some tokens": (
        ["heads.vocab=64", "loss.target=distribution"],
        ["loss.target", "found distribution with heads.vocab", "use label"],
    ),
    "temperature of labels": (["loss.temperature=2.0"], ["loss.temperature", "with target: label", "distribution"]),
}
"""What is given on the command line beside the good recipe, and what the message says."""

JSONS: dict[str, tuple[str, list[str]]] = {
    "trailing comma": ('{\n"zero_optimization": {},\n}', ["zero.json:3", "not valid JSON"]),
    "comment": ('{"steps_per_print": 1} // x', ["zero.json:1", "not valid JSON"]),
    "JSON list": ("[]", ["zero.json", "found list", "JSON object"]),
    "JSON NaN": ('{"gradient_clipping": NaN}', ["zero.json", "NaN"]),
    "JSON duplicate": ('{"bf16": {}, "bf16": {}}', ["zero.json", "duplicate key 'bf16'"]),
    "JSON infinity": ('{"gradient_clipping": 1e999}', ["zero.json", "out of range"]),
    "JSON that prints every 0 steps": ('{"steps_per_print": 0}', ["zero.json: steps_per_print: found 0"]),
    "precision of another place": (
        '{"torch_autocast": {"enabled": true}}',
        ["zero.json: torch_autocast: is not supported here"],
    ),
    "unsupported feature": ('{"sparse_gradients": true}', ["zero.json: sparse_gradients: is not supported here"]),
    "JSON with secondary partitions": (
        '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}',
        ["zero.json: zero_optimization.zero_hpz_partition_size: found 8; allowed is 1"],
    ),
    "JSON too deep": ('{"a": ' * 2000 + "1" + "}" * 2000, ["zero.json", "not valid JSON"]),
    "unknown DeepSpeed key": ('{"zero_optimisation": {}}', ["zero.json: zero_optimisation", "zero_optimization?"]),
    "unknown ZeRO key": ('{"zero_optimization": {"stages": 2}}', ["zero_optimization.stages", "mean stage?"]),
    "unknown offload key": (
        '{"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}',
        ["zero_optimization.offload_optimizer.devise", "device?"],
    ),
    "ZeRO stage as text": ('{"zero_optimization": {"stage": "2"}}', ["stage: found '2'", "0, 1, 2 or 3"]),
    "ZeRO stage 4": ('{"zero_optimization": {"stage": 4}}', ["found 4", "0, 1, 2 or 3"]),
    "ZeRO flag as text": ('{"zero_optimization": {"overlap_comm": "yes"}}', ["overlap_comm", "found 'yes'"]),
    "ZeRO size as text": ('{"zero_optimization": {"reduce_bucket_size": "5e8"}}', ["found '5e8'", "number"]),
    "share of an offload as text": (
        '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": "0.5"}}}',
        ["offload_optimizer.ratio: found '0.5'", "allowed is a number"],
    ),
    "gradients summed": ('{"gradient_allreduce_op": "sum"}', ["gradient_allreduce_op: found 'sum'", "allowed is mean"]),
    "no gradient norm": ('{"zero_optimization": {"compute_grad_norm": false}}', ["compute_grad_norm: found False"]),
    "ZeRO as a number": ('{"zero_optimization": 2}', ["zero_optimization: found 2", "an object"]),
    "negative clipping": ('{"gradient_clipping": -1}', ["gradient_clipping: found -1, but", "make them equal"]),
    "clipping as a switch": ('{"gradient_clipping": true}', ["gradient_clipping: found True, but", "make them equal"]),
    "unknown offload device": ('{"zero_optimization": {"offload_param": {"device": "gpu"}}}', ["found 'gpu'"]),
    "NVMe that ZeRO 2 would not use": (
        '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}}',
        ["zero.json: zero_optimization.offload_optimizer.device: found 'nvme'", "set stage to 3"],
    ),
    "NVMe without a place": (
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
        ["zero.json: zero_optimization.offload_param.nvme_path: found no directory"],
    ),
    "secret in DeepSpeed JSON": ('{"wandb": {"api_key": "0123456789abcdef"}}', ["wandb.api_key", "WANDB_API_KEY"]),
    "clipping in both": (
        '{"gradient_clipping": 0.5}',
        ["zero.json: gradient_clipping: found 0.5", "r.yaml has 1.0", "train.max_grad_norm", '"auto"'],
    ),
    "batch in both": ('{"train_batch_size": 16}', ["found 16", "r.yaml has 8", "train.global_batch_size"]),
    "rate in both": ('{"optimizer": {"type": "AdamW", "params": {"lr": 1}}}', ["params.lr", "r.yaml", "train.lr"]),
    "another optimizer": ('{"optimizer": {"type": "Lamb", "params": {}}}', ["found 'Lamb'", "AdamW"]),
    "optimizer's own settings": ('{"optimizer": {"params": {"torch_adam": true}}}', ["params.torch_adam"]),
    "scheduler's own settings": ('{"scheduler": {"params": {"warmup_num_steps": 9}}}', ["warmup_num_steps"]),
    "fp16": ('{"fp16": {"enabled": true}}', ["fp16.enabled: found True", "r.yaml", "train.precision"]),
    "accumulation that fits no ranks": ('{"gradient_accumulation_steps": 3}', ["found 3", "r.yaml", "no number of"]),
    "accumulation as text": ('{"gradient_accumulation_steps": "4"}', ["found '4'", "no number of ranks", '"auto"']),
    "sequence over no ranks": ('{"sequence_parallel_size": 0}', ["sequence_parallel_size: is not supported here"]),
}
"""What stands in the DeepSpeed JSON of the good recipe, and in the message."""
