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


# name: (recipe text, overrides, DeepSpeed JSON or None, fragments that the message must hold)
BAD: dict[str, tuple[str, list[str], str | None, list[str]]] = {
    # YAML
    "syntax": (edit("num: 3", "num: [3"), [], None, ["r.yaml:5", "not valid YAML"]),
    "tab": (edit("  num: 3", "\tnum: 3"), [], None, ["r.yaml:4", "not valid YAML", "write spaces in place of the tab"]),
    "duplicate key": (
        edit("  num: 3", "  num: 3\n  num: 4"),
        [],
        None,
        ["r.yaml:5", "duplicate key heads.num", "line 4"],
    ),
    "alias": (edit("num: 3", "num: &n 3\n  layers: *n"), [], None, ["r.yaml:5", "alias"]),
    "billion laughs": ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n", [], None, ["r.yaml:2", "alias"]),
    "tag": (edit("num: 3", "num: !!python/object/apply:os.system [id]"), [], None, ["r.yaml:4", "tag"]),
    "two documents": (GOOD + "---\nx: 1\n", [], None, ["r.yaml:14", "not valid YAML"]),
    "list": ("- model\n", [], None, ["r.yaml", "found list", "mapping"]),
    "empty": ("", [], None, ["r.yaml", "found NoneType", "mapping"]),
    "number as key": (edit("num: 3", "3: 3"), [], None, ["r.yaml:4", "not text"]),
    "too deep": (edit("num: 3", "num: " + "[" * 100 + "]" * 100), [], None, ["not valid YAML", "deep"]),
    "number out of range": (edit("1e-3", "1e999"), [], None, ["1e999 is out of range"]),
    "half a surrogate": (edit("owner/model", '"\\ud800"'), [], None, ["r.yaml:2", "surrogate"]),
    "damaged stub": ('_: r"""  # stub\n' + GOOD, [], None, ["r.yaml:1", "stub is damaged", STUB_LAST]),
    "quotes inside the stub": ('_: r"""  # stub\n' + GOOD + 'x: """\n' + STUB_LAST, [], None, ["stub is damaged", "3"]),
    "stub not first": (GOOD + '_: r"""  # stub\n' + STUB_LAST, [], None, ["r.yaml:14", "stub is damaged"]),
    # keys and types
    "unknown key": (edit("num: 3", "nums: 3"), [], None, ["r.yaml:4: heads.nums", "did you mean num?"]),
    "unknown section": (edit("heads:", "head:"), [], None, ["r.yaml:3: head", "did you mean heads?"]),
    "key of another section": (edit("num: 3", "global_batch_size: 3"), [], None, ["train.global_batch_size?"]),
    "unknown without a neighbour": (edit("num: 3", "qqq: 3"), [], None, ["allowed are kind, num, layers, lm_head"]),
    "missing section": (edit("model:\n  name: owner/model\n", ""), [], None, ["r.yaml: model: missing"]),
    "missing key": (edit("  lr: 1e-3\n", ""), [], None, ["r.yaml:8: train.lr: missing"]),
    "text for a number": (edit("1e-3", "fast"), [], None, ["r.yaml:11: train.lr", 'found "fast"', "a number"]),
    "octal": (edit("num: 3", "num: 0x3"), [], None, ["r.yaml:4: heads.num", 'found "0x3"', "a whole number"]),
    "fraction for a count": (edit("num: 3", "num: 3.0"), [], None, ["heads.num", "found 3.0", "whole number"]),
    "boolean for a count": (edit("num: 3", "num: true"), [], None, ["heads.num", "found true", "whole number"]),
    "boolean for the stage": (edit("stage: 1", "stage: true"), [], None, ["r.yaml:5: stage", "found true", "1 or 2"]),
    "text for the stage": (edit("stage: 1", 'stage: "1"'), [], None, ["stage", 'found "1"', "1 or 2"]),
    "fp8 in fp32": (
        GOOD,
        ["model.frozen_precision=fp8", "train.precision=fp32"],
        None,
        ["model.frozen_precision", "found fp8 with train.precision: fp32"],
    ),
    "fp8 in stage 2": (
        GOOD,
        ["model.frozen_precision=fp8", "stage=2"],
        None,
        ["found fp8 with stage 2, which trains the backbone; use bf16"],
    ),
    "fp8 with Liger's layers": (
        GOOD,
        ["model.frozen_precision=fp8", "model.liger_kernels=true"],
        None,
        ["model.liger_kernels", "found true with frozen_precision: fp8"],
    ),
    "fp8 partitioned": (
        GOOD,
        ["model.frozen_precision=fp8"],
        '{"zero_optimization": {"stage": 3}}',
        ["model.frozen_precision", "found fp8 with ZeRO-3", "zero.json", "use zero2.json"],
    ),
    "fp4": (
        edit("  name: owner/model", "  name: owner/model\n  frozen_precision: fp4"),
        [],
        None,
        ["r.yaml:3: model.frozen_precision", 'found "fp4"', "bf16 or fp8"],
    ),
    "stage 3": (edit("stage: 1", "stage: 3"), [], None, ["stage", "found 3", "allowed is 1 or 2"]),
    "no for false": (edit("jsonl", "jsonl\n  packing: no"), [], None, ["r.yaml:8: data.packing", "true or false"]),
    "list for a section": (edit("heads:\n  num: 3", "heads: [3]"), [], None, ["r.yaml:3: heads", "found [3]"]),
    "null for a section with needed keys": (edit("  name: owner/model\n", ""), [], None, ["model.name: missing"]),
    "no for a switch of the template": (
        edit("jsonl", "jsonl\n  template_args: {enable_thinking: no}"),
        [],
        None,
        ["r.yaml:8", "found no, which is text here", "write true or false, or quote it"],
    ),
    "off for a switch of the template": (
        GOOD,
        ["data.template_args.enable_thinking=off"],
        None,
        ["data.template_args.enable_thinking (from the command line)", "found off, which is text here"],
    ),
    "below range": (edit("num: 3", "num: 0"), [], None, ["heads.num", "found 0", "of at least 1"]),
    "above range": (edit("num: 3", "num: 99"), [], None, ["heads.num", "found 99", "at most 16"]),
    "zero rate": (edit("1e-3", "0"), [], None, ["train.lr", "found 0", "above 0"]),
    "unknown choice": (GOOD + "loss: {impl: cuda}\n", [], None, ["r.yaml:14: loss.impl", "liger, torch or eager"]),
    "three betas": (edit("1e-3", "1e-3\n  betas: [1, 2, 3]"), [], None, ["train.betas"]),
    "bad split": (edit("jsonl", "jsonl\n  split: 'train[a:b]'"), [], None, ["data.split", "train[a:b]"]),
    "negative seed": (edit("jsonl", "jsonl\n  seed: -1"), [], None, ["data.seed", "found -1"]),
    "number as data path": (edit("chat.jsonl", "3"), [], None, ["r.yaml:7: data.path", "found 3", "text"]),
    "wrong source in a list": (
        edit("path: chat.jsonl", "path:\n  - path: chat.jsonl\n    wieght: 2"),
        [],
        None,
        ["r.yaml:9: data.path.0.wieght", "did you mean weight?"],
    ),
    "number in a list of sources": (
        GOOD,
        ["data.path=[chat.jsonl, 3]"],
        None,
        ["data.path.1 (from", "found 3; allowed is text or a section of the keys path, split, weight"],
    ),
    "number for a text": (GOOD, ["model.revision=1234567"], None, ["found 1234567", "allowed is text in quotes"]),
    "comment on the command line": (
        GOOD,
        ["output=runs/my #2"],
        None,
        ["output (from the command line): found a #, which begins a comment in YAML; quote the value"],
    ),
    "comment in place of a value": (GOOD, ["output=#2"], None, ["output (from the command line): found a #, which"]),
    "text for the positions": (
        GOOD,
        ["model.config={model_type: llama, max_position_embeddings: '64'}", "data.max_length=8"],
        None,
        ["data.max_length", "found 8"],
    ),
    "neither a switch nor a section": (GOOD, ["train.wandb=[1]"], None, ["train.wandb (from", "found [1]", "project"]),
    "unknown key of a switch's section": (
        GOOD,
        ["train.wandb={projekt: x}"],
        None,
        ["train.wandb.projekt", "mean project?"],
    ),
    "a key called like a type": (edit("num: 3", "int: 3"), [], None, ["r.yaml:4: heads.int: unknown key"]),
    "neither auto nor a number": (
        GOOD,
        ["train.activation_checkpointing=fast"],
        None,
        ["train.activation_checkpointing", 'found "fast"', "auto, true or false or a whole number of at least 1"],
    ),
    "bad hash": (
        edit("model\n", "model\n  package: {requirement: a, file: b, sha256: xyz}\n"),
        [],
        None,
        ["r.yaml:3: model.package.sha256", 'found "xyz"'],
    ),
    # contradictions
    "stage 1 trains the backbone": (
        edit("model\n", "model\n  frozen: false\n"),
        [],
        None,
        ["r.yaml:3: model.frozen", "found false with stage 1"],
    ),
    "stage 2 freezes the backbone": (
        GOOD,
        ["stage=2", "heads.init_from=old", "heads.num=5", "model.frozen=true"],
        None,
        ["model.frozen (from the command line", "found true with stage 2"],
    ),
    "stage 2 without heads": (GOOD, ["stage=2"], None, ["heads.init_from", "missing", "stage-1 run"]),
    "stage 2 with a shared LM head": (
        GOOD,
        ["stage=2", "heads.lm_head=shared", "heads.init_from=old"],
        None,
        ["heads.lm_head", "found shared with stage 2"],
    ),
    "nothing to learn": (GOOD, ["heads.lm_head=shared", "heads.layers=0"], None, ["heads.layers", "nothing to learn"]),
    "few tokens of a shared LM head": (
        GOOD,
        ["heads.lm_head=shared", "heads.vocab=8192"],
        None,
        ["heads.vocab", "found 8192 with lm_head: shared", "use own"],
    ),
    "vocabulary in words": (GOOD, ["heads.vocab=small"], None, ["heads.vocab", 'found "small"']),
    "vocabulary of nothing": (GOOD, ["heads.vocab=8"], None, ["heads.vocab", "found 8", "64"]),
    "hidden cache of a moving backbone": (
        GOOD,
        ["stage=2", "heads.init_from=old", "heads.num=5", "data.hidden_cache=auto"],
        None,
        ["data.hidden_cache", "found auto with stage 2"],
    ),
    "predictions beside a cache": (
        GOOD,
        ["loss.target=argmax", "data.hidden_cache=auto"],
        None,
        ["loss.target", "found argmax with data.hidden_cache"],
    ),
    "precision of no cache": (
        GOOD,
        ["data.hidden_cache_dtype=fp8"],
        None,
        ["data.hidden_cache_dtype", "with hidden_cache: off"],
    ),
    "coefficient in stage 1": (GOOD, ["loss.coefficient=0.2"], None, ["loss.coefficient", "no meaning in stage 1"]),
    "coefficient schedule in stage 1": (GOOD, ["loss.coefficient_schedule=sine"], None, ["no meaning in stage 1"]),
    "multiplier in stage 1": (GOOD, ["train.lr_multiplier=4"], None, ["train.lr_multiplier", "no meaning in stage 1"]),
    "recomputation in stage 1": (GOOD, ["train.activation_checkpointing=true"], None, ["no backward pass"]),
    "batch that does not divide": (
        edit("micro_batch_size: 2", "micro_batch_size: 3"),
        [],
        None,
        ["r.yaml:9: train.global_batch_size", "found 8", "micro_batch_size 3"],
    ),
    "endless epochs": (GOOD, ["train.epochs=1e9"], None, ["train.epochs", "at most 1000"]),
    "validation of nothing": (
        GOOD,
        ["train.eval_every=5", "data.validation=0"],
        None,
        ["train.eval_every", "holds noth"],
    ),
    "sequence shorter than the heads": (GOOD, ["heads.num=16", "data.max_length=16"], None, ["data.max_length", "17"]),
    "split of a local file": (GOOD, ["data.split=test"], None, ["data.split", "only data sets of the hub have splits"]),
    "split beside a list": (
        GOOD,
        ["data.path=[{path: sample}]", "data.split=test"],
        None,
        ["data.split", "its own split"],
    ),
    "no source": (GOOD, ["data.path=[]"], None, ["data.path", "at least one source"]),
    "flash attention in fp32": (
        GOOD,
        ["model.attention=flash_attention_2", "train.precision=fp32"],
        None,
        ["needs bf16"],
    ),
    "config of a pretrained model": (
        GOOD,
        ["model.config={num_hidden_layers: 2}"],
        None,
        ["model.config", "init: random"],
    ),
    "strangers' code unpinned": (GOOD, ["model.trust_remote_code=true"], None, ["model.revision", "pin the commit"]),
    "heads from the own output": (
        GOOD,
        ["heads.init_from=old", "heads.num=5", "output=old"],
        None,
        ["would overwrite"],
    ),
    "heads of another shape": (
        GOOD,
        ["heads.init_from=old"],
        None,
        ["r.yaml:4: heads.num", "found 3", "has 5", "equal"],
    ),
    "heads of another model": (
        GOOD,
        ["heads.init_from=old", "heads.num=5", "model.name=meta-llama/Llama-3.1-8B-Instruct"],
        None,
        ["heads.init_from", "of owner/model for model.name meta-llama/Llama", "hidden_size 32 and 4096", "two models"],
    ),
    "more tokens than positions": (
        GOOD,
        ["model.name=lmsys/vicuna-7b-v1.5", "data.max_length=8192"],
        None,
        ["data.max_length", "found 8192", "4096 positions"],
    ),
    # files
    "no DeepSpeed file": (
        edit("zero.json", "zero9.json"),
        [],
        None,
        ["r.yaml:12: deepspeed", "zero9.json", "zero3.json"],
    ),
    "no heads": (GOOD, ["heads.init_from=nowhere"], None, ["heads.init_from", "nowhere", "run stage 1 first"]),
    "directory without heads": (GOOD, ["heads.init_from=empty"], None, ["heads.init_from", "no heads.json"]),
    "no data file": (edit("chat.jsonl", "chats.jsonl"), [], None, ["r.yaml:7: data.path", "chats.jsonl", "not exist"]),
    "data file of another kind": (edit("chat.jsonl", "r.yaml"), [], None, ["data.path", ".parquet"]),
    "data directory without data": (edit("chat.jsonl", "empty"), [], None, ["data.path", "without a JSON"]),
    "no model directory": (edit("owner/model", "./model"), [], None, ["r.yaml:2: model.name", "./model", "owner/name"]),
    "no model name": (edit("owner/model", '""'), [], None, ["model.name", "found ''"]),
    "output is a file": (edit("output: out", "output: chat.jsonl"), [], None, ["r.yaml:13: output", "a directory"]),
    # overrides
    "override without =": (GOOD, ["train.lr"], None, ["train.lr: not an override", "key.path=value"]),
    "override of a value's key": (GOOD, ["train.lr.x=1"], None, ["train.lr is not a section"]),
    "override of an unknown key": (GOOD, ["train.step=1"], None, ["train.step (from the command line", "mean steps?"]),
    "override of a wrong type": (GOOD, ["heads.num=x"], None, ["heads.num (from the command line", 'found "x"']),
    "override that is no YAML": (GOOD, ["heads.num=[1"], None, ["heads.num (from the command line)", "not valid YAML"]),
    # secrets
    "secret token": (edit("owner/model", SECRET), [], None, ["r.yaml:2: model.name", "secret (not shown)", "HF_TOKEN"]),
    "secret in an override": (GOOD, [f"heads.num={SECRET}"], None, ["heads.num", "secret (not shown)"]),
    "secret by its name": (
        edit("jsonl", "jsonl\n  template_args: {api_key: abcd1234}"),
        [],
        None,
        ["data.template_args.api_key", "secret (not shown)"],
    ),
    "password in a URL": (edit("owner/model", "https://me:pa55word@hub.co/x"), [], None, ["model.name", "not shown"]),
    "secret as an override alone": (GOOD, [SECRET], None, ["(not shown): not an override"]),
    # DeepSpeed JSON
    "trailing comma": (GOOD, [], '{\n"zero_optimization": {},\n}', ["zero.json:3", "not valid JSON"]),
    "comment": (GOOD, [], '{"steps_per_print": 1} // x', ["zero.json:1", "not valid JSON"]),
    "JSON list": (GOOD, [], "[]", ["zero.json", "found list", "JSON object"]),
    "JSON NaN": (GOOD, [], '{"gradient_clipping": NaN}', ["zero.json", "NaN"]),
    "JSON duplicate": (GOOD, [], '{"bf16": {}, "bf16": {}}', ["zero.json", "duplicate key 'bf16'"]),
    "JSON infinity": (GOOD, [], '{"gradient_clipping": 1e999}', ["zero.json", "out of range"]),
    "JSON that prints every 0 steps": (GOOD, [], '{"steps_per_print": 0}', ["zero.json: steps_per_print: found 0"]),
    **{
        f"JSON with {key}": (GOOD, [], f'{{"{key}": {value}}}', [f"zero.json: {key}: is not supported here"])
        for key, value in (("torch_autocast", '{"enabled": true}'), ("sparse_gradients", "true"))
    },
    "JSON with secondary partitions": (
        GOOD,
        [],
        '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}',
        ["zero.json: zero_optimization.zero_hpz_partition_size: found 8; allowed is 1"],
    ),
    "JSON too deep": (GOOD, [], '{"a": ' * 2000 + "1" + "}" * 2000, ["zero.json", "not valid JSON"]),
    "unknown DeepSpeed key": (
        GOOD,
        [],
        '{"zero_optimisation": {}}',
        ["zero.json: zero_optimisation", "zero_optimization?"],
    ),
    "unknown ZeRO key": (GOOD, [], '{"zero_optimization": {"stages": 2}}', ["zero_optimization.stages", "mean stage?"]),
    "unknown offload key": (
        GOOD,
        [],
        '{"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}',
        ["zero_optimization.offload_optimizer.devise", "device?"],
    ),
    "ZeRO stage as text": (GOOD, [], '{"zero_optimization": {"stage": "2"}}', ["stage: found '2'", "0, 1, 2 or 3"]),
    "ZeRO stage 4": (GOOD, [], '{"zero_optimization": {"stage": 4}}', ["found 4", "0, 1, 2 or 3"]),
    "ZeRO flag as text": (GOOD, [], '{"zero_optimization": {"overlap_comm": "yes"}}', ["overlap_comm", "found 'yes'"]),
    "ZeRO size as text": (GOOD, [], '{"zero_optimization": {"reduce_bucket_size": "5e8"}}', ["found '5e8'", "number"]),
    "offload size as text": (
        GOOD,
        [],
        '{"zero_optimization": {"offload_param": {"device": "cpu", "buffer_count": "5"}}}',
        ["offload_param.buffer_count: found '5'", "whole number"],
    ),
    "ZenFlow's key": (
        GOOD,
        [],
        '{"zero_optimization": {"zenflow": {"topk_ration": 0.1}}}',
        ["zero_optimization.zenflow.topk_ration: unknown key; did you mean topk_ratio?"],
    ),
    "ZeRO as a number": (GOOD, [], '{"zero_optimization": 2}', ["zero_optimization: found 2", "an object"]),
    "negative clipping": (GOOD, [], '{"gradient_clipping": -1}', ["gradient_clipping: found -1", "at least 0"]),
    "batch of 0": (GOOD, [], '{"train_batch_size": 0}', ["train_batch_size: found 0", "at least 1"]),
    "distillation of something else": (
        GOOD,
        ["loss.target=frozen"],
        None,
        ["loss.target", 'found "frozen"', "label, argmax or distribution"],
    ),
    "distillation of some tokens in stage 2": (
        GOOD,
        ["stage=2", "heads.init_from=old", "heads.num=5", "heads.vocab=64", "loss.target=argmax"],
        None,
        ["loss.target", "found argmax with heads.vocab", "use label"],
    ),
    "temperature of first choices": (
        GOOD,
        ["stage=2", "heads.init_from=old", "heads.num=5", "loss.target=argmax", "loss.temperature=2.0"],
        None,
        ["loss.temperature", "no meaning with loss.target argmax"],
    ),
    "distillation onto some tokens": (
        GOOD,
        ["heads.vocab=64", "loss.target=distribution"],
        None,
        ["loss.target", "found distribution with heads.vocab", "use label"],
    ),
    "temperature of labels": (GOOD, ["loss.temperature=2.0"], None, ["loss.temperature", "no meaning", "distribution"]),
    "unsupported feature": (GOOD, [], '{"elasticity": {"enabled": true}}', ["elasticity", "not supported"]),
    "unknown offload device": (
        GOOD,
        [],
        '{"zero_optimization": {"offload_param": {"device": "gpu"}}}',
        ["found 'gpu'"],
    ),
    "NVMe that ZeRO 2 would not use": (
        GOOD,
        [],
        '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}}',
        ["zero.json: zero_optimization.offload_optimizer.device: found 'nvme'", "set stage to 3"],
    ),
    "NVMe without a place": (
        GOOD,
        [],
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
        ["zero.json: zero_optimization.offload_param.nvme_path: found no directory"],
    ),
    "secret in DeepSpeed JSON": (
        GOOD,
        [],
        '{"wandb": {"api_key": "0123456789abcdef"}}',
        ["wandb.api_key", "WANDB_API_KEY"],
    ),
    "clipping in both": (
        GOOD,
        [],
        '{"gradient_clipping": 0.5}',
        ["zero.json: gradient_clipping: found 0.5", "r.yaml has 1.0", "train.max_grad_norm", '"auto"'],
    ),
    "batch in both": (GOOD, [], '{"train_batch_size": 16}', ["found 16", "r.yaml has 8", "train.global_batch_size"]),
    "rate in both": (
        GOOD,
        [],
        '{"optimizer": {"type": "AdamW", "params": {"lr": 1}}}',
        ["params.lr", "r.yaml", "train.lr"],
    ),
    "another optimizer": (GOOD, [], '{"optimizer": {"type": "Lamb", "params": {}}}', ["found 'Lamb'", "AdamW"]),
    "optimizer's own settings": (GOOD, [], '{"optimizer": {"params": {"torch_adam": true}}}', ["params.torch_adam"]),
    "scheduler's own settings": (GOOD, [], '{"scheduler": {"params": {"warmup_num_steps": 9}}}', ["warmup_num_steps"]),
    "fp16": (GOOD, [], '{"fp16": {"enabled": true}}', ["fp16.enabled: found True", "r.yaml", "train.precision"]),
    "accumulation that fits no ranks": (
        GOOD,
        [],
        '{"gradient_accumulation_steps": 3}',
        ["found 3", "no number of ranks"],
    ),
}
