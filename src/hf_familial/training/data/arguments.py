"""Arguments that choose the training data."""

from dataclasses import dataclass

from ...errors import DataError
from ..args import argument


# a byte-level vocabulary has at least the 256 bytes and the end-of-text token
MIN_VOCAB_SIZE = 257


@dataclass
class DataArguments:
    """Arguments for the corpus, the tokenizer and the length of the blocks.

    `HfArgumentParser` can read them from a command line. If neither `dataset_name` nor
    `train_files` is set, the corpus is the source code of Python's standard library. It is about
    30 MB of real text that every machine has.

    Raises:
        DataError: If a value is out of range, or if two arguments contradict each other.

    Example:
        >>> args = DataArguments(train_files=["book.txt"], seq_length=512)
    """

    dataset_name: str | None = argument(
        None, "Dataset on the Hub, or a folder that `datasets` can load."
    )
    dataset_config_name: str | None = argument(None, "Configuration of `dataset_name`.")
    dataset_train_split: str = argument("train", "Split of `dataset_name` to train on.")
    dataset_eval_split: str | None = argument(
        None, "Split of `dataset_name` to evaluate on. Default: a part of the train split."
    )
    streaming: bool = argument(False, "Stream the corpus instead of loading all of it.")
    stream_eval_documents: int = argument(
        500, "Documents at the start of a stream to evaluate on, if there is no eval split."
    )
    train_files: list[str] | None = argument(
        None, "Text, jsonl or parquet files (also as .gz), or folders of them, to train on."
    )
    eval_files: list[str] | None = argument(
        None, "Files or folders to evaluate on. Default: a part of `train_files`."
    )
    text_column: str = argument("text", "Column that contains the text of a document.")
    tokenizer_name: str | None = argument(
        None, "Pretrained tokenizer. Default: train a new one on the corpus."
    )
    vocab_size: int = argument(4096, "Vocabulary size of a new tokenizer, at least 257.")
    seq_length: int = argument(256, "Tokens in one block, at least 2.")
    eval_fraction: float = argument(
        0.02,
        "Share of the documents to evaluate on, between 0 and 1. A corpus of one document is "
        "split inside its text.",
    )
    max_train_bytes: int | None = argument(
        None, "Train only on the first documents, up to this many bytes of UTF-8 text."
    )
    max_eval_tokens: int | None = argument(1_048_576, "Maximum number of tokens to evaluate on.")
    cache_dir: str | None = argument(
        None, "Folder for tokenizers and blocks. Default: `$HF_HOME/hf_familial`."
    )
    tokenizer_seed: int = argument(
        0, "Seed for the random sample of text that a new tokenizer is trained on."
    )

    def __post_init__(self) -> None:
        """Check the values before anything is read or written."""
        for name in ("train_files", "eval_files"):
            if isinstance(value := getattr(self, name), str):
                raise DataError(f"`{name}` must be a list of paths, got the string {value!r}.")
        if not 0 < self.eval_fraction < 1:
            raise DataError(
                f"`eval_fraction` must be more than 0 and less than 1, got {self.eval_fraction}."
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
                "`dataset_name` cannot be combined with `train_files` or `eval_files`, got "
                f"{self.dataset_name!r}, {self.train_files} and {self.eval_files}. Choose one."
            )
        if self.eval_files and not self.train_files:
            raise DataError(f"`eval_files` needs `train_files` too, got only {self.eval_files}.")
        if self.streaming and self.dataset_name is None and not self.train_files:
            raise DataError("`streaming` needs `dataset_name` or `train_files`, got neither.")
