#!/usr/bin/env bash
# From a fresh clone to a story: builds, serves the demo model, generates; see --help.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: deploy/quickstart.sh [options]

Installs what is missing (deploy/install.sh), builds the server and the client, starts the server on
the demo model, streams a story to the terminal, and keeps serving until Ctrl-C.

  --prompt=TEXT      how the story begins
  --max_tokens=N     how long it gets (default: 200)
  --seed=N           another story; the same seed always tells the same one (default: 7)
  --model=DIR        another model directory (default: deploy/models/tales)
  --port=N           of gRPC, 0 picks a free one (default: 50051)
  --metrics_port=N   of the metrics page, 0 picks a free one (default: 9090)
  --once             exit after the story
  --no-install       install nothing
  --bin=DIR          run the programs in DIR instead of building them
  --help             this text
TEXT
}

prompt='Once upon a time, in the middle of a dark forest, there lived'
max_tokens=200
seed=7
model=deploy/models/tales
port=50051
metrics_port=9090
once=0
install=1
bin=
for argument in "$@"; do
  case $argument in
    --prompt=*) prompt=${argument#*=} ;;
    --max_tokens=*) max_tokens=${argument#*=} ;;
    --seed=*) seed=${argument#*=} ;;
    --model=*) model=${argument#*=} ;;
    --port=*) port=${argument#*=} ;;
    --metrics_port=*) metrics_port=${argument#*=} ;;
    --once) once=1 ;;
    --no-install) install=0 ;;
    --bin=*) bin=${argument#*=} ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      echo "quickstart.sh: unknown option \"$argument\"" >&2
      usage >&2
      exit 2
      ;;
  esac
done

build() {
  if [ "$install" -eq 1 ]; then ./deploy/install.sh build; fi
  # A build folder that deploy/test.sh has configured keeps its tests; a new one goes without.
  local tests=(-DMMFREE_TESTS=OFF)
  if [ -f build/release/CMakeCache.txt ]; then tests=(); fi
  # One compiler cache for all checkouts of the project, wherever they are.
  export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$PWD} CCACHE_NOHASHDIR=1
  cmake --preset release "${tests[@]}"
  cmake --build --preset release --parallel "$(nproc)" --target mmfree-server mmfree
  bin=build/release/bin
}

scratch=$(mktemp -d)
log=$scratch/server.log
server=

# SIGTERM lets the server finish what it is doing; it answers nothing new meanwhile.
# shellcheck disable=SC2317  # the traps call it
stop() {
  trap - INT TERM EXIT
  if [ -n "$server" ]; then
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    echo "The server has stopped."
  fi
  rm -rf "$scratch"
}
trap stop EXIT
trap 'echo; exit 130' INT
trap 'exit 143' TERM

fail() {
  echo "quickstart.sh: $1; the server said:" >&2
  tail -n 20 "$log" >&2
  exit 1
}

if [ -z "$bin" ]; then build; fi

# In a session of its own, so that Ctrl-C reaches this script alone and the server is stopped once.
setsid "$bin/mmfree-server" --model="$model" --listen="127.0.0.1:$port" \
  --metrics_listen="127.0.0.1:$metrics_port" --port_file="$scratch/ports" >"$log" 2>&1 &
server=$!
for _ in $(seq 600); do
  if [ -s "$scratch/ports" ]; then break; fi
  kill -0 "$server" 2>/dev/null || fail "the server did not start (--port=0 and --metrics_port=0 pick free ports)"
  sleep 0.1
done
[ -s "$scratch/ports" ] || fail "the server is not ready after a minute"
port=$(sed -n 's/^grpc=//p' "$scratch/ports")
metrics_port=$(sed -n 's/^metrics=//p' "$scratch/ports")

printf '\n%s' "$prompt"
"$bin/mmfree" --server="127.0.0.1:$port" generate --prompt="$prompt" --max_tokens="$max_tokens" \
  --temperature=0.8 --seed="$seed" || fail "generate failed"
printf '\n'

if [ "$once" -eq 1 ]; then exit 0; fi

name=$(basename "$model")
cat <<TEXT

The server goes on serving "$name" at 127.0.0.1:$port. In another terminal, in this folder:

  mmfree="$bin/mmfree --server=127.0.0.1:$port"
  \$mmfree generate --prompt="The king said to his" --max_tokens=80 --temperature=0.7
  \$mmfree generate --prompt="The old man" --json          every event as a line of JSON
  \$mmfree score --text="It was a dark night." --json      how likely each token is
  \$mmfree tokenize --text="naïve 🐺" --json
  \$mmfree models list

Metrics, as Prometheus reads them:  http://127.0.0.1:$metrics_port/metrics
Ctrl-C stops the server.
TEXT
trap 'echo; exit 0' INT TERM
wait "$server" || true
server=
fail "the server ended"
