"""Text and token offsets of sampled tokens, exactly, and prompts with and without a chat template."""

from __future__ import annotations

import codecs
import copy
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from actors.segmentation import cuts_clauses, token_boundaries
from ray_rl.config import ConfigError
from ray_rl.tokenizer import TokenizerCodec, load_tokenizer

quick = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

SENTENCES = (
    "She has 3.14 apples, and he has 1,000. Then they share $x + y = 2$, so\n\\[ x, y \\]\n\nis done.",
    "Der Kuß kostet 5 €. 你好，世界。 \U0001f600 naïve façade\n",
    "We have \\begin{align} a &= b \\\\ c &= d \\end{align} and $$z$$. Hence $\\boxed{3}$.",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>"]


def wrap(backend, **kwargs):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **kwargs)


def byte_level_backend():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 2, trainer)
    # Added tokens inside and outside the byte alphabet; "Ġ" is a space when read as bytes.
    backend.add_tokens([AddedToken("<think>", normalized=False), "Ġword", "tiếng Việt", "\n\n$$"])
    return backend


def sentencepiece_backend(model, trainer):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.train_from_iterator(SENTENCES * 2, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def bpe_with_byte_fallback():
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    backend = sentencepiece_backend(models.BPE(byte_fallback=True, unk_token="<unk>"), trainer)
    # The trainer marks its special tokens as such; bytes are ordinary tokens of a model.
    rebuilt = Tokenizer(
        models.BPE(vocab=backend.get_vocab(), merges=merges(backend), byte_fallback=True, unk_token="<unk>")
    )
    rebuilt.pre_tokenizer, rebuilt.decoder = backend.pre_tokenizer, backend.decoder
    rebuilt.post_processor = backend.post_processor
    rebuilt.add_special_tokens(SPECIAL)
    return rebuilt


def merges(backend):
    import json

    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def unigram_with_metaspace():
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    backend = sentencepiece_backend(models.Unigram(), trainer)
    backend.decoder = decoders.Metaspace()
    return backend


@pytest.fixture(scope="module")
def byte_level():
    return TokenizerCodec(wrap(byte_level_backend()))


@pytest.fixture(scope="module")
def byte_fallback():
    return TokenizerCodec(wrap(bpe_with_byte_fallback()))


@pytest.fixture(scope="module")
def unigram():
    return TokenizerCodec(wrap(unigram_with_metaspace()))


@pytest.fixture(scope="module")
def chat():
    backend = bpe_with_byte_fallback()
    return TokenizerCodec(wrap(backend, chat_template=TEMPLATE))


def hf_decode(codec, ids):
    return codec.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_offsets(text, starts, ids):
    assert len(starts) == len(ids)
    assert all(a <= b for a, b in pairwise((0, *starts, len(text))))
    assert "".join(text[a:b] for a, b in pairwise((0, *starts, len(text)))) == text
    assert not starts or starts[0] == 0


# --- decoding


@quick
@given(ids=st.lists(st.integers(0, 430), max_size=30))
def test_byte_level_text_of_any_ids_is_what_the_tokenizer_decodes(byte_level, ids):
    assert len(byte_level.tokenizer) < 430
    text, starts = byte_level.decode_with_offsets(ids)
    assert text == hf_decode(byte_level, ids)
    check_offsets(text, starts, ids)


def single_byte_ids(codec):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ids = [codec.tokenizer.convert_tokens_to_ids(character) for character in alphabet]
    return {codec._token_bytes(token_id): token_id for token_id in ids}


@quick
@given(
    data=st.binary(max_size=12)
    | st.text(max_size=6).map(str.encode)
    | st.sampled_from([b"\xe2\x82a", b"\xef\xbf\xbd\xf0", b"\xed\xa0", b"\xed\xa0\x80\xed\xa0a\xed"])
)
def test_offsets_of_single_bytes_point_at_the_character_they_belong_to(byte_level, data):
    ids_of = single_byte_ids(byte_level)
    assert len(ids_of) == 256
    text, starts = byte_level.decode_with_offsets([ids_of[bytes([byte])] for byte in data])
    assert text == data.decode("utf-8", "replace")
    expected, at, index = [], 0, 0
    while at < len(data):
        size = next(n for n in range(1, len(data) - at + 1) if is_one_character(data, at, n))
        expected += [index] * size
        at, index = at + size, index + 1
    assert list(starts) == expected


def is_one_character(data, at, size):
    """Whether the `size` bytes at `at` are read as one character: cutting there changes nothing, and gives one."""
    head, rest = data[at : at + size].decode("utf-8", "replace"), data[at + size :].decode("utf-8", "replace")
    return len(head) == 1 and head + rest == data[at:].decode("utf-8", "replace")


def test_tokens_amid_a_character_begin_where_it_does(byte_level):
    ids_of = single_byte_ids(byte_level)
    ids = [ids_of[bytes([byte])] for byte in "a€b".encode()]
    assert byte_level.decode_with_offsets(ids) == ("a€b", (0, 1, 1, 1, 2))
    eos = byte_level.tokenizer.eos_token_id
    assert byte_level.decode_with_offsets([*ids[:3], eos, *ids[3:], eos]) == ("a€b", (0, 1, 1, 1, 1, 2, 3))
    assert byte_level.decode_with_offsets([*ids[:3], eos]) == ("a\ufffd", (0, 1, 1, 2))
    assert byte_level.decode_with_offsets([*ids[:3], ids[4]]) == ("a\ufffdb", (0, 1, 1, 2))
    assert byte_level.decode_with_offsets([eos, 10**6]) == ("", (0, 0))
    assert byte_level.decode_with_offsets([]) == ("", ())


@quick
@given(ids=st.lists(st.integers(0, 440), max_size=30))
def test_sentencepiece_text_is_what_the_tokenizer_decodes_but_for_the_leading_space(byte_fallback, unigram, ids):
    for codec in (byte_fallback, unigram):
        text, starts = codec.decode_with_offsets(ids)
        check_offsets(text, starts, ids)
        if all(len(token) != 6 or not token.startswith("<0x") for token in tokens_of(codec, ids)):
            reference = hf_decode(codec, ids)
            assert text.lstrip(" ") == reference.lstrip(" ")
            assert len(text) - len(reference) in (0, 1)


def tokens_of(codec, ids):
    return [token for token in codec.tokenizer.convert_ids_to_tokens(ids) if token is not None]


@quick
@given(text=st.text(max_size=40) | st.sampled_from(SENTENCES))
def test_byte_fallback_puts_characters_together(byte_fallback, text):
    text = text.replace("▁", "_")
    ids = byte_fallback.tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, starts = byte_fallback.decode_with_offsets(ids)
    assert decoded.removeprefix(" ") == text.removeprefix(" ")
    check_offsets(decoded, starts, ids)


def test_byte_fallback_by_hand(byte_fallback):
    to_id = byte_fallback.tokenizer.convert_tokens_to_ids
    ids = [to_id(token) for token in ("▁", "<0xE2>", "<0x82>", "<0xAC>", "a", "</s>")]
    assert byte_fallback.decode_with_offsets(ids) == (" €a", (0, 1, 1, 1, 2, 3))


def test_other_decoders_are_asked_token_by_token():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "ab": 3, "c": 4}, unk_token="<unk>"))
    backend.add_special_tokens(SPECIAL)
    codec = TokenizerCodec(wrap(backend))
    assert codec.decode_with_offsets([3, 4, 2]) == ("abc", (0, 2, 3))


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "unigram"])
def test_segments_of_sampled_tokens_join_to_the_completion(name, request):
    codec = request.getfixturevalue(name)
    size = len(codec.tokenizer) + 5

    @quick
    @given(st.lists(st.integers(0, size), max_size=40), st.sampled_from(SENTENCES), st.integers(1, 3))
    def check(noise, sentence, min_tokens):
        ids = [*codec.tokenizer(sentence, add_special_tokens=False)["input_ids"], *noise]
        text, starts = codec.decode_with_offsets(ids)
        boundaries = token_boundaries(cuts_clauses(text), starts, text, min_tokens=min_tokens)
        assert boundaries[0] == 0
        assert boundaries[-1] == len(ids)
        assert all(a < b for a, b in pairwise(boundaries))
        parts = [text[starts[a] : starts[b] if b < len(ids) else None] for a, b in pairwise(boundaries)]
        assert "".join(parts) == text
        data = b"".join(codec._token_bytes(token_id) for token_id in ids)
        assert codecs.decode(data, "utf-8", "replace") == text

    check()


def test_a_real_split_by_hand(byte_level):
    sentence = "Then they share 1,000 apples, and he has 3.14. So\n\\[ x, y \\]\n\nis done."
    ids = byte_level.tokenizer(sentence, add_special_tokens=False)["input_ids"] + [byte_level.tokenizer.eos_token_id]
    text, starts = byte_level.decode_with_offsets(ids)
    boundaries = token_boundaries(cuts_clauses(text), starts, text)
    assert [text[starts[a] : starts[b] if b < len(ids) else None] for a, b in pairwise(boundaries)] == [
        "Then they share 1,000 apples,",
        " and he has 3.14.",
        " So\n",
        "\\[ x, y \\]\n\n",
        "is done.",
    ]


# --- prompts


def test_plain_text_gets_the_tokenizers_own_special_tokens(byte_fallback):
    bos = byte_fallback.tokenizer.bos_token_id
    ids = byte_fallback.encode_prompt("so is y")
    assert ids == tuple(byte_fallback.tokenizer("so is y")["input_ids"])
    assert ids[0] == bos
    assert bos not in ids[1:]
    assert byte_fallback.render_prompt("so is y") == "so is y"


def test_a_chat_template_turns_text_into_a_user_message(chat):
    assert chat.render_prompt("hi") == "<s><|user|>hi<|assistant|>"
    assert chat.render_prompt("hi", system_prompt="be kind") == "<s><|system|>be kind<|user|>hi<|assistant|>"
    assert chat.render_prompt("hi", use_chat_template=False) == "hi"


def test_chat_ids_are_those_of_the_template_with_one_begin_token(chat):
    messages = [{"role": "user", "content": "hi"}]
    ids = chat.encode_prompt(messages, system_prompt="s", use_chat_template=True)
    reference = chat.tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, *messages], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert ids == tuple(reference)
    assert all(isinstance(token_id, int) for token_id in ids)
    assert ids.count(chat.tokenizer.bos_token_id) == 1


def test_a_system_message_of_the_prompt_wins(chat):
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    assert chat.render_prompt(messages, system_prompt="other") == "<s><|system|>own<|user|>hi<|assistant|>"


@pytest.mark.parametrize("prompt", ["hi", [{"role": "user", "content": "hi"}]])
def test_what_needs_a_chat_template_and_has_none_is_refused(byte_fallback, chat, prompt):
    with pytest.raises(ValueError, match=r"model\.chat_template"):
        byte_fallback.encode_prompt(prompt, use_chat_template=True)
    for codec, use in ((byte_fallback, None), (byte_fallback, False), (chat, False)):
        with pytest.raises(ValueError, match=r"model\.chat_template"):
            codec.render_prompt(prompt, system_prompt="be kind", use_chat_template=use)
    with pytest.raises(ValueError, match=r"model\.chat_template.*switched off"):
        chat.render_prompt([{"role": "user", "content": "hi"}], use_chat_template=False)
    with pytest.raises(ValueError, match="empty"):
        chat.render_prompt([])


# --- loading


def test_loading_finds_the_tokenizer_and_all_end_ids(byte_level, tmp_path):
    byte_level.tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token_ids() == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1, 5]}')
    codec = load_tokenizer(str(tmp_path))
    assert codec.eos_token_ids() == (1, 5, 7)
    assert codec.eos_token_ids(9) == (1, 5, 7, 9)
    assert codec.eos_token_ids([3, 5]) == (1, 3, 5, 7)
    ids = byte_level.encode_prompt(SENTENCES[0])
    assert codec.encode_prompt(SENTENCES[0]) == ids
    assert codec.decode_with_offsets(ids) == byte_level.decode_with_offsets(ids)


def test_end_ids_may_be_absent():
    from transformers import PreTrainedTokenizerFast

    assert TokenizerCodec(PreTrainedTokenizerFast(tokenizer_object=byte_level_backend())).eos_token_ids() == ()


@pytest.mark.parametrize("module", ["ray_rl.tokenizer", "actors.segmentation"])
def test_importing_brings_in_nothing_heavy(module):
    heavy = {"torch", "transformers", "tokenizers", "ray", "vllm", "pydantic"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_messages_that_a_template_refuses_are_a_value_error(chat):
    codec = TokenizerCodec(copy.deepcopy(chat.tokenizer))
    codec.tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(ValueError, match=r"^model\.chat_template: .* no system role here"):
        codec.render_prompt("hi", system_prompt="s")


def test_a_policy_that_could_never_end_a_completion_is_a_fault_with_its_mend(byte_level):
    from transformers import PreTrainedTokenizerFast

    endless = TokenizerCodec(PreTrainedTokenizerFast(tokenizer_object=byte_level_backend()), generation_eos=10**6)
    with pytest.raises(ConfigError, match=r"^rollout\.stop_token_ids: completions could never end"):
        endless.check_ends()
    endless.check_ends([1])
    byte_level.check_ends()
    for token_id in (-1, 10**6, 2**63 - 1):
        with pytest.raises(ConfigError, match=rf"^rollout\.stop_token_ids: {token_id} is no token of this tokenizer"):
            byte_level.check_ends([1, token_id])


@pytest.mark.parametrize(
    "eos", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, "x"]}', '{"eos_token_id": 1.5}']
)
def test_a_broken_generation_config_is_not_taken_for_none(byte_level, tmp_path, eos):
    byte_level.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(eos)
    with pytest.raises(ConfigError, match=r"^model\.path: no tokenizer could be loaded from .*: .+"):
        load_tokenizer(str(tmp_path))


def test_characters_that_a_tokenizer_cannot_express_are_a_value_error():
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    codec = TokenizerCodec(wrap(backend))
    with pytest.raises(ValueError, match=r"^model\.path: the tokenizer does not take the prompt: "):
        codec.encode_prompt("b")
