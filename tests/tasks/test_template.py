"""Dialogues as a model reads them: what is learned, what is cut, what is refused."""

import pytest
from transformers import PreTrainedTokenizerFast

from slora_flwr.config import ConfigError, DataConfig
from slora_flwr.data.dialogues import answered, ask, read_messages
from slora_flwr.data.texts import Texts
from slora_flwr.tasks.causal_lm import CausalLM
from slora_flwr.tasks.template import Template, encode
from tests.support.tiny import make_tokenizer

CHAT = (
    "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP]\n{% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)
# As of models that reason: earlier answers lose a part once another question follows.
FORGETFUL = CHAT.replace(
    "{{ m.content }}", "{{ m.content if loop.last else m.content[:2] }}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    made.eos_token = "[SEP]"
    return made


def test_plain_and_alpaca_keep_an_instructions_input(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    dialogue = answered(ask(["Add.", "1 and 2"]), "3")
    assert Template("plain", tokenizer).pieces(dialogue) == [
        ("Add.\n1 and 2\n", False),
        ("3[SEP]", True),
    ]
    [(prompt, _), response] = Template("alpaca", tokenizer).pieces(dialogue)
    assert response == ("3[SEP]", True)
    assert prompt.endswith(
        "request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    assert "paired with an input" in prompt
    [(without, _), _] = Template("alpaca", tokenizer).pieces(answered(ask(["Hi"]), "3"))
    assert "Input" not in without
    assert "paired" not in without


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("plain", "Be terse.\nHi\n"),
        ("alpaca", "Be terse.\n\nBelow is an instruction that describes a task. "),
    ],
)
def test_a_system_message_is_no_task_of_its_own(
    tokenizer: PreTrainedTokenizerFast, name: str, written: str
) -> None:
    given = [{"role": "system", "content": "Be terse."}, *ask(["Hi"])]
    prompt = Template(name, tokenizer).prompt(given)
    assert prompt.startswith(written)
    assert prompt.count("Response:") == (name == "alpaca")


def test_a_chat_learns_every_answer_and_its_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = CHAT
    given = [
        {"role": "system", "content": "w5"},
        {"role": "user", "content": "w6"},
        {"role": "assistant", "content": "w7"},
        {"role": "user", "content": "w8"},
        {"role": "assistant", "content": "w9"},
    ]
    template = Template("auto", tokenizer)
    pieces = template.pieces(read_messages(given))
    assert pieces == [
        ("[CLS] system w5 [SEP]\n[CLS] user w6 [SEP]\n[CLS] assistant ", False),
        # The model is asked to go on after the line end, and never for it.
        ("w7 [SEP]", True),
        ("\n[CLS] user w8 [SEP]\n[CLS] assistant ", False),
        ("w9 [SEP]", True),
    ]
    # What is asked of the model later is what it learned to continue.
    assert template.prompt(read_messages(given)[:2]) == pieces[0][0]
    tokens = encode(pieces, tokenizer, 100)
    learned = [i for i, is_learned in zip(tokens.ids, tokens.learned) if is_learned]  # noqa: B905
    assert tokenizer.decode(learned) == "w7 [SEP] w9 [SEP]"


def test_a_template_that_rewrites_the_past_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = FORGETFUL
    turn = [{"role": "user", "content": "w6"}, {"role": "assistant", "content": "w77"}]
    with pytest.raises(ConfigError, match="changes what precedes a response"):
        Template("chat", tokenizer).pieces(turn * 2)


def test_templates_that_a_tokenizer_cannot_have_are_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ConfigError, match="no chat template; allowed: alpaca, plain"):
        Template("chat", tokenizer)
    with pytest.raises(ConfigError, match="no end token"):
        Template("plain", make_tokenizer())
    assert Template("auto", tokenizer).name == "plain"


@pytest.mark.parametrize(
    ("prompt", "response", "length", "ids", "learned"),
    [
        # All fits.
        ("w5 w6", "w7", 4, [5, 6, 7, 3], [0, 0, 1, 1]),
        # The prompt's middle goes first.
        ("w5 w6 w7 w8", "w9", 5, [5, 6, 8, 9, 3], [0, 0, 0, 1, 1]),
        # Half is the prompt's at least, and the response loses its end.
        ("w5 w6 w7 w8", "w9 w10 w11", 6, [5, 6, 8, 9, 10, 11], [0, 0, 0, 1, 1, 1]),
        # A short prompt stays whole.
        ("w5", "w9 w10 w11 w12", 4, [5, 9, 10, 11], [0, 1, 1, 1]),
    ],
)
def test_what_is_too_long_keeps_a_response(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    response: str,
    length: int,
    ids: list[int],
    learned: list[int],
) -> None:
    dialogue = answered(ask([prompt]), response)
    pieces = Template("plain", tokenizer).pieces(dialogue)
    tokens = encode(pieces, tokenizer, length)
    assert tokens.ids == ids
    assert tokens.learned == list(map(bool, learned))


def test_cut_examples_are_counted(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = CausalLM().encoder(DataConfig(max_length=4), tokenizer)
    short, long = (answered(ask([text]), "w9") for text in ("w5", "w5 w6 w7 w8"))
    texts = Texts(["a", "b", "c"], [""] * 3, dialogues=[short, long, long])
    found = encoder.encode(texts)
    assert "data.max-length is 4: 2 of 3 examples are cut" in caplog.text
    assert found["offsets"].tolist() == [0, 3, 7, 11]
    assert found["learned"].sum() == 6


def test_a_text_of_its_own_is_learned_but_for_its_beginning(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    pieces = Template("plain", tokenizer).pieces(answered([], "w5 w6"))
    tokens = encode(pieces, tokenizer, 10)
    assert tokens.ids == [5, 6, 3]
    assert tokens.learned == [False, True, True]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("hello", "not a list of messages"),
        ([{"role": "user", "content": "hi"}], "no message has the role assistant"),
        ([{"role": "robot", "content": "hi"}], "one of system, user, assistant"),
        ([{"role": "assistant", "content": 3}], "content that is text"),
        (["hi"], "a role, one of"),
    ],
)
def test_what_is_no_conversation_is_refused(given: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_messages(given)
