"""Run config values of the command line, and the names that other libraries have."""

from dataclasses import fields
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from peft import LoraConfig
from transformers import TrainingArguments

from slora_flwr.config import ConfigError, list_keys, parse
from slora_flwr.config.arguments import merge_arguments
from slora_flwr.config.other_names import FLOWER, PEFT, SCRIPTS, TRANSFORMERS

KEYS = {key.name for key in list_keys()}


def test_files_and_pairs_merge_from_left_to_right(tmp_path: Path) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text('method = "lora"\nrounds = 3\n[lora]\nrank = 4\nalpha = 8.0\n')
    other.write_text("[lora]\nrank = 2\n")
    given = [str(one), "rounds=5 seed=1", str(other), "lora.alpha=4.0"]
    expected = {"method": "lora", "rounds": 5, "seed": 1}
    expected |= {"lora.rank": 2, "lora.alpha": 4.0}
    assert merge_arguments(given) == expected
    assert merge_arguments([given[1], given[0]])["rounds"] == 3
    assert merge_arguments([f"rounds=9 {one} seed=2"])["rounds"] == 3
    assert merge_arguments([]) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("method=lora", "lora"),
        ("data.name=/x/y.csv", "/x/y.csv"),
        ("data.name=/x/study.toml", "/x/study.toml"),
        (f"data.labels={'x' * 300}.toml", f"{'x' * 300}.toml"),
        ("lora.targets=query,value", "query,value"),
        ("model.name=0123", "0123"),
        ("data.text=1", "1"),
        ("data.label=true", "true"),
        ("data.name=2026-01-01", "2026-01-01"),
        ("data.name='/x/my file.csv'", "/x/my file.csv"),
        ('data.name="/x/my \\"file\\".csv"', '/x/my "file".csv'),
        ("data.name=/it's/x", "/it's/x"),
        ("run.dir=", ""),
        ("run.dir=''", ""),
        ("data.name=a=b", "a=b"),
        ("rounds=12", 12),
        ("rounds=1_000", 1000),
        ("lora.lr=1e-3", 1e-3),
        ("upload.feedback=false", False),
    ],
)
def test_a_string_needs_no_quotes_unless_it_holds_spaces(
    text: str, value: object
) -> None:
    [found] = merge_arguments([text]).values()
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rounds=twelve", "rounds is 'twelve'; allowed: a"),
        ("rounds=True", "rounds is 'True'; allowed: a"),
        ("rounds=[1]", "allowed: a"),
        ("upload.feedback=yes", "upload.feedback is 'yes'; allowed: true or false"),
        ("method lora", "-c is 'method lora'; allowed: key=value"),
        ("rounds=3 lora", "-c is 'rounds=3 lora'; allowed: key=value"),
        ("rounds = 3", "-c is 'rounds = 3'; allowed: key=value"),
        ("data.name='a'b", "data.name is"),
        ("absent.toml", "absent.toml cannot be read (No such file or directory)"),
        ("rounds=3 absent.toml", "absent.toml cannot be read"),
        ("~nobody-has-it/x.toml", "~nobody-has-it/x.toml cannot be read"),
    ],
)
def test_what_is_no_value_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(merge_arguments([text]))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("rounds = 3\nmethod = lora\n")
    with pytest.raises(ConfigError) as caught:
        merge_arguments([str(path)])
    told = f"{path} cannot be read (Invalid value (at line 2, column"
    assert str(caught.value).startswith(told)
    path.write_bytes(b"method = '\xff'")
    with pytest.raises(ConfigError, match="cannot be read"):
        merge_arguments([str(path)])


def test_what_flower_accepts_means_the_same() -> None:
    text = "method='lora' rounds=5 clients.alpha=0.5 data.name=\"/x/y\" run.dir='/a b'"
    assert merge_arguments([text]) == parse_config_args([text])


# Other libraries' names


def test_the_names_are_those_of_peft_and_transformers() -> None:
    assert PEFT.keys() <= {field.name for field in fields(LoraConfig)}
    assert TRANSFORMERS.keys() <= {field.name for field in fields(TrainingArguments)}
    for names in (PEFT, TRANSFORMERS, SCRIPTS, FLOWER):
        assert {*names.values()} <= KEYS


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lora.r", "lora.rank"),
        ("r", "lora.rank"),
        ("lora_alpha", "lora.alpha"),
        ("lora.target_modules", "lora.targets"),
        ("target-modules", "lora.targets"),
        ("learning_rate", "train.lr"),
        ("num_train_epochs", "train.epochs"),
        ("per_device_train_batch_size", "train.batch-size"),
        ("num-server-rounds", "rounds"),
        ("train.batch_size", "train.batch-size"),
        ("data.max_length", "data.max-length"),
        ("lora.rnk", "lora.rank"),
    ],
)
def test_another_librarys_name_is_answered_with_ours(given: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(merge_arguments([f"{given}=8"]))
    told = f"{given} is not a run config key; did you mean {meant}?"
    assert str(caught.value) == told
