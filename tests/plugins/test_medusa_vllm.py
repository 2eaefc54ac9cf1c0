"""The plug-in for vLLM against a written-down vLLM: what needs none to run."""

import ast
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
import torch
from exporting import export_
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoConfig

from medusa_ds.runs import load_run

PLUGIN = Path(__file__).parents[2] / "plugins" / "vllm"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in, registered with the written-down vLLM."""
    monkeypatch.syspath_prepend(PLUGIN)
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("medusa_vllm", "medusa_vllm.config", "medusa_vllm.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content", {})
    package = importlib.import_module("medusa_vllm")
    package.register()
    yield importlib.import_module("medusa_vllm.model")
    for name in ("medusa_vllm", "medusa_vllm.config", "medusa_vllm.model"):
        sys.modules.pop(name, None)


def load(plugin: Any, path: Path, lm_head: torch.nn.Module | None = None, embeddings: Any = None) -> Any:
    """The draft as vLLM builds it: config, model, weights, then the target's embeddings and LM head."""
    model = plugin.MedusaMTPModel(vllm_config=fake_vllm.config_of(AutoConfig.from_pretrained(path)))
    loaded = model.load_weights(load_file(path / "model.safetensors").items())
    assert loaded == set(dict(model.named_parameters()))  # vLLM refuses what was left as it was built
    model.model.embed_tokens, model.lm_head = embeddings, lm_head
    return model


@pytest.fixture
def exported(make_run) -> Path:
    """An export of Medusa heads with projections of their own."""
    return export_(make_run(), "out", "--for", "vllm")


def export_cut(run: Path) -> tuple[Path, torch.Tensor]:
    """An export of shared heads cut to 120 tokens, and these."""
    path = export_(run, "cut", "--for", "vllm", "--vocab", "120")
    return path, load_file(path / "model.safetensors")["token_map"]


@pytest.mark.parametrize("passes_step", [True, False], ids=["0.32", "0.31"])
@pytest.mark.parametrize(
    ("lm_head", "layers", "cut"),
    [("own", 1, False), ("own", 2, True), ("own", 0, False), ("shared", 1, False), ("shared", 2, True)],
)
def test_drafts_are_the_guesses_of_the_exported_heads(plugin, make_run, monkeypatch, lm_head, layers, cut, passes_step):
    """Turns red when every step asks the first head, or the token map's order is not kept.

    And when heads that share a projection read it more than once a draft.
    """
    speculator = fake_vllm.MultiModuleMTPSpeculator()
    speculator.passes_step = passes_step
    tokens = torch.arange(299, 40, -3) if cut and lm_head == "own" else None
    run = make_run("run", f"heads.lm_head={lm_head}", f"heads.layers={layers}", tokens=tokens)
    if cut and lm_head == "shared":
        path, tokens = export_cut(run)
    else:
        path = export_(run, "out", "--for", "vllm")
    loaded = load_run(run, torch.device("cpu"), torch.float32)
    target = loaded.backbone.get_output_embeddings()
    model = load(plugin, path, target)
    hidden, ids = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)), torch.arange(64)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            products: list[int] = []
            project = fake_vllm.LogitsProcessor.forward
            patch.setattr(fake_vllm.LogitsProcessor, "forward", lambda *a: products.append(len(a[2])) or project(*a))
            drafts = speculator.drafts(model, hidden, ids, 3)
            assert products == ([3 * 64] if lm_head == "shared" else [64] * 3)
        speculator.use_local_argmax_reduction = True
        assert speculator.drafts(model, hidden, ids, 3).equal(drafts)
        speculator.use_local_argmax_reduction = False
        assert speculator.drafts(model, hidden, ids, 2).equal(drafts[:, :2])
        logits = torch.stack([head.logits(hidden, target) for head in loaded.heads], 1)
        if cut and lm_head == "shared":
            logits = logits[..., tokens]
        guesses = logits.argmax(-1)
        assert drafts.equal(guesses if tokens is None else tokens[guesses])
        whole = [model.compute_logits(hidden, step) for step in range(3)][2]
    assert whole.shape == (64, 300)
    known = torch.arange(300) if tokens is None else tokens
    assert torch.allclose(whole[:, known], logits[:, 2], atol=1e-4) and (whole.isinf().sum(1) == 300 - len(known)).all()
    assert len(set(drafts.flatten().tolist())) > 20 and not drafts[:, 0].equal(drafts[:, 1])


@pytest.mark.parametrize("shared", [True, False])
def test_hydra_drafts_are_those_of_its_equation(plugin, tmp_path, shared):
    """In float64, one row at a time. Turns red when a step gets the token before the last one, or the first state."""
    size, vocab, num = 16, 90, 3
    draw = torch.Generator().manual_seed(0)
    tensors = {f"steps.{k}.weight": torch.randn(size, 2 * size, generator=draw) / 4 for k in range(num)}
    tensors |= {f"steps.{k}.bias": torch.randn(size, generator=draw) for k in range(num)}
    tensors |= {f"blocks.{k}.layers.0.weight": torch.randn(size, size, generator=draw) / 4 for k in range(num)}
    tensors |= {f"blocks.{k}.layers.0.bias": torch.randn(size, generator=draw) for k in range(num)}
    own = {f"lm_heads.{k}.weight": torch.randn(vocab, size, generator=draw) for k in range(num)}
    config = {
        "model_type": "medusa",
        "heads_kind": "hydra",
        "hidden_size": size,
        "vocab_size": vocab,
        "medusa_num_heads": num,
        "medusa_num_layers": 2,
        "original_lm_head": shared,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors | ({} if shared else own), tmp_path / "model.safetensors")
    embeddings, lm_head = torch.nn.Embedding(vocab, size), torch.nn.Linear(size, vocab)
    model = load(plugin, tmp_path, lm_head, embeddings)
    hidden, ids = torch.randn(20, size, generator=draw), torch.randint(vocab, (20,), generator=draw)
    with torch.no_grad():
        drafts = fake_vllm.MultiModuleMTPSpeculator().drafts(model, hidden, ids, num)
        for row in range(20):
            state, token = hidden[row].double(), int(ids[row])
            for k in range(num):
                embedded = embeddings.weight[token].double()
                inputs = torch.cat([state, embedded / (embedded.square().mean() + 1e-6).sqrt()])
                state = state + silu(tensors[f"steps.{k}.weight"].double() @ inputs + tensors[f"steps.{k}.bias"])
                weight, bias = (lm_head.weight, lm_head.bias) if shared else (own[f"lm_heads.{k}.weight"], 0)
                block = [tensors[f"blocks.{k}.layers.0.{kind}"].double() for kind in ("weight", "bias")]
                token = int((weight.double() @ (state + silu(block[0] @ state + block[1])) + bias).argmax())
                assert drafts[row, k] == token, (row, k)


@pytest.mark.parametrize("lm_head", ["own", "shared"])
def test_exported_hydra_heads_draft_what_they_guess(plugin, make_run, lm_head):
    """Turns red when a step gets the token before the last one, or the first state."""
    run = make_run("run", "heads.kind=hydra", f"heads.lm_head={lm_head}", "heads.layers=2")
    path = export_(run, "out", "--for", "vllm")
    loaded = load_run(run, torch.device("cpu"), torch.float32)
    target, embed = loaded.backbone.get_output_embeddings(), loaded.backbone.get_input_embeddings()
    model = load(plugin, path, target, embed)
    hidden, ids = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)), torch.arange(64)
    with torch.no_grad():
        drafts = fake_vllm.MultiModuleMTPSpeculator().drafts(model, hidden, ids, 3)
        following = torch.cat([ids[None], drafts.T[:2]])
        states = loaded.heads.states(hidden, following, embed)
        for k, (head, state) in enumerate(zip(loaded.heads, states, strict=True)):
            assert drafts[:, k].equal(head.logits(state, target).argmax(-1)), k
    readme = (path / "README.md").read_text()
    assert '"method": "mtp"' in readme and '"method": "medusa"' not in readme


def test_the_config_of_an_export_reads_as_a_draft_of_several_modules(plugin, make_run):
    path = export_(make_run("run", "heads.num=4"), "out", "--for", "vllm")
    config = AutoConfig.from_pretrained(path)
    assert config.model_type == "mtp"  # in vLLM's `MTPModelTypes`
    assert config.architectures == ["MedusaMTPModel"]
    assert sys.modules["vllm"].ModelRegistry.models == {"MedusaMTPModel": "medusa_vllm.model:MedusaMTPModel"}
    assert config.num_nextn_predict_layers == config.n_predict == 4  # `use_multi_module_mtp`: more than 1
    assert (config.hidden_size, config.vocab_size) == (32, 300)
    assert config.num_attention_heads % 8 == 0 and config.num_hidden_layers == 0  # any tensor parallel size, no cache
    tables = sys.modules["vllm.transformers_utils.config"]
    assert set(tables._CONFIG_REGISTRY) == tables._SPECULATIVE_DECODING_CONFIGS == {"eagle"}
    assert len(str(AutoConfig.from_pretrained(path))) > 0


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("0.27.1", "found vLLM 0.27.1; heads run in 0.28 to 0.33"),
        ("0.34.0rc1", "found vLLM 0.34.0rc1"),
        ("0.33.2+cu130", None),
    ],
)
def test_an_unknown_vllm_refuses_the_heads_alone(plugin, exported, monkeypatch, version, text):
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    tables = sys.modules["vllm.transformers_utils.config"]
    monkeypatch.setattr(tables, "_CONFIG_REGISTRY", {"medusa": "MedusaConfig"})
    sys.modules["medusa_vllm"].register()  # other models are not its business
    if text is None:
        AutoConfig.from_pretrained(exported)
        return
    assert "medusa" in tables._CONFIG_REGISTRY
    with pytest.raises(ValueError, match=text):
        AutoConfig.from_pretrained(exported)


@pytest.mark.parametrize("name", ["eagle-like", "my-EAGLE3", "dflash", "x-dspark"])
def test_a_path_that_names_another_method_is_refused(plugin, exported, name):
    with pytest.raises(ValueError, match="rename the directory"):
        AutoConfig.from_pretrained(exported.rename(exported.with_name(name)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_v2_model_runner": False}, "set VLLM_USE_V2_MODEL_RUNNER=1"),
        ({"num_speculative_tokens": 4}, "num_speculative_tokens: found 4; allowed is at most 3, one a head"),
        ({"method": "medusa"}, 'start with "method": "mtp"'),
    ],
)
def test_what_would_not_ask_each_head_is_refused_in_a_line(plugin, exported, changes, text):
    config = AutoConfig.from_pretrained(exported)
    with pytest.raises(ValueError, match=text) as error:
        plugin.MedusaMTPModel(vllm_config=fake_vllm.config_of(config, **changes))
    assert "\n" not in str(error.value)


def test_another_signature_is_refused(plugin, exported, monkeypatch):
    config = AutoConfig.from_pretrained(exported)
    monkeypatch.setattr(fake_vllm.MultiModuleMTPSpeculator, "_run_model", lambda self, num_tokens: None)
    with pytest.raises(ValueError, match="has no spec_module_idx in this vLLM"):
        plugin.MedusaMTPModel(vllm_config=fake_vllm.config_of(config))


def test_the_plugin_needs_no_trainer_and_both_distributions_bring_it():
    found = set()
    for file in (PLUGIN / "medusa_vllm").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
            found |= {str(name).split(".")[0] for name in names}
    assert found - set(sys.stdlib_module_names) == {"torch", "transformers", "vllm", "packaging", "medusa_vllm"}
    assert 'medusa = "medusa_vllm:register"' in (PLUGIN / "pyproject.toml").read_text()
    setup = (PLUGIN.parents[1] / "setup.py").read_text()
    assert '"vllm.general_plugins": ["medusa=medusa_vllm:register"]' in setup
    assert '"medusa_vllm": "plugins/vllm/medusa_vllm"' in setup and '"medusa_vllm",' in setup
