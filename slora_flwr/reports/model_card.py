"""The model card of an export: its README, written from the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from slora_flwr.adapters.loading import Loading
from slora_flwr.common.files import expand
from slora_flwr.common.text import printable
from slora_flwr.config import EMBEDDED_MODELS, RunConfig
from slora_flwr.config.methods import list_methods
from slora_flwr.data.shared_files import FORMATS as FILES
from slora_flwr.reports.chance import tell_chance
from slora_flwr.reports.closing_table import hides_traffic, tell_figures, tell_guarantee
from slora_flwr.reports.figures import FORMS, accuracy_interval
from slora_flwr.tasks.base import Task

# Of metrics, what the Hub calls them.
_METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "f1",
    "perplexity": "perplexity",
    "loss": "loss",
    "exact_match": "exact_match",
    "rouge_l": "rouge",
    "choice_accuracy": "accuracy",
}
_TEMPLATE = """\
---
{{ card.metadata }}
---

# {{ card.shown }}, fine-tuned by {{ card.config.method }}

{{ card.task.describe(card.classes) }}
It was trained by federated learning with
[slora-flwr](https://github.com/slora-flwr/slora-flwr), and loads without it.

## Load it

The code below needs {{ card.packages }}.
{% if not card.repo %}
Run it in the folder of this file.
{% endif %}
{% if card.loading.needs_base and not card.is_public %}
It looks where it runs for the checkpoint,
the folder `{{ card.shown }}`: copy or link it.
{% if card.is_embedded %}
The package slora-flwr has it: `slora_embedded.folder("{{ card.config.model.name }}")`.
{% endif %}
{% endif %}
{% if card.loading.refused %}

PEFT and transformers refuse to load these files in their usual way, because
{{ card.loading.refused }}
{% endif %}

```python
{% if card.repo %}
from huggingface_hub import snapshot_download

folder = snapshot_download("{{ card.repo }}")
{% else %}
folder = "."
{% endif %}
{% if card.loading.needs_base %}
base = {
{% for name, value in card.source.items() %}
    {{ name | tojson }}: {{ value | tojson }},
{% endfor %}
{% if card.quantization %}
    "quantization_config": {
{% for name, value in card.quantization.items() %}
        {{ name | tojson }}: {{ "True" if value is true else value | tojson }},
{% endfor %}
    },
{% endif %}
}
{% endif %}
{{ card.loading.code(card.task) }}```

It answers so:

```python
{{ card.usage }}```

## The run

| | |
|---|---|
| base | `{{ card.shown }}`{{ card.revision }} |
| its weights' digest | `{{ card.digest }}` (BLAKE2b) |
{% if card.quantization %}
| its linear layers | {{ card.held }} |
{% endif %}
| method | {{ card.method }} |
| data | {{ card.data }} |
| clients | {{ card.clients }} |
| rounds | {{ card.rounds }} |
| {{ card.config.data.tested_on }} | {{ card.tested }} |
{% if card.interval %}
| accuracy, 95% interval | {{ card.interval }} |
{% endif %}
{% for name, value in card.traffic.items() %}
| {{ name }} | {{ value }} |
{% endfor %}
| privacy | {{ card.guarantee }} |
{% if card.warning %}

{{ card.warning }}
{% endif %}
"""


@dataclass(frozen=True)
class ModelCard:
    """What a model card tells; nothing in it depends on the clock or the machine.

    Attributes
    ----------
    config : RunConfig
        The run.
    base : str
        The checkpoint: a Hub id, or `./NAME` for a folder.
    digest : str
        BLAKE2b of the checkpoint's weights.
    quantization : Mapping[str, Any]
        What makes transformers pack them as the run did; empty if it did not.
    task : Task
        What it is for.
    usage : str
        Python that has it answer.
    classes : int
        Number of classes.
    which : str
        Which of the run's states this is.
    number : int
        The round after which it was that.
    loading : Loading
        How it is loaded.
    figures : Mapping[str, Any]
        Its figures, named as in summary.json; empty if unknown.
    payload : Sequence[int]
        Payload bytes that clients received and sent. With privacy they are not told.
    privacy : Mapping[str, Any]
        The guarantee; empty without one.
    test_examples : int
        Number of the server's test texts; 0 if it has none.
    repo : str
        The repository of the Hub that it is for; empty if for none.
    """

    config: RunConfig
    base: str
    digest: str
    quantization: Mapping[str, Any]
    task: Task
    usage: str
    classes: int
    which: str
    number: int
    loading: Loading
    figures: Mapping[str, Any]
    payload: Sequence[int]
    privacy: Mapping[str, Any]
    test_examples: int
    repo: str = ""

    @property
    def metadata(self) -> str:
        """What the Hub reads: YAML, without the dashes around it."""
        data = ModelCardData(
            base_model=self.base if self.is_public else None,
            library_name=self.library,
            pipeline_tag=self.task.pipeline,
            tags=["federated-learning", "slora-flwr", self.config.method],
            model_name=self.repo or self.base,
            eval_results=self._results or None,
        )
        return data.to_yaml().rstrip()

    @property
    def _results(self) -> list[EvalResult]:
        """The figures, as the Hub has them."""
        known = {n: v for n in _METRICS if (v := self.figures.get(n)) is not None}
        return [
            EvalResult(
                task_type=self.task.pipeline,
                dataset_type="other" if self._is_own_data else self.config.data.name,
                dataset_name=f"{self.config.data.tested_on} of {self._data_name}",
                metric_type=_METRICS[name],
                metric_value=round(value, 6),
                metric_name=FORMS[name][0],
            )
            for name, value in known.items()
        ]

    @property
    def is_public(self) -> bool:
        """Whether the checkpoint has a public name."""
        return not self.base.startswith("./")

    @property
    def is_embedded(self) -> bool:
        """Whether the package `slora_embedded` has the checkpoint."""
        return self.config.model.name in EMBEDDED_MODELS

    @property
    def shown(self) -> str:
        """The checkpoint's name, for Markdown."""
        return _inline(self.base)

    @property
    def library(self) -> str:
        """The library whose format it has."""
        return "peft" if self.loading.needs_base else "transformers"

    @property
    def packages(self) -> str:
        """The packages that load it."""
        if not self.loading.needs_base:
            return "transformers"
        if self.quantization:
            return "transformers, peft, accelerate and bitsandbytes"
        return "transformers and peft"

    @property
    def held(self) -> str:
        """How the run held the linear layers of the blocks, if it packed them."""
        bits = f"`{self.config.model.quantize}` in the run"
        if self.loading.needs_base:
            return f"{bits}, and as the code above loads them"
        return f"{bits}, unpacked here: rounded, not as the checkpoint has them"

    @property
    def source(self) -> dict[str, str]:
        """The arguments by which transformers finds the checkpoint."""
        model = self.config.model
        source = {"pretrained_model_name_or_path": self.base, "dtype": model.dtype}
        return source | ({"revision": model.revision} if model.revision else {})

    @property
    def revision(self) -> str:
        """The checkpoint's revision, if the config names one."""
        revision = self.config.model.revision
        return f", revision `{_inline(revision)}`" if revision else ""

    @property
    def method(self) -> str:
        """The method, with its line of help and its paper."""
        row = list_methods()[self.config.method]
        paper = f" ({_link(row.paper)})" if row.paper else ""
        return f"`{self.config.method}`: {row.help}{paper}"

    @property
    def data(self) -> str:
        """The training data. A file is told by its name without its folder."""
        if self.config.data.is_own:
            return self._data_name
        return f"`{_inline(self._data_name)}`"

    @property
    def _is_own_data(self) -> bool:
        """Whether it is files of somebody's, not what has a public name."""
        # Where the run was made, it may have been a file that is not here.
        path = expand(self.config.data.name)
        is_path = path.is_absolute() or path.exists() or len(path.parts) > 2
        return self.config.data.is_own or is_path or path.suffix in FILES

    @property
    def _data_name(self) -> str:
        if self.config.data.is_own:
            return "the clients' own files"
        name = self.config.data.name
        return printable(expand(name).name if self._is_own_data else name)

    @property
    def clients(self) -> str:
        """How many clients there were, and how many trained in a round."""
        clients = self.config.clients
        of = f" of {clients.count}" if clients.count else ""
        return f"{clients.per_round}{of} in each round"

    @property
    def rounds(self) -> str:
        """How many rounds there were, and which state after which round this is."""
        return (
            f"{self.config.rounds}; this is the {self.which} state after {self.number}"
        )

    @property
    def tested(self) -> str:
        """The figures on the test texts."""
        return tell_figures(self.figures) if self.figures else "not evaluated"

    @property
    def interval(self) -> str:
        """The interval of a classifier's accuracy on the server's test texts, or ""."""
        accuracy = self.figures.get("accuracy")
        if accuracy is None or not (self.test_examples and self.task.has_classes):
            return ""
        low, high = accuracy_interval(accuracy, self.test_examples)
        return f"{low:.1%} to {high:.1%} (Wilson, {self.test_examples} texts)"

    @property
    def warning(self) -> str:
        """That the accuracy is no better than chance; empty if it is.

        With privacy it is told in files that stay on the server alone.
        """
        if self.privacy or not self.figures:
            return ""
        return tell_chance(self.config, self.figures)

    @property
    def traffic(self) -> dict[str, str]:
        """The payload bytes, told in megabytes."""
        if hides_traffic(self.privacy):
            return {}
        down, up = self.payload
        told = f"{down / 1e6:.2f} MB to clients, {up / 1e6:.2f} MB from them (payload)"
        return {"traffic": told}

    @property
    def guarantee(self) -> str:
        """The guarantee, or that there is none."""
        if not self.privacy:
            return "no guarantee"
        return f"{tell_guarantee(self.privacy)}, over all rounds"

    @cached_property
    def text(self) -> str:
        """The card, Markdown with metadata."""
        environment = Environment(
            autoescape=False,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        return environment.from_string(_TEMPLATE).render(card=self)


def _link(paper: str) -> str:
    """Return a paper's name for Markdown; arXiv's as links, which make tags on the Hub.

    The name is `arXiv NUMBER`, or whatever it is elsewhere.
    """
    archive, _, number = paper.partition(" ")
    if archive != "arXiv":
        return paper
    return f"[{paper}](https://arxiv.org/abs/{number})"


def _inline(text: str) -> str:
    """Return text for Markdown's inline code in a cell of a table."""
    return printable(text).replace("`", "'").replace("|", "/")
