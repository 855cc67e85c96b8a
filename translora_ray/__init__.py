"""Moving LoRA adapters to a new base model without the data they were trained on."""

__version__ = "0.1.0"
