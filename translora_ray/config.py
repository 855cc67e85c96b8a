"""What users write in YAML: the task, and what task and recipe (`recipe.py`) share. `reading.py` reads them. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

EngineKind = Literal["auto", "transformers", "vllm"]
AdapterType = Literal["lora", "rslora", "dora", "prompt_tuning", "ia3"]
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What a task in a kit may be called: names become parts of paths."""
RELEASE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""What a release, a channel, a transfer of a fleet and a new task may be called; tasks of older kits may have longer names."""
MOST_RANK, MOST_TEMPERATURE = 512, 2.0
"""What vLLM takes."""


class Section(BaseModel):
    """A part of a YAML file: unknown keys and wrong types are errors that name the key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


EPOCHS = 6
"""Passes over rows, and over so many examples that there are `CHOSEN_FOR_A_ROW` for each row."""


class Training(Section):
    """How an adapter is trained. The paper (arXiv 2405.17258, section 4.1): AdamW, linear decay, batch 8, no weight decay."""

    epochs: int | None = Field(None, ge=1)
    """Passes over the rows. None: `EPOCHS`; in a transfer so many fewer that more examples than `CHOSEN_FOR_A_ROW` take no more steps."""
    batch_size: int = Field(8, ge=1)
    """Rows per optimiser step over all workers together."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak rate, decayed linearly to 0."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """A step's gradient that is longer is shortened to this: now and then one is a hundred times the median."""
    held_out: float = Field(0.0, ge=0, le=0.5)
    """Share of the rows that is not trained on: the epoch, and the learning rate, with the least loss on them are taken. A transfer's rows are
    synthetic, so no real row decides anything. 0: the last epoch is taken."""
    patience: int | None = Field(None, ge=1)
    """Epochs without a lower loss on the rows held out after which training stops. None: it goes on to the end."""
    token_weights: float = Field(0.0, ge=0, le=1)
    """Share of the loss's weight that goes to an answer's tokens by what the source adapter adds to them (TiTok, arXiv 2510.04682); the rest is the same for
    all. Of transfers alone, where a teacher answers."""
    base_bits: Literal[4, 8] | None = None
    """Bits per weight of the frozen base while it trains (bitsandbytes, the extra `quantized`; 4 is QLoRA's NF4, arXiv 2305.14314). None: as it is."""
    learning_rates: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=2)
    """Rates to try in turn in place of `learning_rate`, each from a fresh adapter; the rows held out choose."""

    @property
    def passes(self) -> int:
        """`epochs`, decided."""
        return self.epochs or EPOCHS

    @model_validator(mode="after")
    def _chooses_by_something(self) -> Training:
        if (self.patience or self.learning_rates) and not self.held_out:
            raise ValueError("patience and learning_rates choose by rows held out: set held_out")
        return self

    @property
    def trials(self) -> list[Training]:
        """This section for each of the learning rates to try."""
        rates = self.learning_rates or [self.learning_rate]
        return [self.model_copy(update={"learning_rate": rate, "learning_rates": None}) for rate in rates]


class Adapter(Section):
    """An adapter's type and size. None: what the source adapter has; keys that a type has no use for are not read."""

    type: AdapterType | None = None
    """LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), prompt tuning (2104.08691; it wants a higher learning rate, in the paper
    2e-3) or IA3 (2205.05638, on the modules that peft names for the base's family). vLLM serves the first two."""
    rank: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, gt=0)
    """With another rank than the source adapter's, None keeps alpha / rank."""
    dropout: float | None = Field(None, ge=0, lt=1)
    modules: Literal["all-linear"] | list[str] | None = Field(None, min_length=1)
    """Names of the linear layers that LoRA goes on, as they end (`q_proj`). None: those that do what the source adapter's do."""
    virtual_tokens: int | None = Field(None, ge=1)
    """Of prompt tuning; 20 where the source adapter has none."""


class Privacy(Section):
    """Bounds what an adapter can have learnt from any one row (differential privacy; DP-SGD, arXiv 1607.00133)."""

    epsilon: float = Field(8.0, gt=0)
    """How much likelier any outcome may be with a row than without it, as a logarithm. Smaller is stricter, and takes more noise."""
    delta: float | None = Field(None, gt=0, lt=1)
    """Chance that `epsilon` does not hold. None: a tenth of one in as many rows as there are."""
    clip: float = Field(1.0, gt=0)
    """Length to which the gradient of each row is cut."""


class Task(Section):
    """TASK.yaml: what the adapter is for, and where its rows lie while they are at hand."""

    name: str = Field(pattern=f"^{NAME}$")
    """Names the task in the discriminator's question and in tables."""
    prompt: str
    """Template with `{input}` in it."""
    train: str
    """JSONL of {"input", "target"}, relative to the YAML file."""
    metric: Literal["exact_match", "choice", "number", "rouge_l", "code"] = "exact_match"
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer in tokens."""
    seeds: int = Field(5, ge=1)
    """Rows that go into the kit (paper: 5, one task needed 15). Spread over the targets where these are classes."""
    labels: list[str] | Literal["from_rows", "open"] = "from_rows"
    """The classes that answers come from; the teacher's other answers are rejects. `from_rows`: with the metrics exact_match and choice the different targets
    of the rows where these come at least four times each in the mean, else as `open`: any text. Names of classes go into the kit, so give `open` where they
    are secret."""
    answer_words: list[str] | Literal["from_rows", "any"] = "from_rows"
    """What answers may say beside words of their input, such as names of slots; the teacher's other answers are rejects. `from_rows`: with the metrics
    exact_match and rouge_l, where `labels` are not given and the rows' answers are no classes, but say nothing else than words that do so in four rows or more,
    these words (`answers.py`); else `any`: whatever they like. The words go into the kit, so give `any` where they are secret."""
    format: Literal["text", "chat"] = "text"
    """`chat` sends the prompt as one user message through each base's own template."""
    seed: int = 0
    """Random seed of `prepare`."""
    source_training: Training = Training()
    """For the source adapter; unused with `--adapter`."""
    source_adapter: Adapter = Adapter()
    """Type and size of the source adapter; None means LoRA of rank 16, alpha twice the rank, dropout 0, all linear layers."""
    discriminator_training: Training = Training(epochs=3)
    generator_adapter: bool = False
    """Whether a LoRA on the source base learns to write the task's inputs, each after its label, for recipes whose `synthesis.generator` is `adapter`. It
    learns from all rows and may repeat some: audit the kit (docs/privacy.md)."""
    generator_training: Training = Training(epochs=3)
    """For the generator adapter."""
    generator_privacy: Privacy | None = None
    """Trains the generator adapter with differential privacy ({epsilon: 8}), as `pip install '.[private]'` makes possible."""

    @model_validator(mode="after")
    def _private_rows_choose_nothing(self) -> Task:
        if self.generator_privacy and not self.generator_adapter:
            raise ValueError("generator_privacy is about the generator adapter: set generator_adapter, or leave it out")
        if self.generator_privacy and (self.generator_training.held_out or self.generator_training.learning_rates):
            raise ValueError("generator_privacy does not count what rows choose: leave held_out and learning_rates out of generator_training")
        return self

    @model_validator(mode="after")
    def _real_rows_have_no_teacher(self) -> Task:
        if any(training.token_weights for training in (self.source_training, self.discriminator_training, self.generator_training)):
            raise ValueError("token_weights weighs a teacher's answers, and prepare trains on real ones: put it into the recipe's training")
        return self

    @property
    def classes(self) -> list[str]:
        """The labels, once `prepare` has found them; none where answers are open."""
        return self.labels if isinstance(self.labels, list) else []
