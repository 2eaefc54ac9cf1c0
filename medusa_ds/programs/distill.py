"""Let the recipe's own model answer prompts, or make them up, as training data; goes on where it was interrupted.

Without a server the built-in engine decodes. Rows go to OUT in the format that `data.path` reads. Several GPUs share
the rows under the launcher: deepspeed --module medusa_ds.cli distill RECIPE --out OUT ...

Example:
    medusa-ds distill smollm2_135m_stage1 --prompts questions.jsonl --out answers.jsonl

Heads guess what their own backbone will say, so its answers are the best text to train them on. Prompts come
from a source, or the model makes them up: a chat model that is given its template's beginning of a user turn writes
one (Magpie, arXiv 2406.08464). Every row has a number. It ends in the output file, among the removed rows, or has
failed, and whatever ended the process, the same command goes on with the rest. Several ranks share the rows; what a row
becomes depends on none of them.
"""

import json
from collections import Counter, deque
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from medusa_ds.config.recipe import Recipe
from medusa_ds.config.settings import Bare, Beside, RecipeSettings
from medusa_ds.config.types import Count, Positive
from medusa_ds.data.dialogues import Chat
from medusa_ds.data.prompts import Prompt, load_prompts
from medusa_ds.decoding.decoder import end_at
from medusa_ds.decoding.kernels.packed import pack_projections
from medusa_ds.decoding.session import position_limit
from medusa_ds.distilling.output import Journal, Output
from medusa_ds.distilling.requests import MAKE_PROMPT, Engine, Reply, Request, Sampling
from medusa_ds.distilling.sampler import Sampler
from medusa_ds.distilling.server import Server, check_url
from medusa_ds.distilling.texts import Excluded, Seen, read_openings, repetitive
from medusa_ds.errors import UserError, counted
from medusa_ds.files import digest
from medusa_ds.model.backbone import load_backbone, load_config, load_tokenizer
from medusa_ds.progress import Progress
from medusa_ds.ranks import Ranks
from medusa_ds.runs import place
from medusa_ds.training.supervisor import Supervisor, end_with_others

PROMPT_TOKENS, MADE_PROMPT_TOKENS = 1024, 256
OPENINGS = Path(__file__).parents[1] / "data" / "openings.txt"
Messages = list[dict[str, Any]]


class Settings(RecipeSettings):
    """What the command line says."""

    out: str = Field(title="FILE")
    """JSON lines to write, a conversation each; FILE.progress keeps what was removed and the prompts that were made."""
    prompts: str | None = Field(None, title="SOURCE")
    """JSON lines such as {"turns": ["Hello"]}, or what data.path takes; its user turns are answered."""
    split: Annotated[str, Beside("prompts")] = "train"
    """Of a hub dataset."""
    limit: Annotated[Count | None, Beside("prompts")] = None
    """Take the first N prompts."""
    synthesize: Count | None = None
    """Let the model make up N prompts."""
    synthesize_temperature: Annotated[Positive, Beside("synthesize")] = 1.0
    """Of the prompts that the model makes up."""
    openings: Annotated[str | None, Bare(str(OPENINGS)), Beside("synthesize")] = Field(None, title="FILE")
    """Prompts that the model makes up begin with the lines of a text file in turn, so that they differ more; without
    FILE, with those that the package ships."""
    exclude: list[str] = Field([], title="SOURCE")
    """Leave out prompts that share eight words in a row with one of these; may be repeated."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the answers; 0 takes the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most probable tokens up to this share."""
    max_new_tokens: Count = 512
    """Of an answer; longer ones are removed."""
    keep_unfinished: bool = False
    """Keep answers that are cut off or repeat themselves, without a label on their end: heads that decode long texts
    meet such text."""
    max_prompt_tokens: Count | None = None
    """Of a conversation before an answer; without it, 1024, or what the model's limit leaves beside an answer. A server
    has a limit of its own."""
    seed: int = 0
    """Of all draws."""
    batch: Count | None = None
    """Rows at once, or requests in flight; without it, 512 on a GPU, 8 on a CPU, 64 with a server."""
    server: str | None = Field(None, title="URL")
    """An OpenAI-compatible server, as http://localhost:8000/v1."""
    server_model: Annotated[str | None, Beside("server")] = Field(None, title="NAME")
    """The model's name there; without it, the recipe's."""
    timeout_s: Annotated[Positive, Beside("server")] = Field(300.0, alias="timeout", title="SECONDS")
    """Of a request to the server."""
    retries: Annotated[Count, Beside("server")] = 5
    """Of a request to the server."""
    device: str | None = None
    """`cuda` or `cpu`; without it, a GPU if there is one."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Without it, bf16 on a GPU and fp32 on a CPU."""

    def sampling(self, limit: int | None) -> Sampling:
        """How answers are drawn, of a model with positions for `limit` tokens of prompt and answer together.

        Raises:
            UserError: more is asked for.
        """
        room = limit or self.max_new_tokens + PROMPT_TOKENS
        most = self.max_prompt_tokens or min(PROMPT_TOKENS, room - self.max_new_tokens)
        if limit and (most < 1 or most + self.max_new_tokens > limit):
            given = f" and --max-prompt-tokens {self.max_prompt_tokens}" if self.max_prompt_tokens else ""
            raise UserError(
                f"distill: found --max-new-tokens {self.max_new_tokens}{given}; prompt and answer together have at "
                f"most the model's {limit} tokens: give less"
            )
        return Sampling(self.temperature, self.top_p, self.max_new_tokens, most, self.seed)


def run(settings: Settings) -> dict[str, Any]:
    """Make the rows that are still missing, print a summary and return it; every rank calls it.

    Raises:
        UserError: nothing to do, an output of other settings, or a source, model or server that cannot be used.
    """
    recipe = settings.load_recipe()
    if settings.prompts is None and not settings.synthesize:
        raise UserError("distill: found neither --prompts nor --synthesize; give one of them, or both")
    place(settings.device, settings.dtype)  # refuses what is not there
    ranks = Ranks()
    if settings.server:
        check_url(settings.server)
        if ranks.size > 1:
            raise UserError(
                f"--server: found {ranks.size} ranks; one process keeps the server busy: run medusa-ds distill without "
                "the deepspeed launcher, with more requests in flight (--batch)"
            )
    kept = "ending at once; finished rows are kept, and the same command goes on"
    watch = closing(Supervisor(ranks.rank, ranks.local_size, recipe.train.hang_timeout, before_start=kept))
    with watch, end_with_others(ranks.rank):
        ranks.join()
        return _distill(recipe, settings, ranks)


def _distill(recipe: Recipe, settings: Settings, ranks: Ranks) -> dict[str, Any]:
    chat = Chat(load_tokenizer(recipe.model), recipe.data.template_args)
    chat.check()
    limit = None if settings.server else position_limit(load_config(recipe.model))[0]
    sampling = settings.sampling(limit)
    rows = _read("--prompts", settings.prompts, settings.split)[: settings.limit] if settings.prompts else []
    excluded = [row for source in settings.exclude for _, row in _read("--exclude", source) if not isinstance(row, str)]
    unwanted = [message["content"] for row in excluded for message in row if message["role"] == "user"]
    openings = read_openings(settings.openings) if settings.openings else [""]
    state = _state(recipe, settings, sampling, [row for _, row in rows], unwanted, openings)
    with closing(Output(Path(settings.out), state, ranks)) as output:
        engines = _Engines(recipe, settings, chat, sampling, ranks)
        rows += _make_prompts(engines, openings, output, len(rows))
        removed = _removed([row for _, row in rows], Excluded(unwanted), chat.tokenizer.all_special_tokens)
        failed = _answer(engines, rows, removed, output)
        parts = ranks.gather((failed, removed))
        output.merge()
    everyone = [{number: why for part in parts for number, why in part[kind].items()} for kind in (0, 1)]
    return ranks.first(lambda: _summary(settings.out, [place for place, _ in rows], *everyone))


class _Engines:
    """Makes engines; the model is loaded once, when it is first needed."""

    def __init__(self, recipe: Recipe, settings: Settings, chat: Chat, sampling: Sampling, ranks: Ranks) -> None:
        self.recipe, self.settings, self.chat, self.sampling, self.ranks = recipe, settings, chat, sampling, ranks
        self.backbone: Any = None

    def make(self, sampling: Sampling, rows: int) -> Engine:
        settings = self.settings
        if settings.server:
            name = settings.server_model or self.recipe.model.name
            in_flight = settings.batch or 64
            return Server(settings.server, name, sampling, in_flight, settings.timeout_s, settings.retries)
        if self.backbone is None:
            device, dtype = place(settings.device, settings.dtype)
            if device.type == "cuda" and device.index is None:
                device = torch.device("cuda", self.ranks.local_rank)
                torch.cuda.set_device(device)
            self.backbone = load_backbone(self.recipe.model, dtype, device=device)
            pack_projections(self.backbone)
            end_at(self.backbone, self.chat.ends)
        batch = settings.batch or (512 if self.backbone.device.type == "cuda" else 8)
        return Sampler(self.backbone, self.chat, sampling, min(batch, rows))


def _read(where: str, source: str, split: str = "train") -> list[tuple[str, Any]]:
    """Where every prompt stands, and its messages, or why it cannot be used."""
    found = load_prompts(where, source, split)
    return [(place, row.messages if isinstance(row, Prompt) else f"unusable row: {row}") for place, row in found]


def _state(
    recipe: Recipe, settings: Settings, sampling: Sampling, asked: list[Any], unwanted: list[str], openings: list[str]
) -> dict[str, Any]:
    """What an output depends on."""
    return {
        "model": recipe.model.name,
        "revision": recipe.model.revision,
        "template_args": recipe.data.template_args,
        "prompts": len(asked),
        "prompts_digest": digest(json.dumps(asked))[:16],
        "exclude_digest": digest(json.dumps(unwanted))[:16],
        "synthesize": settings.synthesize or 0,
        "synthesize_temperature": settings.synthesize_temperature,
        "openings_digest": digest(json.dumps(openings))[:16],
        "keep_unfinished": settings.keep_unfinished,
        **asdict(sampling),
    }


def _make_prompts(engines: _Engines, openings: list[str], output: Output, first: int) -> list[tuple[str, Any]]:
    """The prompts that the model makes, kept in the progress file, as `_read` gives those of a source."""
    settings, ranks, chat = engines.settings, engines.ranks, engines.chat
    made = {row["row"]: row for row in output.before if "prompt" in row}
    wanted = range(first, first + (settings.synthesize or 0))
    missing, new = [row for row in wanted if row not in made], {}
    begin = chat.before_prompt()
    texts = {row: begin + openings[row % len(openings)] for row in missing}
    if todo := deque(Request(row, MAKE_PROMPT, texts[row], []) for row in ranks.share(missing)):
        bar = _count(f"making {counted(len(missing), 'prompt')}", len(todo), ranks)
        before = max(len(chat.tokenizer(begin + each, add_special_tokens=False)["input_ids"]) for each in openings)
        sampling = replace(
            engines.sampling,
            temperature=settings.synthesize_temperature,
            top_p=1.0,
            max_prompt_tokens=before,
            max_new_tokens=max(1, min(MADE_PROMPT_TOKENS, engines.sampling.max_prompt_tokens - before)),
        )

        def keep(request: Request, reply: Reply) -> None:
            bar.add(1, reply.tokens)
            if not reply.finish.startswith("failed"):
                text = request.text.removeprefix(begin) + reply.text if reply.text.strip() else ""
                new[request.row] = {"row": request.row, "prompt": text, "finish": reply.finish}
                output.progress.append(new[request.row])

        engines.make(sampling, len(todo)).run(todo, keep)
        bar.close()
    for part in ranks.gather(new):
        made |= part
    seen = Seen()
    prompts: list[tuple[str, Any]] = []
    for number in wanted:
        if number not in made:
            raise UserError(f"{settings.server}: some prompts could not be made; the same command tries them again")
        text, finish = made[number]["prompt"].strip(), made[number]["finish"]
        problem = ""
        if finish != "end" or not text:
            problem = finish if text else "empty"
        elif repetitive(text):
            problem = "repetition"
        elif not seen.add(text):
            problem = "near-duplicate"
        prompts.append((f"row {number}", f"made prompt: {problem}" if problem else [{"role": "user", "content": text}]))
    return prompts


def _removed(prompts: list[Any], excluded: Excluded, controls: list[str]) -> dict[int, str]:
    """Rows that are not answered, with the reason."""
    removed = {}
    for number, messages in enumerate(prompts):
        if isinstance(messages, str):
            removed[number] = messages
        elif any(control in message["content"] for message in messages for control in controls):
            removed[number] = "control tokens in a prompt"
        elif any(excluded.overlap(message["content"]) for message in messages if message["role"] == "user"):
            removed[number] = "overlap with --exclude"
    return removed


def _answer(
    engines: _Engines, prompts: list[tuple[str, Any]], removed: dict[int, str], output: Output
) -> dict[int, str]:
    """Answer this rank's part of what is neither answered nor removed; the rows that failed, with the reason."""
    keeps_unfinished = engines.settings.keep_unfinished
    removed |= {row["row"]: row["removed"] for row in output.before if "removed" in row}
    talks: dict[int, tuple[Messages, deque[dict[str, Any]], list[int]]] = {}
    failed: dict[int, str] = {}

    def ask(number: int, turn: int) -> Request | None:
        """The next answer of a conversation, if a user's turn is left."""
        messages, rest, _ = talks[number]
        while rest:
            messages.append(rest.popleft())
            if messages[-1]["role"] == "user":
                return Request(number, turn, "", list(messages))
        return None

    missing = [number for number in range(len(prompts)) if number not in output.written and number not in removed]
    todo: deque[Request] = deque()
    for number in engines.ranks.share(missing):
        talks[number] = ([], deque(prompts[number][1]), [])
        request = ask(number, 0)
        assert request is not None
        todo.append(request)
    if not todo:
        return failed
    bar = _count(f"answering {len(missing):,} of {len(prompts):,} rows", len(todo), engines.ranks)

    def keep(request: Request, reply: Reply) -> Request | None:
        number, finish = request.row, reply.finish
        messages, _, tokens = talks[number]
        if finish == "end" and not reply.text.strip():
            finish = "empty"
        elif finish == "end" and repetitive(reply.text) and not keeps_unfinished:
            finish = "repetition"
        unfinished = keeps_unfinished and finish in ("cut off", "repetition") and bool(reply.text.strip())
        if finish == "end" or unfinished:
            thoughts = {"reasoning_content": reply.thoughts} if reply.thoughts else {}
            messages.append({"role": "assistant", "content": reply.text, **thoughts})
            if unfinished:
                messages[-1]["unfinished"] = True
            tokens.append(reply.tokens)
            following = None if unfinished else ask(number, request.turn + 1)
            if following is not None:
                bar.add(0, reply.tokens)
                return following
            output.rows.append({"row": number, "messages": messages, "tokens": tokens})
        elif finish.startswith("failed"):
            failed[number] = finish
        else:
            removed[number] = f"answer: {finish}"
            output.progress.append({"row": number, "removed": removed[number]})
        bar.add(1, reply.tokens)
        del talks[number]
        return None

    engines.make(engines.sampling, len(todo)).run(todo, keep)
    bar.close()
    return failed


def _count(text: str, rows: int, ranks: Ranks) -> Progress:
    """Say what begins, and count this rank's rows of it on the first rank."""
    if ranks.rank == 0:
        print(text + (f" on {ranks.size} ranks; {rows:,} of them here" if ranks.size > 1 else ""), flush=True)
    return Progress(rows, "rows", silent=ranks.rank > 0)


def _summary(out: str, places: list[str], failed: dict[int, str], removed: dict[int, str]) -> dict[str, Any]:
    with closing(Journal(Path(out))) as written:
        lengths = sorted(tokens for row in written.rows for tokens in row["tokens"])
    shares = {str(share): lengths[int(share / 100 * (len(lengths) - 1))] for share in (0, 50, 90, 100) if lengths}
    report: dict[str, Any] = {
        "asked": len(places),
        "written": len(written.rows),
        "failed": len(failed),
        "removed": len(removed),
        "answers": len(lengths),
        "tokens": sum(lengths),
        "answer_tokens": shares,
        "removed_by_reason": dict(Counter(removed.values()).most_common()),
        "failed_by_reason": dict(Counter(failed.values())),
    }
    print(
        f"{counted(len(places), 'row')} asked = {report['written']:,} written to {out} + {len(removed):,} removed + "
        f"{len(failed):,} failed"
    )
    first = {why: places[number] for number, why in sorted({**removed, **failed}.items(), reverse=True)}
    for why, count in {**report["removed_by_reason"], **report["failed_by_reason"]}.items():
        print(f"  {count:,} x {why} (first: {first[why]})")
    if any(why.endswith("cut off") for why in removed.values()):
        print("  fewer are cut off with a larger --max-new-tokens; --keep-unfinished keeps those that are")
    middle = ", ".join(f"{share}%: {tokens}" for share, tokens in shares.items())
    lengths_of = f"; tokens of an answer by percentile: {middle}" if middle else ""
    print(f"{counted(report['answers'], 'answer')} with {counted(report['tokens'], 'token')}{lengths_of}")
    if failed:
        print("the same command asks the failed rows again")
    return report
