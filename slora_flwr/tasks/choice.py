"""The task of a run config."""

from slora_flwr.config import RunConfig
from slora_flwr.tasks.base import Task
from slora_flwr.tasks.causal_lm import CausalLM
from slora_flwr.tasks.classification import Classification

# Tasks have no state.
_TASKS: dict[str, Task] = {
    "classification": Classification(),
    "causal-lm": CausalLM(),
}


def find_task(config: RunConfig) -> Task:
    """Return the task that a run config names."""
    return _TASKS[config.task]
