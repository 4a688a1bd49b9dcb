#!/usr/bin/env bash
# Keys and certificates. Needs openssl, ssh-keygen and docker.
#
#   certs.sh ca                      create the certificate authority, once, on the server
#   certs.sh server NAME_OR_IP...    create the server's certificate for its host names
#   certs.sh node NAME...            create a node's key pair, on the node's host
#   certs.sh register NAME|FILE...   admit nodes by their public keys, NAME.pub
#   certs.sh revoke NAME...          revoke nodes
#   certs.sh list                    list the nodes known to the SuperLink
#
# SLORA_CERTS (docker/certs): ca.key stays with the server's operator and goes into no
# container; ca.crt is for everybody. SLORA_NODES (docker/nodes): NAME/key never leaves
# the node's host; NAME/key.pub goes to the server. COMPOSE_PROJECT_NAME selects the
# SuperLink if this host has several. SLORA_UID is whose the private keys become: the
# image's user, 10001, by default.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
certs=${SLORA_CERTS:-$here/certs}
nodes=${SLORA_NODES:-$here/nodes}
image=${SLORA_IMAGE:-slora-flwr}
uid=${SLORA_UID:-10001}
umask 077

die() {
    echo "certs.sh: $*" >&2
    exit 1
}

new() {
    local file
    for file; do
        [ ! -e "$file" ] || die "$file exists; move it away to replace it"
    done
}

# Makes a file readable only by its user, that of the containers by default. Whoever may run containers can
# change a file's owner without being root.
give() {
    chmod 400 "$1"
    chown "$uid" "$1" 2> /dev/null || docker run --rm --user 0 --network none \
        --volume "$(cd "$(dirname "$1")" && pwd):/folder" "$image" chown "$uid" "/folder/${1##*/}"
}

ca() {
    mkdir -p "$certs"
    chmod 755 "$certs"
    new "$certs/ca.key" "$certs/ca.crt" "$certs/superexec"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 3650 \
        -subj "/CN=slora-flwr CA" -addext keyUsage=critical,keyCertSign,cRLSign -keyout "$certs/ca.key" -out "$certs/ca.crt" 2> /dev/null
    chmod 644 "$certs/ca.crt"
    # The secret by which the SuperLink knows the ServerApp's container.
    openssl rand -hex 32 > "$certs/superexec"
    give "$certs/superexec"
}

server() {
    [ $# -gt 0 ] || die "server needs the names or addresses by which nodes reach it"
    [ -f "$certs/ca.key" ] || die "$certs/ca.key does not exist; run certs.sh ca first"
    new "$certs/server.key" "$certs/server.crt"
    local made
    made=$(mktemp -d)
    # The first three names are for the server's own containers.
    local name names=DNS:localhost,DNS:superlink,IP:127.0.0.1
    for name; do
        if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then
            names+=,IP:$name
        else
            names+=,DNS:$name
        fi
    done
    printf '%s\n' "subjectAltName=$names" extendedKeyUsage=serverAuth \
        subjectKeyIdentifier=hash authorityKeyIdentifier=keyid > "$made/extensions"
    # Both files appear, or neither.
    if ! { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=$1" \
            -keyout "$made/server.key" \
            | openssl x509 -req -CA "$certs/ca.crt" -CAkey "$certs/ca.key" -days 825 \
                -set_serial "0x$(openssl rand -hex 16)" -out "$made/server.crt" \
                -extfile "$made/extensions"; } 2> "$made/log"; then
        cat "$made/log" >&2
        rm -r "$made"
        die "no certificate for $*; allowed: host names and IP addresses"
    fi
    mv "$made/server.key" "$made/server.crt" "$certs"
    rm -r "$made"
    chmod 644 "$certs/server.crt"
    give "$certs/server.key"
}

node() {
    local name
    for name; do
        new "$nodes/$name/key"
        mkdir -p "$nodes/$name/data"
        chmod 755 "$nodes" "$nodes/$name" "$nodes/$name/data"
        ssh-keygen -q -t ecdsa -b 384 -N "" -C "$name" -f "$nodes/$name/key"
        chmod 644 "$nodes/$name/key.pub"
        give "$nodes/$name/key"
    done
}

# Flower's command line inside the SuperLink's container, so that no host needs Python.
flwr() {
    local container left=60
    container=$(docker ps --quiet --filter label=com.docker.compose.service=superlink \
        ${COMPOSE_PROJECT_NAME:+--filter label=com.docker.compose.project=$COMPOSE_PROJECT_NAME})
    [[ $container =~ ^[0-9a-f]+$ ]] || die "there must be one running SuperLink on this host"
    until [ "$(docker inspect --format '{{.State.Health.Status}}' "$container")" = healthy ]; do
        [ $((left--)) -gt 0 ] || die "the SuperLink is not healthy after a minute"
        sleep 1
    done
    docker exec --interactive "$container" "$@"
}

register() {
    local name file id answer
    mkdir -p "$certs/registered"
    for name; do
        file=$nodes/$name/key.pub
        if [ -f "$name" ]; then
            file=$name name=$(basename "$name" .pub)
        fi
        [ -f "$file" ] || die "$file does not exist; give a node's name or a file NAME.pub"
        new "$certs/registered/$name"
        # shellcheck disable=SC2016
        answer=$(flwr sh -c 'f=$(mktemp) && cat > "$f" && flwr supernode register "$f" local --name "$1" --format json' \
            - "$name" < "$file") || true
        id=$(sed -n 's/.*"node-id": *"\{0,1\}\([0-9]*\).*/\1/p' <<< "$answer")
        [ -n "$id" ] || die "$name was not registered: $answer"
        echo "$id" > "$certs/registered/$name"
        echo "$name is node $id"
    done
}

revoke() {
    local name
    for name; do
        [ -f "$certs/registered/$name" ] || die "$certs/registered/$name does not exist"
        flwr flwr supernode unregister "$(cat "$certs/registered/$name")" local < /dev/null
        rm "$certs/registered/$name"
    done
}

list() {
    flwr flwr supernode list local < /dev/null
    (cd "$certs" && grep -rH . registered | sed 's|.*/||; s|:| is node |') || true
}

case ${1:-} in
    ca | server | node | register | revoke | list) "$@" ;;
    *)
        sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
