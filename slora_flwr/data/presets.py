"""Known data sets: where the Hub has them, and their columns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A known data set: its Hub id, empty for an embedded one, columns and splits."""

    hub: str
    text: str
    label: str = ""
    test: str = ""
    response: str = ""
    by: str = ""


PRESETS = {
    "stdlib-docs": Preset("", "text", "chapter"),
    "stdlib-summaries": Preset("", "prompt,response", "chapter"),
    "20newsgroups": Preset("SetFit/20_newsgroups", "text", "label_text", "test"),
    "news-category": Preset(
        "heegyu/news-category-dataset", "headline,short_description", "category"
    ),
}

# Those that hold instructions, with the columns in which they do.
DIALOGUES = {
    "stdlib-docs": Preset("", "text", by="chapter"),
    "stdlib-summaries": Preset("", "prompt", response="response", by="chapter"),
    "vicgalle/alpaca-gpt4": Preset(
        "vicgalle/alpaca-gpt4", "instruction,input", response="output"
    ),
    "databricks/databricks-dolly-15k": Preset(
        "databricks/databricks-dolly-15k",
        "instruction,context",
        response="response",
        by="category",
    ),
    "FinGPT/fingpt-sentiment-train": Preset(
        "FinGPT/fingpt-sentiment-train", "instruction,input", response="output"
    ),
    "medalpaca/medical_meadow_medical_flashcards": Preset(
        "medalpaca/medical_meadow_medical_flashcards",
        "instruction,input",
        response="output",
    ),
    "flwrlabs/code-alpaca-20k": Preset(
        "flwrlabs/code-alpaca-20k", "instruction,input", response="output"
    ),
    "20newsgroups": Preset(
        "SetFit/20_newsgroups",
        "text",
        test="test",
        response="label_text",
        by="label_text",
    ),
    "news-category": Preset(
        "heegyu/news-category-dataset",
        "short_description",
        response="headline",
        by="category",
    ),
}
