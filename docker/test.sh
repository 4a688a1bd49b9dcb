#!/usr/bin/env bash
# Builds the image and tests the deployment on a real Docker engine.
#   docker/test.sh            one host, parts a to f
#   docker/test.sh a d        only these parts
#   docker/test.sh network    two hosts behind slow links; needs root and /dev/net/tun
# Needs slora-flwr installed (PYTHON names the interpreter, python3 by default).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! docker info > /dev/null 2>&1; then
    echo "docker/test.sh: there is no Docker engine here"
    exit 77
fi
if docker compose version > /dev/null 2>&1; then
    compose_command=(docker compose)
else
    compose_command=(docker-compose)
fi
python=$(command -v "${PYTHON:-python3}")
PATH=$(dirname "$python"):$PATH
cd "$here/.."

work=$(mktemp -d)
chmod 755 "$work"
project=slora-test-$$
export COMPOSE_PROJECT_NAME=$project SLORA_CERTS=$work/certs SLORA_NODES=$work/nodes
export SLORA_DATA=$work/server SLORA_ASSETS=$work/assets OMP_NUM_THREADS=1
free_port() { "$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])'; }
SLORA_PORT=$(free_port)
export SLORA_PORT FLWR_HOME=$work/flwr FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export SLORA_HOME=$work/slora
jobs=()

compose() { "${compose_command[@]}" -f docker/compose.yml "$@"; }

clean_up() {
    local status=$?
    trap - EXIT
    set +e
    if [ $status -ne 0 ]; then
        docker ps --all --filter "name=^${project}[-_]" --format '{{.Names}} {{.Status}}'
        for name in $(docker ps --all --filter "name=^${project}[-_]" --format '{{.Names}}'); do
            echo "--- $name"
            docker logs --tail 25 "$name" 2>&1 | grep -v uvicorn.access
        done
        for log in "$work"/*.log; do
            echo "--- $log"
            tail -n 25 "$log"
        done
    fi
    for job in "${jobs[@]}"; do kill "$job" 2> /dev/null; done
    for kind in container volume network; do
        # shellcheck disable=SC2046
        docker $kind rm $([ $kind = network ] || echo --force) \
            $(docker $kind ls --quiet $([ $kind != container ] || echo --all) --filter "name=^${project}[-_]") > /dev/null 2>&1
    done
    rm -rf "$work"
    exit $status
}
trap clean_up EXIT
trap 'exit 130' INT TERM

pass() { echo "PASS $*"; }
fail() {
    echo "FAIL $*" >&2
    exit 1
}

# until_true WHAT COMMAND...: waits for as long as a loaded machine may take.
until_true() {
    local deadline=$((SECONDS + 1200)) what=$1
    shift
    until "$@" 2> /dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || fail "$what did not happen in time"
        sleep 0.3
    done
}

# containers SERVICE: prints the ids of a service's containers.
containers() { docker ps --all --quiet --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=$1"; }

healthy() { [ "$(docker inspect --format '{{.State.Health.Status}}' "$(containers "$1")")" = healthy ]; }

# node_container NAME: prints the container that has taken the node's folder.
node_container() {
    local id
    for id in $(containers supernode); do
        # The last line counts: a restarted container may take another folder.
        if [[ $(docker logs "$id" 2>&1 | grep '^node [^ ]*: ' | tail -n 1) == "node $1:"* ]]; then echo "$id"; fi
    done
}

# prepare NAME_OR_IP...: creates data, keys and a server certificate for these names.
prepare() {
    "$python" - "$work" << 'END'
"""Write the files of four nodes and the server from the library's docstrings."""
import csv, hashlib, sys
from pathlib import Path
from slora_flwr.data.stdlib_docs import load

work = Path(sys.argv[1])
rows = zip(*load().values())
rows = sorted(rows, key=lambda row: hashlib.sha256(row[0].encode()).digest())[:700]
# Files differ in size, and each node's lacks a different label.
shares = {"0": rows[:100], "1": rows[100:250], "2": rows[250:500], "3": rows[50:200]}
labels = sorted({label for _, label in rows})
files = {
    work / "nodes" / name / "data" / "train.csv": [r for r in share if r[1] != labels[int(name)]]
    for name, share in shares.items()
}
files[work / "server" / "test.csv"] = rows[500:]
for path, share in files.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *share])
END
    chmod -R a+rX "$work/server" "$work/nodes"
    mkdir -p "$SLORA_ASSETS" "$FLWR_HOME"
    cat > "$FLWR_HOME/config.toml" << END
[superlink]
default = "docker"

[superlink.docker]
address = "localhost:$SLORA_PORT"
root-certificates = "$SLORA_CERTS/ca.crt"
END
    docker/certs.sh ca
    docker/certs.sh server localhost "$@"
    docker/certs.sh node 0 1 2
    for i in 0 1 2; do echo "partition-id=$i data-text=\"text\" data-label=\"label\"" > "$SLORA_NODES/$i/config"; done
}

# One precision for containers and for the engines that they are compared with: the one
# that is chosen by itself may differ, where the environment limits the instructions.
common='model.name="embedded" train.precision="float32" data.name="node" data.max-length=32 clients.count=0 clients.per-round=3 clients.min-nodes=3'

# start LOG CONFIG: sets $run, the run's id, and $stream, the process that shows its log.
start() {
    flwr run . docker --stream --run-config "$common $2" > "$work/$1.log" 2>&1 &
    stream=$!
    jobs+=("$stream")
    until_true "the start of run $1" grep -q "Successfully started run" "$work/$1.log"
    run=$(sed -n 's/.*Successfully started run \([0-9]*\).*/\1/p' "$work/$1.log")
}

status() {
    flwr list --run-id "$run" --format json | "$python" -c 'import json, sys; print(json.load(sys.stdin)["runs"][0]["status"])'
}

ended() { [[ $(status) == finished:* ]]; }

# finish LOG: waits for the run and fetches its directory to $work/LOG.
finish() {
    until_true "the end of run $1" ended
    [ "$(status)" = finished:completed ] || fail "run $1 is $(status)"
    local server path
    server=$(containers serverapp)
    path=$(docker exec "$server" sh -c "echo /state/runs/*-$run")
    docker cp "$server:$path" "$work/$1" > /dev/null
}

events() { docker exec "$(containers serverapp)" sh -c "cat /state/runs/*-$run/events.jsonl" 2> /dev/null; }
figure() { "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$work/$1/summary.json" "$2"; }

up() {
    local since=$SECONDS
    prepare
    compose build superlink > "$work/build.log" 2>&1
    echo "built in $((SECONDS - since)) s"
    compose up --detach --scale supernode=3 > /dev/null 2>&1
    until_true "the SuperLink's health" healthy superlink
    docker/certs.sh register 0 1 2
}

a_run() {
    local since=$SECONDS
    start a 'rounds=4 sparse.rounds=2 data.test="/data/test.csv"'
    finish a
    wait "$stream"
    grep -q "round 4/4" "$work/a.log" || fail "the log was not streamed"
    [ -f "$work/a/adapter/adapter_config.json" ] || fail "there is no adapter"
    pass "a: TLS, node keys, 3 nodes: finished:completed in $((SECONDS - since)) s, accuracy $(figure a accuracy), adapter fetched"
}

b_equals_simulation() {
    slora run --engine inline --nodes 3 -c "$common rounds=4 sparse.rounds=2 \
        data.test=\"$SLORA_DATA/test.csv\" data.train=\"$SLORA_NODES/{}/data/train.csv\" run.dir=\"$work/b\"" > "$work/b.log" 2>&1
    local compared
    compared=$("$python" - "$work/a" "$work/b" << 'END'
import json, sys
from pathlib import Path
from safetensors.numpy import load_file

a, b = map(Path, sys.argv[1:])
one, other = (load_file(p / "checkpoints" / "last.safetensors") for p in (a, b))
assert one.keys() == other.keys(), one.keys() ^ other.keys()
apart = max(float(abs(one[k].astype("f8") - other[k]).max()) for k in one)
accuracies = [json.loads((p / "summary.json").read_text())["accuracy"] for p in (a, b)]
print(f"largest difference of the state {apart:.1e}, accuracies {accuracies[0]:.6f} and {accuracies[1]:.6f}")
assert apart <= 1e-5 and abs(accuracies[0] - accuracies[1]) <= 1e-5
END
    ) || fail "b: $compared"
    pass "b: $compared"
}

# refused NAME EXPECTED_LINE DOCKER_RUN_ARGUMENTS...
refused() {
    local log=$work/refused-$1.log expected=$2 status=0
    shift 2
    timeout 600 docker run --rm --name "$project-refused" --network "${project}_default" \
        --volume "$work/other:/other:ro" --volume "$SLORA_CERTS/ca.crt:/ca.crt:ro" slora-flwr "$@" > "$log" 2>&1 || status=$?
    docker rm --force "$project-refused" > /dev/null 2>&1 || true
    [ $status -ne 0 ] || fail "c: $* was not refused"
    grep -E -o -m 1 "$expected" "$log" || fail "c: $log lacks '$expected'"
}

c_refusals() {
    SLORA_NODES=$work/other SLORA_CERTS=$work/other/certs docker/certs.sh node stranger
    SLORA_CERTS=$work/other/certs docker/certs.sh ca
    chmod 755 "$work/other"
    local supernode=(flower-supernode --superlink superlink:8000)
    local unknown wrong plain revoked
    unknown=$(refused key '.code: 2004.*' "${supernode[@]}" --root-certificates /ca.crt --auth-supernode-private-key /other/stranger/key)
    wrong=$(refused ca 'certificate verify failed.*' "${supernode[@]}" --root-certificates /other/certs/ca.crt --auth-supernode-private-key /other/stranger/key)
    plain=$(refused plain 'Server disconnected.*|Connection reset by peer' "${supernode[@]}" --insecure --max-retries 1)
    ln -s key.pub "$work/other/stranger/stranger.pub"
    docker/certs.sh register "$work/other/stranger/stranger.pub"
    docker/certs.sh revoke stranger > /dev/null
    revoked=$(refused revoked '.code: 2004.*' "${supernode[@]}" --root-certificates /ca.crt --auth-supernode-private-key /other/stranger/key)
    pass "c: unregistered key: $unknown; other CA: $wrong; plaintext: $plain; revoked: $revoked"
}

# rounds: prints a line per finished round: its number and the number of replies.
rounds() { events | "$python" -c 'import json, sys
for event in map(json.loads, sys.stdin):
    if event["event"] == "round":
        print(event["round"], event["replied"])'; }
replied() { [ "$(rounds | awk -v round="$1" '$1 == round {print $2}')" = "$2" ]; }
in_round() { docker logs "$1" 2>&1 | tail -n 8 | grep "ROUND $2\]" > /dev/null; }
full_round_after() { rounds | awk -v round="$1" '$1 > round && $2 == 3 {found = 1} END {exit !found}'; }

d_failures() {
    # A node is killed in the middle of round 2.
    local node since closed last total=14
    start d 'method="lora" rounds='$total' data.test="/data/test.csv"'
    until_true "round 1" replied 1 3
    node=$(node_container 2)
    until_true "round 2 on node 2" in_round "$node" 2
    docker kill "$node" > /dev/null
    since=$SECONDS
    until_true "the end of round 2 with two replies" replied 2 2
    closed=$((SECONDS - since))
    events | grep '"event": "failure"' > /dev/null || fail "d: no failure was noted"
    docker start "$node" > /dev/null
    until_true "a round with all three again" full_round_after 2
    # The SuperLink is restarted in the middle of the run.
    last=$(rounds | tail -n 1 | cut -d ' ' -f 1)
    events > "$work/before.jsonl"
    [ "$last" -lt $((total - 2)) ] || fail "d: the run is too short for this test"
    since=$SECONDS
    docker restart "$(containers superlink)" > /dev/null
    until_true "a round after the restart" replied $((last + 2)) 3
    local back=$((SECONDS - since))
    finish d
    head -c "$(wc -c < "$work/before.jsonl")" "$work/d/events.jsonl" | cmp - "$work/before.jsonl" || fail "d: events were lost"
    [ "$(rounds | wc -l)" = $total ] || fail "d: rounds were lost"
    [ -f "$work/d/adapter/adapter_config.json" ] || fail "d: there is no adapter"
    pass "d: node killed: round closed with 2 of 3 after $closed s, back in round $(rounds | awk '$1 > 2 && $2 == 3 {print $1; exit}'); SuperLink restarted after round $last: round $((last + 2)) done after $back s, finished:completed, $total rounds"
}

# counters: prints the received and sent bytes and packets of each node's interface.
counters() {
    local name
    for name in 0 1 2; do
        # shellcheck disable=SC2016
        docker exec "$(node_container $name)" sh -c 'cd /sys/class/net/eth0/statistics && echo $(cat rx_bytes tx_bytes rx_packets tx_packets)'
    done
}

e_bytes() {
    # What nodes send and receive while nothing runs: polls and heartbeats.
    counters > "$work/idle-before"
    sleep 10
    counters > "$work/idle-after"
    local since=$SECONDS
    start e 'method="fft" rounds=3 data.test="/data/test.csv"'
    counters > "$work/before"
    finish e
    counters > "$work/after"
    local took=$((SECONDS - since + 1))
    local compared
    compared=$("$python" - "$work" "$took" << 'END'
import csv, sys
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

# Bytes other than messages: the app's bundle, which Flower does not compress, with 40 kB
# of what else a run begins with; what each round needs besides; and polls and heartbeats, by the second.
ONCE, A_ROUND = len(build_fab_from_disk(Path.cwd())) + 40_000, 20_000
# A packet's Ethernet, IP and TCP headers. How many packets there are, and how many of
# them only acknowledge others, is the kernel's affair.
HEADERS = 14 + 20 + 32
work, seconds = Path(sys.argv[1]), int(sys.argv[2])
names = ("before", "after", "idle-before", "idle-after")
before, after, rested, idled = ([line.split() for line in (work / name).read_text().splitlines()] for name in names)
ledger = list(csv.DictReader((work / "e" / "ledger.csv").open()))
for i, way in enumerate(("down", "up")):
    told = sum(int(row["message_bytes"]) for row in ledger if row["direction"] == way) / 3
    wire = [int(b[i]) - int(a[i]) for a, b in zip(before, after)]
    packets = [int(b[i + 2]) - int(a[i + 2]) for a, b in zip(before, after)]
    within = [w - HEADERS * count for w, count in zip(wire, packets)]
    idle = max(int(b[i]) - int(a[i]) for a, b in zip(rested, idled)) * seconds / 10
    known = 3 * A_ROUND + idle + (ONCE if way == "down" else 0)
    counted = sum(int(row["wire_bytes"] or 0) for row in ledger if row["direction"] == way) / 3
    # Counted from a node's first reply to its third: two of three rounds, not the app.
    if not 0.6 * told <= counted <= 0.7 * max(wire) + known:
        sys.exit(f"{way}: the ledger counts {counted} bytes on the wire of {wire}")
    print(f"{way}: ledger {told / 1e6:.3f} MB a node, wire {min(wire) / 1e6:.3f} to {max(wire) / 1e6:.3f} MB, {max(within) / 1e6:.3f} without headers, idle {idle / 1e6:.3f} MB;", end=" ")
    # Of one node packets may have been sent again, of all three hardly.
    if not all(told <= w <= 1.05 * told + known for w in within) or min(within) > 1.01 * told + known:
        sys.exit(1)
END
    ) || fail "e: $compared"
    pass "e: fft, 3 rounds: $compared beside headers at most 1% (5% with what was sent again) + 20 kB a round + the app once"
}

# online COUNT: whether so many SuperNodes are online according to Flower.
online() {
    [ "$(flwr supernode list docker --format json | "$python" -c 'import json, sys
print(sum(node["status"] == "online" for node in json.load(sys.stdin)["nodes"]))')" = "$1" ]
}

# now STAGE: has nodes wait there; see stages/sitecustomize.py.
now() { echo "$1" > "$SLORA_STAGES/new" && mv "$SLORA_STAGES/new" "$SLORA_STAGES/now"; }
said() { docker logs "$1" 2>&1 | grep -F "$2" > /dev/null; }

f_secure() {
    # Nodes that may be told to wait, a fourth among them; of four that hold a secret,
    # three are needed.
    export SLORA_STAGES=$work/stages
    mkdir "$SLORA_STAGES"
    cp docker/stages/*.py "$SLORA_STAGES"
    chmod 755 "$SLORA_STAGES"
    now nowhere
    docker/certs.sh node 3
    echo "partition-id=3 data-text=\"text\" data-label=\"label\"" > "$SLORA_NODES/3/config"
    docker/certs.sh register 3
    # Else nodes that are about to be replaced would count as online.
    compose stop supernode > /dev/null 2>&1
    until_true "all nodes offline" online 0
    compose -f docker/stages/compose.yml up --detach --scale supernode=4 > /dev/null 2>&1
    common=${common//=3/=4}
    local config='method="slora" rounds=3 sparse.rounds=2 upload.dtype="int8" secure.aggregation=true secure.clip=20.0 clients.max-weight=50 clients.min-replies=3 data.test="/data/test.csv"'
    local lost=0 stage when kind node name compared told=()
    for stage in "before query.introduce" "before train" "after train" "before query.tell"; do
        until_true "four nodes online" online 4
        read -r when kind <<< "$stage"
        name=f-$when-$kind
        node=$(node_container $lost)
        now "$stage 2"
        start "$name" "$config"
        until_true "node $lost $stage of round 2" said "$node" "waits $stage 2"
        docker kill "$node" > /dev/null
        now nowhere
        finish "$name"
        until_true "node $lost offline" online 3
        docker start "$node" > /dev/null
        mkdir --mode 777 "$work/$name/inline"
        docker run --rm --name "$project-inline" --network none --env OMP_NUM_THREADS \
            --volume "$SLORA_NODES:/nodes:ro" --volume "$SLORA_DATA:/data:ro" \
            --volume "$SLORA_STAGES:/stages:ro" --volume "$work/$name/inline:/inline" slora-flwr \
            python3 /stages/lose.py 4 $lost "$kind" 2 "$common" "$config" \
            'data.train="/nodes/{}/data/train.csv" run.dir="/inline/run"' > "$work/$name-inline.log" 2>&1
        compared=$("$python" - "$work/$name" "$work/$name/inline/run" << 'END'
import json, sys
from pathlib import Path
from safetensors.numpy import load_file

runs = [*map(Path, sys.argv[1:])]
one, other = ({p.name: load_file(p) for p in (run / "checkpoints").glob("*.safetensors")} for run in runs)
assert one.keys() == other.keys(), one.keys() ^ other.keys()
for name, state in one.items():
    assert state.keys() == other[name].keys(), name
    for key, value in state.items():
        assert value.tobytes() == other[name][key].tobytes(), f"{name}: {key} differs"
rounds, others = ([e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] == "round"] for run in runs)
replied = [done["replied"] for done in rounds]
assert replied == [done["replied"] for done in others], replied
losses = [done["train_loss"] for done in rounds]
assert losses == [done["train_loss"] for done in others], losses
summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
assert summaries[0]["accuracy"] == summaries[1]["accuracy"]
print(f"{len(one)} states equal, replies", *replied)
END
        ) || fail "f: $stage: $compared"
        echo "f: node $lost killed $stage of round 2: $compared"
        told+=("$stage: $compared;")
        lost=$((lost + 1))
    done
    pass "f: secure sums, TLS, 4 nodes, one killed in round 2: ${told[*]} as on the inline engine, bit for bit"
}

# Server and two nodes in different compose projects, connected only by link.py.
network() {
    local node method
    SLORA_GATE=$(free_port)
    export SLORA_GATE
    prepare 10.99.0.1 10.99.1.1
    compose build superlink > "$work/build.log" 2>&1
    "${compose_command[@]}" -f docker/compose.server.yml up --detach > /dev/null 2>&1
    until_true "the gate's health" healthy gate
    docker/certs.sh register 0 1
    # The gate must not let the command line through.
    printf '\n[superlink.gate]\naddress = "localhost:%s"\nroot-certificates = "%s"\n' "$SLORA_GATE" "$SLORA_CERTS/ca.crt" >> "$FLWR_HOME/config.toml"
    ! flwr supernode list gate > "$work/gate.log" 2>&1 || fail "the gate let the command line through"
    pass "network: the command line at the gate: $(grep -o "Client error [^f]*" "$work/gate.log")"
    for node in 0 1; do
        SLORA_NODE=$node SLORA_DATA=$SLORA_NODES/$node/data SLORA_CA=$SLORA_CERTS/ca.crt \
            SLORA_NODE_CONFIG="partition-id=$node" SLORA_TEXT=text SLORA_LABEL=label SLORA_SUPERLINK=10.99.$node.1:8443 \
            "${compose_command[@]}" -p "$project-$node" -f docker/compose.client.yml up --detach > /dev/null 2>&1
        "$python" docker/link.py "$(pid "$project" gate)" "10.99.$node.1" "$(pid "$project-$node" supernode)" "10.99.$node.2" \
            --mbit 100 --ms 25 > "$work/link$node.log" 2>&1 &
        jobs+=("$!")
    done
    common=${common//=3/=2}
    for method in slora lora fft; do
        start "$method" "method=\"$method\" rounds=3 sparse.rounds=1 data.test=\"/data/test.csv\""
        finish "$method"
        pass "network: $method at 100 Mbit/s and 50 ms: $("$python" - "$work/$method" << 'END'
import csv, json, sys
from pathlib import Path

folder = Path(sys.argv[1])
events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
ends = [(e["phase"], e["seconds"]) for e in events if e["event"] == "round"]
took = [f"{phase} {b - a:.1f}" for (_, a), (phase, b) in zip(ends, ends[1:])]
sent = sum(int(row["message_bytes"]) for row in csv.DictReader((folder / "ledger.csv").open()))
print("seconds of rounds 2 and 3:", ", ".join(took) + ";", f"{sent / 2e6:.2f} MB a node in all")
END
        )"
    done
}

pid() {
    docker inspect --format '{{.State.Pid}}' "$(docker ps --quiet --filter "label=com.docker.compose.project=$1" --filter "label=com.docker.compose.service=$2")"
}

[ $# -gt 0 ] || set -- a b c d e f
[ "$1" = network ] || up
for part; do
    case $part in
        a) a_run ;;
        b) b_equals_simulation ;;
        c) c_refusals ;;
        d) d_failures ;;
        e) e_bytes ;;
        f) f_secure ;;
        network) network ;;
        *) fail "there is no part $part" ;;
    esac
done
