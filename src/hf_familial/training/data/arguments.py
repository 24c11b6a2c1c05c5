"""The choices of a user about the training data, checked before anything is read."""

from dataclasses import dataclass

from ...errors import DataError
from ..args import argument


# the 256 bytes and the end-of-text token: a byte-level vocabulary cannot be smaller
MIN_VOCAB_SIZE = 257


@dataclass
class DataArguments:
    """The text and how it is cut into blocks; parsed by `HfArgumentParser`.

    With neither `dataset_name` nor `train_files` the corpus is the source code of the running
    Python's standard library: about 30 MB of real text that is on every machine.

    Raises:
        DataError: If a value is out of range or two choices contradict each other.
    """

    dataset_name: str | None = argument(
        None, "Name of a dataset on the Hub, or a folder `datasets` reads."
    )
    dataset_config_name: str | None = argument(None, "Configuration of `dataset_name`.")
    dataset_train_split: str = argument("train", "Split of `dataset_name` to train on.")
    dataset_eval_split: str | None = argument(
        None, "Split of `dataset_name` to evaluate on; by default some of the train split."
    )
    streaming: bool = argument(False, "Read the corpus lazily, in constant memory.")
    stream_eval_documents: int = argument(
        500, "Documents held out of the head of a stream without an eval split."
    )
    train_files: list[str] | None = argument(
        None, "Text, jsonl or parquet files (.gz too), or folders of them, to train on."
    )
    eval_files: list[str] | None = argument(
        None, "Files or folders to evaluate on; by default some of `train_files`."
    )
    text_column: str = argument("text", "Column that holds the text of a document.")
    tokenizer_name: str | None = argument(
        None, "Pretrained tokenizer; by default one is trained on the corpus."
    )
    vocab_size: int = argument(4096, "Size of a trained vocabulary, at least 257.")
    seq_length: int = argument(256, "Tokens in one block, at least 2.")
    eval_fraction: float = argument(
        0.02,
        "Share of the documents held out, strictly within (0, 1); of a single one, of its text.",
    )
    max_train_bytes: int | None = argument(
        None, "Train on the first documents that fit in these UTF-8 bytes."
    )
    max_eval_tokens: int | None = argument(1_048_576, "Most tokens to evaluate on.")
    cache_dir: str | None = argument(
        None, "Folder for tokenizers and blocks; by default `$HF_HOME/hf_familial`."
    )
    tokenizer_seed: int = argument(0, "Seed of the sample that a tokenizer is trained on.")

    def __post_init__(self) -> None:
        """Check the values, before anything is read or written."""
        if not 0 < self.eval_fraction < 1:
            raise DataError(
                f"`eval_fraction` must lie strictly between 0 and 1, got {self.eval_fraction}."
            )
        minima = {"seq_length": 2, "vocab_size": MIN_VOCAB_SIZE, "stream_eval_documents": 1}
        minima |= {"max_train_bytes": 1, "max_eval_tokens": self.seq_length}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                reason = " (one block of `seq_length`)" if name == "max_eval_tokens" else ""
                raise DataError(f"`{name}` must be at least {minimum}{reason}, got {value}.")
        if self.dataset_name is not None and (self.train_files or self.eval_files):
            raise DataError(
                "`dataset_name` and `train_files` / `eval_files` are two sources, choose one; got "
                f"{self.dataset_name!r}, {self.train_files} and {self.eval_files}."
            )
        if self.eval_files and not self.train_files:
            raise DataError(f"`eval_files` needs `train_files`, got only {self.eval_files}.")
        if self.streaming and self.dataset_name is None and not self.train_files:
            raise DataError("`streaming` needs `dataset_name` or `train_files`, got neither.")
