#!/usr/bin/env bash
# Starts a SuperNode as the first node below /nodes that no other container has taken.
# supernode.sh ARGUMENTS_OF_FLOWER_SUPERNODE...
set -euo pipefail

for folder in /nodes/*/; do
    folder=${folder%/}
    [ -r "$folder/key" ] || continue
    # The SuperNode inherits this descriptor and so holds the lock until it ends.
    exec 9< "$folder/key"
    flock --nonblock 9 || continue
    config="name=\"${folder##*/}\" data-path=\"$folder/data\" wire-interface=\"eth0\""
    [ ! -f "$folder/config" ] || config+=" $(tr '\n' ' ' < "$folder/config")"
    policy=$folder/policy/policy.toml
    [ ! -f "$policy" ] || config+=" policy=\"$policy\""
    echo "node ${folder##*/}: $config"
    # shellcheck disable=SC2093
    exec python3 -m slora_flwr.client.supernode "$@" \
        --auth-supernode-private-key "$folder/key" --node-config "$config"
done
echo "every folder below /nodes with a readable key is taken" >&2
exit 1
