#!/usr/bin/env bash
# deploy/quickstart.sh with the programs of this build. Usage: quickstart_test.sh BIN_DIR CASE
set -euo pipefail
cd "$(dirname "$0")/../.."

bin=$1
scratch=$(mktemp -d)
out=$scratch/out
pid=
cleanup() {
  if [ -n "$pid" ]; then kill "$pid" 2>/dev/null || true; fi
  rm -rf "$scratch"
}
trap cleanup EXIT

die() {
  echo "$1; the output:" >&2
  cat "$out" >&2
  exit 1
}

quickstart() {
  exec ./deploy/quickstart.sh --no-install --bin="$bin" --port=0 --metrics_port=0 "$@"
}

case $2 in
  tells_a_story_and_exits)
    prompt='The old man opened the door and'
    (quickstart --once --max_tokens=40 --seed=3 --prompt="$prompt") >"$out" 2>&1 || die "it failed"
    story=$(cat "$out")
    [ "${story#*"$prompt"}" != "$story" ] || die "the prompt is not in the story"
    story=${story#*"$prompt"}
    [ ${#story} -gt 60 ] || die "40 tokens gave ${#story} characters"
    ;;

  the_same_seed_tells_the_same_story)
    (quickstart --once --max_tokens=40 --seed=3) >"$out" 2>&1 || die "it failed"
    (quickstart --once --max_tokens=40 --seed=3) >"$out.again" 2>&1 || die "it failed"
    cmp "$out" "$out.again" || die "the stories differ"
    ;;

  serves_until_it_is_stopped)
    # In a session of its own: the signal below goes to the script alone.
    mkfifo "$scratch/pipe"
    (exec setsid ./deploy/quickstart.sh --no-install --bin="$bin" --port=0 --metrics_port=0 \
      --max_tokens=10) >"$scratch/pipe" 2>&1 &
    pid=$!
    address=
    stopped=0
    while IFS= read -r line; do
      echo "$line" >>"$out"
      case $line in
        *"goes on serving"*)
          address=${line##* at }
          address=${address%%. *}
          ;;
        "Ctrl-C stops the server.")
          "$bin/mmfree" --server="$address" models list >>"$out" || die "no answer at $address"
          kill -TERM "$pid"
          ;;
        "The server has stopped.") stopped=1 ;;
      esac
    done <"$scratch/pipe"
    status=0
    wait "$pid" || status=$?
    pid=
    [ "$status" -eq 0 ] || die "it ended with $status"
    [ "$stopped" -eq 1 ] || die "it did not stop the server"
    if "$bin/mmfree" --server="$address" models list >>"$out" 2>&1; then die "still serving"; fi
    ;;

  says_why_the_server_did_not_start)
    if (quickstart --once --model=no/such/model) >"$out" 2>&1; then die "it did not fail"; fi
    grep -q 'the server did not start' "$out" || die "no word of the server"
    grep -q 'no/such/model' "$out" || die "the model is not named"
    ;;

  *)
    echo "no case $2" >&2
    exit 2
    ;;
esac
