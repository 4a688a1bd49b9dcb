"""Known data sets: where the Hub has them, and their columns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A known data set: its Hub id, columns and splits."""

    hub: str
    text: str
    label: str
    test: str = ""


PRESETS = {
    "20newsgroups": Preset("SetFit/20_newsgroups", "text", "label_text", "test"),
    "news-category": Preset(
        "heegyu/news-category-dataset", "headline,short_description", "category"
    ),
}
