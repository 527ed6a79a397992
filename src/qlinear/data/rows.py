"""What a row of a data set means: the fields in which text is commonly kept, and a document made of them.

    text                                   the text
    messages                               a conversation: role and content, `tools` beside it
    conversations                          the same, or ShareGPT's: from and value, `system` beside it
    prompt, completion                     the two texts together, or two conversations
    instruction, input, output             Alpaca's: a conversation of a question and an answer

A blank field counts as missing. Content may be given in parts, of which only text can be read.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ..errors import DataError

Conversation = Sequence[Mapping[str, Any]]

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
_ANSWERS = ("completion", "response", "output")
FIELDS = (
    "text",
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "instruction",
    "input",
    *_ANSWERS,
    "tools",
    "system",
)


class Messages(list[Mapping[str, Any]]):
    """A conversation of a row. tools: for the chat template. place: for errors. plain: its text without a template."""

    def __init__(
        self, messages: Conversation, place: str, tools: list[Any] | None = None, plain: str | None = None
    ) -> None:
        super().__init__({**m, "content": _content(m.get("content"), place)} for m in messages)
        self.place, self.tools, self.plain = place, tools, plain


def document(row: Any, place: str) -> "str | Messages":
    """The text or the conversation of a row. Raises DataError, naming the place, where it has neither."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place}: a row must be an object with `text` or `messages`; got {type(row).__name__}"
        )
    row = {key: value for key, value in row.items() if not _is_blank(value)} | {"": row}
    if isinstance(text := row.get("text"), str):
        return text
    for field in ("messages", "conversations", "conversation"):
        if field in row:
            return Messages(
                _turns(row[field], row.get("system"), field, place), place, _tools(row.get("tools"), place)
            )
    answer = next((row[key] for key in _ANSWERS if key in row), None)
    if "prompt" in row:
        return _completed(row["prompt"], answer, place)
    if isinstance(row.get("instruction"), str):
        question = "\n\n".join(
            part for part in (row["instruction"], row.get("input")) if isinstance(part, str)
        )
        turns = [{"role": "user", "content": question}]
        turns += [{"role": "assistant", "content": answer}] if isinstance(answer, str) else []
        return Messages(turns, place, plain="\n\n".join(str(turn["content"]) for turn in turns))
    if isinstance(row[""].get("text"), str):
        return ""
    names = ", ".join(map(str, row[""])) or "none"
    raise DataError(
        f"{place}: neither a string `text` nor a list `messages` of role and content, nor another known field; "
        f"its fields: {names[:200]}"
    )


def is_conversation(value: Any) -> TypeGuard[Conversation]:
    """Whether a value is a list of at least one message, each with a role."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return False
    return bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _is_blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _turns(value: Any, system: Any, field: str, place: str) -> Conversation:
    """Messages with role and content, from those or from ShareGPT's. Raises DataError."""
    turns = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None
    if turns is not None and all(
        isinstance(turn, Mapping) and "from" in turn and "value" in turn for turn in turns
    ):
        turns = [{"role": _ROLES.get(str(t["from"]), str(t["from"])), "content": t["value"]} for t in turns]
    if not is_conversation(turns):
        raise DataError(
            f"{place}: `{field}` must be a list of messages with role and content "
            "(or from and value): mend or leave out the row"
        )
    has_system = any(turn.get("role") == "system" for turn in turns)
    return (
        [{"role": "system", "content": system}, *turns]
        if isinstance(system, str) and not has_system
        else turns
    )


def _completed(prompt: Any, answer: Any, place: str) -> "str | Messages":
    """A prompt and its completion: texts, or conversations."""
    if isinstance(prompt, str) and (answer is None or isinstance(answer, str)):
        return prompt + (answer or "")
    if is_conversation(prompt) and (answer is None or is_conversation(answer)):
        return Messages([*prompt, *(answer or ())], place)
    raise DataError(f"{place}: `prompt` and its completion must both be texts, or both be lists of messages")


def _content(content: Any, place: str) -> str:
    """The text of a message's content. Raises DataError where a part of it is no text."""
    if content is None:
        return ""
    parts = [content] if isinstance(content, str | Mapping) or not isinstance(content, Sequence) else content
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    for part, text in zip(parts, texts, strict=True):
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(
                f"{place}: content has a part of type {kind!r}, and only text can be read: leave the row out"
            )
    return "".join(map(str, texts))


def _tools(tools: Any, place: str) -> list[Any] | None:
    """The descriptions of tools, which may be JSON in a string. Raises DataError."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise DataError(f"{place}: `tools` is a string that is no JSON: give a list of objects") from None
    if tools is not None and not (
        isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise DataError(f"{place}: `tools` must be a list of objects; got {type(tools).__name__}")
    return [dict(tool) for tool in tools] if tools else None
