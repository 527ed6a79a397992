"""Text from every source becomes full sequences of ids, and what cannot is refused in one line."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, GPT2Config, LlamaConfig, MptConfig, PreTrainedTokenizerFast

from qlinear.data import check_length, load_texts, load_tokenizer, random_ids, token_ids, tokenize
from qlinear.errors import DataError

BOS = 0
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=64, max_position_embeddings=32, bos_token_id=BOS, eos_token_id=1, pad_token_id=2
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w49, `user`, and a BOS in front of every text."""
    words = ["<s>", "<unk>", "user", *(f"w{i}" for i in range(50))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def words(first: int, count: int) -> str:
    return " ".join(f"w{first + i}" for i in range(count))


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def one_line(caught: pytest.ExceptionInfo[DataError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# Sources


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond é", encoding="utf-8")
    assert load_texts(tmp_path / "a.txt") == ["first\n\nsecond é"]
    assert load_texts(str(tmp_path / "a.txt")) == ["first\n\nsecond é"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert load_texts(tmp_path / "a.txt") == ["hello"]


def test_jsonl_rows_are_documents_and_conversations_in_order(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}]
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "  "}, {"messages": talk, "id": 3})
    assert load_texts(path) == ["one", talk]


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "one\u2028two"})
    assert load_texts(path) == ["one\u2028two"]


def test_a_folder_is_all_its_files_by_name_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "notes.md").write_text("not read")
    write_jsonl(tmp_path / "a.jsonl", {"text": "first"})
    assert load_texts(tmp_path) == ["first", "second", "third"]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    talk = [{"role": "user", "content": "hi"}]
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"messages": [talk]}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "c.parquet")
    assert load_texts(tmp_path / "a.parquet") == ["one", "two"]
    assert load_texts(tmp_path / "b.parquet") == [talk]
    with pytest.raises(DataError, match=r"no column `text` or `messages`; its columns: \['n'\]"):
        load_texts(tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="no parquet file") as caught:
        load_texts(tmp_path / "d.parquet")
    one_line(caught)


@pytest.mark.parametrize(("source", "module"), [("a.parquet", "pyarrow"), ("owner/name", "datasets")])
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs the package {module}: pip install 'qlinear\[data\]'"):
        load_texts(source)


def test_a_hub_id_reads_the_training_split_as_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: object, **options: object) -> list[dict[str, str]]:
        asked.append((arguments, options))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_texts("owner/name:some-config") == ["one", "two"]
    assert asked == [(("owner/name", "some-config"), {"split": "train", "streaming": True})]


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="owner/name is no file here, and the Hub") as caught:
        load_texts("owner/name")
    assert "no route to host" in one_line(caught)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b" \n\n", "a.txt holds no text"),
        ("a.txt", b"ab\xff", r"a.txt is not UTF-8 text \(byte 2\)"),
        ("a.jsonl", b"", "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": "ok"}\n{"body": "x"}\n', "a.jsonl, line 2: neither a string `text` nor"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"text": 3}\n', "a.jsonl, line 3: neither a string `text` nor"),
        ("a.jsonl", b'{"messages": []}\n', "a.jsonl, line 1: neither a string `text` nor"),
        (
            "a.jsonl",
            b'{"messages": [{"content": "x"}]}\n',
            "a.jsonl, line 1: `messages` must be a list of messages",
        ),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["text"]\n', "a.jsonl, line 1: a row must be an object .* got list"),
        (
            "a.csv",
            b"text\n",
            r"a.csv is of an unknown kind '.csv': the kinds read are .txt, .json, .jsonl, .parquet",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        load_texts(tmp_path / name)
    one_line(caught)


@pytest.mark.parametrize("name", ["none.txt", "folder/none.jsonl", "./owner/name", "/no/such", "word"])
def test_a_missing_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file") as caught:
        load_texts(name)
    one_line(caught)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no .txt, .json, .jsonl, .parquet file"):
        load_texts(tmp_path)


# Documents to ids


def test_documents_are_strung_together_each_behind_its_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenize([words(0, 3), words(10, 2)], tokenizer, samples=9, seq_len=7, seed=None)
    expected = [BOS, *tokenizer.convert_tokens_to_ids(["w0", "w1", "w2"])]
    expected += [BOS, *tokenizer.convert_tokens_to_ids(["w10", "w11"])]
    assert torch.equal(ids, torch.tensor([expected]))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    samples=st.integers(1, 8),
    seq_len=st.integers(1, 20),
    seed=st.none() | st.integers(0, 5),
)
def test_sequences_are_full_consecutive_and_as_many_as_there_are(
    tokenizer: PreTrainedTokenizerFast, lengths: list[int], samples: int, seq_len: int, seed: int | None
) -> None:
    texts = [words(i, n) for i, n in enumerate(lengths)]
    available = sum(n + 1 for n in lengths)
    if available < seq_len:
        with pytest.raises(DataError, match=f"the text has {available} tokens, fewer than seq_len {seq_len}"):
            tokenize(texts, tokenizer, samples, seq_len, seed)
        return
    ids = tokenize(texts, tokenizer, samples, seq_len, seed)
    assert ids.shape == (min(samples, available // seq_len), seq_len)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, tokenize(texts, tokenizer, samples, seq_len, seed))
    # Within a sequence, a word is followed by the next of its document, or by the BOS of another one.
    now, following = ids[:, :-1], ids[:, 1:]
    assert bool(((following == now + 1) | (following == BOS) | (now == BOS)).all())


def test_without_a_seed_sequences_are_the_first_ones_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [words(i, 9) for i in range(6)]
    whole = tokenize(texts, tokenizer, samples=1, seq_len=60, seed=None)
    assert torch.equal(tokenize(texts, tokenizer, 5, 10, None).flatten(), whole.flatten()[:50])


def test_the_seed_decides_which_documents_are_seen(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [words(i, 9) for i in range(40)]
    drawn = [tokenize(texts, tokenizer, 3, 10, seed) for seed in range(4)]
    assert len({tuple(ids.flatten().tolist()) for ids in drawn}) == 4


def test_one_long_document_is_sampled_over_its_length(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenize([words(0, 49)], tokenizer, samples=3, seq_len=5, seed=1)
    assert ids.max() > 20


def test_a_conversation_goes_through_the_chat_template_with_one_bos(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    talk = [{"role": "user", "content": words(0, 3)}]
    ids = tokenize([talk], tokenizer, samples=1, seq_len=5)
    expected = [BOS, *tokenizer.convert_tokens_to_ids(["user", "w0", "w1", "w2"])]
    assert ids.tolist() == [expected]


def test_a_conversation_needs_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no chat template"):
        tokenize([[{"role": "user", "content": "w1"}]], tokenizer, 1, 1)


def test_what_a_chat_template_refuses_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(DataError, match="refuses a conversation: roles must alternate") as caught:
        tokenize([[{"role": "user", "content": "w1"}]], tokenizer, 1, 1)
    one_line(caught)


@pytest.mark.parametrize("document", [3, [1.5, 2], b"bytes", [], torch.zeros(2)])
def test_a_document_is_text_or_messages(tokenizer: PreTrainedTokenizerFast, document: object) -> None:
    with pytest.raises(DataError, match="must be a text or a list of messages"):
        tokenize([document], tokenizer, 1, 1)  # type: ignore[list-item]


def test_no_documents_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="there is no text"):
        tokenize([], tokenizer, 1, 1)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 4), (4, 0), (-1, 4)])
def test_counts_are_positive(tokenizer: PreTrainedTokenizerFast, samples: int, seq_len: int) -> None:
    with pytest.raises(DataError, match="must be at least 1; got"):
        tokenize(["w1"], tokenizer, samples, seq_len)


# Tokenizers


def test_a_saved_tokenizer_is_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("w1")["input_ids"] == tokenizer("w1")["input_ids"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma", "gpt_neox"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, model_type: str) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"no tokenizer .*or calibrate on 'random'") as caught:
        load_tokenizer(tmp_path)
    one_line(caught)


def test_a_damaged_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match="no tokenizer can be loaded") as caught:
        load_tokenizer(tmp_path)
    one_line(caught)


# Ids


def no_tokenizer() -> PreTrainedTokenizerFast:
    raise AssertionError("ids need no tokenizer")


def test_random_ids_are_of_the_vocabulary_seeded_and_never_special() -> None:
    ids = random_ids(CONFIG, 50, 32, seed=3)
    assert torch.equal(ids, random_ids(CONFIG, 50, 32, seed=3))
    assert not torch.equal(ids, random_ids(CONFIG, 50, 32, seed=4))
    assert ids.unique().tolist() == list(range(3, 64))


def test_random_ids_avoid_the_placeholders_of_a_nested_config() -> None:
    text = {"model_type": "llama", "vocab_size": 8, "eos_token_id": [2, 5]}
    config = AutoConfig.for_model("llava", text_config=text, image_token_index=7)
    assert not {2, 5, 7} & set(random_ids(config, 40, 10).unique().tolist())


def test_random_needs_no_tokenizer() -> None:
    ids = token_ids("random", 3, 8, config=CONFIG, tokenizer=no_tokenizer, seed=1)
    assert torch.equal(ids, random_ids(CONFIG, 3, 8, seed=1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ids_are_taken_as_they_are(dtype: torch.dtype) -> None:
    given = torch.randint(0, 64, (5, 7)).to(dtype)
    ids = token_ids(given, 1, 99, config=CONFIG, tokenizer=no_tokenizer)
    assert torch.equal(ids, given.long())
    assert ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        (torch.zeros(4, dtype=torch.long), r"integer tensor \(n, seq_len\)"),
        (torch.zeros(0, 4, dtype=torch.long), "at least 1"),
        (torch.zeros(2, 4), r"got \(2, 4\) torch.float32"),
        (torch.zeros(2, 4, dtype=torch.bool), "torch.bool"),
        (torch.full((2, 4), 64), r"must be in 0 ... 63, .* got 64 ... 64"),
        (torch.tensor([[3, -1]]), r"got -1 ... 3"),
        (torch.zeros(2, 33, dtype=torch.long), r"seq_len 33 is longer .*\(max_position_embeddings 32\)"),
    ],
)
def test_ids_that_do_not_fit_the_model_are_refused(ids: torch.Tensor, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        token_ids(ids, 1, 1, config=CONFIG, tokenizer=no_tokenizer)
    one_line(caught)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    small = LlamaConfig(vocab_size=8)
    with pytest.raises(DataError, match="is the tokenizer another model's"):
        token_ids([words(0, 20)], 1, 4, config=small, tokenizer=lambda: tokenizer)


def test_files_and_documents_give_the_same_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = [words(0, 20), words(10, 30)]
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    from_documents = token_ids(texts, 4, 8, config=CONFIG, tokenizer=lambda: tokenizer)
    assert torch.equal(token_ids(path, 4, 8, config=CONFIG, tokenizer=lambda: tokenizer), from_documents)
    assert torch.equal(
        token_ids(iter(texts), 4, 8, config=CONFIG, tokenizer=lambda: tokenizer), from_documents
    )


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (CONFIG, 32),
        (GPT2Config(n_positions=48), 48),
        (MptConfig(max_seq_len=40), 40),
        (
            AutoConfig.for_model("llava", text_config={"model_type": "llama", "max_position_embeddings": 24}),
            24,
        ),
    ],
    ids=["llama", "gpt2", "mpt", "llava"],
)
def test_sequences_are_at_most_as_long_as_the_model_takes(config: LlamaConfig, limit: int) -> None:
    check_length(config, limit)
    with pytest.raises(DataError, match=f"use at most {limit}"):
        check_length(config, limit + 1)


def test_length_is_checked_before_text_is_read() -> None:
    with pytest.raises(DataError, match="seq_len 33 is longer"):
        token_ids("no-such-file.txt", 1, 33, config=CONFIG, tokenizer=no_tokenizer)


def test_a_model_without_a_limit_takes_any_length() -> None:
    check_length(AutoConfig.for_model("bloom"), 1 << 20)


# Rows as data sets have them


PARTS = [{"type": "text", "text": words(0, 2)}, {"type": "text", "text": f" {words(2, 1)}"}]
KNOWN_ROWS = {
    "parts": ({"messages": [{"role": "user", "content": PARTS}]}, "user w0 w1 w2 "),
    "parts in Python": ({"messages": [{"role": "user", "content": ["w0", " w1"]}]}, "user w0 w1 "),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "user  "),
    "empty text": ({"text": "", "messages": [{"role": "user", "content": "w1"}]}, "user w1 "),
    "null text": ({"text": None, "messages": [{"role": "user", "content": "w1"}]}, "user w1 "),
    "sharegpt": ({"conversations": [{"from": "human", "value": "w1"}]}, "user w1 "),
    "sharegpt system": (
        {"system": "w9", "conversations": [{"from": "human", "value": "w1"}]},
        "system w9 user w1 ",
    ),
    "roles in conversations": ({"conversations": [{"role": "user", "content": "w1"}]}, "user w1 "),
    "prompt and completion": ({"prompt": "w1 ", "completion": "w2"}, "w1 w2"),
    "prompt alone": ({"prompt": "w1"}, "w1"),
    "conversations of both": (
        {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "user", "content": "w2"}]},
        "user w1 user w2 ",
    ),
    "alpaca": ({"instruction": "w1", "input": "w2", "output": "w3"}, "user w1\n\nw2 assistant w3 "),
    "alpaca without input": ({"instruction": "w1", "input": "", "output": "w3"}, "user w1 assistant w3 "),
}


def encoded(tokenizer: PreTrainedTokenizerFast, text: str, is_chat: bool) -> list[int]:
    ids: list[int] = tokenizer(f"<s>{text}" if is_chat else text, add_special_tokens=not is_chat)["input_ids"]
    return ids


@pytest.mark.parametrize("name", KNOWN_ROWS)
@pytest.mark.parametrize("source", ["jsonl", "json", "lines in json", "nested json", "Python"])
def test_rows_of_known_fields_are_rendered(
    name: str, source: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    row, text = KNOWN_ROWS[name]
    chat = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", unk_token="<unk>"
    )
    chat.chat_template = TEMPLATE
    path = tmp_path / ("a.jsonl" if source == "jsonl" else "a.json")
    content = {"json": json.dumps([row]), "nested json": json.dumps({"version": 1, "data": [row]})}
    path.write_text(content.get(source, f"{json.dumps(row)}\n{json.dumps(row)}\n"))
    expected = encoded(chat, text, text.startswith(("user ", "system ")))
    ids = tokenize([row] if source == "Python" else load_texts(path), chat, 1, len(expected), None)
    assert ids.tolist() == [expected]


def test_an_instruction_needs_no_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"instruction": "w1", "input": "w2", "output": "w3"}
    assert (
        tokenize([row], tokenizer, 1, 4, None).tolist()
        == tokenize(["w1\n\nw2\n\nw3"], tokenizer, 1, 4).tolist()
    )


def test_tools_reach_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", unk_token="<unk>"
    )
    chat.chat_template = "{% for tool in tools %}{{ tool.name }} {% endfor %}" + TEMPLATE.replace(
        "{{ bos_token }}", ""
    )
    turns = [{"role": "user", "content": "w1"}]
    for tools in ([{"name": "w7"}], '[{"name": "w7"}]'):
        ids = tokenize([{"messages": turns, "tools": tools}], chat, 1, 3, None)
        assert ids.tolist() == [chat("w7 user w1", add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "part of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "part of type 'int'"),
        ({"messages": "hello"}, "`messages` must be a list"),
        ({"conversations": [{"from": "human"}]}, "`conversations` must be a list"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "{"}, "no JSON"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [1]}, "list of objects"),
        ({"prompt": "x", "completion": [{"role": "user", "content": "x"}]}, "both be texts"),
        ({"question": "x"}, "its fields: question"),
    ],
)
def test_rows_that_cannot_be_rendered_are_refused_by_place(
    row: object, complaint: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{complaint}") as from_file:
        load_texts(write_jsonl(tmp_path / "a.jsonl", {"text": "w1"}, row))
    assert "\n" not in str(from_file.value)
    with pytest.raises(DataError, match=rf"document 1: .*{complaint}"):
        tokenize([row], tokenizer, 1, 2, None)


def test_a_template_that_fails_is_named_with_the_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    chat = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", unk_token="<unk>"
    )
    chat.chat_template = "{{ messages[0].content + 3 }}"
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: the chat template refuses"):
        tokenize(load_texts(path), chat, 1, 2)


def test_surrogates_without_a_partner_are_replaced(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1 \\ud83d w2 \\ud83d\\ude00"}\n')
    assert tokenize(load_texts(path), tokenizer, 1, 5, None).tolist() == [[BOS, 4, 1, 5, 1]]


@pytest.mark.parametrize(
    "name", ["dict", "BatchEncoding", "numpy", "lists", "rows of ids", "rows of BatchEncodings"]
)
def test_ids_are_taken_whatever_holds_them(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import BatchEncoding

    ids = torch.arange(3, 19).view(2, 8)
    given = {
        "dict": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "BatchEncoding": BatchEncoding({"input_ids": ids}),
        "numpy": ids.numpy(),
        "lists": ids.tolist(),
        "rows of ids": list(ids),
        "rows of BatchEncodings": [BatchEncoding({"input_ids": row[None]}) for row in ids],
    }[name]
    actual = token_ids(given, 2, 8, config=CONFIG, tokenizer=lambda: tokenizer, seed=None)
    assert torch.equal(actual, ids)


def test_padding_among_given_ids_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = torch.arange(3, 19).view(2, 8)
    with pytest.raises(DataError, match="padding"):
        token_ids(
            {"input_ids": ids, "attention_mask": ids > 4}, 2, 8, config=CONFIG, tokenizer=lambda: tokenizer
        )
    with pytest.raises(DataError, match="equal lengths"):
        token_ids([[1, 2], [3]], 2, 8, config=CONFIG, tokenizer=lambda: tokenizer)


def test_a_column_of_texts_is_its_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["w1 w2", "w3"]
    expected = tokenize(texts, tokenizer, 1, 5, None)
    actual = token_ids({"text": texts}, 1, 5, config=CONFIG, tokenizer=lambda: tokenizer, seed=None)
    assert torch.equal(actual, expected)
