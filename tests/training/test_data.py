"""Data: every text survives the tokenizer, blocks equal a naive cut, caches are whole or absent."""

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_familial.errors import (
    DataError,
    EmptyCorpusError,
    TextColumnError,
    TokenizerError,
    UnknownFileTypeError,
)
from hf_familial.training.data import (
    Corpus,
    DataArguments,
    count_text_bytes,
    load_corpus,
    load_or_train_tokenizer,
    pack_documents,
    prepare_data,
    tokenization,
)


TEXTS = [f"def f_{i}(x):\n    return x * {i}  # déjà vu 🙂 {'ab' * (i % 7)}\n" for i in range(200)]

# characters a file can hold: no lone surrogates
unicode_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def documents_of(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


def corpus_of(texts: list[str]) -> Corpus:
    return Corpus(documents_of(texts), documents_of(texts), "test", "Documents of a test.")


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "id": 1}) + "\n" for text in texts))
    return path


def texts_of(documents: Dataset | IterableDataset) -> list[str]:
    assert set(next(iter(documents))) == {"text"}
    return [row["text"] for row in documents]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    args = DataArguments(vocab_size=400, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return load_or_train_tokenizer(corpus_of(TEXTS), args)


@pytest.fixture
def jsonl_args(tmp_path: Path) -> DataArguments:
    path = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    return DataArguments(
        train_files=[str(path)],
        eval_fraction=0.2,
        vocab_size=300,
        seq_length=16,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The vocabulary size of each tokenizer trained."""
    calls: list[int] = []
    train = tokenization._train

    def counted(sample: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
        calls.append(vocab_size)
        return train(sample, vocab_size)

    monkeypatch.setattr(tokenization, "_train", counted)
    return calls


# tokenizer


@examples
@given(text=unicode_texts)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (
        tokenizer.decode(tokenizer(f" \n\t  {text} ,  . ")["input_ids"]) == f" \n\t  {text} ,  . "
    )


def test_tokenizer_has_an_end_of_text_and_a_padding_token(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert 257 < len(tokenizer) <= 400
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    tokenizer.save_pretrained(tmp_path)
    for made in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert made.pad_token_id not in (None, made.eos_token_id)
        assert made.pad_token_id < len(tokenizer)
        every_byte = "".join(map(chr, range(0x500))) + "\U0010ffff"
        assert made.pad_token_id not in made(every_byte)["input_ids"]
        assert made.decode(made(every_byte)["input_ids"]) == every_byte


def test_the_collator_of_the_guide_takes_rows_of_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in ("a", "several words")]
    batch = collator(rows)
    ends = batch["input_ids"][0, len(rows[0]["input_ids"]) :]
    assert set(ends.tolist()) == {tokenizer.pad_token_id}
    assert batch["labels"][0, -1] == -100


def test_tokenizer_is_deterministic_and_cached(
    jsonl_args: DataArguments, tmp_path: Path, trainings: list[int]
) -> None:
    corpus = load_corpus(jsonl_args)
    first = load_or_train_tokenizer(corpus, jsonl_args)
    second = load_or_train_tokenizer(corpus, jsonl_args)
    assert trainings == [300]
    jsonl_args.cache_dir = str(tmp_path / "elsewhere")
    third = load_or_train_tokenizer(corpus, jsonl_args)
    assert trainings == [300, 300]
    states = {made.backend_tokenizer.to_str() for made in (first, second, third)}
    assert len(states) == 1


def test_tokenizer_cache_is_keyed_by_text_and_size(tmp_path: Path, trainings: list[int]) -> None:
    args = DataArguments(vocab_size=300, cache_dir=str(tmp_path))
    load_or_train_tokenizer(corpus_of(TEXTS), args)
    load_or_train_tokenizer(corpus_of(TEXTS[:100]), args)
    args.vocab_size = 310
    load_or_train_tokenizer(corpus_of(TEXTS), args)
    assert trainings == [300, 300, 310]


@pytest.mark.parametrize("damage", ["cut", "removed", "no manifest"])
def test_damaged_tokenizer_is_trained_again(
    tmp_path: Path, trainings: list[int], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    args = DataArguments(vocab_size=300, cache_dir=str(tmp_path))
    whole = load_or_train_tokenizer(corpus_of(TEXTS), args).backend_tokenizer.to_str()
    (file,) = tmp_path.glob("tokenizers/*/tokenizer.json")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        (file if damage == "removed" else file.with_name("manifest.json")).unlink()
    with caplog.at_level(logging.WARNING):
        again = load_or_train_tokenizer(corpus_of(TEXTS), args)
    assert again.backend_tokenizer.to_str() == whole
    assert trainings == [300, 300]
    assert "damaged" in caplog.text


def test_pretrained_tokenizer_is_loaded_by_name(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, trainings: list[int]
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_or_train_tokenizer(corpus_of(TEXTS), DataArguments(tokenizer_name=str(tmp_path)))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert trainings == []


# packing


@examples
@given(texts=st.lists(unicode_texts, min_size=1, max_size=12), seq_length=st.integers(2, 9))
def test_packing_equals_naive_cut(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], seq_length: int
) -> None:
    tokens: list[int] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        tokens += [*ids, tokenizer.eos_token_id]
    count = len(tokens) // seq_length
    naive = [tokens[i * seq_length : (i + 1) * seq_length] for i in range(count)]
    if not naive:
        with pytest.raises(EmptyCorpusError, match=f"got {len(tokens)}"):
            pack_documents(documents_of(texts), tokenizer, seq_length)
        return
    packed = pack_documents(documents_of(texts), tokenizer, seq_length)
    assert packed.blocks["input_ids"][:] == packed.blocks["labels"][:] == naive
    assert packed.num_tokens == count * seq_length
    assert packed.dropped_tokens == len(tokens) - count * seq_length
    stream = documents_of(texts).to_iterable_dataset()
    lazy = pack_documents(stream, tokenizer, seq_length)
    assert [row["input_ids"] for row in lazy.blocks] == naive
    assert [row["labels"] for row in lazy.blocks] == naive


@examples
@given(texts=st.lists(unicode_texts, min_size=1, max_size=8), seq_length=st.integers(2, 5))
def test_bytes_are_those_of_the_blocks(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], seq_length: int
) -> None:
    documents = documents_of([*texts, "enough for one block"])
    packed = pack_documents(documents, tokenizer, seq_length, max_tokens=4 * seq_length)
    spelled = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ids = [i for block in packed.blocks["input_ids"] for i in block if i != tokenizer.eos_token_id]
    raw = bytes(
        spelled[letter] for token in tokenizer.convert_ids_to_tokens(ids) for letter in token
    )
    assert "".join(documents["text"]).encode().startswith(raw)
    assert packed.num_bytes == len(raw)


def test_a_literal_end_of_text_is_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    packed = pack_documents(documents_of(["a<|endoftext|>b"]), tokenizer, 2)
    ids = [i for block in packed.blocks["input_ids"] for i in block]
    assert ids.count(tokenizer.eos_token_id) <= 1
    assert packed.num_tokens > 4


def test_added_tokens_count_their_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenization.plain_backend(tokenizer), eos_token="<|endoftext|>"
    )
    tokenizer.add_tokens(["<thé>"])
    ids = tokenizer("a<thé>b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert count_text_bytes(tokenizer, [*ids, tokenizer.eos_token_id]) == len("a<thé>b".encode())


def test_max_tokens_bounds_the_blocks(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = pack_documents(documents_of(TEXTS), tokenizer, 8)
    packed = pack_documents(documents_of(TEXTS), tokenizer, 8, max_tokens=100)
    assert packed.num_tokens == 96
    assert packed.blocks["input_ids"][:] == whole.blocks["input_ids"][:12]


def test_lazy_packing_reads_no_further_than_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    read: list[int] = []

    def endless() -> Iterator[dict[str, str]]:
        while True:
            read.append(len(read))
            yield {"text": "abc"}

    per_document = len(tokenizer("abc")["input_ids"]) + 1
    blocks = pack_documents(IterableDataset.from_generator(endless), tokenizer, 16).blocks
    read.clear()
    taken = iter(blocks)
    for count in range(1, 4):
        assert len(next(taken)["input_ids"]) == 16
        assert len(read) == -(-16 * count // per_document)


def test_missing_texts_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    packed = pack_documents(documents_of(["abcd", None, "efgh"]), tokenizer, 2)
    plain = pack_documents(documents_of(["abcd", "efgh"]), tokenizer, 2)
    assert packed.blocks["input_ids"][:] == plain.blocks["input_ids"][:]


# corpus


def test_split_is_disjoint_and_stable(tmp_path: Path) -> None:
    sides = []
    for texts in (TEXTS, TEXTS[::-1], TEXTS[::2]):
        path = write_jsonl(tmp_path / "corpus.jsonl", texts)
        args = DataArguments(
            train_files=[str(path)], eval_fraction=0.2, cache_dir=str(tmp_path / "cache")
        )
        corpus = load_corpus(args)
        train, held_out = set(texts_of(corpus.train)), set(texts_of(corpus.eval))
        assert train.isdisjoint(held_out)
        assert train | held_out == set(texts)
        sides.append(held_out)
    assert sides[0] == sides[1]
    assert sides[2] == sides[0] & set(TEXTS[::2])
    assert 0.1 < len(sides[0]) / len(TEXTS) < 0.3


def test_a_small_corpus_has_an_eval_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "two.jsonl", ["one", "two"])
    corpus = load_corpus(DataArguments(train_files=[str(path)], cache_dir=str(tmp_path)))
    assert len(corpus.train) == len(corpus.eval) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_every_kind(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "windows.txt").write_bytes(b"a\r\nb\r\n")
    (folder / "sub" / "code.py").write_text("x = 1\n")
    (folder / "zipped.md.gz").write_bytes(gzip.compress("# é\n".encode()))
    write_jsonl(folder / "rows [1].jsonl", ["row 1", "row 2"])
    table = tmp_path / "table.parquet"
    documents_of(["cell 1", "cell 2"]).to_parquet(table)
    held_out = tmp_path / "eval [1].txt"
    held_out.write_text("held out")
    args = DataArguments(
        train_files=[str(folder), str(table)],
        eval_files=[str(held_out)],
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    corpus = load_corpus(args)
    expected = {"a\r\nb\r\n", "x = 1\n", "# é\n", "row 1", "row 2", "cell 1", "cell 2"}
    assert set(texts_of(corpus.train)) == expected
    assert texts_of(corpus.eval) == ["held out"]
    assert isinstance(corpus.train, IterableDataset) == streaming


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    other.write_text("other")
    args = DataArguments(
        train_files=[str(path)], eval_files=[str(other)], cache_dir=str(tmp_path / "cache")
    )
    for text in ("before", "after it"):
        path.write_text(text)
        assert texts_of(load_corpus(args).train) == [text]


def test_a_named_dataset_with_its_own_column(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", TEXTS, column="content")
    write_jsonl(folder / "test.jsonl", ["held out"], column="content")
    args = DataArguments(
        dataset_name=str(folder),
        dataset_eval_split="test",
        text_column="content",
        cache_dir=str(tmp_path / "cache"),
    )
    corpus = load_corpus(args)
    assert texts_of(corpus.train) == TEXTS
    assert texts_of(corpus.eval) == ["held out"]


def test_max_train_bytes_keeps_the_first_documents(jsonl_args: DataArguments) -> None:
    whole = texts_of(load_corpus(jsonl_args).train)
    jsonl_args.max_train_bytes = len("".join(whole[:5]).encode()) + 1
    assert texts_of(load_corpus(jsonl_args).train) == whole[:5]
    jsonl_args.streaming, jsonl_args.stream_eval_documents = True, 10
    jsonl_args.max_train_bytes = len("".join(TEXTS[10:13]).encode())
    assert texts_of(load_corpus(jsonl_args).train) == TEXTS[10:13]


# the one door


def test_prepare_data_packs_once(
    jsonl_args: DataArguments, tmp_path: Path, trainings: list[int]
) -> None:
    data, tokenizer = prepare_data(jsonl_args)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/blocks/*/*")}
    assert len(files) == 6
    again, _ = prepare_data(jsonl_args)
    assert trainings == [300]
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/blocks/*/*")}
    assert again.train[:] == data.train[:]
    assert data.train_tokens == 16 * len(data.train)
    assert data.eval_tokens == 16 * len(data.eval)
    ids = [i for block in data.eval["input_ids"] for i in block]
    assert data.eval_bytes_per_token == count_text_bytes(tokenizer, ids) / len(ids)
    # nothing half-written is left
    assert not list(tmp_path.glob("cache/*/.*"))


def test_damaged_blocks_are_packed_again(jsonl_args: DataArguments, tmp_path: Path) -> None:
    data, _ = prepare_data(jsonl_args)
    rows = data.train[:]
    for path in tmp_path.glob("cache/blocks/*/blocks.arrow"):
        path.unlink()
        path.write_bytes(b"damaged")
    again, _ = prepare_data(jsonl_args)
    assert again.train[:] == rows


def test_prepare_data_streams(jsonl_args: DataArguments) -> None:
    jsonl_args.streaming, jsonl_args.stream_eval_documents = True, 20
    data, tokenizer = prepare_data(jsonl_args)
    assert isinstance(data.train, IterableDataset)
    assert isinstance(data.eval, Dataset)
    assert data.train_tokens is None
    assert data.train_dropped_tokens is None
    whole = pack_documents(documents_of(TEXTS[20:]), tokenizer, 16).blocks
    assert [row["input_ids"] for row in data.train] == whole["input_ids"][:]
    held_out = pack_documents(documents_of(TEXTS[:20]), tokenizer, 16)
    assert data.eval["input_ids"][:] == held_out.blocks["input_ids"][:]


def test_arguments_parse_beside_the_trainer_s(tmp_path: Path) -> None:
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    line = f"--train_files a b --streaming --seq_length 64 --output_dir {tmp_path} --use_cpu"
    args, _ = parser.parse_args_into_dataclasses(line.split())
    assert args.train_files == ["a", "b"]
    assert args.streaming
    assert args.seq_length == 64


@pytest.mark.slow
def test_the_standard_library(tmp_path: Path) -> None:
    args = DataArguments(cache_dir=str(tmp_path))
    corpus = load_corpus(args)
    assert set(texts_of(corpus.train)).isdisjoint(texts_of(corpus.eval))
    data, tokenizer = prepare_data(args)
    assert len(tokenizer) == 4096
    assert data.train_tokens is not None
    assert data.train_tokens > 3_000_000
    assert data.eval_tokens > 20_000
    assert 2.5 < data.eval_bytes_per_token < 4.5


# errors


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"seq_length": 1}, "`seq_length` must be at least 2, got 1"),
        ({"eval_fraction": 0.0}, "`eval_fraction` must be more than 0 and less than 1, got 0.0"),
        ({"eval_fraction": 1.0}, "`eval_fraction` must be more than 0 and less than 1, got 1.0"),
        ({"vocab_size": 256}, "`vocab_size` must be at least 257, got 256"),
        ({"max_train_bytes": 0}, "`max_train_bytes` must be at least 1, got 0"),
        ({"max_eval_tokens": 255}, "`max_eval_tokens` must be at least 256 .*, got 255"),
        ({"stream_eval_documents": 0}, "`stream_eval_documents` must be at least 1, got 0"),
        ({"dataset_name": "a", "train_files": ["b"]}, "cannot be combined"),
        ({"eval_files": ["b"]}, "needs `train_files`"),
        ({"streaming": True}, "`streaming` needs"),
    ],
)
def test_arguments_are_checked(choice: dict[str, object], match: str) -> None:
    with pytest.raises(DataError, match=match):
        DataArguments(**choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_column_names_the_columns(tmp_path: Path, streaming: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS, column="content")
    args = DataArguments(
        train_files=[str(path)], cache_dir=str(tmp_path / "cache"), streaming=streaming
    )
    with pytest.raises(TextColumnError, match=r"got 'text'.*\['content', 'id'\]"):
        load_corpus(args)
    args.text_column = "id"
    with pytest.raises(TextColumnError, match="must contain strings, got 'id'.*int"):
        load_corpus(args)


def test_file_errors(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty").mkdir()
    cache_dir = str(tmp_path / "cache")
    for name, error, match in [
        ("absent.txt", FileNotFoundError, "absent.txt"),
        ("a.xyz", UnknownFileTypeError, "'a.xyz'"),
        ("latin.txt", DataError, "must be UTF-8, got .*latin.txt"),
        ("broken.jsonl", DataError, "could not be read: JSON parse error"),
        ("empty.jsonl", EmptyCorpusError, "but these are empty: .*empty.jsonl"),
        ("chats.jsonl", TextColumnError, r"use `multi_exit\(SFTTrainer\)`"),
        ("empty", EmptyCorpusError, "must contain text, jsonl or parquet files"),
    ]:
        args = DataArguments(train_files=[str(tmp_path / name)], cache_dir=cache_dir)
        with pytest.raises(error, match=match):
            load_corpus(args)


def one_file(folder: Path, text: str, **choices: Any) -> DataArguments:
    (folder / "one.txt").write_text(text, newline="")
    names = {"train_files": [str(folder / "one.txt")], "cache_dir": str(folder / "cache")}
    return DataArguments(**(names | choices))


@pytest.mark.parametrize(
    ("text", "fraction", "held_out"),
    [
        ("ab\ncd\nef\ngh\n", 0.25, "gh\n"),
        ("ab\ncd\nef\ngh\n", 0.3, "ef\ngh\n"),
        ("ab\ncd\nef\ngh\n", 1e-9, "gh\n"),
        ("ab\ncd\nef\ngh", 1e-9, "gh"),
        ("ab\ncd\nef\ngh", 0.999, "cd\nef\ngh"),
        ("\nab", 0.5, "ab"),
    ],
)
def test_the_end_of_one_document_is_held_out(
    tmp_path: Path, text: str, fraction: float, held_out: str
) -> None:
    corpus = load_corpus(one_file(tmp_path, text, eval_fraction=fraction))
    assert texts_of(corpus.eval) == [held_out]
    assert texts_of(corpus.train) == [text.removesuffix(held_out)]


def test_one_text_file_is_enough_to_train_on(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a file that is one document\n" for i in range(2000))
    args = one_file(tmp_path, text, vocab_size=300, seq_length=16, eval_fraction=0.1)
    data = prepare_data(args)[0]
    assert len(data.train) > 5 * len(data.eval) > 0


@pytest.mark.parametrize("text", ["one", "one\n"])
def test_one_line_cannot_be_split(tmp_path: Path, text: str) -> None:
    with pytest.raises(EmptyCorpusError, match="got one line. Each text file is one document"):
        load_corpus(one_file(tmp_path, text))


def test_copies_cannot_be_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "copies.jsonl", ["same\ntext"] * 2)
    args = DataArguments(train_files=[str(path)], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(EmptyCorpusError, match="2 documents, and all would be held out"):
        load_corpus(args)


def test_an_empty_corpus_leaves_nothing_behind(jsonl_args: DataArguments, tmp_path: Path) -> None:
    jsonl_args.max_train_bytes = 1
    with pytest.raises(EmptyCorpusError, match=r"train split .* `max_train_bytes` \(1\), got none"):
        prepare_data(jsonl_args)
    jsonl_args.max_train_bytes = None
    jsonl_args.seq_length = jsonl_args.max_eval_tokens = 100_000
    with pytest.raises(EmptyCorpusError, match="at least one block"):
        prepare_data(jsonl_args)
    assert not list(tmp_path.glob("cache/blocks/*"))
    assert not list(tmp_path.glob("cache/blocks/.*"))


def test_too_short_a_stream_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = documents_of(["abc"]).to_iterable_dataset()
    blocks = pack_documents(stream, tokenizer, 64).blocks
    with pytest.raises(EmptyCorpusError, match="at least one block"):
        next(iter(blocks))


def test_tokenizer_without_end_of_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenization.plain_backend(tokenizer))
    with pytest.raises(TokenizerError, match="must have an `eos_token`"):
        pack_documents(documents_of(TEXTS), bare, 8)
    bare.save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="got None"):
        load_or_train_tokenizer(corpus_of(TEXTS), DataArguments(tokenizer_name=str(tmp_path)))


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"seq_length": 1}, "`seq_length` must be at least 2, got 1"),
        ({"seq_length": 8, "max_tokens": 7}, r"at least `seq_length` \(8\), got 7"),
        (
            {"seq_length": 8, "max_tokens": 8, "lazy": True},
            "must be None if packing is lazy",
        ),
    ],
)
def test_packing_choices_are_checked(
    tokenizer: PreTrainedTokenizerFast, choice: dict[str, int], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        pack_documents(documents_of(TEXTS), tokenizer, **choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_an_empty_file_is_called_empty(text: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(text)
    args = DataArguments(train_files=[str(tmp_path / "notes.txt")], cache_dir=str(tmp_path / "c"))
    with pytest.raises(EmptyCorpusError, match="which is empty"):
        prepare_data(args)


WRONG_PLACES: list[tuple[dict[str, Any], str]] = [
    ({"train_files": ["{here}/ntoes.txt"]}, "Did you mean '{here}/notes.txt'?"),
    ({"train_files": ["{here}/notes.txt"], "eval_files": ["{here}/absent"]}, "must exist"),
    ({"train_files": ["a.txt,b.txt"]}, "by spaces"),
    ({"dataset_name": "./absent"}, "there is no folder `./absent`"),
    ({"dataset_name": "{here}/notes.txt"}, "Pass it as `train_files`"),
    ({"train_files": ["{here}/notes.txt"], "tokenizer_name": "./absent"}, "tokenizer_name"),
    ({"tokenizer_name": "outputs/family/model"}, "`tokenizer_name`: there is no folder"),
    ({"tokenizer_name": "{here}/notes.txt"}, "must be the folder of a checkpoint"),
    ({"train_files": ["{here}/notes.txt"], "cache_dir": "{here}/notes.txt"}, "`cache_dir` must be"),
]


@pytest.mark.parametrize(("fields", "said"), WRONG_PLACES)
def test_places_are_checked_before_anything_is_read(
    fields: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("words\n")
    monkeypatch.setattr("hf_familial.training.data.prepare.load_corpus", None)

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(item) for item in value]
        return value.format(here=tmp_path)

    with pytest.raises((OSError, DataError)) as raised:
        prepare_data(DataArguments(**{name: placed(value) for name, value in fields.items()}))
    assert placed(said) in str(raised.value)


def test_text_with_a_special_token_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abcdefghij":
        (tmp_path / f"{name}.txt").write_text(f"<|endoftext|>words of chat {name} " * 40)
    args = DataArguments(
        train_files=[str(tmp_path)], cache_dir=str(tmp_path / "cache"), vocab_size=300, seq_length=8
    )
    with caplog.at_level("WARNING", logger="hf_familial"):
        prepare_data(args)
    warned = [r.getMessage() for r in caplog.records if "special token" in r.getMessage()]
    assert warned
    assert "`<|endoftext|>`" in warned[0]
    assert len(warned) <= 2  # one for each split
