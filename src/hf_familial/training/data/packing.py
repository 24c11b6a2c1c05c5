"""Packing of documents into blocks of tokens that have a fixed length and no padding."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ..._files import digest
from ...errors import DataError, EmptyCorpusError
from ._cache import cached_folder
from .corpus import Documents, iter_texts
from .tokenization import check_end_of_text, count_text_bytes, make_encoder, plain_backend


# part of the cache's key: raise it when the layout of the blocks changes
RECIPE = "packed-blocks-1"

BLOCKS_FILE = "blocks.arrow"
TOTALS_FILE = "totals.json"
BATCH_DOCUMENTS = 64
BATCH_BLOCKS = 1024
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32())})


@dataclass(frozen=True)
class PackedDocuments:
    """Blocks of one split and their counts. All counts are `None` if packing is lazy.

    The columns `input_ids` and `labels` are equal, because the model shifts the labels.
    """

    blocks: Documents
    num_tokens: int | None = None  # tokens in the blocks, end-of-text tokens included
    dropped_tokens: int | None = None  # tokens after the last full block
    num_bytes: int | None = None  # UTF-8 bytes of the blocks' text; an end of text has 0 bytes


def pack_documents(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    *,
    max_tokens: int | None = None,
    lazy: bool | None = None,
    cache_dir: Path | None = None,
) -> PackedDocuments:
    """Tokenise documents, join them, and cut the result into blocks of `seq_length` tokens.

    An end-of-text token follows each document. The last tokens are dropped if they do not fill a
    block. Call this function in every process of a launch.

    Args:
        documents (`datasets.Dataset` or `datasets.IterableDataset`): Dataset with one column,
            `text`.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Tokenizer with an end-of-text token.
        seq_length (`int`): Tokens per block, at least 2.
        max_tokens (`int`, *optional*): Maximum number of tokens to pack, at least `seq_length`. It
            cannot be combined with lazy packing.
        lazy (`bool`, *optional*): Whether to pack while the blocks are read, one document at a
            time. Defaults to `True` for an `IterableDataset` and to `False` for a `Dataset`.
        cache_dir (`pathlib.Path`, *optional*): Folder that keeps the blocks of a `Dataset` for the
            next run.

    Raises:
        DataError: If a length is too small, or if `max_tokens` is set and packing is lazy.
        TokenizerError: If the tokenizer has no end-of-text token.
        EmptyCorpusError: If the documents do not fill one block. Lazy packing raises it while the
            blocks are read.

    Example:
        >>> packed = pack_documents(corpus.train, tokenizer, seq_length=256)
        >>> packed.blocks[0]["input_ids"]
    """
    lazy = isinstance(documents, IterableDataset) if lazy is None else lazy
    if seq_length < 2:
        raise DataError(f"`seq_length` must be at least 2, got {seq_length}.")
    if max_tokens is not None and lazy:
        raise DataError(f"`max_tokens` must be None if packing is lazy, got {max_tokens}.")
    if max_tokens is not None and max_tokens < seq_length:
        raise DataError(
            f"`max_tokens` must be at least `seq_length` ({seq_length}), got {max_tokens}."
        )
    check_end_of_text(tokenizer)
    if lazy:
        tokens = List(Value("int32"))
        blocks = IterableDataset.from_generator(
            _stream_blocks,
            features=Features({"input_ids": tokens, "labels": tokens}),
            gen_kwargs={"documents": documents, "tokenizer": tokenizer, "seq_length": seq_length},
        )
        return PackedDocuments(blocks)
    if cache_dir is None or isinstance(documents, IterableDataset):
        sink = pa.BufferOutputStream()
        totals = _write_blocks(documents, tokenizer, seq_length, max_tokens, sink)
        return PackedDocuments(_with_labels(Dataset.from_buffer(sink.getvalue())), **totals)
    return _pack_cached(documents, tokenizer, seq_length, max_tokens, cache_dir)


def _stream_blocks(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Iterator[dict[str, list[int]]]:
    cutter = _Cutter(_encode(documents, tokenizer, batch_size=1), seq_length)
    for block in cutter:
        yield {"input_ids": block, "labels": block}
    cutter.check_not_empty()


def _pack_cached(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    max_tokens: int | None,
    cache_dir: Path,
) -> PackedDocuments:
    # the cache of datasets would hash a pickle of the tokenizer, which changes with use
    texts = chain.from_iterable(iter_texts(documents, 1000))
    choices = [RECIPE, _identify(tokenizer), str(seq_length), str(max_tokens)]
    folder = cache_dir / "blocks" / digest(chain(choices, texts))

    def build(temporary: Path) -> None:
        with pa.OSFile(str(temporary / BLOCKS_FILE), "wb") as sink:
            totals = _write_blocks(documents, tokenizer, seq_length, max_tokens, sink)
        (temporary / TOTALS_FILE).write_text(json.dumps(totals))

    cached_folder(folder, build)
    totals = json.loads((folder / TOTALS_FILE).read_text())
    return PackedDocuments(_with_labels(Dataset.from_file(str(folder / BLOCKS_FILE))), **totals)


def _write_blocks(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    max_tokens: int | None,
    sink: pa.NativeFile,
) -> dict[str, int]:
    cutter = _Cutter(_encode(documents, tokenizer, BATCH_DOCUMENTS), seq_length)
    blocks = islice(cutter, None if max_tokens is None else max_tokens // seq_length)
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        while rows := list(islice(blocks, BATCH_BLOCKS)):
            writer.write(pa.record_batch({"input_ids": rows}, schema=SCHEMA))
    cutter.check_not_empty()
    # all bytes read minus the dropped ones is exact, even if a cut splits a character
    num_bytes = cutter.text_bytes - count_text_bytes(tokenizer, cutter.pending)
    return {
        "num_tokens": cutter.num_blocks * seq_length,
        "dropped_tokens": len(cutter.pending),
        "num_bytes": num_bytes,
    }


class _Cutter:
    """An iterator over blocks of encoded documents. It counts the blocks and bytes it has read."""

    def __init__(self, encoded: Iterator[tuple[list[int], int]], seq_length: int) -> None:
        self.encoded = encoded
        self.seq_length = seq_length
        self.num_blocks = 0
        self.text_bytes = 0
        self._tokens: list[int] = []
        self._start = 0

    @property
    def pending(self) -> list[int]:
        return self._tokens[self._start :]

    def __iter__(self) -> Iterator[list[int]]:
        for ids, num_bytes in self.encoded:
            self._tokens, self._start = self.pending + ids, 0
            self.text_bytes += num_bytes
            while self._start + self.seq_length <= len(self._tokens):
                start, self._start = self._start, self._start + self.seq_length
                self.num_blocks += 1
                yield self._tokens[start : self._start]

    def check_not_empty(self) -> None:
        if self.num_blocks == 0:
            raise EmptyCorpusError(
                f"Each split must fill at least one block of `seq_length` ({self.seq_length}) "
                f"tokens, got {len(self.pending)}. Use more text or a shorter `seq_length`."
            )


def _encode(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[tuple[list[int], int]]:
    encode, end_of_text = make_encoder(tokenizer), check_end_of_text(tokenizer)
    for texts in iter_texts(documents, batch_size):
        for text, ids in zip(texts, encode(texts) if texts else [], strict=True):
            yield [*ids, end_of_text], len(text.encode())


def _identify(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        state = plain_backend(tokenizer).to_str()
    else:
        state = json.dumps(tokenizer.get_vocab(), sort_keys=True) + repr(tokenizer)
    return digest([state, str(tokenizer.eos_token_id)])


def _with_labels(blocks: Dataset) -> Dataset:
    # both columns are views of the same memory
    return concatenate_datasets([blocks, blocks.rename_column("input_ids", "labels")], axis=1)
