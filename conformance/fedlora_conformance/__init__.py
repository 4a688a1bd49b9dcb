"""Conformance vectors for aggregators of federated LoRA, and their runner."""

from fedlora_conformance.averaging import average
from fedlora_conformance.run import Answer, Case, check, judge, load

__all__ = ["Answer", "Case", "average", "check", "judge", "load"]
