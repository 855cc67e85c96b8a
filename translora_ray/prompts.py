"""Texts that go into models: the task's prompt, the synthesis list, the discriminator's question, and their tokens.

Text crosses between bases as text or messages, never as tokens: each base renders with its own tokenizer, and loss masks
come from that rendering. No model is loaded here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from translora_ray.config import Task
from translora_ray.errors import UsageError
from translora_ray.records import TaskRow

Format = Literal["text", "chat"]
YES, NO = "Yes", "No"
_NUMBERED = re.compile(r"\s*\d+[.)]\s")
_ITEM_NUMBER = re.compile(rf"\n{_NUMBERED.pattern}")
_LINE_ENDS = re.compile(r"\n+")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked. `format` "text" is continued as it stands, "chat" is a user message in the base's template, after `before`: (role, text)."""

    text: str
    format: Format = "text"
    before: tuple[tuple[str, str], ...] = ()


def task_prompt(template: str, text_input: str, format: Format) -> Prompt:
    """The task's template with one input in it. Only `{input}` is special: other braces are plain text."""
    return Prompt(template.replace("{input}", text_input), format)


def synthesis_prompt(seeds: Sequence[str], shots: int, seed: int) -> Prompt:
    """A numbered list of seed inputs for the generator to continue (Trans-LoRA, arXiv 2405.17258, section 3.2).

    `shots` seeds are drawn without replacement and in an order of their own by `seed`, so that requests differ
    in more than their sampling noise. Inputs only: answers are the teacher's business.
    """
    chosen = random.Random(seed).sample(list(seeds), min(shots, len(seeds)))
    items = [f"Here are {2 * len(chosen)} examples:", *(f"{number}. {text}" for number, text in enumerate(chosen, 1)), f"{len(chosen) + 1}."]
    return Prompt(_gap(seeds).join(items))


def labelled_prompt(seeds: Sequence[TaskRow], shots: int, seed: int, label: str) -> Prompt:
    """Seed inputs after the names of their labels, and a last label to write an input for: seeds of other labels first, then those that have it.

    `shots` of them are drawn by `seed`, those of the label before others.
    """
    order = random.Random(f"{seed}/{label}").sample(list(seeds), len(seeds))
    shown = sorted(order, key=lambda row: row.target.strip() != label)[:shots][::-1]
    return Prompt(_gap([row.input for row in seeds]).join([*(f"{row.target.strip()}: {row.input}" for row in shown), f"{label}:"]))


def generator_prompt(name: str) -> Prompt:
    """What a generator adapter goes on from: the label of the input to write, or the task's name where answers are open."""
    return Prompt(f"{name}:")


def learnt_prompt(task: Task, target: str) -> Prompt:
    """What a generator adapter learns to go on from where the input of a row with this target follows."""
    return generator_prompt(target.strip() if task.classes else task.name)


def synthesis_stops(seeds: Sequence[str]) -> tuple[str, ...]:
    """Where a list item ends: at what stands between two of them."""
    return (_gap(seeds),)


def _gap(seeds: Sequence[str]) -> str:
    """What stands between the items of a list: the line's end, or, where seeds have several lines, more empty lines than a seed has."""
    longest = max((len(run) for seed in seeds for run in _LINE_ENDS.findall(seed.strip())), default=0)
    return "\n" * (longest + 1)


def several_lines(rows: Sequence[TaskRow]) -> bool:
    """Whether some answer has more than one line."""
    return any("\n" in row.target.strip() for row in rows)


def answer_stops(several: bool, format: Format) -> tuple[str, ...]:
    """Where an answer ends that an adapter, or a bare base, does not end itself: at the line's end, if no row's answer has `several` lines."""
    return ("\n",) if format == "text" and not several else ()


def parse_synthesis(text: str, whole: bool = False) -> str:
    """The one item the generator wrote, without blanks around it; empty when it wrote none but a number. Unless it is the `whole` text, as where items have
    numbered lines themselves, it ends before a line with a number."""
    if _NUMBERED.match(text):
        return ""
    return (text if whole else _ITEM_NUMBER.split(text, maxsplit=1)[0]).strip()


def has_numbered_lines(text: str) -> bool:
    return bool(_ITEM_NUMBER.search(text))


def few_shot_prompt(template: str, seeds: Sequence[tuple[str, str]], text_input: str, format: Format) -> Prompt:
    """The seeds with their answers before the input: what the bare target can do without any training."""
    parts = [complete_text(template.replace("{input}", shown), target) for shown, target in seeds]
    return Prompt("\n\n".join([*parts, template.replace("{input}", text_input)]), format)


def discriminator_prompt(task_name: str, text_input: str) -> Prompt:
    """Trans-LoRA's question about a prompt; the answer is `YES` for the task's own prompts and `NO` for synthetic ones."""
    return Prompt(f"{text_input}\n\nIs the above question from the {task_name} dataset? Answer:")


def complete_text(prompt: str, answer: str) -> str:
    """Prompt and answer as one text, with the blank between them that tokenizers expect."""
    return prompt + separator(prompt) + answer


def separator(prompt: str) -> str:
    return "" if prompt.endswith((" ", "\n", "\t")) else " "


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as `tokenizer`'s base expects them, special tokens included."""
    if prompt.format == "chat":
        if not tokenizer.chat_template:
            raise UsageError(f"{tokenizer.name_or_path} has no chat template: use a task with format: text, or an instruct model.")
        messages = [*({"role": role, "content": text} for role, text in prompt.before), {"role": "user", "content": prompt.text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return list(tokenizer(prompt.text)["input_ids"])


def answer_text(prompt: Prompt, answer: str) -> str:
    """An answer as it follows `prompt`: with the blank between them where it is not in the prompt."""
    return ("" if prompt.format == "chat" else separator(prompt.text)) + answer


def answer_ids(tokenizer: Any, prompt: Prompt, answer: str, end: bool = True) -> list[int]:
    """Token ids of an answer that follows `prompt`; with `end`, the end-of-sequence token closes it."""
    ids = list(tokenizer(answer_text(prompt, answer), add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id] if end else ids


def distinct_tokens(tokenizer: Any, prompt: Prompt, answers: Sequence[str]) -> tuple[list[int], list[int]]:
    """(tokens with which all answers begin after `prompt`, the token of each answer that follows them)."""
    ids = [answer_ids(tokenizer, prompt, answer, end=False) for answer in answers]
    lead = ids[0][: common_length(ids)]
    tokens = [row[len(lead)] for row in ids if len(row) > len(lead)]
    if len(set(tokens)) < len(answers):
        raise UsageError(f"The answers {', '.join(answers)} can not be told apart by one token of {tokenizer.name_or_path}: choose another base.")
    return lead, tokens


def common_length(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def clean_answer(text: str) -> str:
    """A generated answer as it is compared and stored: blanks around it do not count."""
    return text.strip()
