#!/usr/bin/env bash
# Every benchmark of RESULTS.md, one after the other: benchmarks/run.sh [FOLDER]
# Writes a JSON file each. With MiniLM below $SLORA_ASSETS/models also those on it.
# About an hour on two cores; leave the machine alone meanwhile. Not among them is
# peers/compare.py, which installs other frameworks and writes a page of its own.
set -euo pipefail
mkdir -p "${1:-results}"
out=$(realpath "${1:-results}")
cd "$(dirname "$0")"
export HF_HUB_OFFLINE=1

measure() { # NAME SCRIPT OPTIONS...
    local name=$1 script=$2
    shift 2
    echo "== $name: $script $*"
    python "$script" "$@" --json >"$out/$name.json"
}

measure step-64 step.py
measure step-32 step.py --length 32 --model minilm-l6
measure masked-gradient masked_gradient.py
measure workers workers.py
measure handoff handoff.py
measure memory memory.py
measure aggregation aggregation.py
measure codec codec.py
measure secure-sums secure_sums.py
measure rounds-embedded rounds.py
minilm=minilm-l6-h384-uncased
if [ -d "${SLORA_ASSETS:-/nowhere}/models/$minilm" ]; then
    measure rounds-minilm rounds.py --model "$minilm"
    measure private-step private_step.py --model "$minilm"
    measure rounds-minilm-8 rounds.py --model "$minilm" --examples 8
fi
measure llm-example llm_example.py
measure scale scale.py
