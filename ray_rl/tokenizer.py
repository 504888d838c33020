"""Prompts to tokens, and sampled tokens to text with the place of every token in it.

A completion is never re-tokenised: its text is put together from the bytes of its tokens, which also tells where each
begins. transformers is imported when a tokenizer is loaded, not before.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_rl.errors import ConfigError
from ray_rl.garbage import uncollected
from ray_rl.tokenizer_files import read_generation_eos, read_tokenizer
from ray_rl.wording import one_line

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder
    from transformers import PreTrainedTokenizerFast

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_MOST_TOKENS = 2**32
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def load_tokenizer(path: str, trust_remote_code: bool = False, revision: str | None = None) -> TokenizerCodec:
    """The tokenizer of a Hugging Face name or folder, and the end-of-sequence ids of the generation config beside it.

    Raises:
        ConfigError: nothing loadable at `path`, or only a slow tokenizer, which doesn't say what the bytes of a token are.
    """
    if os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, name)) for name in _TOKENIZER_FILES):
        raise ConfigError(f"model.path: {path} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy it there")
    try:
        with uncollected():
            tokenizer = read_tokenizer(path, trust_remote_code=trust_remote_code, revision=revision)
        if not tokenizer.is_fast:
            raise ValueError("it has no fast tokenizer (tokenizer.json), which token offsets need")
        return TokenizerCodec(tokenizer, generation_eos=read_generation_eos(path, revision))
    # `tokenizers` raises bare Exceptions, and transformers whatever it stumbles over in a broken file.
    except Exception as error:
        raise ConfigError(f"model.path: no tokenizer could be loaded from {path}: {one_line(error)}") from error


class TokenizerCodec:
    """Encodes prompts and decodes completions with one tokenizer.

    Kinds of tokenizer, by the decoder in its tokenizer.json: byte-level (GPT-2, Llama 3, Qwen, SmolLM),
    sentencepiece-like (word mark and byte fallback: Llama 2, Gemma, T5) and others, whose tokens are decoded one by
    one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, generation_eos: int | Iterable[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._generation_eos = generation_eos
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._to_bytes = _token_decoder(self._backend.decoder)
        self._known: dict[int, bytes] = {}

    def render_prompt(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        system_prompt: str | None = None,
        use_chat_template: bool | None = None,
    ) -> str:
        """The prompt as the policy sees it, up to where its answer begins; plain text stays as it is.

        Args:
            prompt: Text (one user message, where the chat template is used) or messages with ``role`` and ``content``.
            system_prompt: Put before the messages, unless they begin with a system message of their own.
            use_chat_template: None: if the tokenizer has one.

        Raises:
            ValueError: Something that only a chat template can express, and none is used; or no messages.
        """
        chat = self._uses_chat(use_chat_template)
        if isinstance(prompt, str):
            if not chat:
                if system_prompt is not None:
                    raise ValueError("model.system_prompt: needs a chat template; see model.chat_template")
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        if not chat:
            raise ValueError(
                "model.chat_template: the prompt is a list of messages, which needs a chat template, and "
                + ("it is switched off" if self.tokenizer.chat_template else "the tokenizer has none")
            )
        messages = [dict(message) for message in prompt]
        if not messages:
            raise ValueError("task.prompt_column: the prompt is an empty list of messages")
        if system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        # A template may refuse roles, or their order; it is a program, which may also be wrong in any other way.
        except Exception as error:
            raise ValueError(
                f"model.chat_template: the template does not take these messages: {one_line(error)}"
            ) from error

    def encode_prompt(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        system_prompt: str | None = None,
        use_chat_template: bool | None = None,
    ) -> tuple[int, ...]:
        """Token ids of `render_prompt`'s text.

        A chat template writes its special tokens itself; to plain text the tokenizer adds its own (such as a
        begin-of-sequence).
        """
        text = self.render_prompt(prompt, system_prompt=system_prompt, use_chat_template=use_chat_template)
        add_special_tokens = not self._uses_chat(use_chat_template)
        try:
            return tuple(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        # `tokenizers` raises bare Exceptions, for instance for a character that is neither in the vocabulary nor unknown.
        except Exception as error:
            raise ValueError(f"model.path: the tokenizer does not take the prompt: {one_line(error)}") from error

    def decode_with_offsets(self, token_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """The text of sampled tokens without special tokens, and [T] the offset of each token's first character in it.

        The bytes of all tokens are joined and read as UTF-8, invalid ones as U+FFFD. For byte-level tokenizers this is
        ``tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`` for any ids;
        sentencepiece-like ones keep a leading space, because a completion continues a prompt. Offsets don't descend. A
        token that begins amid a character begins where that does; one without text (special, or an id beyond the
        vocabulary, as padded models can sample) where the next token with text begins, and at the end of the text if
        there is none.
        """
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        pieces: list[str] = []
        length = 0
        starts: list[int] = []
        for token_id in token_ids:
            data = self._token_bytes(token_id)
            if not data:
                starts.append(-1)
                continue
            amid = reader.getstate()[0] != b""
            first = _read(reader, data[:1])
            # Pending bytes that the first byte doesn't continue come out as U+FFFD, before whatever that byte begins.
            continues = amid and (first == "" or (len(first) == 1 and reader.getstate()[0] == b""))
            starts.append(length + 1 if amid and not continues else length)
            piece = first + _read(reader, data[1:])
            pieces.append(piece)
            length += len(piece)
        text = "".join(pieces) + reader.decode(b"", final=True)
        following = len(text)
        for index in range(len(starts) - 1, -1, -1):
            following = starts[index] = following if starts[index] < 0 else starts[index]
        return text, tuple(starts)

    def eos_token_ids(self, extra: int | Iterable[int] | None = None) -> tuple[int, ...]:
        """Ascending ids that end a completion: the tokenizer's, the generation config's and `extra`; maybe none."""
        ids: set[int] = set()
        for source in (self.tokenizer.eos_token_id, self._generation_eos, extra):
            if source is not None:
                ids.update((source,) if isinstance(source, int) else source)
        return tuple(sorted(ids))

    def check_ends(self, stop_token_ids: Sequence[int] = ()) -> None:
        """Whether the policy can end a completion at all, and whether the ids in ``rollout.stop_token_ids`` are tokens.

        Raises:
            ConfigError: completions could never end, so that all of them would be truncated; or an id is none.
        """
        for token_id in stop_token_ids:
            if not self._is_token(token_id):
                raise ConfigError(
                    f"rollout.stop_token_ids: {token_id} is no token of this tokenizer, which has {len(self.tokenizer)}"
                )
        if not any(map(self._is_token, self.eos_token_ids(stop_token_ids))):
            raise ConfigError(
                "rollout.stop_token_ids: completions could never end, as neither the tokenizer nor a generation_config.json "
                "names an end-of-sequence token; name one here, or set eos_token in the model's tokenizer_config.json"
            )

    def _is_token(self, token_id: int) -> bool:
        return 0 <= token_id < _MOST_TOKENS and self._backend.id_to_token(token_id) is not None

    def _uses_chat(self, use_chat_template: bool | None) -> bool:
        available = self.tokenizer.chat_template is not None
        if use_chat_template and not available:
            raise ValueError(
                "model.chat_template: the tokenizer has no chat template; leave it unset, or set it to false"
            )
        return available if use_chat_template is None else use_chat_template

    def _token_bytes(self, token_id: int) -> bytes:
        data = self._known.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id)
            if token is None or token in self._special:
                data = b""
            elif self._to_bytes is not None:
                data = self._to_bytes(token)
            else:
                data = self._backend.decode([token_id]).encode()
            self._known[token_id] = data
        return data


def _read(reader: codecs.IncrementalDecoder, data: bytes) -> str:
    """Python waits for a third byte before it calls half an encoded surrogate invalid; offsets need to know at once."""
    text = reader.decode(data)
    pending = reader.getstate()[0]
    if pending[:1] == b"\xed" and pending[1:] >= b"\xa0":
        reader.reset()
        text += "\ufffd\ufffd"
    return text


def _token_decoder(decoder: Decoder | None) -> Callable[[str], bytes] | None:
    """What a token's string means in bytes, from the decoder of the backend; None if that depends on its neighbours.

    Strip is passed over: it trims the beginning of a whole text, and a completion isn't one.
    """
    if decoder is None:
        return None
    steps = _flatten(json.loads(bytes(decoder.__getstate__())))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return partial(_byte_level, _byte_alphabet())
    if kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        replacements: list[tuple[str, str]] = []
        for step in steps:
            if step["type"] == "Metaspace":
                replacements.append((step["replacement"], " "))
            elif step["type"] == "Replace":
                if "String" not in step["pattern"]:
                    return None
                replacements.append((step["pattern"]["String"], step["content"]))
        return partial(_sentencepiece, tuple(replacements), "ByteFallback" in kinds)
    return None


def _flatten(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for outer in step["decoders"] for inner in _flatten(outer)]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet, character -> byte: printable Latin-1 stands for itself, the other bytes are U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _byte_level(alphabet: Mapping[str, int], token: str) -> bytes:
    """An added token with a character outside the alphabet is taken as it is, as `tokenizers` does."""
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def _sentencepiece(replacements: Sequence[tuple[str, str]], byte_fallback: bool, token: str) -> bytes:
    if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(match[1], 16)])
    for old, new in replacements:
        token = token.replace(old, new)
    return token.encode()
