#!/usr/bin/env bash
# A real Ray cluster of several nodes on this machine, with token authentication: a head without CPUs, and workers, each a raylet of its own.
#   cluster/local.sh start [NODES] [CPUS]    2 nodes with an even share of this machine's CPUs each, if not said otherwise
#   cluster/local.sh submit COMMAND...       ray job submit with the token, from the current directory
#   cluster/local.sh stop
# Token, logs and process ids lie in $TRANSLORA_LOCAL (/tmp/translora-local-UID), Ray's own files in its ray/; the path must be short, as it becomes part of
# the names of sockets. Only processes started here are stopped.
set -euo pipefail
umask 077
STATE=${TRANSLORA_LOCAL:-/tmp/translora-local-$(id -u)}
ROOT=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$ROOT/.venv/bin/ray" ] && PATH=$ROOT/.venv/bin:$PATH
export PATH RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/token
export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-600} # a job that was stopped commits what is under way
unset RAY_AUTH_TOKEN RAY_ADDRESS RAY_API_SERVER_ADDRESS

fail() { echo "local.sh: $1" >&2; exit 2; }

# When a process began, which no later process with the same id shares.
began() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

# Starts `ray start $@` in the background and notes its process.
node() {
  local name=$1
  shift
  nohup ray start --block --min-worker-port=0 --max-worker-port=0 --object-store-memory=200000000 "$@" \
    >"$STATE/$name.log" 2>&1 </dev/null &
  last=$!
  echo "$last $(began "$last")" >>"$STATE/pids"
}

start() {
  local nodes=${1:-2} cpus ports
  cpus=${2:-$(($(nproc) / nodes > 0 ? $(nproc) / nodes : 1))}
  command -v ray >/dev/null || fail "there is no ray command: run make install, or activate an environment with translora_ray."
  [ ! -e "$STATE" ] || fail "$STATE exists: cluster/local.sh stop first, or set TRANSLORA_LOCAL to another folder."
  mkdir -p "$STATE"
  od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$STATE/token"
  # shellcheck disable=SC2016
  read -ra ports < <(python -c 'import socket; s = [socket.create_server(("", 0)) for _ in range(4)]; print(*(x.getsockname()[1] for x in s))')
  ip=$(python -c 'import ray._private.services as s; print(s.get_node_ip_address())')
  echo "${ports[1]}" >"$STATE/dashboard"
  node head --head --num-cpus=0 --num-gpus=0 --port="${ports[0]}" --dashboard-host=127.0.0.1 --dashboard-port="${ports[1]}" \
    --ray-client-server-port="${ports[2]}" --dashboard-agent-listen-port="${ports[3]}" --temp-dir="$STATE/ray"
  if ! wait_for 1; then stop; fail "the head did not start; its log is above."; fi
  for ((i = 1; i <= nodes; i++)); do # one after another: two that start at once may take each other's ports
    node "node$i" --address="$ip:${ports[0]}" --num-cpus="$cpus" --num-gpus=0
    if ! wait_for $((i + 1)); then stop; fail "a node did not start; the logs are above."; fi
  done
  echo "Ray runs: $nodes nodes with $cpus CPUs each, dashboard http://127.0.0.1:${ports[1]} (the token is in $STATE/token)"
  echo "submit:   cluster/local.sh submit python jobs/fleet.py jobs/fleet.example.yaml"
  echo "stop:     cluster/local.sh stop"
}

# Until the dashboard answers and tells of so many nodes, at most 4 minutes and while the last process lives; else shows the logs.
wait_for() {
  python - "$1" "$(cat "$STATE/dashboard")" "$STATE/token" "$last" <<'PYTHON' || { tail -n 20 "$STATE"/*.log >&2; return 1; }
import json, os, sys, time, urllib.request

wanted, port, token = int(sys.argv[1]), sys.argv[2], open(sys.argv[3]).read()
request = urllib.request.Request(f"http://127.0.0.1:{port}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
deadline = time.monotonic() + 240
while time.monotonic() < deadline and os.path.exists(f"/proc/{sys.argv[4]}"):
    time.sleep(0.5)
    try:
        nodes = json.load(urllib.request.urlopen(request, timeout=10))["data"]["result"]["result"]
    except OSError:
        continue
    if sum(node["state"] == "ALIVE" for node in nodes) >= wanted:
        sys.exit(0)
sys.exit(1)
PYTHON
}

submit() {
  [ -e "$STATE/dashboard" ] || fail "no cluster runs: cluster/local.sh start first."
  [ $# -gt 0 ] || fail "say what to submit: cluster/local.sh submit python jobs/fleet.py FLEET.yaml"
  exec ray job submit --address "http://127.0.0.1:$(cat "$STATE/dashboard")" --working-dir . -- "$@"
}

# Workers first, the head last; whoever does not go is killed.
stop() {
  [ -e "$STATE/token" ] || fail "no cluster runs here ($STATE)."
  touch "$STATE/pids"
  while read -r pid began; do
    [ "$(began "$pid")" = "$began" ] || continue
    kill "$pid"
    for _ in {1..120}; do [ "$(began "$pid")" = "$began" ] && sleep 0.25; done
    [ "$(began "$pid")" != "$began" ] || kill -9 "$pid"
  done < <(tac "$STATE/pids")
  rm -r "$STATE"
}

case ${1:-} in
  start | submit | stop) "$@" ;;
  *) fail "use start, submit or stop." ;;
esac
