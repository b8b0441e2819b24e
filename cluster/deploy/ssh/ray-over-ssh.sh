#!/bin/bash
# A Ray cluster on hosts that you reach by ssh, the first of which is the head.
#   ray-over-ssh.sh up alice@one two three
#   export RAY_AUTH_TOKEN_PATH=~/.infl/ssh/token
#   infl cluster wait --address http://localhost:8265 --nodes 3
#   infl submit ... --runs /shared/runs --address http://localhost:8265
#   ray-over-ssh.sh down alice@one two three
# BIN is the folder of python and ray on the hosts, HEAD the head's name or address among them.
set -euo pipefail
: "${BIN:=/usr/local/bin}" "${PORT:=6379}" "${DASHBOARD:=8265}"
verb=${1:?up or down} head=${2:?the hosts, the head first}
shift
state=${INFL_HOME:-$HOME/.infl}/ssh
there=.infl/ssh # on every host, below its home

# Starts Ray on a host, in a session of its own, and keeps its process id.
start() {
    local host=$1
    shift
    ssh "$host" "umask 077; mkdir -p $there; cat > $there/token" < "$state/token"
    ssh "$host" "cd $there; umask 077; export PATH=$BIN:\$PATH RAY_USAGE_STATS_ENABLED=0 \
        RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=\$PWD/token; unset RAY_ADDRESS RAY_AUTH_TOKEN; \
        setsid nohup ray start --block --disable-usage-stats $* > ray.log 2>&1 < /dev/null & \
        echo \$! > pid"
}

case $verb in
    up)
        umask 077
        mkdir -p "$state"
        python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$state/token"
        start "$head" --head --port="$PORT" --dashboard-host=127.0.0.1 \
            --dashboard-port="$DASHBOARD" ${HEAD_OPTIONS:-}
        for host in "${@:2}"; do
            start "$host" --address="${HEAD:-${head#*@}}:$PORT" ${NODE_OPTIONS:-}
        done
        # The dashboard listens on the head alone; the tunnel carries the token, encrypted.
        ssh -f -N -M -S "$state/tunnel" -o ExitOnForwardFailure=yes -L "$DASHBOARD:localhost:$DASHBOARD" "$head"
        echo "token in $state/token; dashboard http://localhost:$DASHBOARD"
        ;;
    down)
        for host in "$@"; do
            ssh "$host" "cd $there || exit 0; kill \$(cat pid); rm -f token pid"
        done
        ssh -S "$state/tunnel" -O exit "$head" || true
        rm -f "$state/token"
        ;;
    *)
        echo "up or down, not $verb" >&2
        exit 2
        ;;
esac
