"""Run by the long tests with the Python of a vLLM environment: jobs as JSON on standard input, answers in a file.

A job is an engine's arguments and groups of prompts; a group's answers come with what the engine counted for it.
"""

import gc
import json
import os
import sys
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def counted(llm: Any) -> dict[str, list[int]]:
    """The engine's counters of speculative decoding and its prefix cache so far, each as a list."""
    found = {}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:")
        if name.startswith(("spec_decode", "prefix_cache_hits")):
            found[name.removeprefix("spec_decode_")] = getattr(metric, "values", None) or [metric.value]
    return found


def answer(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    engine = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": False, "seed": 0, **job["engine"]}
    llm = LLM(**engine)
    results = []
    before = counted(llm)
    for group in job["groups"]:
        answers = []
        for batch in group["batches"]:
            prompts = [{"prompt_token_ids": ids} for ids in batch]
            outputs = llm.generate(prompts, SamplingParams(**group["sampling"]), use_tqdm=False)
            answers += [[list(one.token_ids) for one in output.outputs] for output in outputs]
        after = counted(llm)
        difference = {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in after}
        results.append({"answers": answers, "counted": difference})
        before = after
    del llm
    gc.collect()
    return results


def main(target: str) -> None:
    results: list[Any] = []
    for number, job in enumerate(json.load(sys.stdin), 1):
        print(f"engine {number}", file=sys.stderr, flush=True)
        try:
            results.append(answer(job))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    with open(target, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
