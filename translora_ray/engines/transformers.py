"""The engine on transformers and peft: works wherever torch does, CPU or GPU. Adapters sit side by side on one base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from transformers import DynamicCache

from translora_ray import adapters, adapting
from translora_ray.engines.base import KEPT, AdapterRef, Complete, Generate, Generation, Sampling, Score
from translora_ray.errors import RunFailed, UsageError
from translora_ray.models import context_of, end_tokens, keep_freed_memory, load_base, load_tokenizer, release
from translora_ray.prompts import Prompt, answer_ids, common_length, distinct_tokens, prompt_ids

WORTH_SHARING = 16
GREEDY = 1e-5
"""Temperature below which the likeliest token is taken: logits over a tiny number are no numbers."""
_Request = TypeVar("_Request", Generate, Score, Complete)
_Result = TypeVar("_Result")


class TransformersEngine:
    """A base in memory, in bf16 where the hardware computes in it.

    `batch_size` rows go through the model at a time. A batch holds one adapter and one sampling, so mixed requests are grouped. Of the adapters that answered
    `kept` stay in memory.
    """

    def __init__(self, base: str, batch_size: int = 64, device: str | None = None, kept: int = KEPT) -> None:
        keep_freed_memory()
        self._load = partial(load_base, base, device=device)
        self.model: Any = self._load()
        self._adapted: Any = None
        """The same base as peft sees it, once there was an adapter. Peft's own way through it asks for an active one, which may have been dropped."""
        self._ia3 = False
        """Whether what is on it is IA3."""
        self.tokenizer = load_tokenizer(base)
        self.batch_size = batch_size
        self.context = context_of(self.model)
        self.ends = end_tokens(self.model, self.tokenizer)
        self.kept = kept
        self._names: dict[str, str] = {}
        """Adapters on the base by their paths, the one used last at the end."""
        self._numbers = count()
        self._prompts: dict[str, torch.Tensor] = {}
        self._virtual: torch.Tensor | None = None
        """Vectors before each prompt, (virtual tokens, hidden), where a prompt-tuning adapter answers."""

    def generate(self, requests: Sequence[Generate]) -> list[Generation]:
        return self._grouped(requests, lambda request: (request.adapter, request.sampling), self._generate_batch)

    def score(self, requests: Sequence[Score]) -> list[tuple[float, ...]]:
        return self._grouped(requests, lambda request: (request.adapter, request.answers), self._score_batch)

    def token_logprobs(self, requests: Sequence[Complete]) -> list[tuple[float, ...]]:
        return self._grouped(requests, lambda request: request.adapter, self._complete_batch)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def fits(self, prompt: Prompt, new_tokens: int) -> bool:
        return len(prompt_ids(self.tokenizer, prompt)) + new_tokens <= self.context

    def drop(self, path: str) -> None:
        """Free the memory of an adapter; a request that names it has it read again."""
        self._prompts.pop(path, None)
        if name := self._names.pop(path, None):
            self._adapted.delete_adapter(name)

    def close(self) -> None:
        del self.model, self._adapted
        release()

    def _grouped(
        self, requests: Sequence[_Request], key: Callable[[_Request], Any], run: Callable[[list[_Request], list[list[int]]], list[_Result]]
    ) -> list[_Result]:
        """Run requests in batches of one key and of like prompt length; results in the order of requests."""
        ids = [prompt_ids(self.tokenizer, request.prompt) for request in requests]
        groups: dict[Any, list[int]] = defaultdict(list)
        for i in sorted(range(len(requests)), key=lambda i: len(ids[i])):
            groups[key(requests[i])].append(i)
        results: dict[int, _Result] = {}
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                part = group[start : start + self.batch_size]
                self._activate(requests[part[0]].adapter)
                with torch.inference_mode():
                    results.update(zip(part, run([requests[i] for i in part], [ids[i] for i in part]), strict=True))
        return [results[i] for i in range(len(requests))]

    def _generate_batch(self, requests: list[Generate], ids: list[list[int]]) -> list[Generation]:
        """One token a step for the rows that are not done yet; done rows leave the batch, so nobody waits for the longest answer.

        A loop of our own because `generate` has one random state for a batch and computes done rows to the end.
        """
        sampling = requests[0].sampling
        longest = max(map(len, ids)) + (0 if self._virtual is None else len(self._virtual))
        if longest + sampling.max_tokens > self.context:
            raise UsageError(f"A prompt of {longest} tokens and {sampling.max_tokens} new ones exceed the context of {self.context}: shorten it.")
        shared, cache = self._shared_prompt(ids, sampling.max_tokens)
        inputs = self._pad(ids, shared)
        mask, positions = inputs["attention_mask"], inputs["position_ids"][:, shared:]
        feed = {name: inputs[name][:, shared:] for name in ("input_ids", "inputs_embeds") if name in inputs}
        rows = [_Row(self.tokenizer, self.ends, request) for request in requests]
        alive = list(range(len(rows)))
        for _ in range(sampling.max_tokens):
            logits = self.model(**feed, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = _choose(logits[:, -1].float(), sampling, [rows[i].generator for i in alive])
            keep = [slot for slot, (i, token) in enumerate(zip(alive, tokens, strict=True)) if rows[i].add(token)]
            if not keep:
                break
            alive = [alive[slot] for slot in keep]
            slots = torch.tensor(keep, device=mask.device)
            if len(keep) < len(tokens):
                cache.batch_select_indices(slots)
            feed = {"input_ids": torch.tensor([[rows[i].tokens[-1]] for i in alive], device=mask.device)}
            mask = torch.cat([mask[slots], torch.ones_like(feed["input_ids"])], dim=1)
            positions = positions[slots, -1:] + 1
        return [row.result(len(prompt)) for row, prompt in zip(rows, ids, strict=True)]

    def _shared_prompt(self, ids: list[list[int]], new_tokens: int) -> tuple[int, DynamicCache]:
        """(length, keys and values) of the beginning that all prompts have in common, computed once; (0, nothing) if not worth it,
        where the padding after it would count in a sliding window of attention, or where virtual tokens come first."""
        cache = DynamicCache(config=self.model.config)
        shared = min(common_length(ids), min(map(len, ids)) - 1) if len(ids) > 1 else 0
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if shared < WORTH_SHARING or self._virtual is not None or (window and max(map(len, ids)) + new_tokens > window):
            return 0, cache
        self.model(torch.tensor([ids[0][:shared]], device=self.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(ids))
        return shared, cache

    def _score_batch(self, requests: list[Score], ids: list[list[int]]) -> list[tuple[float, ...]]:
        lead, answers = distinct_tokens(self.tokenizer, requests[0].prompt, requests[0].answers)
        ids = [prompt + lead for prompt in ids]
        logits = self.model(**self._pad(ids), logits_to_keep=1, use_cache=False).logits[:, -1].float()
        return [tuple(row) for row in logits.log_softmax(-1)[:, answers].tolist()]

    def _complete_batch(self, requests: list[Complete], ids: list[list[int]]) -> list[tuple[float, ...]]:
        answers = [answer_ids(self.tokenizer, request.prompt, request.completion) for request in requests]
        longest = max(map(len, answers))
        batch = self._pad([prompt + answer for prompt, answer in zip(ids, answers, strict=True)])
        logprobs = self.model(**batch, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        wanted = torch.tensor([[0] * (longest - len(answer)) + answer for answer in answers], device=logprobs.device)
        chosen = logprobs.gather(-1, wanted[..., None])[..., 0].tolist()
        return [tuple(row[longest - len(answer) :]) for row, answer in zip(chosen, answers, strict=True)]

    def _pad(self, ids: list[list[int]], shared: int = 0) -> dict[str, torch.Tensor]:
        """Rows of one length; padding stands after the `shared` first tokens that all rows have in common. Virtual tokens make embeddings of the rows."""
        pad, virtual = self.tokenizer.pad_token_id, self._virtual
        if virtual is not None:
            ids = [[pad] * len(virtual) + row for row in ids]
        width = max(map(len, ids))
        if width > self.context:
            raise UsageError(f"A prompt of {width} tokens exceeds the base's context of {self.context}: shorten the inputs.")
        rows = [row[:shared] + [pad] * (width - len(row)) + row[shared:] for row in ids]
        mask = [[1] * shared + [0] * (width - len(row)) + [1] * (len(row) - shared) for row in ids]
        inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if virtual is not None:
            inputs["inputs_embeds"] = self.model.get_input_embeddings()(inputs.pop("input_ids"))
            for embedded, row in zip(inputs["inputs_embeds"], ids, strict=True):
                embedded[width - len(row) : width - len(row) + len(virtual)] = virtual
        return inputs

    def _activate(self, adapter: AdapterRef | None) -> None:
        """Make one adapter, or the bare base, the one that answers. A new adapter is proved live before its first answer."""
        new = adapters.inspect(adapter.path).type if adapter and adapter.path not in self._prompts and adapter.path not in self._names else None
        if adapter and new == "prompt_tuning":
            self._prompts[adapter.path] = adapting.virtual_tokens(self.model, adapter.path)
        self._virtual = self._prompts.get(adapter.path) if adapter else None
        if adapter is None or self._virtual is not None:
            if self._adapted is not None:
                self._adapted.base_model.disable_adapter_layers()
            return
        if self._adapted is not None:
            self._adapted.base_model.enable_adapter_layers()
        if new:
            name = f"adapter{next(self._numbers)}"
            self._make_way(ia3=new == "ia3")
            try:
                self._adapted = adapting.attach(self.model if self._adapted is None else self._adapted, adapter.path, name)
            except UsageError:
                if self._adapted is None:  # parts of it may be on the base
                    del self.model
                    self.model = self._load()
                raise
            self._names[adapter.path] = name
            try:
                adapting.prove_live(self._adapted, self.tokenizer, adapter.path, name)
            except RunFailed:
                self.drop(adapter.path)  # else the next request would find it loaded
                raise
        self._names[adapter.path] = self._names.pop(adapter.path)
        self._adapted.set_adapter(self._names[adapter.path], inference_mode=True)
        while len(self._names) > self.kept:
            self.drop(next(iter(self._names)))

    def _make_way(self, ia3: bool) -> None:
        """Take all adapters off the base where peft can not put the one that comes beside them: IA3 and LoRA take turns."""
        if self._adapted is not None and ia3 != self._ia3:
            self.model, self._adapted = self._adapted.base_model.unload(), None
            self._names.clear()
        self._ia3 = ia3


class _Row:
    """One request's answer while it grows."""

    WINDOW = 8
    """Tokens in which a stop string is looked for after each step."""

    def __init__(self, tokenizer: Any, ends: set[int], request: Generate) -> None:
        self.tokenizer, self.ends, self.sampling, self.watch = tokenizer, ends, request.sampling, request.watch
        self.generator = torch.Generator().manual_seed(request.seed)
        self.tokens: list[int] = []
        self.finished = False

    def add(self, token: int) -> bool:
        """Take a token; False when the answer is complete."""
        self.tokens.append(token)
        tail = self.tokenizer.decode(self.tokens[-self.WINDOW :], skip_special_tokens=True) if self.sampling.stop else ""
        self.finished = token in self.ends or any(stop in tail for stop in self.sampling.stop)
        if self.watch and not self.watch(self.tokenizer.decode(self.tokens, skip_special_tokens=True)):
            return False
        return not self.finished

    def result(self, prompt_tokens: int) -> Generation:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        cut = min([text.index(stop) for stop in self.sampling.stop if stop in text], default=len(text))
        return Generation(text[:cut], len(self.tokens), prompt_tokens, self.finished)


def _choose(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """The next token of each row: the likeliest, or drawn with the row's own generator, whatever its neighbours draw."""
    if sampling.temperature < GREEDY:
        return list(logits.argmax(-1).tolist())
    probs = (logits / sampling.temperature).softmax(-1)
    if sampling.min_p:
        probs = probs.where(probs >= sampling.min_p * probs.max(-1, keepdim=True).values, 0.0)
    cumulated = probs.cumsum(-1)
    draws = torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(logits.device)
    chosen = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return list(chosen[:, 0].tolist())
